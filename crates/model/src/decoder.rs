//! The Gemma-2 decoder, once for every backend.

use half::bf16;

use crate::backend::{Backend, BackendError, LastHidden, NormArgs, StepLimits, Width};
use crate::config::ModelConfig;
use crate::loader::{LayerWeights, ModelWeights};

/// The weights, the KV cache and the scratch of one model, all reserved before the first step.
pub(crate) struct Decoder<B: Backend> {
    weights: ModelWeights<B>,
    kv_layers: Vec<B::KvLayer>,
    scratch: Scratch<B>,
    /// Sliding window of each layer.
    windows: Vec<Option<usize>>,
    embedding_scale: bf16,
    rms_norm_eps: f32,
    final_softcap: Option<f32>,
}

/// What flows between operations, for the largest step.
pub(crate) struct Scratch<B: Backend> {
    /// The residual stream `[max_tokens, hidden]`.
    residual: B::Tensor,
    /// `[max_tokens, q + k + v]`.
    qkv: B::Tensor,
    /// Output of a sub-layer before its post-norm, `[max_tokens, hidden]`.
    branch: B::Tensor,
    /// `[max_tokens, 2 * intermediate]`.
    gate_up: B::Tensor,
    /// Input of q, k, v and of gate, up: `[max_tokens, hidden]`.
    normed: B::Activation,
    /// Input of o: `[max_tokens, q]`.
    attended: B::Activation,
    /// Input of down: `[max_tokens, intermediate]`.
    gated: B::Activation,
    /// `[max_seqs, vocab]`.
    logits: B::Tensor,
}

impl<B: Backend> Scratch<B> {
    /// Bytes [`Scratch::alloc`] takes.
    pub(crate) fn bytes(backend: &B, config: &ModelConfig, limits: StepLimits) -> u64 {
        scratch_bytes(
            config,
            limits,
            |rows, cols, width| backend.tensor_bytes(rows, cols, width),
            |rows, cols| backend.activation_bytes(rows, cols),
        )
    }

    pub(crate) fn alloc(backend: &mut B, config: &ModelConfig, limits: StepLimits) -> Result<Self, BackendError> {
        let ([residual, qkv, branch, gate_up, logits], [normed, attended, gated]) = scratch_shapes(config, limits);
        let mut tensor = |([rows, cols], width): ([usize; 2], Width)| backend.alloc_tensor(rows, cols, width);
        Ok(Self {
            residual: tensor(residual)?,
            qkv: tensor(qkv)?,
            branch: tensor(branch)?,
            gate_up: tensor(gate_up)?,
            logits: tensor(logits)?,
            normed: backend.alloc_activation(normed[0], normed[1])?,
            attended: backend.alloc_activation(attended[0], attended[1])?,
            gated: backend.alloc_activation(gated[0], gated[1])?,
        })
    }
}

/// Bytes of all scratch where a tensor and an activation take so many.
pub(crate) fn scratch_bytes(
    config: &ModelConfig,
    limits: StepLimits,
    tensor: impl Fn(usize, usize, Width) -> u64,
    activation: impl Fn(usize, usize) -> u64,
) -> u64 {
    let (tensors, activations) = scratch_shapes(config, limits);
    let tensors = tensors.iter().map(|([rows, cols], width)| tensor(*rows, *cols, *width));
    let activations = activations.iter().map(|[rows, cols]| activation(*rows, *cols));
    tensors.chain(activations).sum()
}

/// `[rows, cols]`.
type Shape = [usize; 2];

/// Of residual, qkv, branch, gate_up and logits; of normed, attended and gated.
fn scratch_shapes(config: &ModelConfig, limits: StepLimits) -> ([(Shape, Width); 5], [Shape; 3]) {
    let (tokens, hidden, inner) = (limits.max_tokens, config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.q_size(), config.kv_size());
    let tensors = [
        ([tokens, hidden], Width::Wide),
        ([tokens, q + 2 * kv], Width::Native),
        ([tokens, hidden], Width::Native),
        ([tokens, 2 * inner], Width::Native),
        ([limits.max_seqs, config.vocab_size], Width::Wide),
    ];
    (tensors, [[tokens, hidden], [tokens, q], [tokens, inner]])
}

