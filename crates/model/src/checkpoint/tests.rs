use std::path::Path;

use serde_json::json;

use super::Checkpoint;
use crate::backend::KvCacheDtype;
use crate::config::ConfigOverrides;
use crate::problem::Problems;
use crate::testing::{TinyModel, TinyTensor, TinyWeights};
use crate::warning::Warning;

const UP: &str = "model.layers.1.mlp.up_proj";

fn verify(model: &TinyModel) -> Result<Vec<Warning>, Problems> {
    let checkpoint = model.checkpoint().expect("only tensors are broken");
    checkpoint
        .verify(KvCacheDtype::Native, &mut |_| ())
        .map(|report| report.warnings)
}

/// The message of the faults of a model after one change.
fn refusal(weights: TinyWeights, change: impl FnOnce(&mut TinyModel)) -> String {
    let mut model = TinyModel::new(weights);
    change(&mut model);
    verify(&model).expect_err("the model is broken").to_string()
}

fn tensor<'a>(model: &'a mut TinyModel, name: &str) -> &'a mut TinyTensor {
    model
        .tensors
        .get_mut(name)
        .unwrap_or_else(|| panic!("{name} is in the tiny model"))
}

fn scale(value: f32) -> TinyTensor {
    TinyTensor::new("F32", &[], &[value])
}

#[test]
fn every_way_to_store_the_tiny_model_is_accepted() {
    for weights in [
        TinyWeights::Dense("BF16"),
        TinyWeights::Dense("F16"),
        TinyWeights::Dense("F32"),
        TinyWeights::AutoFp8Static,
        TinyWeights::AutoFp8Dynamic,
        TinyWeights::CompressedChannel,
        TinyWeights::CompressedWeightOnly,
    ] {
        assert_eq!(verify(&TinyModel::new(weights)), Ok(vec![]), "{weights:?}");
    }
}

type Change = Box<dyn FnOnce(&mut TinyModel)>;

fn remove(name: &'static str) -> Change {
    Box::new(move |model| assert!(model.tensors.remove(name).is_some(), "{name} is in the tiny model"))
}

fn put(name: &'static str, tensor: TinyTensor) -> Change {
    Box::new(move |model| {
        model.tensors.insert(name.to_owned(), tensor);
    })
}

fn reshape(name: &'static str, shape: &'static [usize]) -> Change {
    Box::new(move |model| tensor(model, name).shape = shape.to_vec())
}

fn retype(name: &'static str, dtype: &'static str) -> Change {
    Box::new(move |model| dtype.clone_into(&mut tensor(model, name).dtype))
}

fn poke(name: &'static str, at: usize, bytes: &'static [u8]) -> Change {
    Box::new(move |model| tensor(model, name).data[at..at + bytes.len()].copy_from_slice(bytes))
}

