//! [`Cpu`]: the operations of [`Backend`] in terms of this crate's modules.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use lapidary_engine::{Batch, SampledToken};
use lapidary_model::{
    ActivationScheme, AttentionConfig, Backend, BackendError, HostTensor, KvCacheDtype, KvScales, LastHidden,
    LinearWeights, MemoryInfo, NormArgs, StepLimits, Width,
};

use crate::memory;
use crate::ops::attention::{self, AttentionScratch, Geometry, Inputs};
use crate::ops::elementwise::{Geglu, LastNormed, Normed, On, PlusNormed, RmsNorm};
use crate::ops::linear::{self, LinearScratch};
use crate::ops::rope::{self, RopeTable};
use crate::parallel::Pool;
use crate::plan::Plan;
use crate::sample::{Choose, SampleScratch};
use crate::simd::{Buffer, Dispatch, Isa, Plain, make_pages};
use crate::tensor::{Activation, Embedding, KvElements, KvLayer, Linear, Matrix, Norm, Tensor};

/// How the CPU is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuConfig {
    /// Threads that compute, the caller's included. 0 counts as 1.
    pub threads: usize,
    /// Instructions to compute with.
    pub isa: Isa,
    /// What is kept between operations.
    pub storage: Storage,
    /// How products are added up, and what is computed between them.
    pub sums: Sums,
}

/// The precision of what operations leave for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Storage {
    /// Everything as computed.
    #[default]
    F32,
    /// Rounded to bf16 wherever a backend that stores bf16 rounds: tensors of [`Width::Native`], rotated queries and keys,
    /// the KV cache, unquantised weights and inputs of linear layers (the output projection's too), the weights that
    /// attention gives values, and its result where a scale for each token is found afterwards. For comparing such a
    /// backend with this one: it is no faster and takes no less memory.
    Bf16,
}

/// How products of e4m3 with e4m3 and of bf16 with bf16 are added up, and what is computed between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sums {
    /// In f32.
    #[default]
    F32,
    /// Linear layers (the output projection too) add as Hopper's tensor cores do in the kernels of `lapidary-cuda`, and all up
    /// to the last hidden state is computed as those kernels do it, to the bit, if all of it is finite, attention has a
    /// soft-cap and heads of a multiple of 32 elements, and steps have several tokens of a sequence. For comparing them with
    /// this backend, with [`Storage::Bf16`]: several times slower.
    TensorCore,
}

impl Default for CpuConfig {
    /// All CPUs this process may run on (its control group's quota included), and the best instructions they have.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            isa: Isa::detect(),
            storage: Storage::F32,
            sums: Sums::F32,
        }
    }
}

/// KV cache that a task of the thread pool makes pages for: a millisecond or so.
const BYTES_PER_TOUCH: usize = 4 << 20;

/// The backend that every machine has.
#[derive(Debug)]
pub struct Cpu {
    pool: Pool,
    dispatch: Dispatch,
    storage: Storage,
    sums: Sums,
    /// Set by `prepare`.
    prepared: Option<Prepared>,
    linear_scratch: Vec<Mutex<LinearScratch>>,
    sample_scratch: Vec<Mutex<SampleScratch>>,
    /// Normed hidden states of the rows that are sampled.
    hidden: Option<Activation>,
    /// Of the step before, for rows that it feeds.
    last_tokens: Vec<SampledToken>,
    /// Steps not yet collected, oldest first.
    finished: std::collections::VecDeque<Vec<SampledToken>>,
}

/// What depends on the model and the limits.
#[derive(Debug)]
struct Prepared {
    limits: StepLimits,
    geometry: Geometry,
    rope: RopeTable,
    attention_scratch: Vec<Mutex<AttentionScratch>>,
    /// `[num_kv_heads, max_tokens, group * head_dim]`
    heads: Buffer<f32>,
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// This CPU lacks the instructions asked for, or the operating system refused a thread.
    pub fn new(config: CpuConfig) -> Result<Self, BackendError> {
        // Tensor cores add many products at once: no use for sums of pairs.
        let isa = match (config.sums, config.isa) {
            (Sums::TensorCore, Isa::Avx512Bf16) => Isa::Avx512,
            (_, isa) => isa,
        };
        let dispatch =
            Dispatch::new(isa).ok_or_else(|| BackendError::Unsupported(format!("this CPU has no {:?}", config.isa)))?;
        let pool = Pool::new(config.threads).map_err(|error| BackendError::Refused(Box::new(error)))?;
        let num_threads = pool.num_threads();
        Ok(Self {
            pool,
            dispatch,
            storage: config.storage,
            sums: config.sums,
            prepared: None,
            linear_scratch: (0..num_threads).map(|_| Mutex::default()).collect(),
            sample_scratch: (0..num_threads).map(|_| Mutex::default()).collect(),
            hidden: None,
            last_tokens: Vec::new(),
            finished: std::collections::VecDeque::new(),
        })
    }

