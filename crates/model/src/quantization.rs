//! Which linear layers are stored in FP8, and how their input is quantised: `quantization_config` in all its dialects.

use regex::Regex;
use serde_json::{Map, Value};

use crate::config::shorten;
use crate::warning::Warning;

/// How the linear layers of a checkpoint are stored.
#[derive(Debug, Clone, Default)]
pub struct Quantization {
    groups: Vec<Group>,
    ignored: Vec<Pattern>,
    kv_cache_scheme: Option<Value>,
}

/// How one linear layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearScheme {
    /// bf16, fp16 or fp32 weights.
    Unquantized,
    /// E4M3 weights with a `weight_scale`, for the tensor or for each output row: the tensor's shape says which.
    Fp8 {
        /// What happens to the layer's input.
        input: InputScheme,
    },
}

/// What happens to the input of an FP8 layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputScheme {
    /// Nothing: only the weights are quantised.
    None,
    /// Quantised with the scale in `input_scale`.
    Static,
    /// Quantised with a scale computed for each token.
    Token,
}

/// Why a quantised checkpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum QuantizationError {
    /// A method that is not FP8 with per-tensor or per-channel scales.
    #[error("{key} {found} is not supported: {reason}")]
    Unsupported {
        /// Where it says so.
        key: &'static str,
        /// What it says.
        found: String,
        /// Why not.
        reason: &'static str,
    },
    /// A key without a default is absent.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A `re:` pattern that is not a regular expression.
    #[error("pattern {pattern:?} is not a regular expression")]
    Pattern {
        /// The pattern, without `re:`.
        pattern: String,
        /// What is wrong with it.
        #[source]
        source: Box<regex::Error>,
    },
}

#[derive(Debug, Clone)]
struct Group {
    targets: Vec<Pattern>,
    input: InputScheme,
}

/// A name, or a pattern of names, of linear layers.
#[derive(Debug, Clone)]
enum Pattern {
    /// The class of all linear layers.
    EveryLinear,
    /// A module's full name, or the trailing or leading components of one.
    Name(String),
    /// Matches from the start of the name, like Python's `re.match`.
    Regex(Regex),
}

impl Quantization {
    /// Reads the section of a `config.json` that says how weights are quantised, if there is one.
    ///
    /// # Errors
    /// Everything except FP8 E4M3 weights with per-tensor or per-channel scales, by name and with the reason.
    pub fn from_model_config(config: &Map<String, Value>) -> Result<(Self, Vec<Warning>), QuantizationError> {
        let sections = ["quantization_config", "compression_config"].map(|key| config.get(key));
        let Some(section) = sections.into_iter().flatten().find(|section| !section.is_null()) else {
            return Ok((Self::default(), Vec::new()));
        };
        let Value::Object(section) = section else {
            return Err(unsupported("quantization_config", section, "it must be an object"));
        };
        let mut warnings = Vec::new();
        let kv_cache_scheme = section.get("kv_cache_scheme").filter(|scheme| !scheme.is_null());
        if kv_cache_scheme.is_some() {
            warnings.push(Warning::KvCacheSchemeIgnored);
        }
        let mut quantization = match section.get("quant_method").and_then(Value::as_str) {
            Some("fp8") => auto_fp8(section),
            Some("compressed-tensors") => compressed_tensors(section),
            None if section.contains_key("config_groups") => compressed_tensors(section),
            None => Err(QuantizationError::Missing { key: "quant_method" }),
            Some(method) => Err(unsupported("quant_method", &method.into(), refusal(method))),
        }?;
        quantization.kv_cache_scheme = kv_cache_scheme.cloned();
        Ok((quantization, warnings))
    }

    /// How the linear layer of this (unfused) module name is stored: `model.layers.3.mlp.up_proj`, say.
    #[must_use]
    pub fn scheme(&self, linear: &str) -> LinearScheme {
        if self.ignored.iter().any(|pattern| pattern.rank(linear).is_some()) {
            return LinearScheme::Unquantized;
        }
        // The most specific target wins, as in compressed-tensors: a name, then a pattern, then the class.
        let matched = self
            .groups
            .iter()
            .filter_map(|group| {
                Some((
                    group.targets.iter().filter_map(|target| target.rank(linear)).min()?,
                    group,
                ))
            })
            .min_by_key(|(rank, _)| *rank);
        matched.map_or(LinearScheme::Unquantized, |(_, group)| LinearScheme::Fp8 {
            input: group.input,
        })
    }

