//! A stream of token ids to text, never half a character, equal to decoding all ids at once.

use std::fmt;
use std::sync::Arc;

use crate::token_table::{TokenForm, TokenTable};
use crate::tokenizer::Tokenizer;

/// A run of byte tokens is given out after this many tokens even if it has not ended.
///
/// Decoded as a whole, an invalid byte makes the *entire* run into U+FFFD, so a run is certain only when it ends. Any
/// token of another kind ends it, a space too, so real runs are a word of a rare script or a few emoji (a family of four
/// is 25 bytes). The bound is for a model gone astray: it keeps the stream moving and the memory fixed. Only if such a
/// model emits this many valid bytes in a row and then an invalid one does the text differ from decoding all at once.
pub const MAX_HELD_TOKENS: usize = 512;

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
    progress: Progress,
}

/// What is held back; apart from the table so that a push can borrow both.
#[derive(Debug, Clone)]
struct Progress {
    run: ByteRun,
    /// Tokens pushed and not yet reported as text.
    num_held: usize,
    max_held: usize,
    /// The character that the decoder strips from the start of the text, and how many more of it.
    strip: Option<(char, usize)>,
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

const REPLACEMENT: &str = "\u{FFFD}";

impl fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Detokenizer")
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

impl Detokenizer {
    /// Starts a sequence. `skip_special` leaves special tokens (`<eos>`, `<end_of_turn>`) out of the text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        Self::with_bound(Arc::clone(tokenizer.table()), skip_special, MAX_HELD_TOKENS)
    }

    pub(crate) fn with_bound(table: Arc<TokenTable>, skip_special: bool, max_held: usize) -> Self {
        let progress = Progress {
            run: ByteRun::None,
            num_held: 0,
            max_held,
            strip: table.strip_start,
        };
        Self {
            table,
            skip_special,
            progress,
        }
    }

    /// Adds one token, appends the text that is now certain to `out`, and returns how many tokens that settles.
    ///
    /// The settled tokens are the oldest of those pushed and not settled before, so per-token data kept in a queue stays
    /// aligned by popping that many. A token that adds no text (a skipped special one) is settled too, in its turn.
    pub fn push(&mut self, token: u32, out: &mut String) -> usize {
        self.progress.num_held += 1;
        match self.table.form(token) {
            TokenForm::Unknown => self.progress.push_silent(out),
            _ if self.skip_special && self.table.is_special(token) => self.progress.push_silent(out),
            TokenForm::Text(text) => self.progress.push_text(text, out),
            TokenForm::Byte(byte) => self.progress.push_byte(byte, out),
        }
    }

    /// Ends the sequence: appends what was held and returns how many tokens that settles.
    pub fn finish(&mut self, out: &mut String) -> usize {
        self.progress.end_run(out);
        self.progress.settle(0)
    }

    /// How many tokens have been pushed and not yet settled.
    pub fn num_held(&self) -> usize {
        self.progress.num_held
    }
}

impl Progress {
    fn push_text(&mut self, text: &str, out: &mut String) -> usize {
        self.end_run(out);
        self.emit(text, out);
        self.settle(0)
    }

    /// A token without text does not end a run: the library drops it before it looks for runs.
    fn push_silent(&mut self, out: &mut String) -> usize {
        match self.run {
            ByteRun::Held { .. } => self.flush_if_overdue(out),
            ByteRun::None | ByteRun::Broken => self.settle(0),
        }
    }

    fn push_byte(&mut self, byte: u8, out: &mut String) -> usize {
        let (mut bytes, mut complete) = match std::mem::replace(&mut self.run, ByteRun::Broken) {
            ByteRun::None => (Vec::new(), 0),
            ByteRun::Held { bytes, complete } => (bytes, complete),
            ByteRun::Broken => {
                self.emit(REPLACEMENT, out);
                return self.settle(0);
            }
        };
        bytes.push(byte);
        match std::str::from_utf8(&bytes[complete..]) {
            Ok(_) => complete = bytes.len(),
            // An incomplete character at the end: it may still become one.
            Err(error) if error.error_len().is_none() => {}
            Err(_) => {
                bytes.iter().for_each(|_| self.emit(REPLACEMENT, out));
                return self.settle(0);
            }
        }
        self.run = ByteRun::Held { bytes, complete };
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
        let whole: Vec<u8> = bytes.drain(..*complete).collect();
        *complete = 0;
        let num_kept = bytes.len();
        let text = String::from_utf8(whole).expect("bytes up to `complete` were checked");
        self.emit(&text, out);
        self.settle(num_kept)
    }

    fn end_run(&mut self, out: &mut String) {
        if self.run == ByteRun::None {
            return;
        }
        let ByteRun::Held { bytes, .. } = std::mem::replace(&mut self.run, ByteRun::None) else {
            return;
        };
        match std::str::from_utf8(&bytes) {
            Ok(text) => self.emit(text, out),
            Err(_) => bytes.iter().for_each(|_| self.emit(REPLACEMENT, out)),
        }
    }

    /// Reports all held tokens but the newest `num_kept` as settled.
    fn settle(&mut self, num_kept: usize) -> usize {
        let num_settled = self.num_held.saturating_sub(num_kept);
        self.num_held -= num_settled;
        num_settled
    }

    fn emit(&mut self, mut text: &str, out: &mut String) {
        while let Some((content, num_left)) = &mut self.strip
            && !text.is_empty()
        {
            match text.strip_prefix(*content) {
                Some(rest) if *num_left > 0 => {
                    text = rest;
                    *num_left -= 1;
                }
                _ => self.strip = None,
            }
        }
        out.push_str(text);
    }
}
