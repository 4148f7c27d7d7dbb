//! What the model is: `config.json` and `generation_config.json`, checked before a single tensor is read.

use serde_json::{Map, Value};

use crate::backend::{AttentionConfig, KvCacheDtype};
use crate::quantization::{Quantization, QuantizationError};
use crate::warning::Warning;

/// Largest value any dimension may have. Far above every Gemma-2, and small enough that products of two fit.
const MAX_DIMENSION: u64 = 1 << 24;
/// Most layers a model may have.
const MAX_LAYERS: u64 = 1024;

/// A Gemma-2 model's shape and constants. 2b, 9b, 27b and smaller ones are values of this type.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head; `num_heads * head_dim` need not be `hidden_size` (27b: 4096 and 4608).
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Attention scores are multiplied by this to the power of -0.5.
    pub query_pre_attn_scalar: f32,
    /// Soft-cap of attention scores.
    pub attn_logit_softcapping: Option<f32>,
    /// Soft-cap of the output logits.
    pub final_logit_softcapping: Option<f32>,
    /// `[num_layers]`: `Some(w)` if token `i` of that layer sees only `j` with `i - j < w`.
    pub windows: Vec<Option<usize>>,
    /// Base of the rotary embedding.
    pub rope_theta: f32,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text, as `config.json` has them; see [`crate::Checkpoint::stop_token_ids`] for all of them.
    pub eos_token_ids: Vec<u32>,
    /// How linear layers are stored.
    pub quantization: Quantization,
}

/// Values that replace those of `config.json`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ConfigOverrides {
    /// Taken as it is, even the 224 that early 9b uploads had by mistake.
    pub query_pre_attn_scalar: Option<f32>,
}

/// Sampling defaults that `generation_config.json` recommends; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// As in [`lapidary_engine::SamplingParams`].
    pub temperature: Option<f32>,
    /// As in [`lapidary_engine::SamplingParams`].
    pub top_p: Option<f32>,
    /// As in [`lapidary_engine::SamplingParams`].
    pub top_k: Option<u32>,
    /// As in [`lapidary_engine::SamplingParams`].
    pub min_p: Option<f32>,
    /// As in [`lapidary_engine::SamplingParams`].
    pub repetition_penalty: Option<f32>,
    /// Generated tokens when the request does not say.
    pub max_new_tokens: Option<u32>,
}

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON")]
    Json(#[source] serde_json::Error),
    /// JSON, but not an object.
    #[error("not a JSON object")]
    NotAnObject,
    /// Another model family.
    #[error("architecture {found} is not supported, only Gemma2ForCausalLM is")]
    Architecture {
        /// What the file says.
        found: String,
    },
    /// A key without a default is absent.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A key has a value this type of model cannot have.
    #[error("{key} is {found}, expected {expected}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// Its value, shortened.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// `num_key_value_heads` does not divide `num_attention_heads`.
    #[error("num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})")]
    HeadGroups {
        /// Query heads.
        num_heads: usize,
        /// Key/value heads.
        num_kv_heads: usize,
    },
    /// `layer_types` does not name every layer.
    #[error("layer_types has {found} entries for {num_layers} layers")]
    LayerTypes {
        /// Entries.
        found: usize,
        /// Layers.
        num_layers: usize,
    },
    /// The quantization section cannot be served.
    #[error("quantization_config cannot be served")]
    Quantization(#[from] QuantizationError),
}

impl ModelConfig {
    /// Reads a `config.json`. Absent keys take the defaults of transformers' `Gemma2Config`, except the model's shape,
    /// which must be there.
    ///
    /// # Errors
    /// Whatever would make the model compute something else than its authors meant.
    pub fn from_json(json: &[u8], overrides: ConfigOverrides) -> Result<(Self, Vec<Warning>), ConfigError> {
        let map = parse_object(json)?;
        check_architecture(&map)?;
        refuse_unsupported(&map)?;
        let mut warnings = Vec::new();
        let num_layers = required(&map, "num_hidden_layers", MAX_LAYERS)?;
        let num_heads = required(&map, "num_attention_heads", MAX_DIMENSION)?;
        let num_kv_heads = required(&map, "num_key_value_heads", MAX_DIMENSION)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(ConfigError::HeadGroups {
                num_heads,
                num_kv_heads,
            });
        }
        let head_dim = optional(&map, "head_dim", MAX_DIMENSION)?.unwrap_or(256);
        if !head_dim.is_multiple_of(2) {
            return Err(invalid(
                &map,
                "head_dim",
                "an even number: rotary embedding rotates its halves",
            ));
        }
        let (quantization, quantization_warnings) = Quantization::from_model_config(&map)?;
        warnings.extend(quantization_warnings);
        let mut config = Self {
            hidden_size: required(&map, "hidden_size", MAX_DIMENSION)?,
            intermediate_size: required(&map, "intermediate_size", MAX_DIMENSION)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: required(&map, "vocab_size", MAX_DIMENSION)?,
            max_position_embeddings: optional(&map, "max_position_embeddings", MAX_DIMENSION)?.unwrap_or(8192),
            query_pre_attn_scalar: positive(&map, "query_pre_attn_scalar", 256.0)?,
            attn_logit_softcapping: softcap(&map, "attn_logit_softcapping", 50.0)?,
            final_logit_softcapping: softcap(&map, "final_logit_softcapping", 30.0)?,
            windows: windows(&map, num_layers)?,
            rope_theta: rope_theta(&map)?,
            rms_norm_eps: positive(&map, "rms_norm_eps", 1e-6)?,
            bos_token_id: token_ids(&map, "bos_token_id")?.first().copied(),
            eos_token_ids: token_ids(&map, "eos_token_id")?,
            quantization,
        };
        config.fix_query_scalar(overrides, &mut warnings);
        Ok((config, warnings))
    }

    /// The first upload of 9b said 224; its authors meant 256 (huggingface/transformers#31891).
    fn fix_query_scalar(&mut self, overrides: ConfigOverrides, warnings: &mut Vec<Warning>) {
        if let Some(forced) = overrides.query_pre_attn_scalar {
            self.query_pre_attn_scalar = forced;
        } else if self.hidden_size == 3584 && self.num_layers == 42 && self.query_pre_attn_scalar == 224.0 {
            self.query_pre_attn_scalar = 256.0;
            warnings.push(Warning::QueryScalarCorrected {
                found: 224.0,
                used: 256.0,
            });
        }
    }

    /// The geometry that attention operations need.
    #[must_use]
    pub fn attention(&self, kv_cache_dtype: KvCacheDtype) -> AttentionConfig {
        AttentionConfig {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            scale: (1.0 / f64::from(self.query_pre_attn_scalar).sqrt()) as f32,
            softcap: self.attn_logit_softcapping,
            rope_theta: self.rope_theta,
            kv_cache_dtype,
        }
    }

    /// Columns of the attention output, and of q.
    #[must_use]
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of k, and of v.
    #[must_use]
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Parameters of the model, the embedding counted once.
    #[must_use]
    pub fn num_parameters(&self) -> u64 {
        let attention = self.hidden_size * (2 * self.q_size() + 2 * self.kv_size());
        let layer = attention + 3 * self.hidden_size * self.intermediate_size + 4 * self.hidden_size;
        (self.vocab_size * self.hidden_size) as u64 + (self.num_layers * layer + self.hidden_size) as u64
    }
}