    /// What the checkpoint says of its KV cache, if its scales were made for anything but 8-bit floats.
    pub(crate) fn foreign_kv_cache_scheme(&self) -> Option<String> {
        let scheme = self.kv_cache_scheme.as_ref()?;
        let is_foreign = |key, expected: Value| {
            scheme
                .get(key)
                .is_some_and(|found| !found.is_null() && *found != expected)
        };
        (is_foreign("num_bits", 8.into()) || is_foreign("type", "float".into())).then(|| shorten(scheme))
    }

    /// Whether any linear layer is quantised.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        !self.groups.is_empty()
    }
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, QuantizationError> {
        let Some(pattern) = text.strip_prefix("re:") else {
            return Ok(if text == "Linear" {
                Self::EveryLinear
            } else {
                Self::Name(text.to_owned())
            });
        };
        let anchored = Regex::new(&format!("^(?:{pattern})"));
        anchored.map(Self::Regex).map_err(|source| QuantizationError::Pattern {
            pattern: pattern.to_owned(),
            source: Box::new(source),
        })
    }

    /// `Some` if it matches; the smaller, the more specific.
    fn rank(&self, linear: &str) -> Option<u8> {
        match self {
            Self::Name(name) => {
                let rest = linear
                    .strip_prefix(name.as_str())
                    .or_else(|| linear.strip_suffix(name.as_str()));
                rest.filter(|rest| rest.is_empty() || rest.starts_with('.') || rest.ends_with('.'))
                    .map(|_| 0)
            }
            Self::Regex(regex) => regex.is_match(linear).then_some(1),
            Self::EveryLinear => Some(2),
        }
    }
}

/// AutoFP8, and what vLLM and transformers write in its dialect.
fn auto_fp8(section: &Map<String, Value>) -> Result<Quantization, QuantizationError> {
    if let Some(shape) = section.get("weight_block_size").filter(|shape| !shape.is_null()) {
        return Err(unsupported(
            "weight_block_size",
            shape,
            "only per-tensor and per-channel weight scales are",
        ));
    }
    if let Some(format) = section
        .get("fmt")
        .filter(|format| *format != "e4m3" && !format.is_null())
    {
        return Err(unsupported("fmt", format, "only e4m3 is"));
    }
    let input = match section.get("activation_scheme") {
        Some(scheme) if scheme == "static" => InputScheme::Static,
        // One scale for a whole batch would make a sequence depend on its neighbours; one for a token is finer too.
        Some(scheme) if scheme == "dynamic" => InputScheme::Token,
        Some(other) => return Err(unsupported("activation_scheme", other, "it must be static or dynamic")),
        None => {
            return Err(QuantizationError::Missing {
                key: "activation_scheme",
            });
        }
    };
    let mut ignored = Vec::new();
    for key in ["ignored_layers", "modules_to_not_convert", "ignored_modules"] {
        ignored.extend(patterns(section, key)?);
    }
    Ok(Quantization {
        groups: vec![Group {
            targets: vec![Pattern::EveryLinear],
            input,
        }],
        ignored,
        kv_cache_scheme: None,
    })
}

fn compressed_tensors(section: &Map<String, Value>) -> Result<Quantization, QuantizationError> {
    check_format(section)?;
    if let Some(status) = section.get("quantization_status").filter(|status| !status.is_null())
        && status != "compressed"
        && status != "frozen"
    {
        return Err(unsupported(
            "quantization_status",
            status,
            "the weights were not compressed",
        ));
    }
    let sparsity = section
        .get("sparsity_config")
        .and_then(|sparsity| sparsity.get("format"));
    if let Some(format) = sparsity.filter(|format| *format != "dense") {
        return Err(unsupported("sparsity_config.format", format, "sparse weights are not"));
    }
    if let Some(transform) = section.get("transform_config").filter(|transform| !is_empty(transform)) {
        return Err(unsupported("transform_config", transform, "rotated weights are not"));
    }
    let Some(Value::Object(groups)) = section.get("config_groups") else {
        return Err(QuantizationError::Missing { key: "config_groups" });
    };
    let groups = groups.values().map(compressed_group).collect::<Result<_, _>>()?;
    Ok(Quantization {
        groups,
        ignored: patterns(section, "ignore")?,
        kv_cache_scheme: None,
    })
}

fn check_format(section: &Map<String, Value>) -> Result<(), QuantizationError> {
    match section.get("format") {
        None | Some(Value::Null) => Ok(()),
        Some(format) if format == "float-quantized" || format == "naive-quantized" => Ok(()),
        Some(format) => Err(unsupported(
            "format",
            format,
            "only float-quantized and naive-quantized are",
        )),
    }
}

