//! Launches `kernels/sample.cu`, with the packed parameters it chooses by (`kernels/common/sampling.cuh`).

use lapidary_engine::{Batch, SampledToken, TokenId, TokenLogprobs};
use lapidary_model::BackendError;

use crate::device::{Device, DevicePtr, Grid, Kernel, READBACK_BYTES, Readback, bytes_of, kernel_params, launch};
use crate::step::{StepBuffers, StepPointers};
use crate::tensor::Tensor;

const THREADS: usize = 256;
/// Logits that a block looks at.
const SLICE: usize = 4096;
/// The last block of a row looks at one slice a thread.
const MAX_VOCAB: usize = SLICE * THREADS;
/// Blocks of a launch for each multiprocessor, twice what it runs at a time.
const BLOCKS_EACH: usize = 8;
const BINS: usize = 352;
const MAX_CANDIDATES: usize = 16384;
/// At least what the kernels' `SampleShared` takes.
const SHARED_BYTES: usize = 9 * 1024;

const HEADER_WORDS: usize = 8;
const ROW_WORDS: usize = 16;
const ENTRY_WORDS: usize = 4;
const STATE_BYTES: usize = 32;
const SCORE_BYTES: usize = 16;
const RESULT_WORDS: usize = 4 + 2 * MAX_TOP;

/// The most alternatives that are reported with a token.
pub(crate) const MAX_TOP: usize = 20;
/// Alternatives that a sampled token can be reported with.
pub const MAX_LOGPROBS: u32 = MAX_TOP as u32;
/// Rows of a step whose results come back in one piece.
pub(crate) const MAX_SAMPLES: usize = READBACK_BYTES / (4 * RESULT_WORDS);
/// Tokens that biases and bans of a row may name, beside those of its history.
const MAX_LISTED: usize = 2048;

/// The kernels' `SampleParams`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SampleParams {
    step: StepPointers,
    logits: DevicePtr,
    packed: DevicePtr,
    sampled_tokens: DevicePtr,
    results: DevicePtr,
    states: DevicePtr,
    block_keys: DevicePtr,
    slice_masses: DevicePtr,
    bin_counts: DevicePtr,
    bin_masses: DevicePtr,
    candidates: DevicePtr,
    slice_scores: DevicePtr,
    slice_tops: DevicePtr,
    vocab: i32,
    slices: i32,
    slices_each: i32,
    max_samples: i32,
}

kernel_params!(SampleParams);

/// How one token is chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice<'a> {
    pub(crate) sample: &'a lapidary_engine::SampleRow,
    /// The token to report on, which nothing chooses.
    pub(crate) given: Option<TokenId>,
    /// Bit `t % 32` of word `t / 32` allows token `t`.
    pub(crate) mask: Option<&'a [u32]>,
}

/// What the rows of a step need beyond the largest logit: which kernels have work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Needs {
    /// Biases, bans or penalties.
    pub(crate) adjustment: bool,
    /// A draw.
    pub(crate) draw: bool,
    /// `top_k` or `top_p`.
    pub(crate) ranking: bool,
    pub(crate) logprobs: bool,
}

impl Needs {
    /// What steps may need that one recorded sequence of launches can serve: parameters are read on the device.
    pub(crate) const RECORDABLE: Self = Self {
        adjustment: false,
        draw: true,
        ranking: true,
        logprobs: false,
    };

    /// Whether a step needs no more than that.
    pub(crate) fn are_recordable(batch: &Batch) -> bool {
        batch.samples.iter().all(|sample| {
            let params = &sample.params;
            params.logprobs.is_none()
                && params.logit_bias.is_empty()
                && sample.banned.is_none()
                && sample.mask.is_none()
                && sample.given.is_none()
                && sample.history.is_none()
        })
    }
}

/// The kernels and buffers of one device.
#[derive(Debug)]
pub(crate) struct Sampler {
    adjust: Kernel,
    scan: Kernel,
    weigh: Kernel,
    gather: Kernel,
    restore: Kernel,
    logprobs: Kernel,
    params: SampleParams,
    packer: Packer,
    max_vocab: usize,
    max_words: usize,
    max_samples: usize,
    /// With more blocks than these in a launch, each looks at more of a row.
    enough_blocks: usize,
}

