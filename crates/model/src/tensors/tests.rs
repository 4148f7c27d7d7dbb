//! The scales of an FP8 KV cache, in all the dialects there are.

use serde_json::json;

use super::{KEY_SCALES, VALUE_SCALES, verify};
use crate::backend::{KvCacheDtype, KvScales};
use crate::problem::Problems;
use crate::testing::{TinyModel, TinyTensor, TinyWeights};
use crate::warning::Warning;

const NUM_LAYERS: usize = 3;

/// A model, and what to put into its first layers.
fn with_scales(scales: &[(usize, &str, f32)]) -> TinyModel {
    let mut model = TinyModel::new(TinyWeights::AutoFp8Static);
    for (layer, name, scale) in scales {
        put(&mut model, *layer, name, TinyTensor::new("F32", &[], &[*scale]));
    }
    model
}

fn put(model: &mut TinyModel, layer: usize, name: &str, tensor: TinyTensor) {
    let name = format!("model.layers.{layer}.self_attn.{name}");
    model.tensors.insert(name, tensor);
}

fn read(model: &TinyModel, kv_cache_dtype: KvCacheDtype) -> Result<(Vec<KvScales>, Vec<Warning>), Problems> {
    let checkpoint = model.checkpoint().expect("only tensors are broken");
    let (tensors, warnings) = verify(&checkpoint, kv_cache_dtype)?;
    Ok((tensors.layers.iter().map(|layer| layer.kv_scales).collect(), warnings))
}

fn read_fp8(model: &TinyModel) -> (Vec<KvScales>, Vec<Warning>) {
    read(model, KvCacheDtype::Fp8E4m3).expect("the scales are whole")
}

fn refusal(model: &TinyModel) -> String {
    read(model, KvCacheDtype::Fp8E4m3)
        .expect_err("a scale is broken")
        .to_string()
}

fn scales(key: f32, value: f32) -> KvScales {
    KvScales { key, value }
}

#[test]
fn scales_are_read_by_every_name_in_every_form_a_scalar_has() {
    for (key, value) in KEY_SCALES.into_iter().zip(VALUE_SCALES) {
        let mut model = TinyModel::new(TinyWeights::Dense("BF16"));
        put(&mut model, 0, key, TinyTensor::new("F32", &[], &[0.3]));
        put(&mut model, 0, value, TinyTensor::new("F32", &[1], &[0.7]));
        for layer in 1..NUM_LAYERS {
            put(
                &mut model,
                layer,
                key,
                TinyTensor::new("BF16", &[1], &[0.5 * layer as f32]),
            );
            put(
                &mut model,
                layer,
                value,
                TinyTensor::new("F16", &[1, 1], &[0.25 * layer as f32]),
            );
        }
        let expected = vec![scales(0.3, 0.7), scales(0.5, 0.25), scales(1.0, 0.5)];
        assert_eq!(read_fp8(&model), (expected, vec![]), "{key}, {value}");
    }
}

#[test]
fn one_scale_serves_both_unless_there_is_a_nearer_one() {
    let model = with_scales(&[
        (0, "kv_scale", 0.5),
        (1, "kv_scale", 0.5),
        (1, "v_proj.output_scale", 0.25),
        (2, "kv_scale", 0.5),
        (2, "k_scale", 0.125),
        (2, "v_scale", 0.0625),
    ]);
    let expected = vec![scales(0.5, 0.5), scales(0.5, 0.25), scales(0.125, 0.0625)];
    assert_eq!(read_fp8(&model), (expected, vec![]));
}

#[test]
fn missing_scales_are_one_with_a_warning_that_counts_the_layers() {
    let warning = |layers| Warning::KvScalesMissing {
        layers,
        num_layers: NUM_LAYERS,
    };
    let bare = with_scales(&[]);
    assert_eq!(
        read_fp8(&bare),
        (vec![KvScales::default(); NUM_LAYERS], vec![warning(3)])
    );
    let some = with_scales(&[(0, "k_scale", 0.5), (0, "v_scale", 0.5), (2, "v_scale", 0.25)]);
    let expected = vec![scales(0.5, 0.5), scales(1.0, 1.0), scales(1.0, 0.25)];
    assert_eq!(read_fp8(&some), (expected, vec![warning(2)]));
    assert!(warning(2).to_string().starts_with("2 of 3 layers"), "{}", warning(2));
}

