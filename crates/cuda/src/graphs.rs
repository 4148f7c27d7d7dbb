//! Steps of one token a sequence are recorded once for each size and replayed: launching their hundreds of kernels one by
//! one takes longer than running them.

use std::collections::HashMap;

use lapidary_engine::Batch;
use lapidary_model::BackendError;

use crate::device::{Device, GraphId};

/// Sizes that are recorded; a batch runs in the smallest that holds it. Finely spaced where the matrix kernels have a width
/// of their own, coarsely where padding rows are nearly free.
const SIZES: [usize; 15] = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256];

/// What happens to the operations of the step at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// They run one by one.
    Eager,
    /// They are recorded for this size, and replayed when the step ends.
    Record(usize),
    /// They were recorded before: nothing is issued until the step ends.
    Replay(GraphId),
}

/// The recorded steps, and how the step at hand runs.
#[derive(Debug)]
pub(crate) struct Graphs {
    /// Whether the caller promised that operations repeat.
    enabled: bool,
    max_size: usize,
    recorded: HashMap<usize, GraphId>,
    mode: Mode,
}

impl Graphs {
    pub(crate) fn new() -> Self {
        Self {
            enabled: false,
            max_size: 0,
            recorded: HashMap::new(),
            mode: Mode::Eager,
        }
    }

    /// From now on steps of at most `max_size` tokens are recorded. Gives the sizes.
    pub(crate) fn enable(&mut self, max_size: usize) -> Vec<usize> {
        self.enabled = true;
        self.max_size = max_size;
        let below = SIZES.iter().copied().filter(|size| *size < max_size);
        below.chain(SIZES.contains(&max_size).then_some(max_size)).collect()
    }

    /// Throws away what a step that failed half-way has recorded.
    pub(crate) fn abandon(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Record(_) => device.end_capture(false).map(drop),
            Mode::Eager | Mode::Replay(_) => Ok(()),
        }
    }

    /// The recorded size a step runs in; `None`: its operations run one by one. `is_simple`: it needs nothing that a recorded
    /// step has not.
    pub(crate) fn size(&self, batch: &Batch, is_simple: bool) -> Option<usize> {
        let num_tokens = batch.num_tokens();
        let is_decode = num_tokens > 0 && num_tokens == batch.num_seqs() && !batch.samples.is_empty();
        let holds = |size: &usize| *size >= num_tokens && *size <= self.max_size;
        SIZES
            .into_iter()
            .find(holds)
            .filter(|_| self.enabled && is_decode && is_simple)
    }

    /// Begins a step of this size.
    pub(crate) fn begin(&mut self, device: &mut dyn Device, size: Option<usize>) -> Result<(), BackendError> {
        self.mode = match size.map(|size| (size, self.recorded.get(&size))) {
            None => Mode::Eager,
            Some((_, Some(graph))) => Mode::Replay(*graph),
            Some((size, None)) => {
                device.begin_capture()?;
                Mode::Record(size)
            }
        };
        Ok(())
    }

    /// Whether operations are to be issued, to run or to be recorded.
    pub(crate) fn issues(&self) -> bool {
        !matches!(self.mode, Mode::Replay(_))
    }

    /// Whether the operations of the step at hand run as they are issued.
    pub(crate) fn is_eager(&self) -> bool {
        self.mode == Mode::Eager
    }

    /// Ends a step: what was only recorded runs now.
    pub(crate) fn end(&mut self, device: &mut dyn Device) -> Result<(), BackendError> {
        match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Eager => Ok(()),
            Mode::Replay(graph) => device.replay(graph),
            Mode::Record(size) => {
                let graph = device.end_capture(true)?.expect("a kept capture is a graph");
                self.recorded.insert(size, graph);
                device.replay(graph)
            }
        }
    }
}