impl<B: Backend> Decoder<B> {
    pub(crate) fn new(
        config: &ModelConfig,
        weights: ModelWeights<B>,
        kv_layers: Vec<B::KvLayer>,
        scratch: Scratch<B>,
    ) -> Self {
        Self {
            weights,
            kv_layers,
            scratch,
            windows: config.windows.clone(),
            embedding_scale: embedding_scale(config.hidden_size),
            rms_norm_eps: config.rms_norm_eps,
            final_softcap: config.final_logit_softcapping,
        }
    }

    /// Runs one step's tokens through every layer. `logits` says whether the step samples at all: a chunk in the
    /// middle of a prompt needs its keys and values, not its logits.
    pub(crate) fn forward(
        &mut self,
        backend: &mut B,
        plan: &B::Plan,
        logits: bool,
    ) -> Result<&mut B::Tensor, BackendError> {
        let scratch = &mut self.scratch;
        let (layers, eps) = (&self.weights.layers, self.rms_norm_eps);
        backend.embed(
            plan,
            &self.weights.embedding,
            self.embedding_scale,
            &mut scratch.residual,
        )?;
        backend.norm(
            plan,
            &scratch.residual,
            input_norm(&layers[0], eps),
            &mut scratch.normed,
        )?;
        for (index, layer) in layers.iter().enumerate() {
            let window = self.windows[index];
            backend.linear(plan, &scratch.normed, &layer.qkv.weights, &mut scratch.qkv)?;
            let kv = &mut self.kv_layers[index];
            backend.rope_append(plan, &mut scratch.qkv, kv)?;
            backend.attention(plan, &scratch.qkv, kv, window, layer.o.input, &mut scratch.attended)?;
            backend.linear(plan, &scratch.attended, &layer.o.weights, &mut scratch.branch)?;

            let pre = NormArgs {
                weight: &layer.pre_feedforward_norm,
                eps,
                out_scheme: layer.gate_up.input,
            };
            let post = &layer.post_attention_norm;
            backend.add_norm(
                plan,
                &scratch.branch,
                post,
                &mut scratch.residual,
                pre,
                &mut scratch.normed,
            )?;
            backend.gated_linear(
                plan,
                &scratch.normed,
                &layer.gate_up.weights,
                &mut scratch.gate_up,
                layer.down.input,
                &mut scratch.gated,
            )?;
            backend.linear(plan, &scratch.gated, &layer.down.weights, &mut scratch.branch)?;

            if let Some(next) = layers.get(index + 1) {
                let (post, pre) = (&layer.post_feedforward_norm, input_norm(next, eps));
                backend.add_norm(
                    plan,
                    &scratch.branch,
                    post,
                    &mut scratch.residual,
                    pre,
                    &mut scratch.normed,
                )?;
            }
        }
        if logits {
            self.logits(backend, plan)?;
        }
        Ok(&mut self.scratch.logits)
    }

    fn logits(&mut self, backend: &mut B, plan: &B::Plan) -> Result<(), BackendError> {
        let last = LastHidden {
            x: &self.scratch.branch,
            post: &self
                .weights
                .layers
                .last()
                .expect("a model has layers")
                .post_feedforward_norm,
            residual: &self.scratch.residual,
            norm: &self.weights.final_norm,
            eps: self.rms_norm_eps,
        };
        backend.logits(
            plan,
            last,
            &self.weights.embedding,
            self.final_softcap,
            &mut self.scratch.logits,
        )
    }
}

fn input_norm<B: Backend>(layer: &LayerWeights<B>, eps: f32) -> NormArgs<'_, B> {
    NormArgs {
        weight: &layer.input_norm,
        eps,
        out_scheme: layer.qkv.input,
    }
}

/// Gemma was trained with this factor in bf16: 59.75 for 9b, not 59.87.
fn embedding_scale(hidden_size: usize) -> bf16 {
    bf16::from_f64((hidden_size as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use super::embedding_scale;

    #[test]
    fn the_embedding_scale_is_rounded_to_bf16() {
        let scales = [2304, 3584, 4608].map(|hidden| embedding_scale(hidden).to_f32());
        assert_eq!(scales, [48.0, 59.75, 68.0]);
    }
}
