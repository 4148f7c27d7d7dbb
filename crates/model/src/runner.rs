//! Owns a loaded model and runs the engine's batches on it.

use std::fmt;
use std::sync::Arc;

use lapidary_engine::{
    Batch, BlockId, Executor, ExecutorError, KvCacheConfig, RequestId, SampleRow, SampledToken, SamplingParams, TokenId,
};

use crate::backend::{Backend, BackendError, KvCacheDtype, Rehearsal, StepLimits, Width};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::decoder::{Decoder, Scratch, scratch_bytes};
use crate::loader::{LoadError, LoadPhase, LoadProgress, load};
use crate::tensors::{ModelTensors, verify};
use crate::warning::Warning;

/// What a runner reserves at start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RunnerConfig {
    /// Tokens of a step at most.
    pub max_num_batched_tokens: usize,
    /// Sequences of a step at most, and tokens sampled in one.
    pub max_num_seqs: usize,
    /// Positions of a sequence at most; `None` takes the model's.
    pub max_model_len: Option<usize>,
    /// Tokens of a KV block.
    pub block_size: u32,
    /// How much KV cache.
    pub kv_cache: KvCacheSize,
    /// How it keeps keys and values.
    pub kv_cache_dtype: KvCacheDtype,
}

/// How large the KV cache is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvCacheSize {
    /// As many blocks as fit into this.
    Bytes(u64),
    /// Exactly this many.
    Blocks(u32),
    /// Enough for this many tokens, within a share of the memory that is free once the weights are loaded.
    Tokens {
        /// Together in all sequences.
        wanted: u64,
        /// 0 to 1.
        free_share: f64,
    },
    /// As many blocks as fit when this share of the device's memory, 0 to 1, is used in all.
    DeviceShare(f64),
}

/// Where the device's memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, as the checkpoint stores them.
    pub weight_bytes: u64,
    /// Activations of the largest step.
    pub scratch_bytes: u64,
    /// KV cache of all layers.
    pub kv_cache_bytes: u64,
    /// What else the backend reserved: its own buffers, padding. Known once the scratch is in place, on a device that
    /// nobody else uses.
    pub backend_bytes: u64,
    /// What recorded steps took. Known once they are recorded.
    pub graph_bytes: u64,
    /// KV blocks.
    pub num_blocks: u32,
    /// Tokens of a block.
    pub block_size: u32,
    /// One token's keys and values in all layers.
    pub kv_bytes_per_token: u64,
    /// Free before the model was loaded.
    pub device_free_bytes: u64,
    /// In all.
    pub device_total_bytes: u64,
}

/// A model on a device.
pub struct ModelRunner<B: Backend> {
    backend: B,
    decoder: Decoder<B>,
    config: ModelConfig,
    limits: StepLimits,
    plan: MemoryPlan,
    warnings: Vec<Warning>,
}