#[test]
fn a_scale_that_is_no_positive_finite_scalar_is_refused_by_name() {
    let whole = |name| {
        let mut model = TinyModel::new(TinyWeights::AutoFp8Static);
        model.add_kv_scales(KvScales::default());
        put(&mut model, 1, name, TinyTensor::new("F32", &[], &[1.0]));
        model
    };
    // A broken one is a fault even where others would do.
    for name in ["k_scale", "kv_scale", "v_proj.output_scale", "qkv_proj.k_scale"] {
        let full_name = format!("model.layers.1.self_attn.{name}");
        let broken = [
            (TinyTensor::new("F32", &[], &[0.0]), "scale 0 at 0"),
            (TinyTensor::new("F32", &[], &[-0.5]), "scale -0.5 at 0"),
            (TinyTensor::new("BF16", &[1], &[f32::INFINITY]), "scale inf at 0"),
            (TinyTensor::new("F32", &[], &[f32::NAN]), "scale NaN at 0"),
            (
                TinyTensor::new("F32", &[2], &[1.0, 1.0]),
                "has shape [2], expected [] or [1]",
            ),
            (
                TinyTensor {
                    dtype: "I32".into(),
                    shape: vec![],
                    data: vec![1, 0, 0, 0],
                },
                "is I32, expected F32, BF16 or F16",
            ),
        ];
        for (tensor, fault) in broken {
            let mut model = whole(name);
            put(&mut model, 1, name, tensor);
            let message = refusal(&model);
            assert!(
                message.contains(&full_name) && message.contains(fault) && message.lines().count() == 1,
                "{name}, {fault}: {message}"
            );
        }
    }
}

#[test]
fn names_for_the_same_scale_must_agree() {
    let agreeing = with_scales(&[
        (0, "k_scale", 0.5),
        (0, "k_proj.output_scale", 0.5),
        (0, "v_scale", 0.5),
    ]);
    assert_eq!(read_fp8(&agreeing).0[0], scales(0.5, 0.5));
    let differing = with_scales(&[
        (0, "k_scale", 0.5),
        (0, "v_scale", 0.5),
        (0, "v_proj.v_scale", 0.25),
        (0, "qkv_proj.v_scale", 0.5),
    ]);
    let expected = "model.layers.0.self_attn.v_scale, model.layers.0.self_attn.v_proj.v_scale, \
                    model.layers.0.self_attn.qkv_proj.v_scale must be equal: they scale the same, and are \
                    [0.5, 0.25, 0.5]";
    assert_eq!(refusal(&differing), expected);
}

#[test]
fn a_native_cache_ignores_even_broken_scales_and_says_what_would_use_them() {
    let model = with_scales(&[
        (0, "k_scale", f32::NAN),
        (1, "kv_scale", 1.0),
        (1, "q_scale", 1.0),
        (2, "v_proj.output_scale", -1.0),
    ]);
    let (scales, warnings) = read(&model, KvCacheDtype::Native).expect("nobody reads them");
    assert_eq!(scales, vec![KvScales::default(); NUM_LAYERS]);
    let expected = [
        Warning::KvScalesIgnored {
            count: 3,
            first: "model.layers.0.self_attn.k_scale".to_owned(),
        },
        Warning::TensorsIgnored {
            count: 1,
            first: "model.layers.1.self_attn.q_scale".to_owned(),
        },
    ];
    assert_eq!(warnings, expected);
    assert!(
        warnings[0].to_string().contains("--kv-cache-dtype fp8 uses them"),
        "{}",
        warnings[0]
    );
}

#[test]
fn scales_of_a_layer_that_does_not_exist_are_not_of_this_model() {
    let model = with_scales(&[
        (0, "kv_scale", 1.0),
        (1, "kv_scale", 1.0),
        (2, "kv_scale", 1.0),
        (7, "kv_scale", 1.0),
    ]);
    let expected = "model.layers.7.self_attn.kv_scale is not a tensor of this model";
    assert_eq!(refusal(&model), expected);
}

#[test]
fn scales_of_another_format_do_not_fit() {
    let with_scheme = |scheme| {
        let mut model = with_scales(&[]);
        model.add_kv_scales(KvScales::default());
        model.config["quantization_config"]["kv_cache_scheme"] = scheme;
        model
    };
    let float = json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor", "dynamic": false});
    for scheme in [json!("static"), float, json!(null)] {
        assert_eq!(read_fp8(&with_scheme(scheme)).1, []);
    }
    for (scheme, named) in [
        (json!({"num_bits": 8, "type": "int"}), "\"type\":\"int\""),
        (json!({"num_bits": 4, "type": "float"}), "\"num_bits\":4"),
    ] {
        let model = with_scheme(scheme);
        let message = refusal(&model);
        assert!(
            message.contains("kv_cache_scheme") && message.contains(named),
            "{message}"
        );
        assert!(read(&model, KvCacheDtype::Native).is_ok(), "{named}");
    }
}

#[test]
fn a_report_tells_an_fp8_cache_its_scales_and_nothing_of_schemes_that_are_used() {
    let mut model = with_scales(&[]);
    model.add_kv_scales(scales(0.5, 0.25));
    model.config["quantization_config"]["kv_cache_scheme"] = json!("static");
    let report = |kv_cache_dtype| {
        let checkpoint = model.checkpoint().expect("the model is whole");
        checkpoint
            .verify(kv_cache_dtype, &mut |_| ())
            .expect("the model is whole")
    };
    let fp8 = report(KvCacheDtype::Fp8E4m3);
    assert_eq!(
        (fp8.kv_scales, fp8.warnings),
        (vec![scales(0.5, 0.25); NUM_LAYERS], vec![])
    );
    let native = report(KvCacheDtype::Native);
    assert_eq!((native.kv_scales.len(), native.warnings.len()), (0, 2));
    assert_eq!(native.warnings[0], Warning::KvCacheSchemeIgnored);
}
