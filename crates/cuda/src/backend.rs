//! [`Cuda`]: the operations of [`Backend`] in terms of this crate's modules.

use std::collections::VecDeque;

use half::bf16;
use lapidary_engine::{Batch, SampledToken};
use lapidary_model::{
    ActivationScheme, AttentionConfig, Backend, BackendError, HostTensor, KvScales, LastHidden, LinearWeights,
    MemoryInfo, NormArgs, Rehearsal, StepLimits, Width,
};

use crate::attention::{Attention, AttentionInputs, AttentionPlan, value_bytes};
use crate::device::{Device, DeviceInfo, DevicePtr, Driver, bytes_of};
use crate::graphs::{Graphs, Recording};
use crate::matmul::{Matmul, Product};
use crate::pack::{self, Element, Order};
use crate::rope::Rope;
use crate::rows::{Branch, RowCount, RowKernels};
use crate::sample::{Choice, Choices, MAX_SAMPLES, Needs, SampleLimits, Sampler};
use crate::step::StepBuffers;
use crate::tensor::{Activation, ActivationParams, Embedding, GatedLinear, KvLayer, Linear, Norm, Tensor};

/// Steps in flight: while one runs, the host prepares the next.
const MAX_STEPS_IN_FLIGHT: usize = 2;

/// How the GPU is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaConfig {
    /// Record steps of few tokens once and replay them.
    pub graphs: bool,
}

impl Default for CudaConfig {
    fn default() -> Self {
        Self { graphs: true }
    }
}

/// The backend for NVIDIA GPUs.
#[derive(Debug)]
pub struct Cuda {
    device: Box<dyn Device>,
    config: CudaConfig,
    rows: RowKernels,
    matmul: Matmul,
    graphs: Graphs,
    /// Set by `prepare`.
    prepared: Option<Prepared>,
    in_flight: VecDeque<Choices>,
}

/// What depends on the model and the limits.
#[derive(Debug)]
struct Prepared {
    limits: StepLimits,
    geometry: AttentionConfig,
    /// Tokens of a KV block, once there are any.
    block_size: usize,
    step: StepBuffers,
    rope: Rope,
    attention: Attention,
    /// Attention's output where a row kernel quantises it.
    attended: Tensor,
    /// Normed hidden states of the sampled rows; made when the embedding table tells their width.
    hidden: Option<Activation>,
    /// Made when the embedding table tells the vocabulary, which is beside it.
    sampler: Option<(Sampler, usize)>,
}

/// How a step runs.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Rows that kernels are launched for: those of the step, or those of the recorded step it runs as.
    tokens: usize,
    samples: usize,
    attention: AttentionPlan,
}

impl Cuda {
    /// Opens a GPU. The calling thread is the one that uses it.
    ///
    /// # Errors
    /// The driver refused.
    pub fn open(device: DeviceInfo, config: CudaConfig) -> Result<Self, BackendError> {
        Self::on(Box::new(Driver::open(device)?), config)
    }

    /// The same kernels on this machine's CPU, for tests. `compute_capability` 90 takes those for Hopper, 89 the portable
    /// ones.
    ///
    /// # Errors
    /// A kernel is missing.
    #[cfg(feature = "emulator")]
    pub fn emulated(compute_capability: u32, config: CudaConfig) -> Result<Self, BackendError> {
        Self::on(Box::new(crate::device::Emulator::new(compute_capability)), config)
    }

    /// On an opened device.
    pub(crate) fn on(mut device: Box<dyn Device>, config: CudaConfig) -> Result<Self, BackendError> {
        Ok(Self {
            rows: RowKernels::load(&mut *device)?,
            matmul: Matmul::load(&mut *device)?,
            device,
            config,
            graphs: Graphs::new(),
            prepared: None,
            in_flight: VecDeque::new(),
        })
    }

    fn row_count(&self, plan: &Plan) -> RowCount {
        RowCount {
            on_device: self.prepared().step.pointers().num_tokens(),
            at_most: plan.tokens,
        }
    }

