//! A KV cache of e4m3: what it keeps, what attention makes of it, and how much more of it there is.

use super::Bounds;
use super::attention::{Case, HEADS, attention_config, check};
use super::invariance::{BLOCKS_EACH, KV_SCALES, MAX_SEQS, prompt, tiny_config};
use super::rig::{
    BLOCK_SIZE, Numbers, Rig, SCHEMES, SequenceStep, assert_close, batch_of, decode_e4m3, round_bf16, round_e4m3,
};
use crate::backend::{ActivationScheme, AttentionConfig, Backend, KvCacheDtype, KvScales};
use crate::runner::{KvCacheSize, ModelRunner, RunnerConfig};
use crate::testing::{TinyModel, TinyShape, TinyTensor, TinyWeights};

/// No powers of two. Elements reach 1, and rotated ones 1.4: the first pair clips a twentieth of the keys and a seventh of
/// the values, so that neither passes for the other or for 1; the second clips nothing and has subnormal values.
const SCALES: [KvScales; 2] = [
    KvScales {
        key: 0.0024,
        value: 0.0019,
    },
    KvScales { key: 0.007, value: 0.3 },
];

/// Code of 448; the next is NaN.
const LARGEST_CODE: u8 = 0x7e;

fn fp8_config(heads: (usize, usize), head_dim: usize, softcap: Option<f32>) -> AttentionConfig {
    AttentionConfig {
        kv_cache_dtype: KvCacheDtype::Fp8E4m3,
        ..attention_config(heads, head_dim, softcap)
    }
}

/// Attention over keys (rounded after rotation) and values as an e4m3 cache keeps them: prefill, decode, chunks, windows,
/// grouped heads, soft-cap or none. The cache is shuffled, and NaN wherever nobody wrote.
pub fn attention_over_fp8_cache_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(9);
    let mut run = |attention, scales, window, scheme, sequences: &[(usize, usize)]| {
        let case = Case {
            attention,
            scales,
            window,
            scheme,
            sequences,
        };
        check(make, &mut numbers, &case, bounds);
    };
    let none = ActivationScheme::None;
    for head_dim in bounds.head_dims {
        for (heads, scales) in HEADS.into_iter().zip(SCALES.into_iter().cycle()) {
            let sequences = [(0, 17), (40, 1), (13, 5)];
            run(
                fp8_config(heads, *head_dim, Some(50.0)),
                scales,
                Some(20),
                none,
                &sequences,
            );
        }
    }
    let head_dim = bounds.head_dims[0];
    let grouped = |softcap| fp8_config((4, 2), head_dim, softcap);
    for context in [1, 2, 15, 16, 17, 63, 64, 65, 129, 512, 513] {
        for scales in SCALES {
            let sequences = [(context - 1, 1), (0, 1), (context / 2, 3)];
            run(grouped(None), scales, None, none, &[(context - 1, 1)]);
            run(grouped(Some(5.0)), scales, Some(64), none, &sequences);
        }
    }
    for softcap in [None, Some(1.0), Some(50.0)] {
        for window in [None, Some(1), Some(16), Some(129)] {
            run(grouped(softcap), SCALES[0], window, none, &[(0, 129), (64, 63)]);
        }
    }
    run(
        grouped(Some(50.0)),
        SCALES[0],
        Some(4096),
        none,
        &[(4096, 1), (4094, 3)],
    );
    for scheme in SCHEMES {
        let sequences = [(0, 33), (100, 1), (7, 1)];
        run(grouped(Some(50.0)), SCALES[0], Some(32), scheme, &sequences);
    }
}

/// The middle of every two neighbours goes to the even one, and what is too large becomes the largest. A sequence of one
/// position attends to its value alone, so what is stored can be read; a scale that is a power of two makes quotients
/// exact.
pub fn fp8_cache_rounds_half_to_even_and_saturates<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(10);
    let scales = KvScales { key: 0.7, value: 0.25 };
    let head_dim = bounds.head_dims[0];
    let number = |code| f64::from(decode_e4m3(code));
    let middles = (0..LARGEST_CODE).map(|code| f64::midpoint(number(code), number(code + 1)));
    let mut quotients: Vec<f64> = middles.flat_map(|middle| [middle, -middle]).collect();
    quotients.extend([450.0, 464.0, -466.0, 480.0, -1e4, 1e30].map(|large: f64| f64::from(round_bf16(large as f32))));
    quotients.resize(quotients.len().next_multiple_of(head_dim), 0.0);

    let rows = quotients.len() / head_dim;
    let mut rig = Rig::with_attention(make, rows, BLOCK_SIZE, fp8_config((1, 1), head_dim, Some(50.0)));
    let mut kv = rig
        .backend
        .alloc_kv_layer(rows, BLOCK_SIZE, scales)
        .expect("the cache is small");
    let sequences: Vec<_> = (0..rows)
        .map(|row| SequenceStep::new(vec![row as u32], 0, row))
        .collect();
    let plan = rig
        .backend
        .begin(&batch_of(&sequences))
        .expect("the batch keeps the limits");
    let mut qkv = Vec::new();
    for quotients in quotients.chunks(head_dim) {
        qkv.extend(numbers.values(2 * head_dim, 1.0));
        qkv.extend(
            quotients
                .iter()
                .map(|quotient| (quotient * f64::from(scales.value)) as f32),
        );
    }
    let mut qkv = rig.tensor(&plan, &qkv, rows);
    rig.backend.rope_append(&plan, &mut qkv, &mut kv).expect("rope runs");
    let mut out = rig.activation(rows, head_dim);
    let scheme = ActivationScheme::None;
    rig.backend
        .attention(&plan, &qkv, &kv, None, scheme, &mut out)
        .expect("attention runs");
    let got = rig.read_activation(&plan, &out, [rows, head_dim], scheme);
    let want: Vec<f64> = quotients
        .iter()
        .map(|quotient| round_e4m3(*quotient) * f64::from(scales.value))
        .collect();
    let magnitude: Vec<f64> = want.iter().map(|value| value.abs()).collect();
    assert_close("middles of e4m3 numbers", &got, &want, &magnitude, bounds.element);
}