/// Tensors that are missing or one too many: the change, and what the refusal must name.
fn missing_and_extra() -> Vec<(Change, &'static str)> {
    let half = |values: &[f32]| TinyTensor::new("BF16", &[values.len()], values);
    vec![
        (
            remove("model.embed_tokens.weight"),
            "model.embed_tokens.weight is missing",
        ),
        (remove("model.norm.weight"), "model.norm.weight is missing"),
        (
            remove("model.layers.0.input_layernorm.weight"),
            "model.layers.0.input_layernorm.weight is missing",
        ),
        (
            remove("model.layers.2.self_attn.k_proj.weight"),
            "model.layers.2.self_attn.k_proj.weight is missing",
        ),
        (
            remove("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (
            put("model.layers.3.mlp.up_proj.weight", half(&[0.0])),
            "model.layers.3.mlp.up_proj.weight is not a tensor",
        ),
        (
            put("model.layers.1.self_attn.q_proj.bias", half(&[0.0])),
            "model.layers.1.self_attn.q_proj.bias is not",
        ),
        (
            put("model.layers.1.self_attn.q_norm.weight", half(&[0.0])),
            "q_norm.weight is not a tensor",
        ),
        (
            put("model.layers.1.self_attn.qkv_proj.weight", half(&[0.0])),
            "qkv_proj.weight is not a tensor",
        ),
        (put("lm_head.bias", half(&[0.0])), "lm_head.bias is not a tensor"),
        (
            put("vision_tower.patch.weight", half(&[0.0])),
            "vision_tower.patch.weight is not a tensor",
        ),
        (
            put("model.layers.1.mlp.up_proj.weight_scale", scale(1.0)),
            "mlp.up_proj.weight_scale is not a tensor",
        ),
    ]
}

/// Tensors of an unquantised model that are there but wrong.
fn dense_faults() -> Vec<(Change, &'static str)> {
    vec![
        (
            reshape("model.embed_tokens.weight", &[64, 160]),
            "model.embed_tokens.weight has shape [64, 160], expected [160, 64]",
        ),
        (
            reshape("model.layers.1.self_attn.o_proj.weight", &[128, 64]),
            "o_proj.weight has shape [128, 64]",
        ),
        (
            reshape("model.layers.1.mlp.down_proj.weight", &[6144]),
            "down_proj.weight has shape [6144]",
        ),
        (
            reshape("model.layers.1.input_layernorm.weight", &[64, 1]),
            "input_layernorm.weight has shape [64, 1]",
        ),
        (retype("model.norm.weight", "I16"), "model.norm.weight is I16"),
        (
            put(
                "model.layers.1.mlp.up_proj.weight",
                TinyTensor {
                    dtype: "F8_E4M3".into(),
                    shape: vec![96, 64],
                    data: vec![0; 6144],
                },
            ),
            "mlp.up_proj.weight is F8_E4M3, expected BF16, F16 or F32 (quantization_config does not name it)",
        ),
        (
            put(
                "model.layers.1.mlp.up_proj.weight",
                TinyTensor::new("F32", &[96, 64], &[0.0; 6144]),
            ),
            "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj must have the same element type",
        ),
        (
            poke("model.embed_tokens.weight", 10, &[0xc0, 0x7f]),
            "model.embed_tokens.weight has 1 values that are not finite",
        ),
        (
            poke("model.layers.2.mlp.down_proj.weight", 0, &[0x80, 0xff, 0x80, 0x7f]),
            "down_proj.weight has 2 values",
        ),
        (
            poke("model.norm.weight", 2, &[0x80, 0x7f]),
            "model.norm.weight has 1 values",
        ),
    ]
}

/// Faults of an AutoFP8 model with static inputs.
fn static_faults() -> Vec<(Change, &'static str)> {
    let dense = || TinyTensor::new("BF16", &[96, 64], &[0.0; 6144]);
    let ignore = |modules: &'static [&'static str]| -> Change {
        Box::new(move |model| model.config["quantization_config"]["ignored_layers"] = json!(modules))
    };
    vec![
        (
            remove("model.layers.1.mlp.up_proj.weight_scale"),
            "model.layers.1.mlp.up_proj.weight_scale is missing",
        ),
        (
            remove("model.layers.1.mlp.up_proj.input_scale"),
            "model.layers.1.mlp.up_proj.input_scale is missing",
        ),
        (
            put("model.layers.1.mlp.up_proj.weight", dense()),
            "up_proj.weight is BF16, expected F8_E4M3 by quantization_config",
        ),
        (
            retype("model.layers.1.mlp.up_proj.weight", "F8_E5M2"),
            "up_proj.weight is F8_E5M2",
        ),
        (
            retype("model.layers.1.mlp.up_proj.weight", "I8"),
            "up_proj.weight is I8",
        ),
        (
            poke("model.layers.2.self_attn.v_proj.weight", 5, &[0x7f]),
            "v_proj.weight has 1 values that are not finite",
        ),
        (
            poke("model.layers.2.self_attn.v_proj.weight", 0, &[0xff, 0x7f]),
            "v_proj.weight has 2 values",
        ),
        (
            ignore(&["model.layers.0.self_attn.k_proj"]),
            "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj must be",
        ),
        (
            ignore(&["model.layers.0.mlp.gate_proj"]),
            "model.layers.0.mlp.up_proj must be quantised alike",
        ),
        (
            put(
                "model.layers.0.mlp.up_proj.weight_zero_point",
                TinyTensor {
                    dtype: "I8".into(),
                    shape: vec![1],
                    data: vec![3],
                },
            ),
            "up_proj.weight_zero_point is not zero",
        ),
    ]
}

/// Scales of such a model that are there but wrong.
fn scale_faults() -> Vec<(Change, &'static str)> {
    vec![
        (
            put("model.layers.1.mlp.up_proj.weight_scale", scale(0.0)),
            "up_proj.weight_scale: scale 0 at 0",
        ),
        (
            put("model.layers.1.mlp.up_proj.weight_scale", scale(-0.5)),
            "up_proj.weight_scale: scale -0.5",
        ),
        (
            put("model.layers.1.mlp.up_proj.weight_scale", scale(f32::INFINITY)),
            "up_proj.weight_scale: scale inf",
        ),
        (
            put("model.layers.1.mlp.up_proj.weight_scale", scale(f32::NAN)),
            "up_proj.weight_scale: scale NaN",
        ),
        (
            put("model.layers.0.mlp.up_proj.input_scale", scale(0.0)),
            "model.layers.0.mlp.up_proj.input_scale: scale 0",
        ),
        (
            put("model.layers.0.mlp.up_proj.input_scale", scale(f32::NAN)),
            "layers.0.mlp.up_proj.input_scale: scale NaN",
        ),
        (
            put(
                "model.layers.0.mlp.up_proj.input_scale",
                TinyTensor::new("F32", &[2], &[1.0; 2]),
            ),
            "up_proj.input_scale has shape [2], expected [] or [1]",
        ),
        (
            put(
                "model.layers.0.mlp.up_proj.weight_scale",
                TinyTensor::new("F32", &[95, 1], &[1.0; 95]),
            ),
            "up_proj.weight_scale has shape [95, 1], expected [], [1], [96] or [96, 1]",
        ),
        (
            put(
                "model.layers.0.mlp.up_proj.weight_scale",
                TinyTensor::new("F32", &[1, 96], &[1.0; 96]),
            ),
            "up_proj.weight_scale has shape [1, 96]",
        ),
        (
            retype("model.layers.0.mlp.up_proj.weight_scale", "I32"),
            "up_proj.weight_scale is I32",
        ),
        (
            put("model.layers.0.mlp.up_proj.weight_scale_inv", scale(1.0)),
            "up_proj.weight_scale_inv is not a tensor",
        ),
    ]
}