    fn on(&self) -> On<'_> {
        On {
            pool: &self.pool,
            dispatch: self.dispatch,
            storage: self.storage,
            sums: self.sums,
        }
    }

    fn rms_norm<'a>(&self, weight: &'a Norm, eps: f32) -> RmsNorm<'a> {
        RmsNorm {
            weight,
            eps,
            sums: self.sums,
        }
    }

    fn prepared(&self) -> &Prepared {
        self.prepared
            .as_ref()
            .expect("`prepare` is called before everything else")
    }

    fn reserve(&self, what: &'static str, needed_bytes: u64) -> Result<(), BackendError> {
        let free_bytes = self.memory().free_bytes;
        if needed_bytes <= free_bytes {
            Ok(())
        } else {
            Err(BackendError::OutOfMemory {
                what,
                needed_bytes: Some(needed_bytes),
                free_bytes,
            })
        }
    }
}

/// Zeros, all pages of which are made by the whole pool.
fn resident<T: Plain>(pool: &Pool, bytes: usize) -> Buffer<T> {
    let mut buffer = Buffer::zeroed(bytes / size_of::<T>());
    pool.for_chunks(&mut buffer, BYTES_PER_TOUCH / size_of::<T>(), |_, _, chunk| {
        make_pages(chunk);
    });
    buffer
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Activation = Activation;
    type Linear = Linear;
    type GatedLinear = Linear;
    type Norm = Norm;
    type Embedding = Embedding;
    type KvLayer = KvLayer;
    type Plan = Plan;

    fn prepare(&mut self, limits: StepLimits, attention: AttentionConfig) -> Result<(), BackendError> {
        let AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = attention;
        if num_kv_heads == 0 || num_heads % num_kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            let shape = format!("{num_heads} query heads, {num_kv_heads} key/value heads of {head_dim}");
            return Err(BackendError::Unsupported(shape));
        }
        let geometry = Geometry::new(attention);
        let scratch = || Mutex::new(AttentionScratch::new(&geometry, limits.max_model_len));
        let heads_len = limits.max_tokens * num_heads * head_dim;
        self.reserve("attention scratch", 4 * heads_len as u64)?;
        self.prepared = Some(Prepared {
            limits,
            geometry,
            rope: RopeTable::new(&attention, limits.max_model_len),
            attention_scratch: (0..self.pool.num_threads()).map(|_| scratch()).collect(),
            heads: Buffer::resident(heads_len),
        });
        Ok(())
    }

    fn memory(&self) -> MemoryInfo {
        memory::available()
    }

    fn upload_linear(&mut self, weights: &LinearWeights<'_>) -> Result<Linear, BackendError> {
        self.reserve(
            "a linear layer",
            weights.parts.iter().map(|part| part.data.len() as u64).sum(),
        )?;
        Linear::upload(weights, self.dispatch.isa(), self.storage)
    }

    fn upload_gated_linear(&mut self, weights: &LinearWeights<'_>) -> Result<Linear, BackendError> {
        self.upload_linear(weights)
    }

    fn upload_norm(&mut self, weight: HostTensor<'_>) -> Result<Norm, BackendError> {
        Norm::upload(weight)
    }

    fn upload_embedding(&mut self, table: HostTensor<'_>) -> Result<Embedding, BackendError> {
        self.reserve("the embedding table", table.data.len() as u64)?;
        let table = Matrix::upload_unquantized(table)?.stored_as(self.storage);
        if self.hidden.as_ref().is_none_or(|hidden| hidden.cols != table.cols) {
            self.hidden = Some(Activation::zeroed(self.prepared().limits.max_seqs, table.cols, false));
        }
        Ok(Embedding { table })
    }

    fn alloc_tensor(&mut self, rows: usize, cols: usize, width: Width) -> Result<Tensor, BackendError> {
        self.reserve("a tensor", self.tensor_bytes(rows, cols, width))?;
        Ok(Tensor::zeroed(rows, cols))
    }

    fn activation_bytes(&self, rows: usize, cols: usize) -> u64 {
        let bytes = if self.dispatch.has_pairs() { 6 } else { 4 };
        (rows * cols * bytes) as u64
    }

    fn alloc_activation(&mut self, rows: usize, cols: usize) -> Result<Activation, BackendError> {
        self.reserve("an activation", self.activation_bytes(rows, cols))?;
        Ok(Activation::zeroed(rows, cols, self.dispatch.has_pairs()))
    }

    /// 0 before `prepare`.
    fn kv_block_bytes(&self, block_size: usize) -> u64 {
        self.prepared.as_ref().map_or(0, |prepared| {
            let Geometry { config, padded_dim, .. } = prepared.geometry;
            let element_bytes = match config.kv_cache_dtype {
                KvCacheDtype::Native => size_of::<f32>(),
                KvCacheDtype::Fp8E4m3 => 1,
            };
            (2 * block_size * config.num_kv_heads * padded_dim * element_bytes) as u64
        })
    }

    fn alloc_kv_layer(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        scales: KvScales,
    ) -> Result<KvLayer, BackendError> {
        let bytes = num_blocks as u64 * self.kv_block_bytes(block_size);
        self.reserve("the KV cache of a layer", bytes)?;
        let Prepared {
            geometry,
            attention_scratch,
            ..
        } = self.prepared();
        for scratch in attention_scratch {
            let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
            scratch.reserve_page(geometry, block_size);
        }
        let bytes_each = bytes as usize / 2;
        let (elements, scales): (fn(&Pool, usize) -> KvElements, _) = match geometry.config.kv_cache_dtype {
            KvCacheDtype::Native => (
                |pool, bytes| KvElements::F32(resident(pool, bytes)),
                KvScales::default(),
            ),
            KvCacheDtype::Fp8E4m3 => (|pool, bytes| KvElements::E4m3(resident(pool, bytes)), scales),
        };
        Ok(KvLayer {
            keys: elements(&self.pool, bytes_each),
            values: elements(&self.pool, bytes_each),
            scales,
            block_size,
        })
    }

    fn begin(&mut self, batch: &Batch) -> Result<Plan, BackendError> {
        let Geometry { config, group, .. } = self.prepared().geometry;
        let mut token_ids = batch.token_ids.clone();
        for fed in &batch.fed {
            let sampled = self.last_tokens.get(fed.prev_sample as usize).ok_or_else(|| {
                let count = self.last_tokens.len();
                BackendError::Unsupported(format!("sample {} of a step that had {count}", fed.prev_sample))
            })?;
            token_ids[fed.row as usize] = sampled.token;
        }
        Ok(Plan::new(
            batch,
            token_ids,
            config.num_kv_heads,
            group * config.head_dim,
        ))
    }

    fn embed(
        &mut self,
        plan: &Plan,
        table: &Embedding,
        scale: bf16,
        residual: &mut Tensor,
    ) -> Result<(), BackendError> {
        let scale = scale.to_f32();
        self.on()
            .update_rows(residual, plan.num_tokens(), |row: usize, out: &mut [f32]| {
                table.table.widen_row(plan.token_ids[row] as usize, out);
                out.iter_mut().for_each(|x| *x *= scale);
            });
        Ok(())
    }

    fn norm(
        &mut self,
        plan: &Plan,
        x: &Tensor,
        norm: NormArgs<'_, Self>,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        let normed = Normed {
            x,
            norm: self.rms_norm(norm.weight, norm.eps),
        };
        self.on().fill_rows(out, plan.num_tokens(), norm.out_scheme, normed);
        Ok(())
    }

    fn linear(&mut self, plan: &Plan, x: &Activation, weights: &Linear, out: &mut Tensor) -> Result<(), BackendError> {
        linear::linear(self.on(), &self.linear_scratch, plan.num_tokens(), x, weights, out)?;
        self.on().store_rows(out, plan.num_tokens());
        Ok(())
    }

    fn gated_linear(
        &mut self,
        plan: &Plan,
        x: &Activation,
        weights: &Linear,
        gate_up: &mut Tensor,
        out_scheme: ActivationScheme,
        out: &mut Activation,
    ) -> Result<(), BackendError> {
        self.linear(plan, x, weights, gate_up)?;
        let geglu = Geglu {
            gate_up,
            sums: self.sums,
        };
        self.on().fill_rows(out, plan.num_tokens(), out_scheme, geglu);
        Ok(())
    }

    fn rope_append(&mut self, plan: &Plan, qkv: &mut Tensor, kv: &mut KvLayer) -> Result<(), BackendError> {
        let Prepared { geometry, rope, .. } = self.prepared();
        rope::rope_append(self.on(), plan, geometry, rope, qkv, kv);
        Ok(())
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
        let on = On {
            pool: &self.pool,
            dispatch: self.dispatch,
            storage: self.storage,
            sums: self.sums,
        };
        let prepared = self
            .prepared
            .as_mut()
            .expect("`prepare` is called before everything else");
        let inputs = Inputs {
            plan,
            geometry: prepared.geometry,
            qkv,
            kv,
            window,
        };
        attention::attention(
            on,
            &prepared.attention_scratch,
            inputs,
            &mut prepared.heads,
            out_scheme,
            out,
        );
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
        let normed = Normed {
            x,
            norm: self.rms_norm(post, pre.eps),
        };
        self.on().update_rows(residual, plan.num_tokens(), PlusNormed(normed));
        self.norm(plan, residual, pre, out)
    }

    fn logits(
        &mut self,
        plan: &Plan,
        last: LastHidden<'_, Self>,
        table: &Embedding,
        softcap: Option<f32>,
        logits: &mut Tensor,
    ) -> Result<(), BackendError> {
        let num_samples = plan.sample_rows.len();
        let mut hidden = self.hidden.take().expect("made when the table was uploaded");
        if hidden.rows.len() < num_samples || hidden.cols != table.table.cols {
            hidden = Activation::zeroed(num_samples, table.table.cols, false);
        }
        let LastHidden {
            x,
            post,
            residual,
            norm,
            eps,
        } = last;
        let plus = PlusNormed(Normed {
            x,
            norm: self.rms_norm(post, eps),
        });
        let norm = self.rms_norm(norm, eps);
        let normed = LastNormed {
            rows: &plan.sample_rows,
            residual,
            plus,
            norm,
        };
        self.on()
            .fill_rows(&mut hidden, num_samples, ActivationScheme::None, normed);
        let rows = &hidden.rows[..num_samples];
        linear::logits(self.on(), &self.linear_scratch, rows, &table.table, softcap, logits);
        self.hidden = Some(hidden);
        Ok(())
    }

    fn sample(&mut self, plan: &Plan, batch: &Batch, logits: &mut Tensor) -> Result<(), BackendError> {
        let vocab = logits.cols;
        let fed = |row: u32| {
            batch
                .fed
                .iter()
                .any(|fed| fed.row == row)
                .then(|| plan.token_ids[row as usize])
        };
        let rows = logits.rows_mut(batch.samples.len()).chunks_exact_mut(vocab);
        let nothing = SampledToken {
            token: 0,
            logprobs: None,
        };
        let mut work: Vec<_> = rows.map(|row| (row, nothing.clone())).collect();
        self.pool.for_chunks(&mut work, 1, |worker, index, work| {
            let mut scratch = self.sample_scratch[worker]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for (logits, sampled) in work {
                let sample = &batch.samples[index];
                let fed = fed(sample.row);
                *sampled = self.dispatch.run(Choose {
                    sample,
                    fed,
                    logits,
                    scratch: &mut scratch,
                });
            }
        });
        let sampled: Vec<_> = work.into_iter().map(|(_, sampled)| sampled).collect();
        self.last_tokens.clone_from(&sampled);
        self.finished.push_back(sampled);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<SampledToken>, BackendError> {
        Ok(self.finished.pop_front().unwrap_or_default())
    }

    fn read(&mut self, tensor: &Tensor, rows: usize) -> Result<Vec<f32>, BackendError> {
        Ok(tensor.data[..rows * tensor.cols].to_vec())
    }
}
