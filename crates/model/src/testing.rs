//! Small checkpoints made in memory, whole or broken on purpose.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value, json};

use crate::backend::KvScales;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ConfigOverrides;

/// How the linear layers of a [`TinyModel`] are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TinyWeights {
    /// Unquantised, as `BF16`, `F16` or `F32`.
    Dense(&'static str),
    /// AutoFP8 with scales for inputs in the file.
    AutoFp8Static,
    /// AutoFP8 with scales for inputs computed.
    AutoFp8Dynamic,
    /// compressed-tensors, a scale for each output row, inputs quantised by token.
    CompressedChannel,
    /// compressed-tensors, inputs not quantised.
    CompressedWeightOnly,
}

/// All there is to a Gemma-2 checkpoint, small enough to be made in a test and open to be broken by it.
#[derive(Debug, Clone)]
pub struct TinyModel {
    /// `config.json`.
    pub config: Map<String, Value>,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TinyTensor>,
}

/// A tensor as a safetensors file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TinyTensor {
    /// safetensors' name of the element type.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Vec<u8>,
}

/// The shape of a [`TinyModel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TinyShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub inner: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Tokens.
    pub vocab: usize,
}

impl TinyShape {
    /// As small as the decoder allows. 4 heads of 32 make 128, which is not the hidden size of 64.
    pub const SMALLEST: Self = Self {
        hidden: 64,
        inner: 96,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        layers: 3,
        vocab: 160,
    };
    /// Every width a multiple of 128, a head size that every backend has.
    pub const ALIGNED: Self = Self {
        hidden: 128,
        inner: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        layers: 3,
        vocab: 256,
    };

    /// Linear layers of a decoder layer: name, outputs, inputs.
    fn linears(self) -> [(&'static str, usize, usize); 7] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        [
            ("self_attn.q_proj", q, self.hidden),
            ("self_attn.k_proj", kv, self.hidden),
            ("self_attn.v_proj", kv, self.hidden),
            ("self_attn.o_proj", self.hidden, q),
            ("mlp.gate_proj", self.inner, self.hidden),
            ("mlp.up_proj", self.inner, self.hidden),
            ("mlp.down_proj", self.hidden, self.inner),
        ]
    }
}

impl TinyModel {
    /// Random weights of [`TinyShape::SMALLEST`], reproducibly.
    #[must_use]
    pub fn new(weights: TinyWeights) -> Self {
        Self::with_shape(weights, TinyShape::SMALLEST)
    }

