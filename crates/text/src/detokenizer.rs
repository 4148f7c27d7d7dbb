//! A stream of token ids to text, never half a character, equal to decoding all ids at once.

use std::fmt;
use std::sync::Arc;

use crate::token_table::{TokenForm, TokenTable};
use crate::tokenizer::Tokenizer;

/// A run of byte tokens is given out after this many tokens even if it has not ended.
///
/// Decoded as a whole, an invalid byte makes the *entire* run into U+FFFD, so a run is certain only when it ends. The
/// longest real runs are emoji sequences (a family of four is 25 bytes; with skin tones 41). A model that emits more
/// bytes than this in a row and then an invalid one gets replacement characters for the last bytes only.
pub const MAX_HELD_TOKENS: usize = 64;

/// Turns ids into text as they arrive. One per generated sequence; holds the tokenizer's table by `Arc`.
///
/// ```
/// # use lapidary_text::{Detokenizer, Tokenizer};
/// # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tiny/tokenizer.json"));
/// # let tokenizer = Tokenizer::from_bytes(json, None)?;
/// let mut detokenizer = Detokenizer::new(&tokenizer, true);
/// let byte = |name| tokenizer.token_to_id(name).unwrap();
/// let mut text = String::new();
/// assert_eq!(detokenizer.push(byte("<0xC3>"), &mut text), 0, "half a character is held");
/// assert_eq!(detokenizer.push(byte("<0xA9>"), &mut text), 0, "the run of bytes may go on");
/// assert_eq!(detokenizer.push(byte("a"), &mut text), 3, "three tokens have become text");
/// assert_eq!(text, "éa");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Detokenizer {
    table: Arc<TokenTable>,
    skip_special: bool,
    max_held: usize,
    run: ByteRun,
    /// Tokens pushed and not yet reported as text.
    num_held: usize,
    /// How many more leading characters the decoder's strip may take.
    strip_left: usize,
}

/// The byte tokens since the last token of another kind.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ByteRun {
    None,
    /// Valid so far; `bytes[..complete]` are whole characters, the rest is the beginning of one.
    Held {
        bytes: Vec<u8>,
        complete: usize,
    },
    /// Invalid whatever follows: every further byte of the run is a U+FFFD.
    Broken,
}

impl fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detokenizer")
            .field("run", &self.run)
            .field("num_held", &self.num_held)
            .finish_non_exhaustive()
    }
}

impl Detokenizer {
    /// Starts a sequence. `skip_special` leaves special tokens (`<eos>`, `<end_of_turn>`) out of the text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self::with_bound(Arc::clone(tokenizer.table()), skip_special, MAX_HELD_TOKENS)
    }

    pub(crate) fn with_bound(table: Arc<TokenTable>, skip_special: bool, max_held: usize) -> Self {
        let strip_left = table.strip_start.map_or(0, |(_, count)| count);
        Self {
            table,
            skip_special,
            max_held,
            run: ByteRun::None,
            num_held: 0,
            strip_left,
        }
    }

    /// Adds one token, appends the text that is now certain to `out`, and returns how many tokens that settles.
    ///
    /// The settled tokens are the oldest of those pushed and not settled before, so per-token data kept in a queue stays
    /// aligned by popping that many. A token that adds no text (a skipped special one) is settled too, in its turn.
    pub fn push(&mut self, token: u32, out: &mut String) -> usize {
        self.num_held += 1;
        let table = Arc::clone(&self.table);
        match table.form(token) {
            TokenForm::Unknown => self.push_silent(out),
            _ if self.skip_special && table.is_special(token) => self.push_silent(out),
            TokenForm::Byte(byte) => self.push_byte(byte, out),
            TokenForm::Text(text) => {
                self.end_run(out);
                self.emit(text, out);
                self.settle(0)
            }
        }
    }

    /// Ends the sequence: appends what was held and returns how many tokens that settles.
    pub fn finish(&mut self, out: &mut String) -> usize {
        self.end_run(out);
        self.settle(0)
    }

    /// How many tokens have been pushed and not yet settled.
    pub fn num_held(&self) -> usize {
        self.num_held
    }

    /// A token without text does not end a run: the library drops it before it looks for runs.
    fn push_silent(&mut self, out: &mut String) -> usize {
        match self.run {
            ByteRun::Held { .. } => self.flush_if_overdue(out),
            ByteRun::None | ByteRun::Broken => self.settle(0),
        }
    }

    fn push_byte(&mut self, byte: u8, out: &mut String) -> usize {
        let (bytes, complete) = match &mut self.run {
            ByteRun::Broken => {
                self.emit(REPLACEMENT, out);
                return self.settle(0);
            }
            ByteRun::None => {
                self.run = ByteRun::Held {
                    bytes: vec![byte],
                    complete: 0,
                };
                let ByteRun::Held { bytes, complete } = &mut self.run else {
                    unreachable!("assigned above")
                };
                (bytes, complete)
            }
            ByteRun::Held { bytes, complete } => {
                bytes.push(byte);
                (bytes, complete)
            }
        };
        match std::str::from_utf8(&bytes[*complete..]) {
            Ok(_) => *complete = bytes.len(),
            Err(error) if error.error_len().is_none() => *complete += error.valid_up_to(),
            Err(_) => {
                self.end_run(out);
                self.run = ByteRun::Broken;
                return self.settle(0);
            }
        }
        self.flush_if_overdue(out)
    }

    /// Gives out the whole characters of a run that has been held for too long.
    fn flush_if_overdue(&mut self, out: &mut String) -> usize {
        if self.num_held < self.max_held {
            return 0;
        }
        let ByteRun::Held { bytes, complete } = &mut self.run else {
            return 0;
        };
        let tail = bytes.split_off(*complete);
        let text = String::from_utf8(std::mem::take(bytes)).expect("bytes up to `complete` were checked");
        let num_tail = tail.len();
        self.run = ByteRun::Held {
            bytes: tail,
            complete: 0,
        };
        self.emit(&text, out);
        self.settle(num_tail)
    }

    fn end_run(&mut self, out: &mut String) {
        if let ByteRun::Held { bytes, complete } = std::mem::replace(&mut self.run, ByteRun::None) {
            match std::str::from_utf8(&bytes) {
                Ok(text) if complete == bytes.len() => self.emit(text, out),
                _ => bytes.iter().for_each(|_| self.emit(REPLACEMENT, out)),
            }
        }
    }

    /// Reports all held tokens but the newest `num_kept` as settled.
    fn settle(&mut self, num_kept: usize) -> usize {
        let num_settled = self.num_held.saturating_sub(num_kept);
        self.num_held -= num_settled;
        num_settled
    }

    fn emit(&mut self, mut text: &str, out: &mut String) {
        while self.strip_left > 0 && !text.is_empty() {
            match self
                .table
                .strip_start
                .and_then(|(content, _)| text.strip_prefix(content))
            {
                Some(rest) => {
                    text = rest;
                    self.strip_left -= 1;
                }
                None => self.strip_left = 0,
            }
        }
        out.push_str(text);
    }
}

const REPLACEMENT: &str = "\u{FFFD}";
