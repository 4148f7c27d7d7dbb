//! Which tensors a Gemma-2 checkpoint must have, and the check that it has them and nothing unknown.
//!
//! Everything here reads names, shapes, types and scales; the large tensors' contents are scanned as they load.

use std::collections::BTreeSet;

use crate::backend::{ActivationScheme, DType, HostTensor, KvCacheDtype, KvScales, LinearWeights};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::problem::{Problem, Problems};
use crate::quantization::{InputScheme, LinearScheme};
use crate::scalars::read_scalars;
use crate::warning::Warning;
use crate::weights::StoredTensor;

/// Every tensor of the model, as the backend takes it.
#[derive(Debug)]
pub(crate) struct ModelTensors<'a> {
    pub(crate) embedding: Named<HostTensor<'a>>,
    pub(crate) layers: Vec<LayerTensors<'a>>,
    pub(crate) final_norm: Named<HostTensor<'a>>,
}

/// One decoder layer's.
#[derive(Debug)]
pub(crate) struct LayerTensors<'a> {
    pub(crate) input_norm: Named<HostTensor<'a>>,
    pub(crate) qkv: Named<LinearWeights<'a>>,
    pub(crate) o: Named<LinearWeights<'a>>,
    pub(crate) post_attention_norm: Named<HostTensor<'a>>,
    pub(crate) pre_feedforward_norm: Named<HostTensor<'a>>,
    pub(crate) gate_up: Named<LinearWeights<'a>>,
    pub(crate) down: Named<LinearWeights<'a>>,
    pub(crate) post_feedforward_norm: Named<HostTensor<'a>>,
    /// Of an e4m3 cache; 1 for any other.
    pub(crate) kv_scales: KvScales,
}

/// A tensor or stack of tensors, and what the checkpoint calls its parts.
#[derive(Debug)]
pub(crate) struct Named<T> {
    pub(crate) names: Vec<String>,
    pub(crate) value: T,
}

/// Matches a checkpoint's tensors with what its configuration asks for. The scales of keys and values are read for an
/// e4m3 cache alone.
///
/// # Errors
/// Everything that is missing, unknown, or of the wrong shape, type or scale, at once.
pub(crate) fn verify(
    checkpoint: &Checkpoint,
    kv_cache_dtype: KvCacheDtype,
) -> Result<(ModelTensors<'_>, Vec<Warning>), Problems> {
    let mut verifier = Verifier {
        checkpoint,
        config: checkpoint.config(),
        kv_cache_dtype,
        layers_without_kv_scales: 0,
        used: BTreeSet::new(),
        problems: Problems::default(),
        warnings: Vec::new(),
    };
    let config = verifier.config;
    let tensors = ModelTensors {
        embedding: verifier.dense("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size]),
        layers: (0..config.num_layers).map(|layer| verifier.layer(layer)).collect(),
        final_norm: verifier.dense("model.norm.weight", &[config.hidden_size]),
    };
    verifier.check_kv_scales();
    verifier.check_extras();
    if verifier.problems.is_empty() {
        Ok((tensors, verifier.warnings))
    } else {
        Err(verifier.problems)
    }
}

impl<'a> ModelTensors<'a> {
    /// Every tensor with its name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, HostTensor<'a>)> {
        let ends = [&self.embedding, &self.final_norm]
            .into_iter()
            .map(|end| (end.names[0].as_str(), end.value));
        ends.chain(self.layers.iter().flat_map(LayerTensors::parts))
    }

    /// Bytes that will be uploaded.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.iter().map(|(_, tensor)| tensor.data.len() as u64).sum()
    }
}

impl<'a> LayerTensors<'a> {
    /// Every tensor of the layer with its name.
    pub(crate) fn parts(&self) -> Vec<(&str, HostTensor<'a>)> {
        let norms = [
            &self.input_norm,
            &self.post_attention_norm,
            &self.pre_feedforward_norm,
            &self.post_feedforward_norm,
        ];
        let norms = norms.into_iter().map(|norm| (norm.names[0].as_str(), norm.value));
        let linears = [&self.qkv, &self.o, &self.gate_up, &self.down].into_iter();
        let linears = linears.flat_map(|linear| {
            linear
                .names
                .iter()
                .map(String::as_str)
                .zip(linear.value.parts.iter().copied())
        });
        norms.chain(linears).collect()
    }
}

struct Verifier<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    kv_cache_dtype: KvCacheDtype,
    layers_without_kv_scales: usize,
    used: BTreeSet<String>,
    problems: Problems,
    warnings: Vec<Warning>,
}

