//! Checkpoints of any shape with random weights. Zeros would be faster on no memory we know, but who knows.

use half::bf16;
use lapidary_model::{Checkpoint, ConfigOverrides};
use serde_json::{Map, Value, json};

/// Dimensions of a Gemma-2 model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
}

impl Shape {
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

    /// Read for every step: FP8 layers and the bfloat16 output projection.
    pub(crate) fn weight_bytes(self) -> usize {
        let layer: usize = self.linears().iter().map(|(_, rows, cols)| rows * cols).sum();
        self.layers * layer + 2 * self.vocab * self.hidden
    }

    /// Read for a sequence of `context` tokens: f32 keys and values.
    pub(crate) fn kv_bytes(self, context: usize) -> usize {
        8 * self.layers * context * self.kv_heads * self.head_dim
    }
}

/// An AutoFP8 checkpoint with static activations, in memory.
pub(crate) fn checkpoint(shape: Shape) -> Checkpoint {
    let config = json!({
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"},
    });
    let weights = safetensors(shape);
    Checkpoint::from_bytes(config.to_string().as_bytes(), weights, ConfigOverrides::default()).expect("it is whole")
}

fn safetensors(shape: Shape) -> Vec<u8> {
    let mut file = File {
        header: Map::new(),
        data: Vec::with_capacity(shape.weight_bytes() + (1 << 20)),
        random: Random(1),
    };
    file.bf16("model.embed_tokens.weight", &[shape.vocab, shape.hidden]);
    file.bf16("model.norm.weight", &[shape.hidden]);
    for layer in 0..shape.layers {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input", "post_attention", "pre_feedforward", "post_feedforward"] {
            file.bf16(&format!("{prefix}.{norm}_layernorm.weight"), &[shape.hidden]);
        }
        for (module, rows, cols) in shape.linears() {
            file.fp8(&format!("{prefix}.{module}.weight"), rows, cols);
            file.scalar(&format!("{prefix}.{module}.weight_scale"), 0.002);
            file.scalar(&format!("{prefix}.{module}.input_scale"), 0.02);
        }
    }
    let header = Value::Object(file.header).to_string();
    let prefix = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    file.data.splice(0..0, prefix);
    file.data
}

struct File {
    header: Map<String, Value>,
    data: Vec<u8>,
    random: Random,
}

impl File {
    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], begin: usize) {
        let offsets = [begin, self.data.len()];
        self.header.insert(
            name.to_owned(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
    }

    fn bf16(&mut self, name: &str, shape: &[usize]) {
        let begin = self.data.len();
        for _ in 0..shape.iter().product::<usize>() {
            let value = bf16::from_f32((self.random.next() >> 40) as f32 / (1 << 24) as f32 - 0.5);
            self.data.extend(value.to_le_bytes());
        }
        self.add(name, "BF16", shape, begin);
    }

    fn fp8(&mut self, name: &str, rows: usize, cols: usize) {
        let begin = self.data.len();
        for _ in 0..rows * cols / 8 {
            let codes = self.random.next().to_le_bytes();
            // Clearing a bit of each NaN leaves a number.
            self.data
                .extend(codes.map(|code| if code & 0x7f == 0x7f { code & 0xdf } else { code }));
        }
        self.add(name, "F8_E4M3", &[rows, cols], begin);
    }

    fn scalar(&mut self, name: &str, value: f32) {
        let begin = self.data.len();
        self.data.extend(value.to_le_bytes());
        self.add(name, "F32", &[], begin);
    }
}

/// xorshift64*.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