/// Why a runner cannot start or a step cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunnerError {
    /// A limit that makes no sense for the model.
    #[error("{name} is {value}, it must be between 1 and {max}")]
    Limit {
        /// Which.
        name: &'static str,
        /// As configured.
        value: usize,
        /// The largest that works.
        max: usize,
    },
    /// The checkpoint cannot be loaded.
    #[error("the model cannot be loaded")]
    Load(#[source] LoadError),
    /// The device ran out of memory at start.
    #[error("the model does not fit: {plan}")]
    OutOfMemory {
        /// What was to be reserved.
        plan: MemoryPlan,
        /// The allocation that failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is left for the KV cache does not hold one sequence of the length asked for.
    #[error(
        "the KV cache holds {capacity_tokens} tokens, less than max_model_len {max_model_len}: \
         lower max_model_len or give it more memory ({plan})"
    )]
    KvCacheTooSmall {
        /// Tokens that fit.
        capacity_tokens: u64,
        /// Tokens a sequence may have.
        max_model_len: usize,
        /// What was to be reserved.
        plan: MemoryPlan,
    },
    /// A batch is larger than what was reserved, or names what does not exist.
    #[error("the batch has {what} {found}, the limit is {limit}")]
    BatchLimit {
        /// Of what.
        what: &'static str,
        /// How many, or which.
        found: usize,
        /// At most, or below.
        limit: usize,
    },
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Default for RunnerConfig {
    fn default() -> Self {
        Self {
            max_num_batched_tokens: 2048,
            max_num_seqs: 256,
            max_model_len: None,
            block_size: 16,
            kv_cache: KvCacheSize::DeviceShare(0.9),
            kv_cache_dtype: KvCacheDtype::Native,
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const GIB: f64 = (1_u64 << 30) as f64;
        let gib = |bytes: u64| bytes as f64 / GIB;
        write!(
            f,
            "weights {:.2} GiB, scratch {:.2} GiB, backend {:.2} GiB, KV cache {:.2} GiB in {} blocks of {} tokens; {:.2} of {:.2} \
             GiB free",
            gib(self.weight_bytes),
            gib(self.scratch_bytes),
            gib(self.backend_bytes),
            gib(self.kv_cache_bytes),
            self.num_blocks,
            self.block_size,
            gib(self.device_free_bytes),
            gib(self.device_total_bytes),
        )
    }
}

impl MemoryPlan {
    /// Tokens whose keys and values fit.
    #[must_use]
    pub fn capacity_tokens(&self) -> u64 {
        u64::from(self.num_blocks) * u64::from(self.block_size)
    }

    /// What a device of `device_bytes` that computes in bf16, with the residual stream and logits in f32, would have
    /// room for if `share` of it may be used. An estimate: what a driver takes for itself is not in it.
    #[must_use]
    pub fn estimate(
        model: &ModelConfig,
        weight_bytes: u64,
        limits: StepLimits,
        block_size: u32,
        kv_cache_dtype: KvCacheDtype,
        device_bytes: u64,
        share: f64,
    ) -> Self {
        const NATIVE_BYTES: usize = size_of::<half::bf16>();
        let kv_bytes = match kv_cache_dtype {
            KvCacheDtype::Native => NATIVE_BYTES,
            KvCacheDtype::Fp8E4m3 => 1,
        };
        let tensor = |rows, cols, width| {
            let element = match width {
                Width::Native => NATIVE_BYTES,
                Width::Wide => size_of::<f32>(),
            };
            (rows * cols * element) as u64
        };
        let activation = |rows, cols| tensor(rows, cols, Width::Native);
        let scratch_bytes = scratch_bytes(model, limits, tensor, activation);
        let kv_bytes_per_token = (2 * model.num_layers * model.kv_size() * kv_bytes) as u64;
        let block_bytes = (kv_bytes_per_token * u64::from(block_size)).max(1);
        let usable = (device_bytes as f64 * share) as u64;
        let blocks = usable.saturating_sub(weight_bytes + scratch_bytes) / block_bytes;
        let blocks = blocks.min(u64::from(u32::MAX / block_size.max(1)));
        Self {
            weight_bytes,
            scratch_bytes,
            kv_cache_bytes: blocks * block_bytes,
            backend_bytes: 0,
            graph_bytes: 0,
            num_blocks: blocks as u32,
            block_size,
            kv_bytes_per_token,
            device_free_bytes: device_bytes,
            device_total_bytes: device_bytes,
        }
    }

    /// All that is reserved.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.scratch_bytes + self.backend_bytes + self.kv_cache_bytes + self.graph_bytes
    }
}