/// The largest step a [`Sampler`] serves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SampleLimits {
    /// Rows.
    pub(crate) max_samples: usize,
    /// Tokens of a sequence, which its penalties look at.
    pub(crate) max_model_len: usize,
    /// Logits of a row.
    pub(crate) max_vocab: usize,
}

impl Sampler {
    /// # Errors
    /// Not enough memory, or a larger vocabulary than the kernels have room for.
    pub(crate) fn alloc(
        device: &mut dyn Device,
        step: &StepBuffers,
        limits: SampleLimits,
    ) -> Result<Self, BackendError> {
        let SampleLimits {
            max_samples,
            max_model_len,
            max_vocab,
        } = limits;
        if max_vocab > MAX_VOCAB {
            return Err(BackendError::Unsupported(format!("a vocabulary of {max_vocab} tokens")));
        }
        let slices = max_vocab.div_ceil(SLICE);
        let listed = max_vocab.min(max_model_len + MAX_LISTED) + 1;
        let row_words = ROW_WORDS + ENTRY_WORDS * listed + mask_words(max_vocab);
        let max_words = HEADER_WORDS + max_samples * row_words;
        // Counters start at zero, and kernels leave them so.
        let mut alloc = |bytes: usize| {
            let buffer = device.alloc("sampling", bytes)?;
            device.zero(buffer, bytes).map(|()| buffer)
        };
        let params = SampleParams {
            step: *step.pointers(),
            logits: DevicePtr::NULL,
            packed: alloc(4 * max_words)?,
            sampled_tokens: step.sampled_tokens(),
            results: alloc(4 * RESULT_WORDS * max_samples)?,
            states: alloc(STATE_BYTES * max_samples)?,
            block_keys: alloc(8 * slices * max_samples)?,
            slice_masses: alloc(8 * slices * max_samples)?,
            bin_counts: alloc(4 * BINS * max_samples)?,
            bin_masses: alloc(8 * BINS * max_samples)?,
            candidates: alloc(8 * MAX_CANDIDATES * max_samples)?,
            slice_scores: alloc(SCORE_BYTES * slices * max_samples)?,
            slice_tops: alloc(8 * MAX_TOP * slices * max_samples)?,
            vocab: 0,
            slices: 0,
            slices_each: 0,
            max_samples: step.max_samples() as i32,
        };
        let mut kernel = |name| device.kernel(name, THREADS as u32);
        Ok(Self {
            adjust: kernel("sample_adjust")?,
            scan: kernel("sample_scan")?,
            weigh: kernel("sample_weigh")?,
            gather: kernel("sample_gather")?,
            restore: kernel("sample_restore")?,
            logprobs: kernel("sample_logprobs")?,
            params,
            packer: Packer::default(),
            max_vocab,
            max_words,
            max_samples,
            enough_blocks: BLOCKS_EACH * device.multiprocessors(),
        })
    }