/// Stands for a tensor that has a problem; never uploaded, since a problem ends the load.
const ABSENT: HostTensor<'static> = HostTensor {
    data: &[],
    dtype: DType::F32,
    shape: &[],
};

impl<'a> Verifier<'a> {
    fn layer(&mut self, index: usize) -> LayerTensors<'a> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_size(), config.kv_size());
        let name = |module: &str| format!("model.layers.{index}.{module}");
        let qkv = [
            ("self_attn.q_proj", q),
            ("self_attn.k_proj", kv),
            ("self_attn.v_proj", kv),
        ];
        let gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)];
        LayerTensors {
            input_norm: self.dense(&name("input_layernorm.weight"), &[hidden]),
            qkv: self.linear(&qkv.map(|(module, out)| (name(module), out)), hidden),
            o: self.linear(&[(name("self_attn.o_proj"), hidden)], q),
            post_attention_norm: self.dense(&name("post_attention_layernorm.weight"), &[hidden]),
            pre_feedforward_norm: self.dense(&name("pre_feedforward_layernorm.weight"), &[hidden]),
            gate_up: self.linear(&gate_up.map(|(module, out)| (name(module), out)), hidden),
            down: self.linear(&[(name("mlp.down_proj"), hidden)], inner),
            post_feedforward_norm: self.dense(&name("post_feedforward_layernorm.weight"), &[hidden]),
            kv_scales: self.kv_scales(index),
        }
    }

    /// A tensor that is never quantised.
    fn dense(&mut self, name: &str, shape: &[usize]) -> Named<HostTensor<'a>> {
        let value = self
            .tensor(name, shape, &[DType::Bf16, DType::F16, DType::F32])
            .unwrap_or(ABSENT);
        Named {
            names: vec![name.to_owned()],
            value,
        }
    }

    /// Projections that read the same input, stacked along their outputs.
    fn linear(&mut self, modules: &[(String, usize)], in_features: usize) -> Named<LinearWeights<'a>> {
        let schemes: Vec<_> = modules
            .iter()
            .map(|(module, _)| self.config.quantization.scheme(module))
            .collect();
        let parts: Vec<_> = modules
            .iter()
            .zip(&schemes)
            .map(|((module, out), scheme)| self.weight(module, &[*out, in_features], *scheme))
            .collect();
        let group = || modules.iter().map(|(module, _)| module.clone()).collect::<Vec<_>>();
        let mut scales = Vec::new();
        let mut input = ActivationScheme::None;
        if schemes.windows(2).any(|pair| pair[0] != pair[1]) {
            self.mark_scales_used(modules);
            self.problems.push(Problem::MixedSchemes { modules: group() });
        } else if let LinearScheme::Fp8 { input: scheme } = schemes[0] {
            for (module, out) in modules {
                self.weight_scales(module, *out, &mut scales);
            }
            input = self.input_scheme(modules, scheme);
        } else if differ(parts.iter().filter(|part| !part.data.is_empty()).map(|part| part.dtype)) {
            self.problems.push(Problem::MixedDTypes { modules: group() });
        }
        let names = modules.iter().map(|(module, _)| format!("{module}.weight")).collect();
        Named {
            names,
            value: LinearWeights { parts, scales, input },
        }
    }

    fn weight(&mut self, module: &str, shape: &[usize], scheme: LinearScheme) -> HostTensor<'a> {
        let name = format!("{module}.weight");
        let dtypes: &[DType] = match scheme {
            LinearScheme::Unquantized => &[DType::Bf16, DType::F16, DType::F32],
            LinearScheme::Fp8 { .. } => &[DType::F8E4M3],
        };
        self.tensor(&name, shape, dtypes).unwrap_or(ABSENT)
    }

    /// Appends one scale for each output row. The file's scale is applied to the rows it was made for, exactly: fused
    /// projections are never requantised to a common scale.
    fn weight_scales(&mut self, module: &str, out_features: usize, scales: &mut Vec<f32>) {
        let name = format!("{module}.weight_scale");
        let Some(stored) = self.stored(&name) else { return };
        match *stored.shape {
            [] | [1] | [1, 1] => {
                let scale = self.scales(&name, stored).and_then(|values| values.first().copied());
                scales.extend(std::iter::repeat_n(scale.unwrap_or(1.0), out_features));
            }
            [rows] | [rows, 1] if rows == out_features => {
                scales.extend(self.scales(&name, stored).unwrap_or_default());
            }
            _ => self.problems.push(Problem::Shape {
                name,
                expected: format!("[], [1], [{out_features}] or [{out_features}, 1]"),
                found: stored.shape.to_vec(),
            }),
        }
    }

    fn input_scheme(&mut self, modules: &[(String, usize)], scheme: InputScheme) -> ActivationScheme {
        match scheme {
            InputScheme::None => return ActivationScheme::None,
            InputScheme::Token => return ActivationScheme::Fp8Token,
            InputScheme::Static => {}
        }
        let scales: Vec<f32> = modules
            .iter()
            .filter_map(|(module, _)| self.one_scale(&format!("{module}.input_scale")))
            .collect();
        let scale = scales.iter().copied().fold(0.0, f32::max);
        if scales.iter().any(|other| *other != scale) {
            // They quantise one and the same input, so they only differ by calibration; the largest clips least.
            let group = modules
                .iter()
                .map(|(module, _)| module.as_str())
                .collect::<Vec<_>>()
                .join(", ");
            self.warnings.push(Warning::InputScalesDiffer { group, scales });
        }
        ActivationScheme::Fp8Static { scale }
    }

    /// What a layer's keys and values are divided by. Each has a name of its own in several dialects, which must agree where
    /// there is more than one; the common `kv_scale` is for whichever has none. All that is there must be valid, used or not.
    fn kv_scales(&mut self, layer: usize) -> KvScales {
        if self.kv_cache_dtype == KvCacheDtype::Native {
            return KvScales::default();
        }
        let common = self.agreed_scale(layer, &[KEY_VALUE_SCALE]);
        let [key, value] = [KEY_SCALES, VALUE_SCALES].map(|names| self.agreed_scale(layer, &names).or(common));
        if key.is_none() || value.is_none() {
            self.layers_without_kv_scales += 1;
        }
        KvScales {
            key: key.unwrap_or(1.0),
            value: value.unwrap_or(1.0),
        }
    }

    /// The scale that those of `names` that are there agree on.
    fn agreed_scale(&mut self, layer: usize, names: &[&str]) -> Option<f32> {
        let mut found: Vec<(String, f32)> = Vec::new();
        for name in names {
            let name = format!("model.layers.{layer}.self_attn.{name}");
            if self.checkpoint.weights().get(&name).is_some()
                && let Some(scale) = self.one_scale(&name)
            {
                found.push((name, scale));
            }
        }
        let (_, first) = *found.first()?;
        if found.iter().any(|(_, scale)| *scale != first) {
            let (names, scales) = found.into_iter().unzip();
            self.problems.push(Problem::KvScalesDiffer { names, scales });
        }
        Some(first)
    }

    /// A scale for a whole tensor.
    fn one_scale(&mut self, name: &str) -> Option<f32> {
        let stored = self.stored(name)?;
        if !matches!(*stored.shape, [] | [1] | [1, 1]) {
            let (expected, found) = ("[] or [1]".to_owned(), stored.shape.to_vec());
            self.problems.push(Problem::Shape {
                name: name.to_owned(),
                expected,
                found,
            });
            return None;
        }
        self.scales(name, stored)?.first().copied()
    }

    /// The values of a scale tensor, all of them positive and finite.
    fn scales(&mut self, name: &str, stored: StoredTensor<'a>) -> Option<Vec<f32>> {
        let Some(values) = stored.as_host().and_then(read_scalars) else {
            let (name, found) = (name.to_owned(), stored.dtype.to_owned());
            self.problems.push(Problem::DType {
                name,
                expected: "F32, BF16 or F16",
                found,
            });
            return None;
        };
        if let Some(row) = values.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
            self.problems.push(Problem::Scale {
                name: name.to_owned(),
                row,
                value: values[row],
            });
            return None;
        }
        Some(values)
    }

    fn tensor(&mut self, name: &str, shape: &[usize], dtypes: &[DType]) -> Option<HostTensor<'a>> {
        let stored = self.stored(name)?;
        if stored.shape != shape {
            let (expected, found) = (format!("{shape:?}"), stored.shape.to_vec());
            self.problems.push(Problem::Shape {
                name: name.to_owned(),
                expected,
                found,
            });
            return None;
        }
        match stored.as_host() {
            Some(tensor) if dtypes.contains(&tensor.dtype) => Some(tensor),
            _ => {
                let expected = match dtypes {
                    [DType::F8E4M3] => "F8_E4M3 by quantization_config",
                    _ => "BF16, F16 or F32 (quantization_config does not name it)",
                };
                let (name, found) = (name.to_owned(), stored.dtype.to_owned());
                self.problems.push(Problem::DType { name, expected, found });
                None
            }
        }
    }

    fn stored(&mut self, name: &str) -> Option<StoredTensor<'a>> {
        let stored = self.checkpoint.weights().get(name);
        match stored {
            Some(_) => {
                self.used.insert(name.to_owned());
            }
            None => self.problems.push(Problem::Missing { name: name.to_owned() }),
        }
        stored
    }

    /// Keeps one fault (a mixed group) from being reported as several unknown scales too.
    fn mark_scales_used(&mut self, modules: &[(String, usize)]) {
        for (module, _) in modules {
            self.used.insert(format!("{module}.weight_scale"));
            self.used.insert(format!("{module}.input_scale"));
        }
    }

    fn check_kv_scales(&mut self) {
        if self.kv_cache_dtype == KvCacheDtype::Native {
            return;
        }
        if let Some(scheme) = self.config.quantization.foreign_kv_cache_scheme() {
            self.problems.push(Problem::KvCacheScheme { scheme });
        }
        if self.layers_without_kv_scales > 0 {
            self.warnings.push(Warning::KvScalesMissing {
                layers: self.layers_without_kv_scales,
                num_layers: self.config.num_layers,
            });
        }
    }

    fn check_extras(&mut self) {
        let mut ignored = Ignored::default();
        let mut kv_scales = Ignored::default();
        for (name, stored) in self.checkpoint.weights().iter() {
            if self.used.contains(name) {
                continue;
            }
            if name.ends_with("_zero_point") {
                if stored.data.iter().any(|byte| *byte != 0) {
                    self.problems.push(Problem::ZeroPoint { name: name.to_owned() });
                }
            } else if is_kv_scale(name) && self.kv_cache_dtype == KvCacheDtype::Native {
                kv_scales.add(name);
                continue;
            } else if !is_harmless(name) {
                self.problems.push(Problem::Unexpected { name: name.to_owned() });
            }
            ignored.add(name);
        }
        if let Ignored {
            count,
            first: Some(first),
        } = kv_scales
        {
            self.warnings.push(Warning::KvScalesIgnored { count, first });
        }
        if let Ignored {
            count,
            first: Some(first),
        } = ignored
        {
            self.warnings.push(Warning::TensorsIgnored { count, first });
        }
    }
}