/// One byte an element, so a budget holds as many times more tokens as a native element has bytes.
pub fn fp8_cache_holds_more_tokens<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let shape = TinyShape::ALIGNED;
    let model = TinyModel::with_shape(TinyWeights::AutoFp8Static, shape);
    let plan = |kv_cache, kv_cache_dtype| *load(make, &model, kv_cache, kv_cache_dtype).memory_plan();
    let some = KvCacheSize::Blocks(BLOCKS_EACH as u32);
    let native = plan(some, KvCacheDtype::Native);
    let fp8 = plan(some, KvCacheDtype::Fp8E4m3);
    assert_eq!(
        fp8.kv_bytes_per_token,
        (2 * shape.layers * shape.kv_heads * shape.head_dim) as u64
    );
    let element_bytes = native.kv_bytes_per_token / fp8.kv_bytes_per_token;
    assert!(
        matches!(element_bytes, 2 | 4),
        "a native element has {element_bytes} bytes"
    );
    assert_eq!(native.kv_bytes_per_token % fp8.kv_bytes_per_token, 0);

    let budget = KvCacheSize::Bytes(native.kv_cache_bytes);
    let larger = plan(budget, KvCacheDtype::Fp8E4m3);
    assert_eq!(
        plan(budget, KvCacheDtype::Native).capacity_tokens(),
        native.capacity_tokens()
    );
    assert_eq!(larger.capacity_tokens(), element_bytes * native.capacity_tokens());
    assert_eq!(larger.kv_cache_bytes, native.kv_cache_bytes);
}

/// A layer's keys and values have scales of their own, from the checkpoint; without any they are 1, and a native cache
/// has none.
pub fn fp8_cache_uses_the_scales_of_each_layer<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let tokens = prompt(0, 40);
    let logits = |model: &TinyModel, kv_cache_dtype| {
        let blocks = KvCacheSize::Blocks(BLOCKS_EACH as u32);
        let logits = load(make, model, blocks, kv_cache_dtype).forward_logits(&tokens);
        logits
            .expect("the prompt fits")
            .into_iter()
            .map(f32::to_bits)
            .collect::<Vec<_>>()
    };
    let bare = TinyModel::with_shape(TinyWeights::Dense("BF16"), TinyShape::ALIGNED);
    let mut scaled = bare.clone();
    scaled.add_kv_scales(KvScales::default());
    let ones = logits(&scaled, KvCacheDtype::Fp8E4m3);
    assert_eq!(
        logits(&bare, KvCacheDtype::Fp8E4m3),
        ones,
        "scales that are missing are 1"
    );

    let native = logits(&bare, KvCacheDtype::Native);
    let mut seen = vec![
        ("a native cache".to_owned(), native.clone()),
        ("scales of 1".to_owned(), ones),
    ];
    for layer in 0..TinyShape::ALIGNED.layers {
        for (name, scale) in [("k_scale", KV_SCALES.key), ("v_scale", KV_SCALES.value)] {
            let name = format!("model.layers.{layer}.self_attn.{name}");
            let mut model = scaled.clone();
            model
                .tensors
                .insert(name.clone(), TinyTensor::new("F32", &[], &[scale]));
            assert_eq!(
                logits(&model, KvCacheDtype::Native),
                native,
                "{name} and a native cache"
            );
            let logits = logits(&model, KvCacheDtype::Fp8E4m3);
            let same = seen.iter().find(|(_, other)| *other == logits);
            assert!(
                same.is_none(),
                "{name} gives the logits of {:?}",
                same.map(|(name, _)| name)
            );
            seen.push((name, logits));
        }
    }
}

fn load<B: Backend>(
    make: &dyn Fn() -> B,
    model: &TinyModel,
    kv_cache: KvCacheSize,
    kv_cache_dtype: KvCacheDtype,
) -> ModelRunner<B> {
    let checkpoint = model.checkpoint().expect("the tiny model is whole");
    let config = RunnerConfig {
        kv_cache,
        kv_cache_dtype,
        ..tiny_config(64, MAX_SEQS)
    };
    ModelRunner::load(make(), &checkpoint, config, &mut |_| ()).expect("the tiny model loads")
}
