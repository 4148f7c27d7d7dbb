//! What becomes of requests, the engine and a start when the device gets into trouble.

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use cudarc::driver::sys::CUresult as Code;
use lapidary_engine::{Engine, EngineConfig, EngineError, EngineHandle, Request, SpawnError, SubmitError, TokenId};
use lapidary_model::testing::{TinyModel, TinyShape, TinyWeights};
use lapidary_model::{KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig, RunnerError};

use crate::device::{Emulator, Faulty, Next, Trouble};
use crate::{Cuda, CudaConfig};

const NUM_TOKENS: usize = 4;

/// What the engine's thread is made of, and the way to its device.
fn load(
    graphs: bool,
    first: Option<Trouble>,
) -> (
    impl FnOnce() -> Result<ModelRunner<Cuda>, RunnerError> + Send + 'static,
    Next,
) {
    let next = Next::default();
    let of_device = Arc::clone(&next);
    let build = move || {
        let model = TinyModel::with_shape(TinyWeights::AutoFp8Dynamic, TinyShape::ALIGNED);
        let checkpoint = model.checkpoint().expect("the tiny model is whole");
        let device = Faulty::new(Emulator::new(90), Arc::clone(&of_device));
        let backend = Cuda::on(Box::new(device), CudaConfig { graphs })?;
        let config = RunnerConfig {
            max_num_batched_tokens: 16,
            max_num_seqs: 2,
            max_model_len: Some(64),
            block_size: 16,
            kv_cache: KvCacheSize::Blocks(8),
            kv_cache_dtype: KvCacheDtype::Native,
        };
        *of_device.lock().expect("nobody panics with it") = first;
        ModelRunner::load(backend, &checkpoint, config, &mut |_| ())
    };
    (build, next)
}

fn start(graphs: bool, step_timeout: Option<Duration>) -> (EngineHandle, Next) {
    let (build, next) = load(graphs, None);
    let config = EngineConfig {
        max_num_batched_tokens: 16,
        max_num_seqs: 2,
        max_model_len: 64,
        enable_prefix_caching: false,
        step_timeout,
        ..EngineConfig::default()
    };
    (Engine::spawn(config, build).expect("the model loads"), next)
}

fn arm(next: &Next, trouble: Trouble) {
    *next.lock().expect("nobody panics with it") = Some(trouble);
}

fn request() -> Request {
    Request::for_test([5, 17, 42], NUM_TOKENS as u32)
}

/// Tokens until the stream ended, and the error it ended with.
fn answer(engine: &EngineHandle) -> (Vec<TokenId>, Option<EngineError>) {
    let mut stream = engine.submit(request()).expect("there is room");
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_recv() {
        match event {
            Ok(event) => tokens.push(event.sampled.token),
            Err(error) => return (tokens, Some(error)),
        }
    }
    (tokens, None)
}

fn causes(error: &(dyn Error + 'static)) -> Vec<String> {
    let chain = std::iter::successors(Some(error), |error| (*error).source());
    chain.map(ToString::to_string).collect()
}

/// The engine is dead, says why, and takes nothing more.
fn assert_dead(engine: &EngineHandle, end: Option<EngineError>, named: &[&str]) {
    let Some(EngineError::EngineDead { reason }) = end else {
        panic!("the request ends with the engine: {end:?}");
    };
    assert!(named.iter().all(|name| reason.contains(name)), "{reason}");
    assert_eq!(engine.death(), Some(&*reason));
    assert_eq!(engine.submit(request()).expect_err("it is dead"), SubmitError::Dead);
    assert_eq!(engine.stats().steps_failed, u64::from(!named.contains(&"step timeout")));
}

#[test]
fn a_refused_launch_fails_its_requests_and_no_others() {
    for graphs in [false, true] {
        let (engine, next) = start(graphs, None);
        let (expected, end) = answer(&engine);
        assert!(expected.len() == NUM_TOKENS && end.is_none(), "{end:?}");
        arm(&next, Trouble::Launch(Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES));
        let (_, end) = answer(&engine);
        let Some(EngineError::StepFailed { source, .. }) = end else {
            panic!("its step failed: {end:?}");
        };
        let causes = causes(&*source);
        let launch = if graphs { "a recorded step" } else { "kernel" };
        let named = format!("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES while launching {launch}");
        assert!(causes.iter().any(|cause| cause.contains(&named)), "{causes:?}");
        let (tokens, end) = answer(&engine);
        assert!(tokens == expected && end.is_none() && engine.is_alive(), "{end:?}");
    }
}

#[test]
fn a_lost_device_ends_the_engine_at_once() {
    let (engine, next) = start(false, None);
    arm(&next, Trouble::Launch(Code::CUDA_ERROR_ILLEGAL_ADDRESS));
    let (_, end) = answer(&engine);
    let named = [
        "CUDA_ERROR_ILLEGAL_ADDRESS while launching kernel `",
        "CUDA_LAUNCH_BLOCKING=1",
    ];
    assert_dead(&engine, end, &named);

    let (engine, next) = start(true, None);
    arm(&next, Trouble::Wait(Code::CUDA_ERROR_ECC_UNCORRECTABLE));
    let (_, end) = answer(&engine);
    let named = [
        "CUDA_ERROR_ECC_UNCORRECTABLE while waiting for a step's tokens",
        "nvidia-smi",
    ];
    assert_dead(&engine, end, &named);
}

#[test]
fn a_kernel_that_hangs_ends_the_engine_in_time() {
    let (engine, next) = start(false, Some(Duration::from_secs(2)));
    let (sender, hangs): (Sender<()>, _) = channel();
    arm(&next, Trouble::Hang(hangs));
    let (_, end) = answer(&engine);
    assert_dead(&engine, end, &["waiting for a step", "step timeout"]);
    drop(sender);
}

#[test]
fn recorded_steps_without_room_fail_the_start_with_the_plan() {
    let (build, _next) = load(true, Some(Trouble::NoRoomToRecord));
    let error = Engine::spawn(EngineConfig::default(), build).expect_err("there is no room");
    let SpawnError::Build(RunnerError::OutOfMemory { plan, source }) = error else {
        panic!("the plan is named: {error:?}");
    };
    assert_eq!(plan.num_blocks, 8);
    assert!(plan.weight_bytes > 0 && plan.scratch_bytes > 0 && plan.kv_cache_bytes > 0);
    assert!(source.to_string().contains("recording a step"), "{source}");
}

#[test]
fn a_device_lost_in_the_warm_up_fails_the_start() {
    let (build, _next) = load(true, Some(Trouble::Wait(Code::CUDA_ERROR_LAUNCH_FAILED)));
    let error = Engine::spawn(EngineConfig::default(), build).expect_err("the device is lost");
    let causes = causes(&error);
    assert!(
        causes.iter().any(|cause| cause.contains("CUDA_ERROR_LAUNCH_FAILED")),
        "{causes:?}"
    );
}
