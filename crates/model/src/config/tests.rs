use proptest::prelude::*;
use serde_json::{Value, json};

use crate::backend::KvCacheDtype;

use super::{ConfigError, ConfigOverrides, GenerationDefaults, ModelConfig};
use crate::warning::Warning;

/// What `config.json` of google/gemma-2-{2b,9b,27b}-it have in common.
fn published(shape: Value) -> Value {
    let mut config = json!({
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "gemma2", "pad_token_id": 0,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4", "use_cache": true, "vocab_size": 256_000,
    });
    merge(&mut config, shape);
    config
}

fn merge(config: &mut Value, changes: Value) {
    let (Value::Object(config), Value::Object(changes)) = (config, changes) else {
        unreachable!("both are objects")
    };
    config.extend(changes);
}

fn nine_b() -> Value {
    published(json!({
        "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window_size": 4096,
    }))
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(config.to_string().as_bytes(), ConfigOverrides::default()).map(|(config, _)| config)
}

fn changed(changes: Value) -> Result<ModelConfig, ConfigError> {
    let mut config = nine_b();
    merge(&mut config, changes);
    parse(&config)
}

fn without(key: &str) -> Result<ModelConfig, ConfigError> {
    let mut config = nine_b();
    config.as_object_mut().unwrap().remove(key);
    parse(&config)
}

#[test]
fn the_three_published_sizes_are_read() {
    let two = parse(&published(json!({
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    })))
    .unwrap();
    let nine = parse(&nine_b()).unwrap();
    let twenty_seven = parse(&published(json!({
        "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144, "eos_token_id": [1, 107],
    })))
    .unwrap();
    assert_eq!(
        [two.num_parameters(), nine.num_parameters()],
        [2_614_341_888, 9_241_705_984]
    );
    assert_eq!(twenty_seven.num_parameters(), 27_227_128_320);
    assert_eq!([two.q_size(), nine.q_size(), twenty_seven.q_size()], [2048, 4096, 4096]);
    assert_eq!(twenty_seven.attention(KvCacheDtype::Native).scale, 1.0 / 12.0);
    assert_eq!(nine.attention(KvCacheDtype::Native).scale, 1.0 / 16.0);
    assert_eq!(nine.windows[..4], [Some(4096), None, Some(4096), None]);
    assert_eq!(
        (nine.attn_logit_softcapping, nine.final_logit_softcapping),
        (Some(50.0), Some(30.0))
    );
    assert_eq!((two.eos_token_ids, twenty_seven.eos_token_ids), (vec![1], vec![1, 107]));
}

#[test]
fn absent_keys_take_the_class_defaults() {
    let config = parse(&json!({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    }))
    .unwrap();
    assert_eq!((config.head_dim, config.max_position_embeddings), (256, 8192));
    assert_eq!(
        (config.query_pre_attn_scalar, config.rope_theta, config.rms_norm_eps),
        (256.0, 10_000.0, 1e-6)
    );
    assert_eq!(
        (config.attn_logit_softcapping, config.final_logit_softcapping),
        (Some(50.0), Some(30.0))
    );
    assert_eq!(config.windows, [Some(4096), None, Some(4096)]);
    assert!(!config.quantization.is_quantized());
}

#[test]
fn null_switches_caps_and_window_off() {
    let config = changed(json!({
        "attn_logit_softcapping": null, "final_logit_softcapping": null, "sliding_window": null,
    }))
    .unwrap();
    assert_eq!(
        (config.attn_logit_softcapping, config.final_logit_softcapping),
        (None, None)
    );
    assert!(config.windows.iter().all(Option::is_none));
}

#[test]
fn layer_types_and_rope_parameters_of_newer_files_are_read() {
    let types = [vec!["full_attention"; 41], vec!["sliding_attention"]].concat();
    let config = changed(json!({
        "layer_types": types, "rope_theta": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }))
    .unwrap();
    assert_eq!(config.windows[0], None);
    assert_eq!(config.windows[41], Some(4096));
    assert_eq!(config.rope_theta, 5000.0);
}

#[test]
fn the_early_9b_scalar_is_corrected_unless_forced() {
    let mut config = nine_b();
    merge(&mut config, json!({"query_pre_attn_scalar": 224}));
    let json = config.to_string();
    let (corrected, warnings) = ModelConfig::from_json(json.as_bytes(), ConfigOverrides::default()).unwrap();
    assert_eq!(corrected.query_pre_attn_scalar, 256.0);
    assert_eq!(
        warnings,
        [Warning::QueryScalarCorrected {
            found: 224.0,
            used: 256.0
        }]
    );

    let overrides = ConfigOverrides {
        query_pre_attn_scalar: Some(224.0),
    };
    let (forced, warnings) = ModelConfig::from_json(json.as_bytes(), overrides).unwrap();
    assert_eq!((forced.query_pre_attn_scalar, warnings), (224.0, vec![]));

    merge(&mut config, json!({"num_hidden_layers": 41}));
    assert_eq!(parse(&config).unwrap().query_pre_attn_scalar, 224.0);
}

