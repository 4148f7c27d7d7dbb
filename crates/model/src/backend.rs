//! The dozen fused operations a Gemma-2 decoder needs, and nothing the model does not use.
//!
//! Shapes are row-major. A backend allocates everything it will ever use before the first step; operations write into
//! `out` parameters. Operations of one step are issued in order and may run asynchronously; only [`Backend::collect`]
//! waits.
//!
//! Whatever a row of the result depends on is in that row's own sequence: how many other rows share the step must not
//! change a bit of it.

use std::fmt::{self, Debug};

use half::bf16;
use lapidary_engine::{Batch, SampledToken};

/// Element type of a tensor in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision: weights only, Gemma-2's activations overflow it.
    F16,
    /// IEEE single precision.
    F32,
    /// FP8 with 4 exponent and 3 mantissa bits, no infinities, largest value 448.
    F8E4M3,
}

impl DType {
    /// Bytes an element takes.
    #[must_use]
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F8E4M3 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// A tensor in host memory, usually a view into a mapped file.
#[derive(Debug, Clone, Copy)]
pub struct HostTensor<'a> {
    /// Little-endian elements, row-major, exactly `shape` of them; not necessarily aligned.
    pub data: &'a [u8],
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
}

/// How the input of a linear layer is quantised: the checkpoint's choice, the same on every backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ActivationScheme {
    /// Not at all.
    None,
    /// To e4m3 with this one scale from the file: `q = round(clamp(x / scale, -448, 448))`.
    Fp8Static {
        /// Positive and finite.
        scale: f32,
    },
    /// To e4m3 with a scale for each token: `max(amax(row) / 448, FP8_MIN_TOKEN_SCALE)`.
    Fp8Token,
}

/// Smallest scale of [`ActivationScheme::Fp8Token`] (an all-zero row must not divide by zero); vLLM's value.
pub const FP8_MIN_TOKEN_SCALE: f32 = 1.0 / (448.0 * 512.0);

/// Largest finite e4m3 value.
pub const FP8_MAX: f32 = 448.0;

/// One projection, or several that read the same input, stacked along their output rows (q, k, v; gate, up).
#[derive(Debug, Clone)]
pub struct LinearWeights<'a> {
    /// `[out_i, in_features]` each, all of one dtype, in stacking order.
    pub parts: Vec<HostTensor<'a>>,
    /// F8E4M3: one scale for each of the stacked output rows (`weight = e4m3 * scale`). Empty for other dtypes.
    pub scales: Vec<f32>,
    /// How the input arrives. [`ActivationScheme::None`] with F8E4M3 weights is weight-only quantisation.
    pub input: ActivationScheme,
}

/// What attention needs to know of the model beyond a layer's window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head. `num_heads * head_dim` need not be the hidden size.
    pub head_dim: usize,
    /// Multiplies `q . k` (`query_pre_attn_scalar ^ -0.5`).
    pub scale: f32,
    /// `Some(c)`: scores become `c * tanh(score / c)`, before the mask.
    pub softcap: Option<f32>,
    /// Base of the rotary embedding (neox style: halves rotated) over the whole head.
    pub rope_theta: f32,
    /// How keys and values are kept.
    pub kv_cache_dtype: KvCacheDtype,
}

/// How the cache keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// As a backend keeps other values between operations: f32 on the CPU, bf16 on CUDA.
    #[default]
    Native,
    /// e4m3, with the scales of [`KvScales`]. What attention reads is what is stored, for a step's own tokens too.
    Fp8E4m3,
}

impl fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Fp8E4m3 => "fp8_e4m3",
        })
    }
}

/// What a layer's keys and values are divided by before they become e4m3: `round(clamp(x / scale, -448, 448))`, where `x`
/// is not rounded to anything else before. Positive and finite; without meaning where the cache is not e4m3.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KvScales {
    /// Of rotated keys.
    pub key: f32,
    /// Of values.
    pub value: f32,
}

impl Default for KvScales {
    fn default() -> Self {
        Self { key: 1.0, value: 1.0 }
    }
}

/// How precisely a tensor is kept between operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// As the backend likes: f32 on the CPU, bf16 on CUDA.
    Native,
    /// f32 everywhere: the residual stream, which many small sums go into, and logits.
    Wide,
}

/// Upper bounds of a step, so that a backend can reserve everything at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of a step.
    pub max_tokens: usize,
    /// Sequences of a step.
    pub max_seqs: usize,
    /// Positions of a sequence.
    pub max_model_len: usize,
}

/// Memory of the device a backend runs on, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Available now.
    pub free_bytes: u64,
    /// In all.
    pub total_bytes: u64,
}