    /// Uploads how the step's tokens are chosen, from `vocab` logits each, and says what that needs.
    ///
    /// # Errors
    /// A step beyond the limits, or the device failed.
    pub(crate) fn upload<'a>(
        &mut self,
        device: &mut dyn Device,
        batch: &Batch,
        choices: impl ExactSizeIterator<Item = Choice<'a>>,
        vocab: usize,
    ) -> Result<Needs, BackendError> {
        let rows = choices.len();
        let needs = self.packer.pack(batch, choices, vocab);
        if rows > self.max_samples || vocab > self.max_vocab || self.packer.words.len() > self.max_words {
            let words = self.packer.words.len();
            return Err(BackendError::Unsupported(format!(
                "{rows} samples from {vocab} logits by {words} words"
            )));
        }
        device.upload(self.params.packed, bytes_of(&self.packer.words))?;
        Ok(needs)
    }

    /// Chooses tokens for at most `samples` rows of `logits`, which must be wide, as the step's upload says.
    ///
    /// # Errors
    /// A larger vocabulary than was reserved for, or the device failed.
    pub(crate) fn run(
        &self,
        device: &mut dyn Device,
        logits: &Tensor,
        samples: usize,
        needs: Needs,
    ) -> Result<(), BackendError> {
        if logits.cols > self.max_vocab || samples > self.max_samples.min(logits.rows) {
            return Err(BackendError::Unsupported(format!(
                "{samples} samples from {} logits",
                logits.cols
            )));
        }
        let slices = logits.cols.div_ceil(SLICE);
        // Masses are exact and keys are all different: how slices are grouped changes no result.
        let slices_each = (samples * slices / self.enough_blocks).clamp(1, slices);
        let params = SampleParams {
            logits: logits.data,
            vocab: logits.cols as i32,
            slices: slices as i32,
            slices_each: slices_each as i32,
            ..self.params
        };
        let by_row = Grid::line(samples).shared(SHARED_BYTES);
        let by_slice = Grid {
            blocks: [slices.div_ceil(slices_each) as u32, samples as u32, 1],
            ..by_row
        };
        let stages = [
            (needs.adjustment, &self.adjust, by_row),
            (true, &self.scan, by_slice),
            (needs.draw, &self.weigh, by_slice),
            (needs.draw && needs.ranking, &self.gather, by_slice),
            (needs.adjustment && needs.logprobs, &self.restore, by_row),
            (needs.logprobs, &self.logprobs, by_slice),
        ];
        for (_, kernel, grid) in stages.into_iter().filter(|(is_needed, ..)| *is_needed) {
            launch(device, kernel, grid, &params)?;
        }
        Ok(())
    }

    /// Starts to copy what the step of `batch` chose to the host: only the tokens, unless someone asked for more.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn start_readback(
        &self,
        device: &mut dyn Device,
        step: &StepBuffers,
        batch: &Batch,
    ) -> Result<Choices, BackendError> {
        let has_logprobs = batch.samples.iter().map(|sample| sample.params.logprobs.is_some());
        let has_logprobs: Vec<_> = has_logprobs.collect();
        let (from, words) = if has_logprobs.contains(&true) {
            (self.params.results, RESULT_WORDS)
        } else {
            (step.current_tokens(), 1)
        };
        let readback = device.start_readback(from, 4 * words * has_logprobs.len())?;
        Ok(Choices { readback, has_logprobs })
    }
}

/// Chosen tokens on their way to the host.
#[derive(Debug)]
pub(crate) struct Choices {
    readback: Readback,
    /// For each row, whether someone asked for log-probabilities.
    has_logprobs: Vec<bool>,
}

impl Choices {
    /// Of a step that chooses nothing.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn none(device: &mut dyn Device) -> Result<Self, BackendError> {
        Ok(Self {
            readback: device.start_readback(DevicePtr::NULL, 0)?,
            has_logprobs: Vec::new(),
        })
    }

    /// Waits for them.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn finish(self, device: &mut dyn Device) -> Result<Vec<SampledToken>, BackendError> {
        let bytes = device.finish_readback(self.readback)?;
        let words: Vec<u32> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word))
            .collect();
        let row_words = if self.has_logprobs.contains(&true) {
            RESULT_WORDS
        } else {
            1
        };
        let rows = words.chunks_exact(row_words).zip(&self.has_logprobs);
        let sampled = |(words, has_logprobs): (&[u32], &bool)| SampledToken {
            token: words[0],
            logprobs: has_logprobs.then(|| Box::new(logprobs(words))),
        };
        Ok(rows.map(sampled).collect())
    }
}

/// Of the kernels' `SampleResult`.
fn logprobs(words: &[u32]) -> TokenLogprobs {
    let count = (words[3] as usize).min(MAX_TOP);
    let (tokens, logprobs) = words[4..].split_at(MAX_TOP);
    let top = tokens.iter().zip(logprobs).take(count);
    TokenLogprobs {
        logprob: f32::from_bits(words[1]),
        rank: words[2],
        top: top.map(|(token, logprob)| (*token, f32::from_bits(*logprob))).collect(),
    }
}

fn mask_words(vocab: usize) -> usize {
    vocab.div_ceil(32).next_multiple_of(4)
}

/// A token of a row whose logit is not the model's alone: the kernels' `SampleEntry`.
#[derive(Debug, Clone, Copy)]
struct Entry {
    token: TokenId,
    /// -inf bans.
    bias: f32,
    /// How often it was generated; -1: it is in neither prompt nor output.
    used: i32,
}

/// Builds packed steps: a header, a record for each row, and then the rows' entries and masks.
#[derive(Debug, Default)]
struct Packer {
    words: Vec<i32>,
    entries: Vec<Entry>,
    /// For each token, 0 or one more than its index in `entries`.
    entry_of: Vec<u32>,
}