impl<B: Backend> ModelRunner<B> {
    /// Loads a checkpoint and reserves everything a step will ever need.
    ///
    /// `progress` is called as the bytes arrive, from this thread.
    ///
    /// # Errors
    /// A checkpoint with faults, limits that make no sense, or too little memory.
    pub fn load(
        mut backend: B,
        checkpoint: &Checkpoint,
        config: RunnerConfig,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, RunnerError> {
        let model = checkpoint.config();
        let limits = step_limits(model, config)?;
        let (tensors, warnings) = verify(checkpoint, config.kv_cache_dtype)
            .map_err(|problems| RunnerError::Load(LoadError::Problems(problems)))?;
        let mut plan = MemoryPlan::before_load(&backend, model, limits, config.block_size, tensors.total_bytes());
        plan.check_before_load()?;
        backend
            .prepare(limits, model.attention(config.kv_cache_dtype))
            .map_err(|error| plan.name_in(error))?;
        let weights = load(&mut backend, &tensors, progress).map_err(|error| match error {
            LoadError::Upload {
                source: BackendError::OutOfMemory { .. },
                ..
            } => RunnerError::OutOfMemory {
                plan,
                source: Box::new(error),
            },
            error => RunnerError::Load(error),
        })?;
        let scratch = Scratch::alloc(&mut backend, model, limits).map_err(|error| plan.name_in(error))?;
        plan.count_backend(&backend, config.kv_cache);
        plan.size_kv_cache(&backend, model, config.kv_cache);
        if plan.capacity_tokens() < limits.max_model_len as u64 && !matches!(config.kv_cache, KvCacheSize::Blocks(1..))
        {
            let capacity_tokens = plan.capacity_tokens();
            return Err(RunnerError::KvCacheTooSmall {
                capacity_tokens,
                max_model_len: limits.max_model_len,
                plan,
            });
        }
        plan.check_kv_cache(&backend)?;
        let kv_layers =
            alloc_kv_layers(&mut backend, &tensors, &plan, progress).map_err(|error| plan.name_in(error))?;
        let decoder = Decoder::new(model, weights, kv_layers, scratch);
        let warnings = checkpoint.warnings_for(config.kv_cache_dtype).chain(warnings).collect();
        let mut runner = Self {
            backend,
            decoder,
            config: model.clone(),
            limits,
            plan,
            warnings,
        };
        runner.warm_up(progress).map_err(|error| match error {
            RunnerError::Backend(error) => runner.plan.name_in(error),
            error => error,
        })?;
        Ok(runner)
    }

    /// Runs the steps that the backend wants to have seen before the first request.
    fn warm_up(&mut self, progress: &mut dyn FnMut(LoadProgress)) -> Result<(), RunnerError> {
        let steps = self.backend.operations_repeat();
        let free_bytes = self.backend.memory().free_bytes;
        for (done, step) in steps.iter().enumerate() {
            progress(LoadProgress {
                phase: LoadPhase::WarmUp,
                done_bytes: done as u64,
                total_bytes: steps.len() as u64,
            });
            self.run(&rehearsal_batch(*step, &self.plan), |_, _| Ok(()))?;
            self.backend.collect()?;
        }
        if !steps.is_empty() {
            self.plan.graph_bytes = free_bytes.saturating_sub(self.backend.memory().free_bytes);
        }
        Ok(())
    }

    /// Where the memory went.
    #[must_use]
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The model that is loaded.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The limits every batch must keep.
    #[must_use]
    pub fn limits(&self) -> StepLimits {
        self.limits
    }

    /// What was corrected or ignored while opening and loading.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Logits at every position of one sequence, `[tokens.len(), vocab]`, for tests, benches and scoring.
    ///
    /// Uses the first KV blocks whatever they hold: not for a runner that serves at the same time.
    ///
    /// # Errors
    /// More tokens than the limits or the KV cache allow, or the device failed.
    pub fn forward_logits(&mut self, tokens: &[TokenId]) -> Result<Vec<f32>, RunnerError> {
        self.forward_logits_in_chunks(tokens, self.limits.max_tokens.min(self.limits.max_seqs))
    }

    /// The same in steps of `chunk` tokens.
    ///
    /// # Errors
    /// As there; no tokens in a chunk, or more than a step may sample.
    pub fn forward_logits_in_chunks(&mut self, tokens: &[TokenId], chunk: usize) -> Result<Vec<f32>, RunnerError> {
        let capacity = self.plan.capacity_tokens().min(self.limits.max_model_len as u64) as usize;
        check_limit("tokens", tokens.len(), capacity)?;
        if chunk == 0 {
            let (name, value, max) = ("chunk", chunk, self.limits.max_tokens);
            return Err(RunnerError::Limit { name, value, max });
        }
        let mut logits = Vec::with_capacity(tokens.len() * self.config.vocab_size);
        for start in (0..tokens.len()).step_by(chunk) {
            let end = tokens.len().min(start + chunk);
            let batch = scoring_batch(tokens, start..end, self.plan.block_size);
            self.run(&batch, |backend, rows| {
                logits.extend(backend.read(rows, end - start)?);
                Ok(())
            })?;
            self.backend.collect()?;
        }
        Ok(logits)
    }

    /// One step, up to the point where its tokens can be collected; `inspect` sees the logits before they are sampled.
    fn run(
        &mut self,
        batch: &Batch,
        inspect: impl FnOnce(&mut B, &B::Tensor) -> Result<(), BackendError>,
    ) -> Result<(), RunnerError> {
        self.check(batch)?;
        let plan = self.backend.begin(batch)?;
        let logits = self
            .decoder
            .forward(&mut self.backend, &plan, !batch.samples.is_empty())?;
        inspect(&mut self.backend, logits)?;
        self.backend.sample(&plan, batch, logits)?;
        Ok(())
    }

    /// Refuses what would make a backend read or write outside what was reserved.
    fn check(&self, batch: &Batch) -> Result<(), RunnerError> {
        check_limit("tokens", batch.num_tokens(), self.limits.max_tokens)?;
        check_limit("sequences", batch.num_seqs(), self.limits.max_seqs)?;
        check_limit("samples", batch.samples.len(), self.limits.max_seqs)?;
        let mask_words = self.config.vocab_size.div_ceil(32);
        let misfit = |sample: &&SampleRow| sample.mask.as_ref().is_some_and(|mask| mask.len() != mask_words);
        if let Some(mask) = batch
            .samples
            .iter()
            .find(misfit)
            .and_then(|sample| sample.mask.as_ref())
        {
            return Err(RunnerError::BatchLimit {
                what: "mask words",
                found: mask.len(),
                limit: mask_words,
            });
        }
        let below = |what, values: &mut dyn Iterator<Item = u32>, limit: usize| {
            values
                .max()
                .map_or(Ok(()), |largest| check_limit(what, largest as usize + 1, limit))
        };
        let slots = self.plan.capacity_tokens() as usize;
        below(
            "a token beyond",
            &mut batch.token_ids.iter().copied(),
            self.config.vocab_size,
        )?;
        below(
            "a position beyond",
            &mut batch.positions.iter().copied(),
            self.limits.max_model_len,
        )?;
        below("a slot beyond", &mut batch.slot_mapping.iter().copied(), slots)?;
        below(
            "a block beyond",
            &mut batch.block_ids.iter().map(|block| block.0),
            self.plan.num_blocks as usize,
        )?;
        below(
            "a sampled row beyond",
            &mut batch.samples.iter().map(|sample| sample.row),
            batch.num_tokens(),
        )
    }
}

impl<B: Backend> Executor for ModelRunner<B> {
    fn kv_cache_config(&self) -> KvCacheConfig {
        KvCacheConfig {
            num_blocks: self.plan.num_blocks,
            block_size: self.plan.block_size,
        }
    }