    /// Random weights, reproducibly.
    #[must_use]
    pub fn with_shape(weights: TinyWeights, shape: TinyShape) -> Self {
        let TinyShape {
            hidden, layers, vocab, ..
        } = shape;
        let mut model = Self {
            config: config(weights, shape),
            tensors: BTreeMap::new(),
        };
        let mut random = Random(1);
        let dtype = if let TinyWeights::Dense(dtype) = weights {
            dtype
        } else {
            "BF16"
        };
        let mut dense = |model: &mut Self, name: &str, shape: &[usize], size: f32| {
            let values = random.values(shape.iter().product(), size);
            model
                .tensors
                .insert(name.to_owned(), TinyTensor::new(dtype, shape, &values));
        };
        dense(&mut model, "model.embed_tokens.weight", &[vocab, hidden], 0.5);
        dense(&mut model, "model.norm.weight", &[hidden], 0.5);
        for layer in 0..layers {
            for norm in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
                dense(
                    &mut model,
                    &format!("model.layers.{layer}.{norm}_layernorm.weight"),
                    &[hidden],
                    0.5,
                );
            }
        }
        for layer in 0..layers {
            for (module, out, inputs) in shape.linears() {
                model.add_linear(
                    &format!("model.layers.{layer}.{module}"),
                    [out, inputs],
                    weights,
                    &mut random,
                );
            }
        }
        model
    }

    fn add_linear(&mut self, module: &str, shape: [usize; 2], weights: TinyWeights, random: &mut Random) {
        let mut add = |suffix: &str, tensor| self.tensors.insert(format!("{module}.{suffix}"), tensor);
        let scale = 0.001 * (1.0 + random.unit());
        if let TinyWeights::Dense(dtype) = weights {
            add(
                "weight",
                TinyTensor::new(dtype, &shape, &random.values(shape[0] * shape[1], 0.3)),
            );
            return;
        }
        add(
            "weight",
            TinyTensor {
                dtype: "F8_E4M3".into(),
                shape: shape.to_vec(),
                data: random.codes(shape),
            },
        );
        match weights {
            TinyWeights::AutoFp8Static => {
                add("weight_scale", TinyTensor::new("F32", &[], &[scale]));
                add("input_scale", TinyTensor::new("F32", &[], &[0.02]));
            }
            TinyWeights::CompressedChannel => {
                let scales: Vec<f32> = (0..shape[0]).map(|_| 0.001 * (1.0 + random.unit())).collect();
                add("weight_scale", TinyTensor::new("BF16", &[shape[0], 1], &scales));
            }
            _ => {
                add("weight_scale", TinyTensor::new("F32", &[1], &[scale]));
            }
        }
    }

    /// Gives every layer `self_attn.k_scale` and `self_attn.v_scale`, for an FP8 KV cache.
    pub fn add_kv_scales(&mut self, scales: KvScales) {
        let layers = self.config["num_hidden_layers"].as_u64().unwrap_or_default();
        for layer in 0..layers {
            for (name, scale) in [("k_scale", scales.key), ("v_scale", scales.value)] {
                let name = format!("model.layers.{layer}.self_attn.{name}");
                self.tensors.insert(name, TinyTensor::new("F32", &[], &[scale]));
            }
        }
    }

    /// `model.safetensors`.
    #[must_use]
    pub fn safetensors(&self) -> Vec<u8> {
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, tensor) in &self.tensors {
            let begin = data.len();
            data.extend_from_slice(&tensor.data);
            let offsets = [begin, data.len()];
            header.insert(
                name.clone(),
                json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}),
            );
        }
        let header = Value::Object(header).to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
    }

    /// Opens it without touching a disk.
    ///
    /// # Errors
    /// Whatever is broken.
    pub fn checkpoint(&self) -> Result<Checkpoint, CheckpointError> {
        let config = Value::Object(self.config.clone()).to_string();
        Checkpoint::from_bytes(config.as_bytes(), self.safetensors(), ConfigOverrides::default())
    }

    /// Writes `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// The system refused.
    pub fn write_dir(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::write(dir.join("config.json"), Value::Object(self.config.clone()).to_string())?;
        std::fs::write(dir.join("model.safetensors"), self.safetensors())
    }
}

impl TinyTensor {
    /// Values as `F32`, `F16` or anything else as `BF16`.
    #[must_use]
    pub fn new(dtype: &str, shape: &[usize], values: &[f32]) -> Self {
        let data = values
            .iter()
            .flat_map(|value| match dtype {
                "F32" => value.to_le_bytes().to_vec(),
                "F16" => f16::from_f32(*value).to_le_bytes().to_vec(),
                _ => bf16::from_f32(*value).to_le_bytes().to_vec(),
            })
            .collect();
        Self {
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            data,
        }
    }
}

fn config(weights: TinyWeights, shape: TinyShape) -> Map<String, Value> {
    let mut config = json!({
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 512,
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": 24,
        "bos_token_id": 2,
        "eos_token_id": [1, 107],
    });
    let group = |inputs: Value| {
        json!({
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "symmetric": true, "strategy": "channel", "dynamic": false},
                "input_activations": inputs,
                "output_activations": null,
            }},
            "ignore": ["lm_head"],
        })
    };
    let quantization = match weights {
        TinyWeights::Dense(_) => Value::Null,
        TinyWeights::AutoFp8Static => json!({"quant_method": "fp8", "activation_scheme": "static"}),
        TinyWeights::AutoFp8Dynamic => json!({"quant_method": "fp8", "activation_scheme": "dynamic"}),
        TinyWeights::CompressedChannel => {
            group(json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "token", "dynamic": true}))
        }
        TinyWeights::CompressedWeightOnly => group(Value::Null),
    };
    let Value::Object(map) = &mut config else {
        unreachable!("it was written as an object above")
    };
    if !quantization.is_null() {
        map.insert("quantization_config".into(), quantization);
    }
    std::mem::take(map)
}

/// xorshift64*: no dependency, the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In `0..1`.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    fn values(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| (2.0 * self.unit() - 1.0) * size).collect()
    }

    /// E4M3 codes, none of them NaN.
    fn codes(&mut self, [rows, cols]: [usize; 2]) -> Vec<u8> {
        (0..rows * cols)
            .map(|_| {
                let code = (self.next() >> 32) as u8;
                if code & 0x7f == 0x7f { code ^ 1 } else { code }
            })
            .collect()
    }
}
