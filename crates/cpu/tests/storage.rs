//! What rounding to bf16 between operations does to a whole model.
#![expect(clippy::unwrap_used, reason = "the whole file is tests")]

use lapidary_cpu::{Cpu, CpuConfig, Storage};
use lapidary_model::testing::{TinyModel, TinyShape, TinyWeights};
use lapidary_model::{KvCacheDtype, KvCacheSize, ModelRunner, RunnerConfig};

fn logits(weights: TinyWeights, storage: Storage) -> Vec<f32> {
    let config = CpuConfig {
        threads: 2,
        storage,
        ..CpuConfig::default()
    };
    let limits = RunnerConfig {
        max_num_batched_tokens: 16,
        max_num_seqs: 16,
        max_model_len: Some(64),
        block_size: 16,
        kv_cache: KvCacheSize::Blocks(4),
        kv_cache_dtype: KvCacheDtype::Native,
    };
    let checkpoint = TinyModel::with_shape(weights, TinyShape::ALIGNED).checkpoint().unwrap();
    let mut runner = ModelRunner::load(Cpu::new(config).unwrap(), &checkpoint, limits, &mut |_| ()).unwrap();
    let tokens: Vec<u32> = (0..40).map(|index| index * 37 % 250 + 1).collect();
    runner.forward_logits(&tokens).unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut a.iter().copied())
}

#[test]
fn bf16_storage_costs_what_bf16_roundings_cost() {
    for weights in [
        TinyWeights::Dense("F32"),
        TinyWeights::Dense("BF16"),
        TinyWeights::AutoFp8Dynamic,
    ] {
        let [exact, default, rounded] =
            [Storage::F32, Storage::default(), Storage::Bf16].map(|storage| logits(weights, storage));
        assert_eq!(exact, default);
        // A rounding costs up to 2^-9; a few of them follow each other, and each may turn one to e4m3, which costs 2^-4.
        let distance = distance(&exact, &rounded);
        println!("{weights:?}: {distance:.1e}");
        assert!((5e-4..1e-1).contains(&distance), "{weights:?}: {distance:e}");
    }
}