/// A device that can run the decoder.
pub trait Backend: 'static {
    /// `[rows, cols]` values between operations, of either [`Width`].
    type Tensor: Debug;
    /// `[rows, cols]` input of a linear layer, in whatever form the layer's [`ActivationScheme`] asks; each write sets
    /// the scheme anew.
    type Activation: Debug;
    /// Weights of one (stacked) projection, laid out as the backend likes.
    type Linear: Debug;
    /// Weights of gate and up, stacked in whatever order [`Backend::gated_linear`] likes.
    type GatedLinear: Debug;
    /// Weights of an RMS norm, `[hidden]`.
    type Norm: Debug;
    /// The embedding table `[vocab, hidden]`, which is the output projection too.
    type Embedding: Debug;
    /// Keys and values of one layer: `[num_blocks, block_size, num_kv_heads, head_dim]` each.
    type KvLayer: Debug;
    /// One step's inputs on the device and how its attention is split; made once, used by every layer.
    type Plan: Debug;

    /// Called once, before everything else: limits of every later step, and the attention geometry.
    ///
    /// # Errors
    /// Shapes the backend cannot run, or not enough memory.
    fn prepare(&mut self, limits: StepLimits, attention: AttentionConfig) -> Result<(), BackendError>;

    /// What can still be allocated.
    fn memory(&self) -> MemoryInfo;

    /// # Errors
    /// Not enough memory, or shapes the backend cannot run.
    fn upload_linear(&mut self, weights: &LinearWeights<'_>) -> Result<Self::Linear, BackendError>;

    /// Of two parts of one shape, gate and up.
    ///
    /// # Errors
    /// Not enough memory, or shapes the backend cannot run.
    fn upload_gated_linear(&mut self, weights: &LinearWeights<'_>) -> Result<Self::GatedLinear, BackendError>;

    /// # Errors
    /// Not enough memory.
    fn upload_norm(&mut self, weight: HostTensor<'_>) -> Result<Self::Norm, BackendError>;

    /// # Errors
    /// Not enough memory.
    fn upload_embedding(&mut self, table: HostTensor<'_>) -> Result<Self::Embedding, BackendError>;

    /// Bytes [`Backend::alloc_tensor`] takes.
    fn tensor_bytes(&self, rows: usize, cols: usize, _width: Width) -> u64 {
        (rows * cols * size_of::<f32>()) as u64
    }

    /// Bytes [`Backend::alloc_activation`] takes.
    fn activation_bytes(&self, rows: usize, cols: usize) -> u64 {
        (rows * cols * size_of::<f32>()) as u64
    }

    /// # Errors
    /// Not enough memory.
    fn alloc_tensor(&mut self, rows: usize, cols: usize, width: Width) -> Result<Self::Tensor, BackendError>;

    /// # Errors
    /// Not enough memory.
    fn alloc_activation(&mut self, rows: usize, cols: usize) -> Result<Self::Activation, BackendError>;

    /// Bytes one block of one layer takes.
    fn kv_block_bytes(&self, block_size: usize) -> u64;

    /// # Errors
    /// Not enough memory.
    fn alloc_kv_layer(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        scales: KvScales,
    ) -> Result<Self::KvLayer, BackendError>;

    /// Steps worth having in flight: 1 where the operations themselves do the work, 2 where a device works behind them.
    fn max_steps_in_flight(&self) -> usize {
        1
    }

    /// From now on, the operations between [`Backend::begin`] and [`Backend::sample`] depend on two things alone: the
    /// number of tokens and whether the step samples. A backend may record and replay them. Gives the steps that the caller
    /// should run before it serves, so that nothing has to be reserved later.
    fn operations_repeat(&mut self) -> Vec<Rehearsal> {
        Vec::new()
    }

    /// Starts a step: uploads its inputs, resolves rows fed by the previous step, splits the attention work.
    ///
    /// # Errors
    /// The device failed.
    fn begin(&mut self, batch: &Batch) -> Result<Self::Plan, BackendError>;

    /// `residual[t] = table[token_ids[t]] * scale`, in f32 on the CPU.
    ///
    /// # Errors
    /// The device failed.
    fn embed(
        &mut self,
        plan: &Self::Plan,
        table: &Self::Embedding,
        scale: bf16,
        residual: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = quantise(norm(x))`, where `norm(x) = x * rsqrt(mean(x^2) + eps) * (1 + weight)` in f32.
    ///
    /// # Errors
    /// The device failed.
    fn norm(
        &mut self,
        plan: &Self::Plan,
        x: &Self::Tensor,
        norm: NormArgs<'_, Self>,
        out: &mut Self::Activation,
    ) -> Result<(), BackendError>
    where
        Self: Sized;

    /// `out = x * weights^T`, `[num_tokens, out_features]`.
    ///
    /// # Errors
    /// The device failed.
    fn linear(
        &mut self,
        plan: &Self::Plan,
        x: &Self::Activation,
        weights: &Self::Linear,
        out: &mut Self::Tensor,
    ) -> Result<(), BackendError>;

    /// `out = quantise(gelu_tanh(gate) * up)`, `[num_tokens, intermediate]`, where gate and up are `x * weights^T`.
    ///
    /// `gate_up` (`[num_tokens, 2 * intermediate]`) is room for those two; what it holds afterwards is the backend's affair.
    ///
    /// # Errors
    /// The device failed.
    fn gated_linear(
        &mut self,
        plan: &Self::Plan,
        x: &Self::Activation,
        weights: &Self::GatedLinear,
        gate_up: &mut Self::Tensor,
        out_scheme: ActivationScheme,
        out: &mut Self::Activation,
    ) -> Result<(), BackendError>;

    /// Rotates q and k of `qkv` (`[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`: q heads, k heads, v heads),
    /// q in place, and writes k and v to the step's slots of `kv`.
    ///
    /// # Errors
    /// The device failed.
    fn rope_append(
        &mut self,
        plan: &Self::Plan,
        qkv: &mut Self::Tensor,
        kv: &mut Self::KvLayer,
    ) -> Result<(), BackendError>;

    /// `out = quantise(attention(q, kv))`, `[num_tokens, num_heads * head_dim]`. Causal; with `window = Some(w)` token
    /// `i` sees `j` with `i - j < w`.
    ///
    /// # Errors
    /// The device failed.
    fn attention(
        &mut self,
        plan: &Self::Plan,
        qkv: &Self::Tensor,
        kv: &Self::KvLayer,
        window: Option<usize>,
        out_scheme: ActivationScheme,
        out: &mut Self::Activation,
    ) -> Result<(), BackendError>;

    /// `residual += norm_post(x)`, then `out = quantise(norm_pre(residual))`.
    ///
    /// # Errors
    /// The device failed.
    fn add_norm(
        &mut self,
        plan: &Self::Plan,
        x: &Self::Tensor,
        post: &Self::Norm,
        residual: &mut Self::Tensor,
        pre: NormArgs<'_, Self>,
        out: &mut Self::Activation,
    ) -> Result<(), BackendError>
    where
        Self: Sized;

    /// The end of the decoder for the step's sampled rows only: `residual + norm_post(x)`, `norm`, then
    /// `logits[s] = softcap * tanh((hidden . table^T) / softcap)`, `[num_samples, vocab]` in f32.
    ///
    /// # Errors
    /// The device failed.
    fn logits(
        &mut self,
        plan: &Self::Plan,
        last: LastHidden<'_, Self>,
        table: &Self::Embedding,
        softcap: Option<f32>,
        logits: &mut Self::Tensor,
    ) -> Result<(), BackendError>
    where
        Self: Sized;

    /// Chooses a token for each of the batch's `samples` from `logits`, which it may overwrite. The result waits for
    /// [`Backend::collect`]. What each parameter means, and in which order, is at the top of `conformance`.
    ///
    /// Ends every step, also one without `samples` (for which [`Backend::logits`] is not called). A step that fails
    /// before it is not collected: the next [`Backend::begin`] takes its place.
    ///
    /// # Errors
    /// The device failed.
    fn sample(&mut self, plan: &Self::Plan, batch: &Batch, logits: &mut Self::Tensor) -> Result<(), BackendError>;

    /// The oldest step that reached [`Backend::sample`]: waits for it and gives its sampled tokens, in the order of its `samples`.
    ///
    /// # Errors
    /// The device failed.
    fn collect(&mut self) -> Result<Vec<SampledToken>, BackendError>;

    /// Reads logits back as f32, for tests and scoring: row-major, the first `rows` rows.
    ///
    /// # Errors
    /// The device failed, or the step at hand is recorded as a whole and only runs when it ends
    /// ([`Backend::operations_repeat`]).
    fn read(&mut self, tensor: &Self::Tensor, rows: usize) -> Result<Vec<f32>, BackendError>;
}

/// A step that a backend wants to have run before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rehearsal {
    /// One token for each of several sequences.
    Decode {
        /// Sequences.
        num_seqs: usize,
        /// Whether log-probabilities are asked for.
        logprobs: bool,
    },
    /// One prompt, and a token after it.
    Prompt {
        /// Of the prompt.
        num_tokens: usize,
    },
}

/// A norm and the form its result must have.
#[derive(Debug)]
pub struct NormArgs<'a, B: Backend> {
    /// Weights.
    pub weight: &'a B::Norm,
    /// Added to the mean square.
    pub eps: f32,
    /// Of the linear layer that reads the result.
    pub out_scheme: ActivationScheme,
}

/// What [`Backend::logits`] starts from.
#[derive(Debug)]
pub struct LastHidden<'a, B: Backend> {
    /// Output of the last layer's MLP.
    pub x: &'a B::Tensor,
    /// The last layer's post-feedforward norm.
    pub post: &'a B::Norm,
    /// The residual stream before that MLP's output is added.
    pub residual: &'a B::Tensor,
    /// The model's final norm.
    pub norm: &'a B::Norm,
    /// Added to both norms' mean squares.
    pub eps: f32,
}

/// What a backend can fail with.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Allocation failed.
    #[error("out of device memory: {what} needs {}, {free_bytes} are free", .needed_bytes.map_or_else(|| "more bytes than there are".to_owned(), |bytes| format!("{bytes} bytes")))]
    OutOfMemory {
        /// What was being allocated.
        what: &'static str,
        /// Asked; `None` where the device does not say.
        needed_bytes: Option<u64>,
        /// Available.
        free_bytes: u64,
    },
    /// The backend has no kernel for this shape or type.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// The device refused one call and goes on working.
    #[error("the device refused a call")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device failed: every later call fails too.
    #[error("the device is lost")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
}
