//! What the runner promises on top of a backend: everything reserved at start, nothing outside it touched.

use lapidary_engine::{Batch, Executor, ExecutorError};

use super::Bounds;
use super::invariance::{BLOCKS_EACH, MAX_SEQS, greedy, prompt, runner, tiny_config};
use super::rig::{BLOCK_SIZE, SequenceStep, batch_of};
use crate::backend::Backend;
use crate::loader::{LoadError, LoadPhase, LoadProgress};
use crate::runner::{KvCacheSize, ModelRunner, RunnerConfig, RunnerError};
use crate::testing::{TinyModel, TinyShape, TinyWeights};

type BatchFault = Box<dyn Fn(&mut Batch)>;
type ConfigFault = fn(&mut RunnerConfig);

/// A budget in bytes becomes the blocks that fit; one that does not hold a single sequence is refused with the numbers.
pub fn runner_sizes_its_cache<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let load = |kv_cache| {
        try_load(
            make,
            &TinyModel::with_shape(TinyWeights::AutoFp8Static, TinyShape::ALIGNED),
            RunnerConfig {
                kv_cache,
                ..tiny_config(32, MAX_SEQS)
            },
        )
    };
    let exact = load(KvCacheSize::Blocks(3)).expect("the tiny model fits");
    let plan = *exact.memory_plan();
    assert_eq!((plan.num_blocks, plan.block_size), (3, BLOCK_SIZE as u32));
    assert_eq!(exact.kv_cache_config().num_blocks, 3);
    let block_bytes = plan.kv_cache_bytes / 3;
    assert_eq!(plan.kv_bytes_per_token, block_bytes / BLOCK_SIZE as u64);
    assert!(plan.weight_bytes > 0 && plan.scratch_bytes > 0, "{plan}");

    let enough = BLOCKS_EACH as u64 * block_bytes;
    let budget = load(KvCacheSize::Bytes(enough + block_bytes - 1)).expect("one sequence fits");
    assert_eq!(budget.memory_plan().num_blocks, BLOCKS_EACH as u32);
    let Err(RunnerError::KvCacheTooSmall {
        capacity_tokens,
        max_model_len,
        ..
    }) = load(KvCacheSize::Bytes(enough - 1))
    else {
        panic!("one block is missing");
    };
    assert_eq!(
        (capacity_tokens as usize, max_model_len),
        ((BLOCKS_EACH - 1) * BLOCK_SIZE, BLOCKS_EACH * BLOCK_SIZE)
    );
    assert!(matches!(
        load(KvCacheSize::DeviceShare(0.0)),
        Err(RunnerError::KvCacheTooSmall { .. })
    ));
    assert!(matches!(
        load(KvCacheSize::Blocks(0)),
        Err(RunnerError::KvCacheTooSmall { .. })
    ));
}

/// A batch beyond the limits fails by itself; the next one runs as if it had never been.
pub fn runner_refuses_what_was_not_reserved<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let mut runner = runner(make, TinyWeights::Dense("BF16"), 32, MAX_SEQS);
    let good = || {
        let mut batch = batch_of(&[SequenceStep::new(prompt(0, 20), 0, 0)]);
        batch.samples = vec![greedy(19)];
        batch
    };
    let expected = step(&mut runner, &good());
    let last_block = (BLOCKS_EACH * MAX_SEQS) as u32;
    let faults: [(&str, BatchFault); 7] = [
        (
            "tokens",
            Box::new(|batch| *batch = batch_of(&[SequenceStep::new(prompt(0, 33), 0, 0)])),
        ),
        (
            "samples",
            Box::new(|batch| batch.samples = vec![greedy(19); MAX_SEQS + 1]),
        ),
        (
            "token",
            Box::new(|batch| batch.token_ids[3] = TinyShape::ALIGNED.vocab as u32),
        ),
        (
            "position",
            Box::new(|batch| batch.positions[19] = (BLOCKS_EACH * BLOCK_SIZE) as u32),
        ),
        (
            "slot",
            Box::new(move |batch| batch.slot_mapping[19] = last_block * BLOCK_SIZE as u32),
        ),
        ("sampled row", Box::new(|batch| batch.samples[0].row = 20)),
        (
            "mask",
            Box::new(|batch| batch.samples[0].mask = Some([u32::MAX; 1].into())),
        ),
    ];
    for (named, fault) in faults {
        let mut batch = good();
        fault(&mut batch);
        let Err(ExecutorError::Step(error)) = runner.launch(&batch) else {
            panic!("{named}: the step must fail")
        };
        assert!(error.to_string().contains(named), "{named}: {error}");
        assert_eq!(step(&mut runner, &good()), expected, "after a refused step");
    }
    let limits: [(&str, ConfigFault); 4] = [
        ("max_num_seqs", |config| config.max_num_seqs = 0),
        ("max_num_batched_tokens", |config| config.max_num_batched_tokens = 0),
        ("max_model_len", |config| config.max_model_len = Some(513)),
        ("block_size", |config| config.block_size = 0),
    ];
    for (named, change) in limits {
        let mut config = tiny_config(32, MAX_SEQS);
        change(&mut config);
        let error = try_load(
            make,
            &TinyModel::with_shape(TinyWeights::Dense("BF16"), TinyShape::ALIGNED),
            config,
        )
        .expect_err(named);
        assert!(error.to_string().contains(named), "{error}");
    }
}

