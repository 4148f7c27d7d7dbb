//! What every token id decodes to, computed once so that streaming costs an array read a token.

use std::fmt;

use tokenizers::Decoder as _;
use tokenizers::decoders::DecoderWrapper;

use crate::tokenizer::TokenizerError;
use crate::uncached::HfTokenizer;

/// Ids above this are taken for a corrupt file: the table is dense. Gemma-2 has 256,000 ids.
const MAX_VOCAB_SIZE: u32 = 1 << 21;

/// What one id adds to the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenForm<'a> {
    /// No such token: the library skips it silently.
    Unknown,
    Text(&'a str),
    Byte(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Unknown,
    Text,
    Byte(u8),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    piece_start: u32,
    text_start: u32,
    kind: Kind,
    is_special: bool,
}

/// Dense map of ids to pieces, decoded text and flags.
pub(crate) struct TokenTable {
    /// One more than there are ids, so that entry `id + 1` ends entry `id`.
    entries: Vec<Entry>,
    pieces: String,
    texts: String,
    /// The whole text loses up to this many of this character at its start.
    pub(crate) strip_start: Option<(char, usize)>,
    pub(crate) longest_text_bytes: usize,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenTable")
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}

impl TokenTable {
    pub(crate) fn new(tokenizer: &HfTokenizer) -> Result<Self, TokenizerError> {
        let recipe = DecodeRecipe::new(tokenizer.get_decoder())?;
        let max_id = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        if max_id >= MAX_VOCAB_SIZE {
            return Err(TokenizerError::VocabularyTooLarge {
                max_id,
                limit: MAX_VOCAB_SIZE,
            });
        }
        let mut table = Self {
            entries: Vec::with_capacity(max_id as usize + 2),
            pieces: String::new(),
            texts: String::new(),
            strip_start: recipe.strip_start,
            longest_text_bytes: 1,
        };
        for id in 0..=max_id {
            let piece = tokenizer.id_to_token(id);
            let is_special = piece
                .as_deref()
                .is_some_and(|p| tokenizer.get_added_vocabulary().is_special_token(p));
            table.push(piece, is_special, &recipe)?;
        }
        table.push_entry(Kind::Unknown, false);
        Ok(table)
    }

    fn push(
        &mut self,
        piece: Option<String>,
        is_special: bool,
        recipe: &DecodeRecipe<'_>,
    ) -> Result<(), TokenizerError> {
        let Some(piece) = piece else {
            self.push_entry(Kind::Unknown, false);
            return Ok(());
        };
        let text = recipe.decode_piece(&piece)?;
        match recipe.byte_of(&text) {
            Some(byte) => self.push_entry(Kind::Byte(byte), is_special),
            None => {
                self.push_entry(Kind::Text, is_special);
                self.texts.push_str(&text);
                self.longest_text_bytes = self.longest_text_bytes.max(text.len());
            }
        }
        self.pieces.push_str(&piece);
        Ok(())
    }

    fn push_entry(&mut self, kind: Kind, is_special: bool) {
        let offset = |text: &str| u32::try_from(text.len()).expect("2^21 tokens of a real file stay under 4 GiB");
        let (piece_start, text_start) = (offset(&self.pieces), offset(&self.texts));
        self.entries.push(Entry {
            piece_start,
            text_start,
            kind,
            is_special,
        });
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.entries.len() - 1
    }

    fn pair(&self, id: u32) -> Option<(&Entry, &Entry)> {
        let id = id as usize;
        Some((self.entries.get(id)?, self.entries.get(id + 1)?))
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.pair(id).is_some_and(|(entry, _)| entry.is_special)
    }

    pub(crate) fn form(&self, id: u32) -> TokenForm<'_> {
        let Some((entry, next)) = self.pair(id) else {
            return TokenForm::Unknown;
        };
        match entry.kind {
            Kind::Unknown => TokenForm::Unknown,
            Kind::Byte(byte) => TokenForm::Byte(byte),
            Kind::Text => TokenForm::Text(&self.texts[entry.text_start as usize..next.text_start as usize]),
        }
    }

    pub(crate) fn piece(&self, id: u32) -> Option<&str> {
        let (entry, next) = self.pair(id)?;
        (entry.kind != Kind::Unknown).then(|| &self.pieces[entry.piece_start as usize..next.piece_start as usize])
    }
}

/// The SentencePiece family of decoders, taken apart: per-token replacements, byte fallback, one fuse, one strip.
struct DecodeRecipe<'a> {
    replacements: Vec<&'a DecoderWrapper>,
    has_byte_fallback: bool,
    strip_start: Option<(char, usize)>,
}

impl<'a> DecodeRecipe<'a> {
    fn new(decoder: Option<&'a DecoderWrapper>) -> Result<Self, TokenizerError> {
        let steps = match decoder {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(single) => std::slice::from_ref(single),
            // The library then joins tokens with spaces, which no SentencePiece model wants.
            None => {
                return Err(TokenizerError::UnsupportedDecoder {
                    step: "none".to_owned(),
                });
            }
        };
        let mut recipe = Self {
            replacements: Vec::new(),
            has_byte_fallback: false,
            strip_start: None,
        };
        let mut is_fused = false;
        for step in steps {
            match step {
                // Before byte fallback a replacement sees single tokens, so its result can be tabled.
                DecoderWrapper::Replace(_) if !recipe.has_byte_fallback && !is_fused => recipe.replacements.push(step),
                DecoderWrapper::ByteFallback(_) if !is_fused => recipe.has_byte_fallback = true,
                DecoderWrapper::Fuse(_) => is_fused = true,
                DecoderWrapper::Strip(strip) if is_fused && strip.stop == 0 && recipe.strip_start.is_none() => {
                    recipe.strip_start = Some((strip.content, strip.start));
                }
                other => {
                    return Err(TokenizerError::UnsupportedDecoder {
                        step: format!("{other:?}"),
                    });
                }
            }
        }
        Ok(recipe)
    }

    fn decode_piece(&self, piece: &str) -> Result<String, TokenizerError> {
        let mut parts = vec![piece.to_owned()];
        for step in &self.replacements {
            parts = step
                .decode_chain(parts)
                .map_err(|source| TokenizerError::Decoder { source })?;
        }
        Ok(parts.concat())
    }

    /// The byte that `<0xNN>` stands for, recognised exactly as `tokenizers` does.
    fn byte_of(&self, text: &str) -> Option<u8> {
        let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
        (self.has_byte_fallback && digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
    }
}