impl Packer {
    fn pack<'a>(&mut self, batch: &Batch, choices: impl ExactSizeIterator<Item = Choice<'a>>, vocab: usize) -> Needs {
        self.words.clear();
        self.words.resize(HEADER_WORDS + ROW_WORDS * choices.len(), 0);
        self.words[0] = choices.len() as i32;
        self.entry_of.resize(vocab, 0);
        let mut needs = Needs::default();
        for (index, choice) in choices.enumerate() {
            let row = choice.sample.row;
            let is_fed = choice.sample.history.is_some() && batch.fed.iter().any(|fed| fed.row == row);
            self.pack_row(index, &choice, is_fed, vocab);
            let params = &choice.sample.params;
            let draws = choice.given.is_none() && params.temperature > 0.0;
            needs.draw |= draws;
            needs.ranking |= draws && (params.top_k > 0 || params.top_p < 1.0);
            needs.adjustment |= is_fed || !self.entries.is_empty();
            needs.logprobs |= params.logprobs.is_some();
        }
        needs
    }

    fn pack_row(&mut self, index: usize, choice: &Choice<'_>, is_fed: bool, vocab: usize) {
        self.list(choice);
        let first_entry = self.words.len();
        for Entry { token, bias, used } in &self.entries {
            self.words
                .extend([token.cast_signed(), bias.to_bits().cast_signed(), *used, 0]);
            self.entry_of[*token as usize] = 0;
        }
        if is_fed {
            // Room for the input, if it is not in the list.
            self.words.extend([-1, 0, 0, 0]);
        }
        let num_entries = self.entries.len() + usize::from(is_fed);
        let first_mask = self.words.len();
        if let Some(mask) = choice.mask {
            self.words.extend(mask.iter().map(|word| word.cast_signed()));
            self.words.resize(first_mask + mask_words(vocab), 0);
        }
        let params = &choice.sample.params;
        let top = params
            .logprobs
            .map_or(-1, |count| count.min(MAX_TOP as u32).cast_signed());
        let bits = |x: f32| x.to_bits().cast_signed();
        let record = [
            (params.seed as u32).cast_signed(),
            ((params.seed >> 32) as u32).cast_signed(),
            bits(params.temperature),
            bits(params.min_p),
            bits(params.top_p),
            params.top_k.min(i32::MAX as u32).cast_signed(),
            choice.sample.position.cast_signed(),
            choice.given.map_or(-1, u32::cast_signed),
            top,
            if choice.mask.is_some() { first_mask as i32 } else { 0 },
            first_entry as i32,
            num_entries as i32,
            bits(params.repetition_penalty),
            bits(params.frequency_penalty),
            bits(params.presence_penalty),
            i32::from(is_fed),
        ];
        self.words[HEADER_WORDS + ROW_WORDS * index..][..ROW_WORDS].copy_from_slice(&record);
    }

    /// Each token that the row names, once.
    fn list(&mut self, choice: &Choice<'_>) {
        self.entries.clear();
        if choice.given.is_some() {
            return;
        }
        let sample = choice.sample;
        for (token, bias) in &sample.params.logit_bias {
            if let Some(entry) = self.entry(*token) {
                entry.bias += bias;
            }
        }
        for token in sample.banned.iter().flat_map(|banned| banned.iter()) {
            if let Some(entry) = self.entry(*token) {
                entry.bias = f32::NEG_INFINITY;
            }
        }
        let Some(history) = &sample.history else { return };
        let prompt = history.prompt.iter().map(|token| (*token, 0));
        for (token, times) in prompt.chain(history.output.iter().map(|token| (*token, 1))) {
            if let Some(entry) = self.entry(token) {
                entry.used = entry.used.max(0) + times;
            }
        }
    }

    /// `None` for tokens that have no logit.
    fn entry(&mut self, token: TokenId) -> Option<&mut Entry> {
        let slot = self.entry_of.get_mut(token as usize)?;
        if *slot == 0 {
            self.entries.push(Entry {
                token,
                bias: 0.0,
                used: -1,
            });
            *slot = self.entries.len() as u32;
        }
        let index = *slot as usize - 1;
        self.entries.get_mut(index)
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
