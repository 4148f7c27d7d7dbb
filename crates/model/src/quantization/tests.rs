use serde_json::{Map, Value, json};

use super::{InputScheme, LinearScheme, Quantization, QuantizationError};
use crate::warning::Warning;

const LAYER: &str = "model.layers.3.mlp.down_proj";

fn read(key: &str, section: Value) -> Result<(Quantization, Vec<Warning>), QuantizationError> {
    Quantization::from_model_config(&Map::from_iter([(key.to_owned(), section)]))
}

fn scheme(section: Value, linear: &str) -> LinearScheme {
    read("quantization_config", section)
        .expect("the section is valid")
        .0
        .scheme(linear)
}

fn fp8(input: InputScheme) -> LinearScheme {
    LinearScheme::Fp8 { input }
}

fn float8(strategy: &str, dynamic: bool) -> Value {
    json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": strategy, "dynamic": dynamic})
}

fn group(targets: Value, inputs: Value) -> Value {
    let mut group = json!({"weights": float8("tensor", false)});
    group["targets"] = targets;
    group["input_activations"] = inputs;
    group
}

fn compressed(groups: Value, ignore: Value) -> Value {
    let mut section = json!({"quant_method": "compressed-tensors", "format": "float-quantized"});
    section["config_groups"] = groups;
    section["ignore"] = ignore;
    section
}

/// A group with one change.
fn changed(path: &[&str], value: Value) -> Value {
    let mut section = compressed(
        json!({"group_0": group(json!(["Linear"]), float8("tensor", false))}),
        json!([]),
    );
    let mut place = &mut section;
    for key in path {
        place = &mut place[*key];
    }
    *place = value;
    section
}

#[test]
fn auto_fp8_names_static_and_dynamic_and_what_it_leaves_alone() {
    let section = |scheme: &str| json!({"quant_method": "fp8", "activation_scheme": scheme, "ignored_layers": ["lm_head", LAYER]});
    assert_eq!(
        scheme(section("static"), "model.layers.0.mlp.up_proj"),
        fp8(InputScheme::Static)
    );
    assert_eq!(
        scheme(section("dynamic"), "model.layers.0.mlp.up_proj"),
        fp8(InputScheme::Token)
    );
    assert_eq!(scheme(section("static"), LAYER), LinearScheme::Unquantized);
    assert_eq!(
        scheme(section("static"), "model.layers.13.mlp.down_proj"),
        fp8(InputScheme::Static)
    );
}

#[test]
fn the_other_names_of_ignored_layers_are_read() {
    for key in ["modules_to_not_convert", "ignored_modules"] {
        for entry in [LAYER, "down_proj", "model.layers.3", "re:.*down_proj"] {
            let section = json!({"quant_method": "fp8", "activation_scheme": "static", key: [entry]});
            assert_eq!(scheme(section, LAYER), LinearScheme::Unquantized, "{key} {entry}");
        }
        let section =
            json!({"quant_method": "fp8", "activation_scheme": "static", key: ["model.layers.31", "own_proj"]});
        assert_eq!(scheme(section, LAYER), fp8(InputScheme::Static));
    }
}

#[test]
fn compressed_tensors_inputs_are_static_by_token_or_left_alone() {
    let one = |inputs| compressed(json!({"group_0": group(json!(["Linear"]), inputs)}), json!(["lm_head"]));
    assert_eq!(scheme(one(float8("tensor", false)), LAYER), fp8(InputScheme::Static));
    assert_eq!(scheme(one(float8("token", true)), LAYER), fp8(InputScheme::Token));
    assert_eq!(scheme(one(Value::Null), LAYER), fp8(InputScheme::None));
}

#[test]
fn the_most_specific_of_several_groups_wins() {
    let groups = json!({
        "group_0": group(json!(["Linear"]), float8("tensor", false)),
        "group_1": group(json!(["re:.*\\.mlp\\..*"]), float8("token", true)),
        "group_2": group(json!([LAYER]), Value::Null),
    });
    let section = || compressed(groups.clone(), json!(["re:.*layers\\.7\\..*", "lm_head"]));
    assert_eq!(scheme(section(), LAYER), fp8(InputScheme::None));
    assert_eq!(scheme(section(), "model.layers.3.mlp.up_proj"), fp8(InputScheme::Token));
    assert_eq!(
        scheme(section(), "model.layers.3.self_attn.q_proj"),
        fp8(InputScheme::Static)
    );
    assert_eq!(
        scheme(section(), "model.layers.7.mlp.up_proj"),
        LinearScheme::Unquantized
    );
}