#[test]
fn what_is_not_this_model_is_refused_by_key() {
    let cases = [
        (json!({"architectures": ["Gemma3ForCausalLM"]}), "Gemma3ForCausalLM"),
        (json!({"architectures": [], "model_type": "llama"}), "llama"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"tie_word_embeddings": false}), "tie_word_embeddings"),
        (json!({"hidden_activation": "silu"}), "hidden_activation"),
        (json!({"hidden_activation": null, "hidden_act": "relu"}), "hidden_act"),
        (json!({"num_key_value_heads": 3}), "num_key_value_heads (3)"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads"),
        (json!({"head_dim": 255}), "head_dim"),
        (json!({"hidden_size": "3584"}), "hidden_size"),
        (json!({"hidden_size": -1}), "hidden_size"),
        (json!({"vocab_size": 1_u64 << 40}), "vocab_size"),
        (json!({"num_hidden_layers": 1.5}), "num_hidden_layers"),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (
            json!({"layer_types": vec!["chunked_attention"; 42]}),
            "chunked_attention",
        ),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "rope_scaling",
        ),
        (
            json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}),
            "rope_parameters",
        ),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
        (json!({"attn_logit_softcapping": -50.0}), "attn_logit_softcapping"),
        (json!({"query_pre_attn_scalar": 0}), "query_pre_attn_scalar"),
        (json!({"eos_token_id": "1"}), "eos_token_id"),
        (
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "quantization_config",
        ),
    ];
    for (change, named) in cases {
        let error = changed(change.clone()).expect_err(&change.to_string()).to_string();
        assert!(error.contains(named), "{change}: {error}");
    }
}

#[test]
fn each_part_of_the_shape_must_be_there() {
    for key in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ] {
        assert!(
            matches!(without(key), Err(ConfigError::Missing { key: missing }) if missing == key),
            "{key}"
        );
    }
}

#[test]
fn generation_defaults_are_read_only_where_present() {
    let defaults = |json: Value| GenerationDefaults::from_json(json.to_string().as_bytes());
    let published = defaults(json!({"_from_model_config": true, "eos_token_id": [1, 107], "pad_token_id": 0})).unwrap();
    assert_eq!(
        published,
        GenerationDefaults {
            eos_token_ids: vec![1, 107],
            ..GenerationDefaults::default()
        }
    );
    let tuned = defaults(json!({"do_sample": true, "temperature": 0.7, "top_p": 0.9, "top_k": 64})).unwrap();
    assert_eq!(
        (tuned.temperature, tuned.top_p, tuned.top_k),
        (Some(0.7), Some(0.9), Some(64))
    );
    assert!(defaults(json!({"top_p": 1.5})).is_err());
    assert!(defaults(json!({"temperature": "warm"})).is_err());
}

/// JSON of any form, with the keys that are read among the names.
fn any_json() -> impl Strategy<Value = Value> {
    let keys = prop::sample::select(vec![
        "architectures",
        "model_type",
        "hidden_size",
        "head_dim",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "intermediate_size",
        "layer_types",
        "sliding_window",
        "rope_parameters",
        "rope_theta",
        "quantization_config",
        "quant_method",
        "config_groups",
        "targets",
        "weights",
        "ignore",
        "activation_scheme",
        "ignored_layers",
        "input_activations",
        "num_bits",
        "type",
        "strategy",
        "eos_token_id",
    ]);
    let text = prop::sample::select(vec![
        "Gemma2ForCausalLM",
        "gemma2",
        "fp8",
        "static",
        "compressed-tensors",
        "Linear",
        "re:(",
        "re:.*",
        "float",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0_u64..2048).prop_map(Value::from),
        text.prop_map(Value::from),
        "\\PC{0,40}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((keys.clone(), inner), 0..12).prop_map(|entries| entries
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_json_is_read_or_refused(changes in any_json()) {
        let mut config = nine_b();
        if changes.is_object() {
            merge(&mut config, changes.clone());
        }
        for json in [config, changes] {
            let json = json.to_string();
            // Whatever comes of it, it comes without a panic, and short enough to print.
            if let Err(error) = ModelConfig::from_json(json.as_bytes(), ConfigOverrides::default()) {
                prop_assert!(error.to_string().len() < 2000);
            }
            let _ = GenerationDefaults::from_json(json.as_bytes());
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        prop_assert!(ModelConfig::from_json(&bytes, ConfigOverrides::default()).is_err());
    }
}