#[test]
fn every_fault_is_refused_by_the_name_of_its_tensor() {
    let dense = missing_and_extra().into_iter().chain(dense_faults());
    let dense = dense.map(|fault| (TinyWeights::Dense("BF16"), fault));
    let quantized = static_faults().into_iter().chain(scale_faults());
    let quantized = quantized.map(|fault| (TinyWeights::AutoFp8Static, fault));
    for (weights, (change, named)) in dense.chain(quantized) {
        let message = refusal(weights, change);
        assert!(message.contains(named), "expected {named:?} in {message:?}");
    }
}

#[test]
fn an_input_scale_that_the_scheme_does_not_want_is_refused() {
    for weights in [
        TinyWeights::AutoFp8Dynamic,
        TinyWeights::CompressedChannel,
        TinyWeights::CompressedWeightOnly,
    ] {
        let message = refusal(weights, put("model.layers.1.mlp.up_proj.input_scale", scale(1.0)));
        assert_eq!(message, format!("{UP}.input_scale is not a tensor of this model"));
    }
}

#[test]
fn a_bad_scale_of_one_output_row_is_refused_with_its_row() {
    let message = refusal(TinyWeights::CompressedChannel, |model| {
        tensor(model, "model.layers.1.mlp.up_proj.weight_scale").data[2 * 17..][..2].fill(0);
    });
    assert_eq!(
        message,
        format!("{UP}.weight_scale: scale 0 at 17 is not positive and finite")
    );
}

#[test]
fn all_faults_are_reported_at_once_up_to_a_bound() {
    let message = refusal(TinyWeights::Dense("BF16"), |model| {
        remove("model.norm.weight")(model);
        reshape("model.layers.0.mlp.up_proj.weight", &[64, 96])(model);
        put("surplus", scale(1.0))(model);
    });
    assert_eq!(message.lines().count(), 3, "{message}");
    let message = refusal(TinyWeights::Dense("BF16"), |model| {
        for index in 0..100 {
            model.tensors.insert(format!("surplus.{index}"), scale(1.0));
        }
    });
    assert!(message.ends_with("and 68 more"), "{message}");
}

#[test]
fn all_tensors_with_nan_are_named() {
    let message = refusal(TinyWeights::AutoFp8Static, |model| {
        poke("model.layers.0.mlp.up_proj.weight", 5, &[0x7f])(model);
        poke("model.layers.2.mlp.up_proj.weight", 5, &[0x7f])(model);
    });
    assert_eq!(message.lines().count(), 2, "{message}");
}

#[test]
fn what_exporters_leave_behind_is_skipped_with_a_note() {
    let mut model = TinyModel::new(TinyWeights::AutoFp8Static);
    let zero = TinyTensor {
        dtype: "I8".into(),
        shape: vec![1],
        data: vec![0],
    };
    let extras = [
        "lm_head.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.v_scale",
        "model.layers.0.self_attn.kv_scale",
        "model.layers.0.self_attn.q_proj.output_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
        "model.layers.0.self_attn.v_proj.output_scale",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.v_proj.v_scale",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.mlp.up_proj.weight_zero_point",
        "model.layers.0.mlp.up_proj.input_zero_point",
    ];
    for name in extras {
        model.tensors.insert(name.to_owned(), zero.clone());
    }
    let kv_scales = Warning::KvScalesIgnored {
        count: 7,
        first: "model.layers.0.self_attn.k_proj.k_scale".to_owned(),
    };
    let others = Warning::TensorsIgnored {
        count: extras.len() - 7,
        first: "lm_head.weight".to_owned(),
    };
    assert_eq!(verify(&model), Ok(vec![kv_scales, others]));
}