impl GenerationDefaults {
    /// Reads a `generation_config.json`.
    ///
    /// # Errors
    /// Values out of range.
    pub fn from_json(json: &[u8]) -> Result<Self, ConfigError> {
        let map = parse_object(json)?;
        Ok(Self {
            eos_token_ids: token_ids(&map, "eos_token_id")?,
            temperature: number_in(&map, "temperature", 0.0..=100.0, "a number from 0 to 100")?,
            top_p: number_in(&map, "top_p", f32::MIN_POSITIVE..=1.0, "a number above 0, at most 1")?,
            top_k: count(&map, "top_k")?,
            min_p: number_in(&map, "min_p", 0.0..=1.0, "a number from 0 to 1")?,
            repetition_penalty: number_in(
                &map,
                "repetition_penalty",
                f32::MIN_POSITIVE..=100.0,
                "a number above 0",
            )?,
            max_new_tokens: count(&map, "max_new_tokens")?,
        })
    }
}

fn parse_object(json: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::from_slice(json).map_err(ConfigError::Json)? {
        Value::Object(map) => Ok(map),
        _ => Err(ConfigError::NotAnObject),
    }
}

fn check_architecture(map: &Map<String, Value>) -> Result<(), ConfigError> {
    let named: Vec<&str> = match present(map, "architectures") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
        Some(_) => return Err(invalid(map, "architectures", "a list of names")),
        None => Vec::new(),
    };
    if named.is_empty() {
        return match present(map, "model_type").and_then(Value::as_str) {
            Some("gemma2") => Ok(()),
            Some(other) => Err(ConfigError::Architecture {
                found: format!("of model_type {other}"),
            }),
            None => Err(ConfigError::Missing { key: "architectures" }),
        };
    }
    if named.contains(&"Gemma2ForCausalLM") {
        return Ok(());
    }
    Err(ConfigError::Architecture {
        found: named.join(", "),
    })
}

fn refuse_unsupported(map: &Map<String, Value>) -> Result<(), ConfigError> {
    if flag(map, "attention_bias", false)? {
        return Err(invalid(map, "attention_bias", "false: Gemma-2 has no biases"));
    }
    if !flag(map, "tie_word_embeddings", true)? {
        return Err(invalid(
            map,
            "tie_word_embeddings",
            "true: Gemma-2's output projection is its embedding",
        ));
    }
    if flag(map, "use_bidirectional_attention", false)? {
        return Err(invalid(
            map,
            "use_bidirectional_attention",
            "false: this decoder is causal",
        ));
    }
    // `hidden_act` counts only where `hidden_activation` is absent, and there "gelu" always meant the tanh form.
    match (present(map, "hidden_activation"), present(map, "hidden_act")) {
        (Some(activation), _) if activation != "gelu_pytorch_tanh" => {
            Err(invalid(map, "hidden_activation", "gelu_pytorch_tanh"))
        }
        (None, Some(act)) if act != "gelu_pytorch_tanh" && act != "gelu" => {
            Err(invalid(map, "hidden_act", "gelu_pytorch_tanh"))
        }
        _ => Ok(()),
    }
}

