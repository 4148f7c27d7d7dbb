//! Stop strings: found in a stream of text deltas, held back while they may still be completed.

use std::fmt;

use thiserror::Error;

/// The most stop strings a request may have. OpenAI allows 4; harnesses send a dozen.
pub const MAX_STOP_STRINGS: usize = 32;

/// The most bytes that all stop strings of a request may have together: bounds the text held back and the time a byte.
pub const MAX_STOP_BYTES: usize = 4096;

/// Why a list of stop strings is refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopError {
    /// An empty string would stop at once.
    #[error("stop string {index} is empty")]
    Empty {
        /// Its position in the list.
        index: usize,
    },
    /// More than [`MAX_STOP_STRINGS`].
    #[error("{count} stop strings are too many: the limit is {limit}")]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
    },
    /// More than [`MAX_STOP_BYTES`] in total.
    #[error("stop strings of {num_bytes} bytes in total are too long: the limit is {limit}")]
    TooLong {
        /// How long they are together.
        num_bytes: usize,
        /// How long they may be.
        limit: usize,
    },
}

/// Cuts a stream of text at the first stop string.
///
/// The first is the one whose last byte comes first, however the text is split into deltas; of several that end on the
/// same byte the longest, and of equal ones the first in the list.
///
/// ```
/// # use lapidary_text::StopMatcher;
/// let mut stop = StopMatcher::new(&["\n\n", "END"], false)?;
/// let mut text = String::new();
/// assert_eq!(stop.push("one E", &mut text), None);
/// assert_eq!(text, "one ", "the E may begin a stop string");
/// assert_eq!(stop.push("NDless", &mut text), Some(1));
/// assert_eq!(text, "one ");
/// # Ok::<(), lapidary_text::StopError>(())
/// ```
#[derive(Clone)]
pub struct StopMatcher {
    stops: Vec<StopString>,
    include_stop: bool,
    /// Text that begins a stop string and has not been given out.
    held: String,
    matched: Option<usize>,
}

/// One stop string and how much of it the text ends with (Knuth, Morris and Pratt).
#[derive(Clone)]
struct StopString {
    pattern: Box<[u8]>,
    /// For each prefix, the length of the longest shorter prefix that it ends with.
    failure: Box<[usize]>,
    num_matched: usize,
}

impl fmt::Debug for StopMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopMatcher")
            .field("num_stops", &self.stops.len())
            .field("num_held_bytes", &self.held.len())
            .field("matched", &self.matched)
            .finish_non_exhaustive()
    }
}

impl StopMatcher {
    /// Prepares to look for `stops`; with `include_stop` the one found is part of the text.
    ///
    /// # Errors
    /// [`StopError`] for an empty string, too many or too long ones.
    pub fn new<S: AsRef<str>>(stops: &[S], include_stop: bool) -> Result<Self, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany {
                count: stops.len(),
                limit: MAX_STOP_STRINGS,
            });
        }
        if let Some(index) = stops.iter().position(|stop| stop.as_ref().is_empty()) {
            return Err(StopError::Empty { index });
        }
        let num_bytes = stops.iter().map(|stop| stop.as_ref().len()).sum();
        if num_bytes > MAX_STOP_BYTES {
            return Err(StopError::TooLong {
                num_bytes,
                limit: MAX_STOP_BYTES,
            });
        }
        let stops = stops.iter().map(|stop| StopString::new(stop.as_ref())).collect();
        Ok(Self {
            stops,
            include_stop,
            held: String::new(),
            matched: None,
        })
    }

    /// Takes the next text and appends to `out` what is certain to precede any stop string.
    ///
    /// Returns the index of the stop string once it is complete; from then on nothing more is appended.
    pub fn push(&mut self, delta: &str, out: &mut String) -> Option<usize> {
        if self.matched.is_some() {
            return self.matched;
        }
        if self.stops.is_empty() {
            out.push_str(delta);
            return None;
        }
        for (offset, byte) in delta.bytes().enumerate() {
            if let Some(index) = self.step(byte) {
                self.matched = Some(index);
                self.held.push_str(&delta[..=offset]);
                let stop_bytes = if self.include_stop {
                    0
                } else {
                    self.stops[index].pattern.len()
                };
                out.push_str(&self.held[..self.held.len() - stop_bytes]);
                self.held.clear();
                return self.matched;
            }
        }
        let num_held = self.stops.iter().map(|stop| stop.num_matched).max().unwrap_or(0);
        let num_free = self.held.len() + delta.len() - num_held;
        match num_free.checked_sub(self.held.len()) {
            Some(num_free_of_delta) => {
                out.push_str(&self.held);
                self.held.clear();
                out.push_str(&delta[..num_free_of_delta]);
                self.held.push_str(&delta[num_free_of_delta..]);
            }
            None => {
                out.extend(self.held.drain(..num_free));
                self.held.push_str(delta);
            }
        }
        None
    }

    /// Ends the text: what was held did not become a stop string, and is appended to `out`.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.stops.iter_mut().for_each(|stop| stop.num_matched = 0);
    }

    /// The index of the stop string that was found.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// How much text is held back at the moment.
    pub fn num_held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Advances every stop string by one byte; the longest of those it completes.
    fn step(&mut self, byte: u8) -> Option<usize> {
        let mut found: Option<usize> = None;
        for index in 0..self.stops.len() {
            if self.stops[index].step(byte) {
                let is_longer = |best: usize| self.stops[index].pattern.len() > self.stops[best].pattern.len();
                if found.is_none_or(is_longer) {
                    found = Some(index);
                }
            }
        }
        found
    }
}

impl StopString {
    fn new(text: &str) -> Self {
        let pattern: Box<[u8]> = text.as_bytes().into();
        let mut failure = vec![0; pattern.len()].into_boxed_slice();
        let mut length = 0;
        for index in 1..pattern.len() {
            while length > 0 && pattern[index] != pattern[length] {
                length = failure[length - 1];
            }
            length += usize::from(pattern[index] == pattern[length]);
            failure[index] = length;
        }
        Self {
            pattern,
            failure,
            num_matched: 0,
        }
    }

    /// Whether `byte` completes the string. Amortised constant time.
    fn step(&mut self, byte: u8) -> bool {
        while self.num_matched > 0 && self.pattern[self.num_matched] != byte {
            self.num_matched = self.failure[self.num_matched - 1];
        }
        self.num_matched += usize::from(self.pattern[self.num_matched] == byte);
        self.num_matched == self.pattern.len()
    }
}