    fn max_steps_in_flight(&self) -> usize {
        self.backend.max_steps_in_flight()
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), ExecutorError> {
        self.run(batch, |_, _| Ok(())).map_err(executor_error)
    }

    fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError> {
        self.backend.collect().map_err(|error| executor_error(error.into()))
    }
}

impl<B: Backend> fmt::Debug for ModelRunner<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelRunner")
            .field("limits", &self.limits)
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl MemoryPlan {
    fn before_load<B: Backend>(
        backend: &B,
        model: &ModelConfig,
        limits: StepLimits,
        block_size: u32,
        weight_bytes: u64,
    ) -> Self {
        let memory = backend.memory();
        Self {
            weight_bytes,
            scratch_bytes: Scratch::bytes(backend, model, limits),
            kv_cache_bytes: 0,
            backend_bytes: 0,
            graph_bytes: 0,
            num_blocks: 0,
            block_size,
            kv_bytes_per_token: 0,
            device_free_bytes: memory.free_bytes,
            device_total_bytes: memory.total_bytes,
        }
    }

    /// A model that cannot fit is refused now, not after its first gigabytes were read.
    fn check_before_load(&self) -> Result<(), RunnerError> {
        let needed_bytes = self.weight_bytes + self.scratch_bytes;
        if needed_bytes <= self.device_free_bytes {
            return Ok(());
        }
        let (what, free_bytes) = ("the model without its KV cache", self.device_free_bytes);
        Err(self.name_in(BackendError::OutOfMemory {
            what,
            needed_bytes: Some(needed_bytes),
            free_bytes,
        }))
    }

    /// After weights and scratch are in place: what more is gone. Where others use the memory too, nobody can tell.
    fn count_backend<B: Backend>(&mut self, backend: &B, size: KvCacheSize) {
        if matches!(size, KvCacheSize::DeviceShare(_)) {
            let taken = self.device_free_bytes.saturating_sub(backend.memory().free_bytes);
            self.backend_bytes = taken.saturating_sub(self.weight_bytes + self.scratch_bytes);
        }
    }

    /// After weights and scratch are in place, so that a share of the device counts what they really took.
    fn size_kv_cache<B: Backend>(&mut self, backend: &B, model: &ModelConfig, size: KvCacheSize) {
        let block_bytes = (backend.kv_block_bytes(self.block_size as usize) * model.num_layers as u64).max(1);
        // Slots are numbered in 32 bits.
        let max_blocks = u64::from(u32::MAX / self.block_size);
        let blocks = match size {
            KvCacheSize::Blocks(blocks) => u64::from(blocks),
            KvCacheSize::Bytes(bytes) => bytes / block_bytes,
            KvCacheSize::Tokens { wanted, free_share } => {
                let usable = (backend.memory().free_bytes as f64 * free_share) as u64;
                wanted.div_ceil(u64::from(self.block_size)).min(usable / block_bytes)
            }
            KvCacheSize::DeviceShare(share) => {
                let memory = backend.memory();
                let used = memory.total_bytes - memory.free_bytes.min(memory.total_bytes);
                let usable = (memory.total_bytes as f64 * share) as u64;
                usable.saturating_sub(used) / block_bytes
            }
        };
        let blocks = blocks.min(max_blocks);
        self.num_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        self.kv_cache_bytes = blocks * block_bytes;
        self.kv_bytes_per_token = block_bytes / u64::from(self.block_size);
    }

    /// Refused in one piece: a backend makes all pages of a layer before it is asked for the next.
    fn check_kv_cache<B: Backend>(&self, backend: &B) -> Result<(), RunnerError> {
        let free_bytes = backend.memory().free_bytes;
        if self.kv_cache_bytes <= free_bytes {
            return Ok(());
        }
        Err(self.name_in(BackendError::OutOfMemory {
            what: "the KV cache",
            needed_bytes: Some(self.kv_cache_bytes),
            free_bytes,
        }))
    }

    /// An allocation that failed is only understood next to the others.
    fn name_in(&self, error: BackendError) -> RunnerError {
        match error {
            BackendError::OutOfMemory { .. } => RunnerError::OutOfMemory {
                plan: *self,
                source: Box::new(error),
            },
            error => RunnerError::Backend(error),
        }
    }
}

fn step_limits(model: &ModelConfig, config: RunnerConfig) -> Result<StepLimits, RunnerError> {
    /// Far above any useful step; keeps sizes computed from limits inside 64 bits.
    const MAX_STEP: usize = 1 << 20;
    /// Larger blocks waste more cache than they save in tables.
    const MAX_BLOCK_SIZE: usize = 1024;
    let check = |name, value, max| {
        if (1..=max).contains(&value) {
            Ok(value)
        } else {
            Err(RunnerError::Limit { name, value, max })
        }
    };
    check("block_size", config.block_size as usize, MAX_BLOCK_SIZE)?;
    let model_len = config.max_model_len.unwrap_or(model.max_position_embeddings);
    Ok(StepLimits {
        max_tokens: check("max_num_batched_tokens", config.max_num_batched_tokens, MAX_STEP)?,
        max_seqs: check("max_num_seqs", config.max_num_seqs, MAX_STEP)?,
        max_model_len: check("max_model_len", model_len, model.max_position_embeddings)?,
    })
}

fn alloc_kv_layers<B: Backend>(
    backend: &mut B,
    tensors: &ModelTensors<'_>,
    plan: &MemoryPlan,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Vec<B::KvLayer>, BackendError> {
    let (total_bytes, num_layers) = (plan.kv_cache_bytes, tensors.layers.len() as u64);
    (1..=num_layers)
        .zip(&tensors.layers)
        .map(|(done, layer)| {
            let (num_blocks, block_size) = (plan.num_blocks as usize, plan.block_size as usize);
            let layer = backend.alloc_kv_layer(num_blocks, block_size, layer.kv_scales)?;
            let done_bytes = total_bytes / num_layers * done;
            progress(LoadProgress {
                phase: LoadPhase::KvCache,
                done_bytes,
                total_bytes,
            });
            Ok(layer)
        })
        .collect()
}

fn check_limit(what: &'static str, found: usize, limit: usize) -> Result<(), RunnerError> {
    if found <= limit {
        Ok(())
    } else {
        Err(RunnerError::BatchLimit { what, found, limit })
    }
}

/// A lost device leaves nothing to run on; everything else concerns one step.
fn executor_error(error: RunnerError) -> ExecutorError {
    match error {
        RunnerError::Backend(BackendError::Lost(cause)) => ExecutorError::DeviceLost(cause),
        error => ExecutorError::Step(Box::new(error)),
    }
}

/// Nobody has keys or values yet, so sequences may overwrite each other's.
fn rehearsal_batch(step: Rehearsal, plan: &MemoryPlan) -> Batch {
    let (lens, logprobs) = match step {
        Rehearsal::Decode { num_seqs, logprobs } => (vec![1; num_seqs], logprobs),
        Rehearsal::Prompt { num_tokens } => (vec![num_tokens as u32], false),
    };
    let params = Arc::new(SamplingParams {
        temperature: 0.0,
        logprobs: logprobs.then_some(0),
        ..SamplingParams::default()
    });
    let mut batch = Batch {
        query_start: vec![0],
        block_start: vec![0],
        ..Batch::default()
    };
    for (seq, len) in lens.iter().copied().enumerate() {
        batch.request_ids.push(RequestId(seq as u64));
        batch.positions.extend(0..len);
        batch.context_lens.push(len);
        let first_block = batch.block_ids.len() as u32;
        let blocks = first_block..first_block + len.div_ceil(plan.block_size);
        let blocks: Vec<u32> = blocks.map(|block| block % plan.num_blocks.max(1)).collect();
        let slot = |position: u32| {
            blocks[(position / plan.block_size) as usize] * plan.block_size + position % plan.block_size
        };
        batch.slot_mapping.extend((0..len).map(slot));
        batch.block_ids.extend(blocks.iter().copied().map(BlockId));
        batch.block_start.push(batch.block_ids.len() as u32);
        let rows = batch.query_start[seq] + len;
        batch.query_start.push(rows);
        batch.samples.push(SampleRow {
            row: rows - 1,
            position: len,
            given: None,
            params: Arc::clone(&params),
            banned: None,
            mask: None,
            history: None,
        });
    }
    batch.token_ids = vec![0; batch.positions.len()];
    batch
}

/// Tokens `rows` of one sequence that occupies the first KV blocks in order; logits wanted for each of them.
fn scoring_batch(tokens: &[TokenId], rows: std::ops::Range<usize>, block_size: u32) -> Batch {
    let (start, end) = (rows.start as u32, rows.end as u32);
    let params = Arc::new(SamplingParams {
        temperature: 0.0,
        // The logits are read before the step ends, so it must not be recorded as a whole and run only then: no such step
        // reports log-probabilities.
        logprobs: Some(0),
        ..SamplingParams::default()
    });
    let sample = |row| SampleRow {
        row,
        position: start + row + 1,
        given: None,
        params: Arc::clone(&params),
        banned: None,
        mask: None,
        history: None,
    };
    let num_blocks = end.div_ceil(block_size);
    Batch {
        step: 0,
        request_ids: vec![RequestId(0)],
        token_ids: tokens[rows].to_vec(),
        fed: Vec::new(),
        positions: (start..end).collect(),
        slot_mapping: (start..end).collect(),
        query_start: vec![0, end - start],
        context_lens: vec![end],
        block_start: vec![0, num_blocks],
        block_ids: (0..num_blocks).map(BlockId).collect(),
        samples: (0..end - start).map(sample).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn plan(device_free_bytes: u64) -> MemoryPlan {
        MemoryPlan {
            weight_bytes: 9 * GIB,
            scratch_bytes: GIB,
            kv_cache_bytes: 0,
            backend_bytes: 0,
            graph_bytes: 0,
            num_blocks: 0,
            block_size: 16,
            kv_bytes_per_token: 0,
            device_free_bytes,
            device_total_bytes: 24 * GIB,
        }
    }

    #[test]
    fn a_model_larger_than_the_device_is_refused_before_it_is_read() {
        assert!(plan(10 * GIB).check_before_load().is_ok());
        let error = plan(10 * GIB - 1).check_before_load().expect_err("one byte is missing");
        assert!(
            error.to_string().contains("weights 9.00 GiB, scratch 1.00 GiB"),
            "{error}"
        );
        let cause = std::error::Error::source(&error)
            .expect("the allocation is named")
            .to_string();
        assert!(cause.contains("10737418240 bytes, 10737418239 are free"), "{cause}");
    }

    #[test]
    fn only_a_lost_device_ends_the_executor() {
        let lost = RunnerError::Backend(BackendError::Lost("gone".into()));
        assert!(matches!(executor_error(lost), ExecutorError::DeviceLost(_)));
        let refused = RunnerError::Backend(BackendError::Refused("a grid".into()));
        assert!(matches!(executor_error(refused), ExecutorError::Step(_)));
        let unsupported = RunnerError::Backend(BackendError::Unsupported("a shape".to_owned()));
        assert!(matches!(executor_error(unsupported), ExecutorError::Step(_)));
        let batch = RunnerError::BatchLimit {
            what: "tokens",
            found: 2,
            limit: 1,
        };
        assert!(matches!(executor_error(batch), ExecutorError::Step(_)));
    }

    #[test]
    fn a_scoring_batch_continues_where_the_last_chunk_ended() {
        let tokens: Vec<_> = (100..140).collect();
        let batch = scoring_batch(&tokens, 20..40, 16);
        assert_eq!(
            (batch.token_ids[0], batch.positions[0], batch.slot_mapping[19]),
            (120, 20, 39)
        );
        assert_eq!(
            (batch.query_start, batch.context_lens, batch.block_start),
            (vec![0, 20], vec![40], vec![0, 3])
        );
        assert_eq!(
            (batch.samples[0].row, batch.samples[0].position, batch.samples.len()),
            (0, 21, 20)
        );
    }
}