    fn prepared(&self) -> &Prepared {
        self.prepared
            .as_ref()
            .expect("`prepare` is called before everything else")
    }

    fn upload_in_order(&mut self, weights: &LinearWeights<'_>, order: Order) -> Result<Linear, BackendError> {
        let element = Element::of_input(weights.input);
        let panels = pack::upload(&mut *self.device, "a linear layer", &weights.parts, element, order)?;
        let scales = match weights.scales.len() {
            0 if element == Element::Bf16 => DevicePtr::NULL,
            rows if rows == panels.rows => {
                let scale = |row| weights.scales[order.stacked_row(row, rows)];
                self.upload_scales((0..rows).map(scale).collect(), panels.padded_rows)?
            }
            rows => {
                let what = format!("{rows} weight scales for {} output rows", panels.rows);
                return Err(BackendError::Unsupported(what));
            }
        };
        Ok(Linear {
            weights: panels,
            scales,
            input: weights.input,
        })
    }

    /// One f32 for each padded row, those of padding 0.
    fn upload_scales(&mut self, scales: Vec<f32>, padded_rows: usize) -> Result<DevicePtr, BackendError> {
        let mut padded = scales;
        padded.resize(padded_rows, 0.0);
        let to = self.device.alloc("weight scales", 4 * padded_rows)?;
        self.device.upload(to, bytes_of(&padded))?;
        Ok(to)
    }
}

impl Prepared {
    /// The sampler, for logits of `vocab` columns at least.
    fn sampler_for(&mut self, device: &mut dyn Device, vocab: usize) -> Result<&mut Sampler, BackendError> {
        let limits = SampleLimits {
            max_samples: self.limits.max_seqs,
            max_model_len: self.limits.max_model_len,
            max_vocab: vocab,
        };
        let (sampler, _) = match self.sampler.take().filter(|(_, reserved)| *reserved >= vocab) {
            Some(sampler) => self.sampler.insert(sampler),
            None => self
                .sampler
                .insert((Sampler::alloc(device, &self.step, limits)?, vocab)),
        };
        Ok(sampler)
    }

    /// How the step's tokens are chosen, from `vocab` logits each or as many as the embedding table has rows.
    fn upload_choices(
        &mut self,
        device: &mut dyn Device,
        batch: &Batch,
        vocab: Option<usize>,
    ) -> Result<Needs, BackendError> {
        let vocab = vocab.or(self.sampler.as_ref().map(|(_, vocab)| *vocab)).unwrap_or(1);
        let choices = batch.samples.iter().map(|sample| Choice {
            sample,
            given: sample.given,
            mask: sample.mask.as_deref(),
        });
        self.sampler_for(device, vocab)?.upload(device, batch, choices, vocab)
    }
}

fn prepared(prepared: &mut Option<Prepared>) -> &mut Prepared {
    prepared.as_mut().expect("`prepare` is called before everything else")
}

fn check_input(x: &Activation, weights: &Linear) -> Result<(), BackendError> {
    if Element::of_input(x.scheme) == weights.weights.element {
        return Ok(());
    }
    Err(BackendError::Unsupported(format!(
        "an input quantised by {:?} for weights that want {:?}",
        x.scheme, weights.input
    )))
}