/// Faults that only a look at every value finds end the load, all of them named; progress is told to the last byte.
pub fn runner_loads_only_whole_checkpoints<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let mut model = TinyModel::with_shape(TinyWeights::CompressedChannel, TinyShape::ALIGNED);
    let mut seen: Vec<LoadProgress> = Vec::new();
    let checkpoint = model.checkpoint().expect("the tiny model is whole");
    let config = tiny_config(32, MAX_SEQS);
    ModelRunner::load(make(), &checkpoint, config, &mut |progress| seen.push(progress)).expect("the tiny model loads");
    for phase in [LoadPhase::Weights, LoadPhase::KvCache] {
        let done: Vec<_> = seen.iter().filter(|progress| progress.phase == phase).collect();
        assert!(
            done.is_sorted_by_key(|progress| progress.done_bytes),
            "{phase:?} goes forward"
        );
        assert!(
            done.last().is_some_and(|last| last.done_bytes == last.total_bytes),
            "{phase:?} ends"
        );
    }

    let faulty = [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
    ];
    for name in faulty {
        model.tensors.get_mut(name).expect("the tiny model has it").data[7] = 0x7f;
    }
    let Err(RunnerError::Load(LoadError::Problems(problems))) = try_load(make, &model, config) else {
        panic!("NaN weights must not load");
    };
    let message = problems.to_string();
    assert!(
        problems.listed().len() == 2 && faulty.iter().all(|name| message.contains(name)),
        "{message}"
    );
}

/// Steps in the middle of a prompt sample nothing and answer with nothing, in their place among the others.
pub fn chunks_without_samples_give_no_tokens<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let tokens = prompt(3, 50);
    let mut whole = batch_of(&[SequenceStep::new(tokens.clone(), 0, 0)]);
    whole.samples = vec![greedy(49)];
    let expected = step(&mut runner(make, TinyWeights::AutoFp8Dynamic, 64, MAX_SEQS), &whole);

    let mut runner = runner(make, TinyWeights::AutoFp8Dynamic, 64, MAX_SEQS);
    for (start, end) in [(0, 17), (17, 40)] {
        let chunk = batch_of(&[SequenceStep::new(tokens[start..end].to_vec(), start, 0)]);
        assert!(step(&mut runner, &chunk).is_empty(), "positions {start}..{end}");
    }
    let mut last = batch_of(&[SequenceStep::new(tokens[40..].to_vec(), 40, 0)]);
    last.samples = vec![greedy(9)];
    assert_eq!(step(&mut runner, &last), expected);
}

fn try_load<B: Backend>(
    make: &dyn Fn() -> B,
    model: &TinyModel,
    config: RunnerConfig,
) -> Result<ModelRunner<B>, RunnerError> {
    let checkpoint = model.checkpoint().expect("the configuration and the file are whole");
    ModelRunner::load(make(), &checkpoint, config, &mut |_| ())
}

fn step<B: Backend>(runner: &mut ModelRunner<B>, batch: &Batch) -> Vec<u32> {
    runner.launch(batch).expect("the step runs");
    runner
        .collect()
        .expect("the step ran")
        .into_iter()
        .map(|sampled| sampled.token)
        .collect()
}