fn compressed_group(group: &Value) -> Result<Group, QuantizationError> {
    let Value::Object(group) = group else {
        return Err(unsupported("config_groups", group, "a group must be an object"));
    };
    check_format(group)?;
    let targets = patterns(group, "targets")?;
    if let Some(Pattern::Name(class)) = targets
        .iter()
        .find(|target| matches!(target, Pattern::Name(name) if !name.contains('.')))
    {
        return Err(unsupported(
            "targets",
            &class.as_str().into(),
            "only Linear layers are quantised",
        ));
    }
    if targets.is_empty() {
        return Err(QuantizationError::Missing { key: "targets" });
    }
    let Some(Value::Object(weights)) = group.get("weights") else {
        return Err(QuantizationError::Missing { key: "weights" });
    };
    check_float8(weights, "weights")?;
    match weights.get("strategy") {
        Some(strategy) if strategy == "tensor" || strategy == "channel" => {}
        Some(strategy) => {
            return Err(unsupported(
                "weights.strategy",
                strategy,
                "only tensor and channel scales are",
            ));
        }
        None => {
            return Err(QuantizationError::Missing {
                key: "weights.strategy",
            });
        }
    }
    if let Some(dynamic) = weights.get("dynamic").filter(|dynamic| **dynamic != Value::Bool(false)) {
        return Err(unsupported(
            "weights.dynamic",
            dynamic,
            "weights have scales in the file",
        ));
    }
    if let Some(outputs) = group.get("output_activations").filter(|outputs| !outputs.is_null()) {
        return Err(unsupported("output_activations", outputs, "outputs are not quantised"));
    }
    Ok(Group {
        targets,
        input: input_scheme(group)?,
    })
}

fn input_scheme(group: &Map<String, Value>) -> Result<InputScheme, QuantizationError> {
    let input = match group.get("input_activations") {
        None | Some(Value::Null) => return Ok(InputScheme::None),
        Some(Value::Object(input)) => input,
        Some(other) => return Err(unsupported("input_activations", other, "it must be an object or null")),
    };
    check_float8(input, "input_activations")?;
    let dynamic = input
        .get("dynamic")
        .is_some_and(|dynamic| *dynamic == Value::Bool(true));
    match (input.get("strategy").and_then(Value::as_str), dynamic) {
        (Some("tensor"), false) => Ok(InputScheme::Static),
        // A scale for each token is finer than one for the batch, and does not depend on the neighbours.
        (Some("token" | "tensor"), true) => Ok(InputScheme::Token),
        (None, _) => Err(QuantizationError::Missing {
            key: "input_activations.strategy",
        }),
        (Some(strategy), _) => Err(unsupported(
            "input_activations.strategy",
            &strategy.into(),
            "only static tensor and dynamic token scales are",
        )),
    }
}

fn check_float8(arguments: &Map<String, Value>, what: &'static str) -> Result<(), QuantizationError> {
    let bits = arguments.get("num_bits").unwrap_or(&Value::Null);
    if bits.as_u64() != Some(8) {
        return Err(unsupported("num_bits", bits, "only 8-bit floats are"));
    }
    let kind = arguments.get("type").unwrap_or(&Value::Null);
    if kind != "float" {
        return Err(unsupported("type", kind, "only 8-bit floats are"));
    }
    if let Some(symmetric) = arguments
        .get("symmetric")
        .filter(|symmetric| **symmetric != Value::Bool(true))
    {
        return Err(unsupported("symmetric", symmetric, what));
    }
    Ok(())
}

fn patterns(section: &Map<String, Value>, key: &'static str) -> Result<Vec<Pattern>, QuantizationError> {
    match section.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| match entry.as_str() {
                Some(text) => Pattern::parse(text),
                None => Err(unsupported(key, entry, "it must be a list of names")),
            })
            .collect(),
        Some(other) => Err(unsupported(key, other, "it must be a list of names")),
    }
}

/// Why a quantisation method that other servers know is not served.
fn refusal(method: &str) -> &'static str {
    match method {
        "gptq" | "awq" | "gptq_marlin" | "awq_marlin" | "auto-round" | "aqlm" | "quip" | "hqq" | "eetq" => {
            "integer weights are not; use an FP8 or bf16 checkpoint"
        }
        "bitsandbytes" => "bitsandbytes weights are not; use an FP8 or bf16 checkpoint",
        "modelopt" | "fbgemm_fp8" | "quark" | "torchao" => {
            "its scales follow another convention; use AutoFP8 or compressed-tensors"
        }
        "mxfp4" | "nvfp4" | "modelopt_fp4" => "4-bit floats are not",
        _ => "it must be fp8 (AutoFP8) or compressed-tensors",
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn unsupported(key: &'static str, found: &Value, reason: &'static str) -> QuantizationError {
    QuantizationError::Unsupported {
        key,
        found: shorten(found),
        reason,
    }
}

#[cfg(test)]
mod tests;