fn product<'a>(x: &'a ActivationParams, weights: &'a Linear, out: &'a Tensor, rows: RowCount) -> Product<'a> {
    Product {
        x,
        w: &weights.weights,
        w_scales: weights.scales,
        out,
        softcap: None,
        num_rows: rows.on_device,
        max_rows: rows.at_most,
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;
    type Activation = Activation;
    type Linear = Linear;
    type GatedLinear = GatedLinear;
    type Norm = Norm;
    type Embedding = Embedding;
    type KvLayer = KvLayer;
    type Plan = Plan;

    fn prepare(&mut self, limits: StepLimits, geometry: AttentionConfig) -> Result<(), BackendError> {
        if limits.max_seqs > MAX_SAMPLES {
            let what = format!("{} sequences in a step, the most is {MAX_SAMPLES}", limits.max_seqs);
            return Err(BackendError::Unsupported(what));
        }
        let device = &mut *self.device;
        let max_blocks = limits.max_seqs * limits.max_model_len.div_ceil(SMALLEST_BLOCK);
        self.prepared = Some(Prepared {
            limits,
            geometry,
            block_size: SMALLEST_BLOCK,
            step: StepBuffers::alloc(device, limits, max_blocks, limits.max_seqs)?,
            rope: Rope::load(device, &geometry, limits.max_model_len)?,
            attention: Attention::new(device, geometry, limits)?,
            attended: Tensor::alloc(
                device,
                "attention output",
                [limits.max_tokens, geometry.num_heads * geometry.head_dim],
                false,
            )?,
            hidden: None,
            sampler: None,
        });
        Ok(())
    }

    fn memory(&self) -> MemoryInfo {
        self.device.memory()
    }

    fn upload_linear(&mut self, weights: &LinearWeights<'_>) -> Result<Linear, BackendError> {
        self.upload_in_order(weights, Order::Stacked)
    }

    fn upload_gated_linear(&mut self, weights: &LinearWeights<'_>) -> Result<GatedLinear, BackendError> {
        Ok(GatedLinear(self.upload_in_order(weights, Order::InTurns)?))
    }

    fn upload_norm(&mut self, weight: HostTensor<'_>) -> Result<Norm, BackendError> {
        let factors: Vec<f32> = pack::to_f32(weight)?.into_iter().map(|weight| 1.0 + weight).collect();
        let to = self.device.alloc("a norm", 4 * factors.len())?;
        self.device.upload(to, bytes_of(&factors))?;
        Ok(Norm { factors: to })
    }

    fn upload_embedding(&mut self, table: HostTensor<'_>) -> Result<Embedding, BackendError> {
        let table = pack::upload(
            &mut *self.device,
            "the embedding table",
            &[table],
            Element::Bf16,
            Order::Stacked,
        )?;
        let (device, prepared) = (&mut *self.device, prepared(&mut self.prepared));
        if prepared.hidden.as_ref().is_none_or(|hidden| hidden.cols != table.cols) {
            prepared.hidden = Some(Activation::alloc(device, prepared.limits.max_seqs, table.cols)?);
        }
        prepared.sampler_for(device, table.rows)?;
        Ok(Embedding { table })
    }

    fn tensor_bytes(&self, rows: usize, cols: usize, width: Width) -> u64 {
        Tensor::bytes(rows, cols, width == Width::Wide) as u64
    }

    fn activation_bytes(&self, rows: usize, cols: usize) -> u64 {
        Activation::bytes(rows, cols) as u64
    }

    fn alloc_tensor(&mut self, rows: usize, cols: usize, width: Width) -> Result<Tensor, BackendError> {
        Tensor::alloc(&mut *self.device, "a tensor", [rows, cols], width == Width::Wide)
    }

    fn alloc_activation(&mut self, rows: usize, cols: usize) -> Result<Activation, BackendError> {
        Activation::alloc(&mut *self.device, rows, cols)
    }

    /// 0 before `prepare`.
    fn kv_block_bytes(&self, block_size: usize) -> u64 {
        self.prepared.as_ref().map_or(0, |prepared| {
            let AttentionConfig {
                num_kv_heads, head_dim, ..
            } = prepared.geometry;
            (2 * block_size * num_kv_heads * head_dim * value_bytes(&prepared.geometry)) as u64
        })
    }

    fn alloc_kv_layer(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        scales: KvScales,
    ) -> Result<KvLayer, BackendError> {
        if !block_size.is_multiple_of(SMALLEST_BLOCK) {
            let what = format!("KV blocks of {block_size} tokens: a multiple of {SMALLEST_BLOCK} it must be");
            return Err(BackendError::Unsupported(what));
        }
        let bytes = num_blocks * self.kv_block_bytes(block_size) as usize;
        let data = self.device.alloc("the KV cache of a layer", bytes)?;
        // From here on the cache only ever holds numbers.
        self.device.zero(data, bytes)?;
        prepared(&mut self.prepared).block_size = block_size;
        Ok(KvLayer {
            data,
            block_size,
            scales,
        })
    }

    fn max_steps_in_flight(&self) -> usize {
        MAX_STEPS_IN_FLIGHT
    }

    fn operations_repeat(&mut self) -> Vec<Rehearsal> {
        if !self.config.graphs {
            return Vec::new();
        }
        let limits = self.prepared().limits;
        self.graphs.enable(limits)
    }

    fn begin(&mut self, batch: &Batch) -> Result<Plan, BackendError> {
        let (device, prepared) = (&mut *self.device, prepared(&mut self.prepared));
        self.graphs.abandon(device)?;
        prepared.step.upload(device, batch)?;
        let (attention, block_size) = (&prepared.attention, prepared.block_size);
        let has_room = |tokens| attention.has_room(batch, block_size, tokens);
        let recording = self.graphs.recording(batch, Needs::are_recordable(batch), has_room);
        let attention = match recording {
            Some(Recording::PromptLayers(tokens)) => attention.plan_recorded(device, batch, block_size, tokens)?,
            _ => attention.plan(device, batch, block_size)?,
        };
        let mut plan = Plan {
            tokens: recording.map_or(batch.num_tokens(), Recording::max_tokens),
            samples: batch.samples.len(),
            attention,
        };
        if let Some(Recording::Whole(size)) = recording {
            plan.samples = size;
            prepared.upload_choices(device, batch, None)?;
        }
        self.graphs.begin(device, recording)?;
        if self.graphs.issues() {
            prepared.step.begin(device)?;
        }
        Ok(plan)
    }

    fn embed(
        &mut self,
        plan: &Plan,
        table: &Embedding,
        scale: bf16,
        residual: &mut Tensor,
    ) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        let step = prepared(&mut self.prepared).step.pointers();
        let scaled = (&table.table, scale.to_f32());
        self.rows.embed(&mut *self.device, step, plan.tokens, scaled, residual)
    }

    fn norm(
        &mut self,
        plan: &Plan,
        x: &Tensor,
        norm: NormArgs<'_, Self>,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        let rows = self.row_count(plan);
        let out = out.write(&mut *self.device, norm.out_scheme)?;
        self.rows.norm(&mut *self.device, rows, x, (norm.weight, norm.eps), out)
    }

    fn linear(&mut self, plan: &Plan, x: &Activation, weights: &Linear, out: &mut Tensor) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        check_input(x, weights)?;
        let x = x.params();
        let product = product(&x, weights, out, self.row_count(plan));
        self.matmul.run(&mut *self.device, &product)
    }

    fn gated_linear(
        &mut self,
        plan: &Plan,
        x: &Activation,
        GatedLinear(weights): &GatedLinear,
        gate_up: &mut Tensor,
        out_scheme: ActivationScheme,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        check_input(x, weights)?;
        let (x, rows) = (x.params(), self.row_count(plan));
        let out = out.write(&mut *self.device, out_scheme)?;
        let product = product(&x, weights, gate_up, rows);
        if self.matmul.gates(&product, &out) {
            return self.matmul.run_gated(&mut *self.device, &product, out);
        }
        self.matmul.run(&mut *self.device, &product)?;
        self.rows.geglu(&mut *self.device, rows, gate_up, out)
    }

    fn rope_append(&mut self, plan: &Plan, qkv: &mut Tensor, kv: &mut KvLayer) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        let prepared = prepared(&mut self.prepared);
        prepared
            .rope
            .append(&mut *self.device, prepared.step.pointers(), plan.tokens, qkv, kv)
    }

    fn attention(
        &mut self,
        plan: &Plan,
        qkv: &Tensor,
        kv: &KvLayer,
        window: Option<usize>,
        out_scheme: ActivationScheme,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        let rows = self.row_count(plan);
        let (device, prepared) = (&mut *self.device, prepared(&mut self.prepared));
        let out = out.write(device, out_scheme)?;
        let inputs = AttentionInputs {
            step: *prepared.step.pointers(),
            max_seqs: plan.tokens.min(prepared.limits.max_seqs),
            qkv: qkv.data,
            kv: kv.data,
            scales: kv.scales,
            block_size: kv.block_size,
            window,
            out,
            rows: prepared.attended.data,
        };
        prepared.attention.run(device, &plan.attention, &inputs)?;
        if out_scheme == ActivationScheme::Fp8Token {
            self.rows.quantize(device, rows, &prepared.attended, out)?;
        }
        Ok(())
    }

    fn add_norm(
        &mut self,
        plan: &Plan,
        x: &Tensor,
        post: &Norm,
        residual: &mut Tensor,
        pre: NormArgs<'_, Self>,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        if !self.graphs.issues() {
            return Ok(());
        }
        let rows = self.row_count(plan);
        let out = out.write(&mut *self.device, pre.out_scheme)?;
        let branch = Branch {
            x,
            post,
            pre: pre.weight,
            residual,
            eps: pre.eps,
        };
        self.rows.add_norm(&mut *self.device, rows, branch, out)
    }

    fn logits(
        &mut self,
        plan: &Plan,
        last: LastHidden<'_, Self>,
        table: &Embedding,
        softcap: Option<f32>,
        logits: &mut Tensor,
    ) -> Result<(), BackendError> {
        self.graphs.end_layers(&mut *self.device)?;
        if !self.graphs.issues() {
            return Ok(());
        }
        let (device, prepared) = (&mut *self.device, prepared(&mut self.prepared));
        let step = prepared.step.pointers();
        let hidden = prepared.hidden.as_mut().expect("made when the table was uploaded");
        let out = hidden.write(device, ActivationScheme::None)?;
        let branch = Branch {
            x: last.x,
            post: last.post,
            pre: last.norm,
            residual: last.residual,
            eps: last.eps,
        };
        self.rows.last_norm(device, step, plan.samples, branch, out)?;
        let product = Product {
            x: &out,
            w: &table.table,
            w_scales: DevicePtr::NULL,
            out: logits,
            softcap,
            num_rows: step.num_samples(),
            max_rows: plan.samples,
        };
        self.matmul.run(device, &product)
    }

    fn sample(&mut self, plan: &Plan, batch: &Batch, logits: &mut Tensor) -> Result<(), BackendError> {
        let (device, prepared) = (&mut *self.device, prepared(&mut self.prepared));
        if self.graphs.issues() && !batch.samples.is_empty() {
            let needs = if self.graphs.is_eager() {
                prepared.upload_choices(device, batch, Some(logits.cols))?
            } else {
                Needs::RECORDABLE
            };
            let (sampler, _) = prepared.sampler.as_ref().expect("made by the upload");
            sampler.run(device, logits, plan.samples, needs)?;
        }
        self.graphs.end(device)?;
        prepared.step.finish();
        let choices = match &prepared.sampler {
            Some((sampler, _)) => sampler.start_readback(device, &prepared.step, batch)?,
            None => Choices::none(device)?,
        };
        self.in_flight.push_back(choices);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<SampledToken>, BackendError> {
        match self.in_flight.pop_front() {
            Some(choices) => choices.finish(&mut *self.device),
            None => Ok(Vec::new()),
        }
    }

    fn read(&mut self, tensor: &Tensor, rows: usize) -> Result<Vec<f32>, BackendError> {
        if !self.graphs.is_eager() {
            let what = "reading inside a recorded step, which has not run yet".to_owned();
            return Err(BackendError::Unsupported(what));
        }
        let mut bytes = vec![0; Tensor::bytes(rows, tensor.cols, tensor.is_wide)];
        self.device.download(tensor.data, &mut bytes)?;
        Ok(if tensor.is_wide {
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect()
        } else {
            bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
                .collect()
        })
    }
}

/// Tokens of the smallest KV block: what the attention kernels load at a time.
const SMALLEST_BLOCK: usize = 16;