/// Tensors that are not used.
#[derive(Debug, Default)]
struct Ignored {
    count: usize,
    first: Option<String>,
}

impl Ignored {
    fn add(&mut self, name: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| name.to_owned());
    }
}

fn differ(mut values: impl Iterator<Item = DType>) -> bool {
    let first = values.next();
    values.any(|value| Some(value) != first)
}

/// The scale of a layer's keys in all the places it has been seen, after `self_attn.`.
const KEY_SCALES: [&str; 4] = ["k_scale", "k_proj.k_scale", "k_proj.output_scale", "qkv_proj.k_scale"];
/// The same of its values.
const VALUE_SCALES: [&str; 4] = ["v_scale", "v_proj.v_scale", "v_proj.output_scale", "qkv_proj.v_scale"];
/// One for both.
const KEY_VALUE_SCALE: &str = "kv_scale";

/// Whether an FP8 KV cache would use it.
fn is_kv_scale(name: &str) -> bool {
    let of_layer = name.strip_prefix("model.layers.");
    of_layer
        .and_then(|name| name.split_once(".self_attn."))
        .is_some_and(|(_, name)| name == KEY_VALUE_SCALE || KEY_SCALES.contains(&name) || VALUE_SCALES.contains(&name))
}

/// Tensors that exporters leave behind and that change nothing here: the tied output projection, scales of other steps of
/// attention than the KV cache, and rotary frequencies that are computed.
fn is_harmless(name: &str) -> bool {
    const SUFFIXES: [&str; 4] = [
        ".self_attn.q_scale",
        ".self_attn.prob_scale",
        ".self_attn.q_proj.output_scale",
        ".self_attn.rotary_emb.inv_freq",
    ];
    let of_layer = name.starts_with("model.layers.") && SUFFIXES.iter().any(|suffix| name.ends_with(suffix));
    of_layer || name == "lm_head.weight" || name == "model.rotary_emb.inv_freq"
}

#[cfg(test)]
mod tests;
