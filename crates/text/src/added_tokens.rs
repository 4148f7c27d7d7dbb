//! Finds added tokens in text, as `tokenizers` does, but with a say in which of them count.
//!
//! The library can match all special tokens in a string or none. A rendered chat needs both at once: the markers that
//! the template wrote are tokens, the same text inside a message is not. So the split is done here.

use std::collections::HashMap;
use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};

/// A stretch of the input: one added token, or text that the model has to tokenize.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Token(u32),
    Text(&'a str),
}

/// The added tokens that are matched against the text as it was written, before normalisation.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    /// `None` when there are no tokens.
    matcher: Option<AhoCorasick>,
    /// By pattern of `matcher`.
    tokens: Vec<AddedId>,
    by_text: HashMap<String, u32>,
}

#[derive(Debug, Clone, Copy)]
struct AddedId {
    id: u32,
    is_control: bool,
}

impl AddedTokens {
    /// `tokens` are (text, id, whether text from a client must not produce it).
    pub(crate) fn new(tokens: &[(String, u32, bool)]) -> Result<Self, aho_corasick::BuildError> {
        let texts = tokens.iter().map(|(text, ..)| text);
        Ok(Self {
            matcher: leftmost_longest(texts)?,
            tokens: tokens
                .iter()
                .map(|&(_, id, is_control)| AddedId { id, is_control })
                .collect(),
            by_text: tokens.iter().map(|(text, id, _)| (text.clone(), *id)).collect(),
        })
    }

    pub(crate) fn id_of(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// Cuts `text` at its added tokens, except at control tokens that touch one of `literals` (ascending, disjoint).
    pub(crate) fn split<'a>(&'a self, text: &'a str, literals: &'a [Range<usize>]) -> impl Iterator<Item = Piece<'a>> {
        let mut literals = literals.iter().peekable();
        let mut matches = self
            .matcher
            .iter()
            .flat_map(move |matcher| matcher.find_iter(text))
            .filter_map(move |found| {
                let token = self.tokens[found.pattern().as_usize()];
                while literals.next_if(|literal| literal.end <= found.start()).is_some() {}
                let is_literal = literals.peek().is_some_and(|literal| literal.start < found.end());
                (!(token.is_control && is_literal)).then_some((found.range(), token.id))
            });
        let mut cursor = 0;
        let mut pending = None;
        std::iter::from_fn(move || {
            if let Some(id) = pending.take() {
                return Some(Piece::Token(id));
            }
            let (range, id) = match matches.next() {
                Some(found) => found,
                None if cursor < text.len() => {
                    let rest = &text[cursor..];
                    cursor = text.len();
                    return Some(Piece::Text(rest));
                }
                None => return None,
            };
            let before = &text[cursor..range.start];
            cursor = range.end;
            if before.is_empty() {
                return Some(Piece::Token(id));
            }
            pending = Some(id);
            Some(Piece::Text(before))
        })
    }
}

/// A matcher with the library's rule: leftmost first, then longest. `None` for no patterns.
pub(crate) fn leftmost_longest<T: AsRef<[u8]>>(
    patterns: impl ExactSizeIterator<Item = T>,
) -> Result<Option<AhoCorasick>, aho_corasick::BuildError> {
    if patterns.len() == 0 {
        return Ok(None);
    }
    AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(patterns)
        .map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> AddedTokens {
        let token = |text: &str, id, is_control| (text.to_owned(), id, is_control);
        AddedTokens::new(&[token("<a>", 1, true), token("\n", 2, false), token("\n\n", 3, false)]).unwrap()
    }

    #[test]
    fn the_longest_of_the_leftmost_tokens_is_taken() {
        let tokens = tokens();
        let pieces: Vec<_> = tokens.split("x<a>\n\n\ny", &[]).collect();
        let expected = [
            Piece::Text("x"),
            Piece::Token(1),
            Piece::Token(3),
            Piece::Token(2),
            Piece::Text("y"),
        ];
        assert_eq!(pieces, expected);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of one literal range is meant")]
    fn control_tokens_in_a_literal_stay_text_and_others_do_not() {
        let tokens = tokens();
        let pieces: Vec<_> = tokens.split("<a><a>\n<a>", &[3..7]).collect();
        assert_eq!(
            pieces,
            [Piece::Token(1), Piece::Text("<a>"), Piece::Token(2), Piece::Token(1)]
        );
    }

    #[test]
    fn no_added_tokens_leave_the_text_whole() {
        let tokens = AddedTokens::new(&[]).unwrap();
        assert_eq!(tokens.split("<a>", &[]).collect::<Vec<_>>(), [Piece::Text("<a>")]);
        assert_eq!(tokens.split("", &[]).count(), 0);
    }
}