#[test]
fn patterns_match_from_the_start_like_python() {
    let section = |pattern: &str| compressed(json!({"group_0": group(json!([pattern]), Value::Null)}), json!([]));
    assert_eq!(scheme(section("re:mlp"), LAYER), LinearScheme::Unquantized);
    assert_eq!(scheme(section("re:model|mlp"), LAYER), fp8(InputScheme::None));
}

#[test]
fn the_older_key_and_format_are_read() {
    let mut section = compressed(json!({"group_0": group(json!(["Linear"]), Value::Null)}), json!([]));
    section["format"] = json!("naive-quantized");
    section.as_object_mut().unwrap().remove("quant_method");
    let (quantization, _) = read("compression_config", section).unwrap();
    assert_eq!(quantization.scheme(LAYER), fp8(InputScheme::None));
}

#[test]
fn a_kv_cache_scheme_is_noted_and_ignored() {
    let section = json!({"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"});
    assert_eq!(
        read("quantization_config", section).unwrap().1,
        [Warning::KvCacheSchemeIgnored]
    );
}

#[test]
fn no_section_means_no_quantization() {
    assert!(!read("quantization_config", Value::Null).unwrap().0.is_quantized());
}

#[test]
fn other_methods_are_refused_by_name() {
    let cases = [
        (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        (json!({"quant_method": "awq"}), "awq"),
        (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (json!({"quant_method": "modelopt"}), "modelopt"),
        (json!({"quant_method": "fbgemm_fp8"}), "fbgemm_fp8"),
        (json!({"quant_method": "mine"}), "mine"),
        (json!({"bits": 4}), "quant_method"),
        (json!([]), "quantization_config"),
        (json!({"quant_method": "fp8"}), "activation_scheme"),
        (json!({"quant_method": "fp8", "activation_scheme": "group"}), "group"),
        (
            json!({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
            "weight_block_size",
        ),
        (
            json!({"quant_method": "fp8", "activation_scheme": "static", "fmt": "e5m2"}),
            "e5m2",
        ),
        (
            json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": [1]}),
            "ignored_layers",
        ),
        (
            json!({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["re:("]}),
            "\"(\"",
        ),
    ];
    assert_refused(&cases);
}

#[test]
fn other_compressed_tensors_are_refused_by_name() {
    let weights = |key| ["config_groups", "group_0", "weights", key];
    let cases = [
        (changed(&["format"], json!("pack-quantized")), "pack-quantized"),
        (changed(&["format"], json!("int-quantized")), "int-quantized"),
        (changed(&["format"], json!("mixed-precision")), "mixed-precision"),
        (changed(&["quantization_status"], json!("calibration")), "calibration"),
        (
            changed(&["sparsity_config"], json!({"format": "sparse-24-bitmask"})),
            "sparse-24-bitmask",
        ),
        (
            changed(&["transform_config"], json!({"config_groups": {}})),
            "transform_config",
        ),
        (changed(&["config_groups"], Value::Null), "config_groups"),
        (
            changed(&["config_groups", "group_0", "targets"], json!(["Embedding"])),
            "Embedding",
        ),
        (changed(&["config_groups", "group_0", "targets"], json!([])), "targets"),
        (
            changed(
                &["config_groups", "group_0", "output_activations"],
                float8("tensor", false),
            ),
            "output_activations",
        ),
        (
            changed(&["config_groups", "group_0", "format"], json!("nvfp4-pack-quantized")),
            "nvfp4-pack-quantized",
        ),
        (changed(&weights("num_bits"), json!(4)), "num_bits 4"),
        (changed(&weights("type"), json!("int")), "int"),
        (changed(&weights("symmetric"), json!(false)), "symmetric"),
        (changed(&weights("strategy"), json!("block")), "block"),
        (changed(&weights("strategy"), json!("group")), "group"),
        (changed(&weights("strategy"), Value::Null), "weights.strategy"),
        (changed(&weights("dynamic"), json!(true)), "weights.dynamic"),
        (
            changed(
                &["config_groups", "group_0", "input_activations"],
                float8("group", true),
            ),
            "group",
        ),
        (
            changed(
                &["config_groups", "group_0", "input_activations"],
                float8("token", false),
            ),
            "token",
        ),
        (
            changed(
                &["config_groups", "group_0", "input_activations", "num_bits"],
                json!(16),
            ),
            "num_bits 16",
        ),
    ];
    assert_refused(&cases);
}

fn assert_refused(cases: &[(Value, &str)]) {
    for (section, named) in cases {
        let error = read("quantization_config", section.clone())
            .expect_err(&section.to_string())
            .to_string();
        assert!(error.contains(named), "{section}: {error}");
    }
}