fn windows(map: &Map<String, Value>, num_layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    // An explicit null switches the window off; an absent key is the class default.
    let window = match map.get("sliding_window") {
        None => Some(4096),
        Some(Value::Null) => None,
        Some(_) => optional(map, "sliding_window", MAX_DIMENSION)?,
    };
    let Some(types) = present(map, "layer_types") else {
        return Ok((0..num_layers)
            .map(|layer| window.filter(|_| layer.is_multiple_of(2)))
            .collect());
    };
    let Value::Array(types) = types else {
        return Err(invalid(map, "layer_types", "a list of names"));
    };
    if types.len() != num_layers {
        return Err(ConfigError::LayerTypes {
            found: types.len(),
            num_layers,
        });
    }
    types
        .iter()
        .map(|name| match name.as_str() {
            Some("sliding_attention") => Ok(window),
            Some("full_attention") => Ok(None),
            _ => Err(ConfigError::Invalid {
                key: "layer_types",
                found: shorten(name),
                expected: "sliding_attention or full_attention",
            }),
        })
        .collect()
}

/// transformers 5 moved `rope_theta` into `rope_parameters`; older files may carry a null `rope_scaling`.
fn rope_theta(map: &Map<String, Value>) -> Result<f32, ConfigError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(section) = present(map, key) else { continue };
        let Value::Object(section) = section else {
            return Err(invalid(map, key, "an object"));
        };
        let kind = section.get("rope_type").or_else(|| section.get("type"));
        if kind.is_some_and(|kind| kind != "default") {
            return Err(invalid(map, key, "of rope_type default"));
        }
        if section.contains_key("rope_theta") {
            return positive(section, "rope_theta", 10_000.0);
        }
    }
    positive(map, "rope_theta", 10_000.0)
}

/// The value of `key`, null counting as absent.
fn present<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|value| !value.is_null())
}

fn required(map: &Map<String, Value>, key: &'static str, max: u64) -> Result<usize, ConfigError> {
    optional(map, key, max)?.ok_or(ConfigError::Missing { key })
}

fn optional(map: &Map<String, Value>, key: &'static str, max: u64) -> Result<Option<usize>, ConfigError> {
    let Some(value) = present(map, key) else {
        return Ok(None);
    };
    match value.as_u64() {
        Some(number) if (1..=max).contains(&number) => Ok(Some(number as usize)),
        _ => Err(invalid(map, key, "a whole number above 0, of a sane size")),
    }
}

fn positive(map: &Map<String, Value>, key: &'static str, default: f32) -> Result<f32, ConfigError> {
    let range = f32::MIN_POSITIVE..=f32::MAX;
    Ok(number_in(map, key, range, "a finite number above 0")?.unwrap_or(default))
}

fn softcap(map: &Map<String, Value>, key: &'static str, default: f32) -> Result<Option<f32>, ConfigError> {
    if map.get(key).is_some_and(Value::is_null) {
        return Ok(None);
    }
    positive(map, key, default).map(Some)
}

fn number_in(
    map: &Map<String, Value>,
    key: &'static str,
    range: std::ops::RangeInclusive<f32>,
    expected: &'static str,
) -> Result<Option<f32>, ConfigError> {
    let Some(value) = present(map, key) else {
        return Ok(None);
    };
    match value.as_f64().map(|number| number as f32) {
        Some(number) if range.contains(&number) => Ok(Some(number)),
        _ => Err(invalid(map, key, expected)),
    }
}

fn count(map: &Map<String, Value>, key: &'static str) -> Result<Option<u32>, ConfigError> {
    let Some(value) = present(map, key) else {
        return Ok(None);
    };
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.map(Some).ok_or_else(|| invalid(map, key, "a whole number"))
}

fn flag(map: &Map<String, Value>, key: &'static str, default: bool) -> Result<bool, ConfigError> {
    match present(map, key) {
        None => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(invalid(map, key, "true or false")),
    }
}

/// A token id, or a list of them.
fn token_ids(map: &Map<String, Value>, key: &'static str) -> Result<Vec<u32>, ConfigError> {
    let values = match present(map, key) {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    values
        .iter()
        .map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok()))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| invalid(map, key, "a token id or a list of them"))
}

fn invalid(map: &Map<String, Value>, key: &'static str, expected: &'static str) -> ConfigError {
    ConfigError::Invalid {
        key,
        found: shorten(map.get(key).unwrap_or(&Value::Null)),
        expected,
    }
}

/// A value as JSON, short enough for an error message.
pub(crate) fn shorten(value: &Value) -> String {
    const MAX_CHARS: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests;