#[test]
fn the_largest_of_differing_input_scales_is_used_with_a_warning() {
    let mut model = TinyModel::new(TinyWeights::AutoFp8Static);
    model
        .tensors
        .insert("model.layers.1.self_attn.v_proj.input_scale".into(), scale(0.05));
    let checkpoint = model.checkpoint().unwrap();
    let (tensors, warnings) = crate::tensors::verify(&checkpoint, KvCacheDtype::Native).unwrap();
    assert_eq!(
        tensors.layers[1].qkv.value.input,
        crate::ActivationScheme::Fp8Static { scale: 0.05 }
    );
    let [Warning::InputScalesDiffer { group, scales }] = warnings.as_slice() else {
        panic!("{warnings:?}")
    };
    assert!(group.contains("model.layers.1.self_attn.v_proj"));
    assert_eq!(scales, &[0.02, 0.02, 0.05]);
}

#[test]
fn each_projection_of_a_stack_keeps_its_own_scale_for_its_rows() {
    let mut model = TinyModel::new(TinyWeights::AutoFp8Static);
    let bf16 = TinyTensor::new("BF16", &[1], &[0.25]);
    let by_row = TinyTensor::new("F32", &[64], &(1..=64).map(|row| row as f32).collect::<Vec<_>>());
    model
        .tensors
        .insert("model.layers.0.self_attn.q_proj.weight_scale".into(), bf16);
    model
        .tensors
        .insert("model.layers.0.self_attn.k_proj.weight_scale".into(), by_row);
    model
        .tensors
        .insert("model.layers.0.self_attn.v_proj.weight_scale".into(), scale(0.5));
    let checkpoint = model.checkpoint().unwrap();
    let (tensors, _) = crate::tensors::verify(&checkpoint, KvCacheDtype::Native).unwrap();
    let scales = &tensors.layers[0].qkv.value.scales;
    assert_eq!(scales.len(), 128 + 64 + 64);
    assert_eq!(
        (scales[0], scales[127], scales[128], scales[191], scales[192]),
        (0.25, 0.25, 1.0, 64.0, 0.5)
    );
}

#[test]
fn the_golden_checkpoints_are_accepted() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/golden");
    let mut accepted = 0;
    for entry in std::fs::read_dir(golden).unwrap() {
        let dir = entry.unwrap().path();
        if !dir.join("golden.safetensors").exists() {
            continue;
        }
        let checkpoint = Checkpoint::open_dir(&dir, ConfigOverrides::default())
            .unwrap_or_else(|error| panic!("{}: {error:?}", dir.display()));
        let report = checkpoint
            .verify(KvCacheDtype::Native, &mut |_| ())
            .unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        assert!(
            report.weight_bytes > 0 && checkpoint.stop_token_ids().contains(&1),
            "{}",
            dir.display()
        );
        accepted += 1;
    }
    assert!(accepted >= 15, "{accepted} golden checkpoints");
}

#[test]
fn a_directory_is_read_with_its_other_files() {
    let dir = std::env::temp_dir().join(format!("lapidary-checkpoint-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    TinyModel::new(TinyWeights::Dense("BF16")).write_dir(&dir).unwrap();
    std::fs::write(
        dir.join("generation_config.json"),
        r#"{"eos_token_id": 5, "temperature": 0.5}"#,
    )
    .unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    let checkpoint = Checkpoint::open_dir(&dir, ConfigOverrides::default()).unwrap();
    assert_eq!(checkpoint.stop_token_ids().into_iter().collect::<Vec<_>>(), [1, 5, 107]);
    assert_eq!(checkpoint.generation_defaults().temperature, Some(0.5));
    assert_eq!(
        checkpoint.file("tokenizer.json").unwrap().as_deref(),
        Some(b"{}".as_slice())
    );
    assert!(checkpoint.file("chat_template.jinja").unwrap().is_none());
    std::fs::remove_file(dir.join("config.json")).unwrap();
    let error = Checkpoint::open_dir(&dir, ConfigOverrides::default())
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("no config.json in"), "{error}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_embedded_checkpoint_names_the_file_it_lacks() {
    const EMPTY: &[u8] = b"{}";
    let error = Checkpoint::from_embedded(&[("tokenizer.json", EMPTY)], ConfigOverrides::default()).unwrap_err();
    assert_eq!(error.to_string(), "no config.json in the embedded checkpoint");
}

#[test]
fn a_config_that_cannot_be_served_is_refused_before_the_weights_are_opened() {
    let mut model = TinyModel::new(TinyWeights::Dense("BF16"));
    model
        .config
        .insert("quantization_config".into(), json!({"quant_method": "awq"}));
    model.tensors.clear();
    let error = model.checkpoint().unwrap_err();
    let mut messages = vec![error.to_string()];
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        messages.push(error.to_string());
        source = error.source();
    }
    assert!(messages.iter().any(|message| message.contains("awq")), "{messages:?}");
}
