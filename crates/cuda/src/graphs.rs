//! Steps of few tokens are recorded once for each size and replayed: launching their hundreds of kernels one by one takes
//! longer than running them.
//!
//! | recorded | of steps with | what runs kernel by kernel |
//! |---|---|---|
//! | the whole step | one token a sequence, chosen by parameters that are read on the device | nothing |
//! | the layers | one token a sequence, chosen in any other way | last norm, logits, choice |
//! | the layers | prompts | the same |
//!
//! The few launches behind recorded layers are issued while those run, whatever they are: masks, penalties and
//! log-probabilities multiply no recordings.

use std::collections::HashMap;

use lapidary_engine::Batch;
use lapidary_model::{BackendError, Rehearsal, StepLimits};

use crate::device::{Device, GraphId};

#[cfg(all(test, feature = "emulator"))]
mod tests;

/// Sizes of whole steps; a batch runs in the smallest that holds it. Finely spaced where the matrix kernels have a width of
/// their own, coarsely where padding rows are nearly free.
const WHOLE_SIZES: [usize; 15] = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256];
/// Sizes of layers. Each takes memory and time at start, and serves steps that are rarer.
const LAYER_SIZES: [usize; 7] = [4, 8, 16, 32, 64, 128, 256];
/// The most tokens of a recorded step.
const MAX_RECORDED: usize = 256;

/// Those of `sizes` below `most`, and `most`: whatever the limit of a step, it is recorded up to there.
fn up_to(sizes: &'static [usize], most: usize) -> impl Iterator<Item = usize> {
    let smaller = sizes.iter().copied().take_while(move |size| *size < most);
    smaller.chain((most > 0).then_some(most))
}

/// What is recorded, for how many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Recording {
    /// All of a step of one token a sequence.
    Whole(usize),
    /// Its layers.
    DecodeLayers(usize),
    /// Those of a step with prompts.
    PromptLayers(usize),
}

impl Recording {
    /// Tokens that it has room for.
    pub(crate) fn max_tokens(self) -> usize {
        let (Self::Whole(size) | Self::DecodeLayers(size) | Self::PromptLayers(size)) = self;
        size
    }
}

/// What happens to the operations of the step at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// They run one by one.
    Eager,
    /// They are recorded, and replayed when what is recorded ends.
    Record(Recording),
    /// They were recorded before: nothing is issued until what is recorded ends.
    Replay(Recording, GraphId),
}

/// The recorded steps, and how the step at hand runs.
#[derive(Debug)]
pub(crate) struct Graphs {
    /// Tokens of the largest step of one token a sequence that is recorded, and of the largest with prompts. 0 before the
    /// caller promised that operations repeat.
    max_seqs: usize,
    max_prompt: usize,
    recorded: HashMap<Recording, GraphId>,
    mode: Mode,
}

impl Graphs {
    pub(crate) fn new() -> Self {
        Self {
            max_seqs: 0,
            max_prompt: 0,
            recorded: HashMap::new(),
            mode: Mode::Eager,
        }
    }

    /// From now on steps within `limits` are recorded. Gives one of each recording.
    pub(crate) fn enable(&mut self, limits: StepLimits) -> Vec<Rehearsal> {
        self.max_seqs = limits.max_seqs.min(limits.max_tokens).min(MAX_RECORDED);
        self.max_prompt = limits.max_tokens.min(limits.max_model_len).min(MAX_RECORDED);
        let (max_seqs, max_prompt) = (self.max_seqs, self.max_prompt);
        let decode = |logprobs| move |num_seqs| Rehearsal::Decode { num_seqs, logprobs };
        // A step with prompts has more tokens than sequences.
        let prompt_sizes = up_to(&LAYER_SIZES, max_prompt).filter(|size| *size > 1);
        up_to(&WHOLE_SIZES, max_seqs)
            .map(decode(false))
            .chain(up_to(&LAYER_SIZES, max_seqs).map(decode(true)))
            .chain(prompt_sizes.map(|num_tokens| Rehearsal::Prompt { num_tokens }))
            .collect()
    }

    /// Throws away what a step that failed half-way has recorded.
    pub(crate) fn abandon(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Record(_) => device.end_capture(false).map(drop),
            Mode::Eager | Mode::Replay(..) => Ok(()),
        }
    }

    /// What a step runs as; `None`: its operations run one by one. `is_plain`: its tokens are chosen as those of whole recorded
    /// steps are. `has_room`: whether a recorded step of so many tokens has room for the attention of its prompts.
    pub(crate) fn recording(
        &self,
        batch: &Batch,
        is_plain: bool,
        has_room: impl Fn(usize) -> bool,
    ) -> Option<Recording> {
        let num_tokens = batch.num_tokens();
        if num_tokens == 0 {
            return None;
        }
        let holding = |sizes, most| up_to(sizes, most).filter(move |size| *size >= num_tokens);
        if num_tokens > batch.num_seqs() {
            let size = holding(&LAYER_SIZES, self.max_prompt).find(|size| has_room(*size));
            return size.map(Recording::PromptLayers);
        }
        if is_plain && !batch.samples.is_empty() {
            return holding(&WHOLE_SIZES, self.max_seqs).next().map(Recording::Whole);
        }
        holding(&LAYER_SIZES, self.max_seqs).next().map(Recording::DecodeLayers)
    }

    /// Begins a step.
    pub(crate) fn begin(&mut self, device: &mut dyn Device, recording: Option<Recording>) -> Result<(), BackendError> {
        self.mode = match recording.map(|recording| (recording, self.recorded.get(&recording))) {
            None => Mode::Eager,
            Some((recording, Some(graph))) => Mode::Replay(recording, *graph),
            Some((recording, None)) => {
                device.begin_capture()?;
                Mode::Record(recording)
            }
        };
        Ok(())
    }

    /// Whether operations are to be issued, to run or to be recorded.
    pub(crate) fn issues(&self) -> bool {
        !matches!(self.mode, Mode::Replay(..))
    }

    /// Whether the operations of the step at hand run as they are issued.
    pub(crate) fn is_eager(&self) -> bool {
        self.mode == Mode::Eager
    }

    /// The layers end: if they alone are recorded they run now, and what follows runs as it is issued.
    pub(crate) fn end_layers(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        match self.mode {
            Mode::Record(Recording::Whole(_)) | Mode::Replay(Recording::Whole(_), _) => Ok(()),
            _ => self.end(device),
        }
    }

    /// Ends a step: what was only recorded runs now.
    pub(crate) fn end(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Eager => Ok(()),
            Mode::Replay(_, graph) => device.replay(graph),
            Mode::Record(recording) => {
                let graph = device.end_capture(true)?.expect("a kept capture is a graph");
                self.recorded.insert(recording, graph);
                device.replay(graph)
            }
        }
    }
}
