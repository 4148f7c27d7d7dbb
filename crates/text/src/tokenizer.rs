//! Loads a checkpoint's tokenizer; text to ids, and what each id is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{AddedToken, AddedVocabulary};

use crate::added_tokens::{AddedTokens, Piece};
use crate::detokenizer::Detokenizer;
use crate::rendered::Rendered;
use crate::token_table::{TokenForm, TokenTable};
use crate::tokenizer_config::{TokenText, TokenizerConfig};
use crate::uncached::HfTokenizer;

/// The turn markers of the Gemma family. They are control tokens even if a checkpoint forgot to flag them as special.
const START_OF_TURN: &str = "<start_of_turn>";
const END_OF_TURN: &str = "<end_of_turn>";

/// Why a tokenizer cannot be loaded or a text not be encoded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A file is missing or unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `tokenizer.json` is not what the `tokenizers` library reads.
    #[error("cannot parse tokenizer.json")]
    Parse {
        /// What the library said.
        source: tokenizers::Error,
    },
    /// `tokenizer_config.json` is not JSON of the expected shape.
    #[error("cannot parse tokenizer_config.json")]
    Config {
        /// Where and why.
        source: serde_json::Error,
    },
    /// The decoder is not of the SentencePiece kind (replacements, byte fallback, fuse, strip at the start).
    #[error("decoder step not supported: {step}")]
    UnsupportedDecoder {
        /// The first step that cannot be streamed.
        step: String,
    },
    /// The pre-tokenizer treats the start of the text differently from what follows an added token.
    #[error("a Metaspace pre-tokenizer is not supported")]
    UnsupportedPreTokenizer,
    /// An added token strips spaces around it or wants to be a whole word; no Gemma tokenizer has one.
    #[error("added token {content:?} has the unsupported flag {flag}")]
    UnsupportedAddedToken {
        /// The token's text.
        content: String,
        /// The flag.
        flag: &'static str,
    },
    /// The two files disagree about the id of an added token.
    #[error("added token {content:?} is {actual:?} in tokenizer.json but {expected:?} in tokenizer_config.json")]
    AddedTokenMismatch {
        /// The token's text.
        content: String,
        /// The key in `tokenizer_config.json`.
        expected: String,
        /// The id in `tokenizer.json`.
        actual: Option<u32>,
    },
    /// `tokenizer_config.json` names a token that `tokenizer.json` lacks.
    #[error("{field} {content:?} is not in the vocabulary")]
    UnknownToken {
        /// The field, such as `bos_token`.
        field: &'static str,
        /// The token's text.
        content: String,
    },
    /// The largest id is beyond what any model has: a corrupt file.
    #[error("token id {max_id} is above the limit of {limit}")]
    VocabularyTooLarge {
        /// The largest id in the file.
        max_id: u32,
        /// The largest one accepted.
        limit: u32,
    },
    /// The decoder failed on a single token.
    #[error("cannot decode a token")]
    Decoder {
        /// What the library said.
        source: tokenizers::Error,
    },
    /// The added tokens cannot be searched for.
    #[error("cannot build the search for added tokens")]
    AddedTokenSearch {
        /// What the library said.
        source: aho_corasick::BuildError,
    },
    /// The library failed on a text (an unknown character without byte fallback, for one).
    #[error("cannot encode the text")]
    Encode {
        /// What the library said.
        source: tokenizers::Error,
    },
}

/// Text to ids and back, for one checkpoint. Immutable: share it by `Arc` among threads.
pub struct Tokenizer {
    /// Only the model and the added tokens that are matched after normalisation; the others are in `added_tokens`.
    model: HfTokenizer,
    added_tokens: AddedTokens,
    table: Arc<TokenTable>,
    /// Ascending ids.
    control_tokens: Vec<ControlToken>,
    named: NamedTokens,
    adds_bos: bool,
}

/// A token that text from a client must not produce.
#[derive(Debug)]
struct ControlToken {
    text: String,
    id: u32,
    /// Its text in ids, one character at a time: what stands for it in messages if merges produce it.
    spelling: Vec<u32>,
}

/// The tokens that have a role.
#[derive(Debug, Clone, Copy, Default)]
struct NamedTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unk: Option<u32>,
    start_of_turn: Option<u32>,
    end_of_turn: Option<u32>,
}

impl NamedTokens {
    fn iter(&self) -> impl Iterator<Item = u32> {
        [
            self.bos,
            self.eos,
            self.pad,
            self.unk,
            self.start_of_turn,
            self.end_of_turn,
        ]
        .into_iter()
        .flatten()
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("table", &self.table)
            .field("named", &self.named)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, if it is there, `tokenizer_config.json` from a checkpoint's folder.
    ///
    /// Takes about 0.8 s for 256,000 tokens as Gemma-2 has, three quarters of it the library's.
    ///
    /// # Errors
    /// Any [`TokenizerError`] but [`TokenizerError::Encode`].
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let json_path = dir.join("tokenizer.json");
        let json = std::fs::read(&json_path).map_err(|source| TokenizerError::Read {
            path: json_path,
            source,
        })?;
        let config_path = dir.join("tokenizer_config.json");
        let config = match std::fs::read(&config_path) {
            Ok(config) => Some(config),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => {
                return Err(TokenizerError::Read {
                    path: config_path,
                    source,
                });
            }
        };
        Self::from_bytes(&json, config.as_deref())
    }

    /// Loads from the files' contents; `config` is that of `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::load`].
    pub fn from_bytes(json: &[u8], config: Option<&[u8]>) -> Result<Self, TokenizerError> {
        let mut model = parse(json).map_err(|source| TokenizerError::Parse { source })?;
        let config: TokenizerConfig = match config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|source| TokenizerError::Config { source })?,
            None => TokenizerConfig::default(),
        };
        // The engine decides about length; a file saved during training may carry either of these.
        model
            .with_truncation(None)
            .map_err(|source| TokenizerError::Parse { source })?
            .with_padding(None);
        if matches!(model.get_pre_tokenizer(), Some(PreTokenizerWrapper::Metaspace(_))) {
            return Err(TokenizerError::UnsupportedPreTokenizer);
        }
        add_configured_tokens(&mut model, &config)?;
        let table = Arc::new(TokenTable::new(&model)?);
        let named = named_tokens(&model, &config)?;
        let control_tokens = control_tokens(&model, named);
        let added_tokens = take_added_tokens(&mut model, &control_tokens)?;
        let control_tokens = spell(&model, control_tokens, named.unk)?;
        Ok(Self {
            model,
            added_tokens,
            table,
            control_tokens,
            named,
            adds_bos: config.add_bos_token.unwrap_or(true),
        })
    }

    /// Encodes text in which special tokens are meant as such (`/v1/completions`).
    ///
    /// With `add_bos`, the BOS token comes first unless the text already begins with it.
    ///
    /// Linear in the text whatever it contains: 400 KB take 70 to 150 ms. A long prompt belongs on a blocking thread.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`], which a tokenizer with byte fallback never returns.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        let bos = self.named.bos.filter(|_| add_bos);
        ids.extend(bos);
        for piece in self.added_tokens.split(text, &[]) {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => ids.extend_from_slice(self.encode_text(text)?.get_ids()),
            }
        }
        if bos.is_some() && ids.get(1) == bos.as_ref() {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Encodes a rendered chat: the template's markers become control tokens, message text never does.
    ///
    /// Adds nothing: a Gemma template writes its own BOS. For messages without the text of a special token the ids are
    /// those of `tokenizers` with `add_special_tokens = false`. Costs what [`Tokenizer::encode`] costs.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_rendered(&self, prompt: &Rendered) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(prompt.text().len() / 4 + 1);
        for piece in self.added_tokens.split(prompt.text(), prompt.literals()) {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => self.encode_untrusted(text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Encodes without control tokens. Merges, or a normaliser, could still build one out of plain characters.
    fn encode_untrusted(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        for &id in self.encode_text(text)?.get_ids() {
            match self.control_tokens.binary_search_by_key(&id, |token| token.id) {
                Ok(index) => ids.extend_from_slice(&self.control_tokens[index].spelling),
                Err(_) => ids.push(id),
            }
        }
        Ok(())
    }

    fn encode_text(&self, text: &str) -> Result<tokenizers::Encoding, TokenizerError> {
        encode_plain(&self.model, text)
    }

    /// Decodes all of `ids` at once, as `tokenizers` does; unknown ids add nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut text = String::with_capacity(ids.len() * 4);
        let mut detokenizer = Detokenizer::with_bound(Arc::clone(&self.table), skip_special, usize::MAX);
        for &id in ids {
            detokenizer.push(id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    /// The bytes that a token stands for: one for a byte token, else its text with `▁` as a space.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        match self.table.form(id) {
            TokenForm::Unknown => None,
            TokenForm::Byte(byte) => Some(vec![byte]),
            TokenForm::Text(text) => Some(text.as_bytes().to_vec()),
        }
    }

    /// A token's text as a client is shown it: [`Tokenizer::token_bytes`], with U+FFFD for a byte that is no character.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.token_bytes(id)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The token as the vocabulary spells it: `▁the`, `<0x0A>`.
    pub fn token_str(&self, id: u32) -> Option<&str> {
        self.table.piece(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.added_tokens.id_of(token).or_else(|| self.model.token_to_id(token))
    }

    /// Whether `skip_special` leaves this token out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// Whether text that a client writes can never produce this token.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control_tokens.binary_search_by_key(&id, |token| token.id).is_ok() || self.is_special(id)
    }

    /// One more than the largest id. A model may have more rows than that (padding), never fewer.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// The fewest tokens that a text of so many bytes can have: refuses hopeless prompts without encoding them.
    ///
    /// Assumes that normalisation does not shorten the text, which holds for Gemma (it replaces spaces).
    pub fn min_num_tokens(&self, num_bytes: usize) -> usize {
        num_bytes.div_ceil(self.table.longest_text_bytes)
    }

    /// `bos_token` of the configuration, else `<bos>`.
    pub fn bos_id(&self) -> Option<u32> {
        self.named.bos
    }

    /// `eos_token` of the configuration, else `<eos>`.
    pub fn eos_id(&self) -> Option<u32> {
        self.named.eos
    }

    /// `pad_token` of the configuration, else `<pad>`.
    pub fn pad_id(&self) -> Option<u32> {
        self.named.pad
    }

    /// `<start_of_turn>`, if the vocabulary has it.
    pub fn start_of_turn_id(&self) -> Option<u32> {
        self.named.start_of_turn
    }

    /// `<end_of_turn>`, if the vocabulary has it: the token that an instruction-tuned Gemma ends its answers with.
    pub fn end_of_turn_id(&self) -> Option<u32> {
        self.named.end_of_turn
    }

    /// Whether a plain prompt gets a BOS: `add_bos_token` of the configuration, true if it does not say.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos && self.named.bos.is_some()
    }

    /// The texts that must not act as tokens when a client writes them.
    pub(crate) fn control_texts(&self) -> impl ExactSizeIterator<Item = &str> {
        self.control_tokens.iter().map(|token| token.text.as_str())
    }

    pub(crate) fn table(&self) -> &Arc<TokenTable> {
        &self.table
    }

    pub(crate) fn unk_id(&self) -> Option<u32> {
        self.named.unk
    }
}

fn encode_plain(model: &HfTokenizer, text: &str) -> Result<tokenizers::Encoding, TokenizerError> {
    model
        .encode_fast(text, false)
        .map_err(|source| TokenizerError::Encode { source })
}

/// Reads the file with the library, once it is certain that the library will not panic on it.
///
/// tokenizers 0.23 `expect`s the decoder and the normaliser to be JSON, so a file cut short in them would end the process.
fn parse(json: &[u8]) -> Result<HfTokenizer, tokenizers::Error> {
    #[derive(serde::Deserialize)]
    struct Fragile {
        #[serde(rename = "normalizer")]
        _normalizer: Option<serde_json::Value>,
        #[serde(rename = "decoder")]
        _decoder: Option<serde_json::Value>,
    }
    let _well_formed: Fragile = serde_json::from_slice(json)?;
    HfTokenizer::from_bytes(json)
}

fn add_configured_tokens(model: &mut HfTokenizer, config: &TokenizerConfig) -> Result<(), TokenizerError> {
    let mut tokens: Vec<_> = config.added_tokens_decoder.iter().collect();
    // The library numbers new tokens in the order they come.
    tokens.sort_by_key(|(id, _)| id.parse::<u32>().unwrap_or(u32::MAX));
    for (expected, token) in tokens {
        model
            .add_tokens([token.clone()])
            .map_err(|source| TokenizerError::Parse { source })?;
        let actual = model.token_to_id(&token.content);
        if actual != expected.parse().ok() {
            let (content, expected) = (token.content.clone(), expected.clone());
            return Err(TokenizerError::AddedTokenMismatch {
                content,
                expected,
                actual,
            });
        }
    }
    Ok(())
}

fn named_tokens(model: &HfTokenizer, config: &TokenizerConfig) -> Result<NamedTokens, TokenizerError> {
    let find = |field, configured: &Option<TokenText>, default: &str| match configured.as_ref().map(TokenText::as_str) {
        None => Ok(model.token_to_id(default)),
        Some(content) => match model.token_to_id(content) {
            Some(id) => Ok(Some(id)),
            None => Err(TokenizerError::UnknownToken {
                field,
                content: content.to_owned(),
            }),
        },
    };
    Ok(NamedTokens {
        bos: find("bos_token", &config.bos_token, "<bos>")?,
        eos: find("eos_token", &config.eos_token, "<eos>")?,
        pad: find("pad_token", &config.pad_token, "<pad>")?,
        unk: find("unk_token", &config.unk_token, "<unk>")?,
        start_of_turn: model.token_to_id(START_OF_TURN),
        end_of_turn: model.token_to_id(END_OF_TURN),
    })
}

/// Every special added token, and the named ones whatever their flags; ascending ids.
fn control_tokens(model: &HfTokenizer, named: NamedTokens) -> Vec<(String, u32)> {
    let mut control: Vec<_> = model
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(id, token)| token.special || named.iter().any(|named_id| named_id == *id))
        .map(|(id, token)| (token.content, id))
        .collect();
    control.sort_by_key(|(_, id)| *id);
    control
}

/// Encodes the characters of each control token, once `model` no longer knows the tokens themselves.
fn spell(
    model: &HfTokenizer,
    control: Vec<(String, u32)>,
    unk: Option<u32>,
) -> Result<Vec<ControlToken>, TokenizerError> {
    let spell_one = |(text, id): (String, u32)| {
        if Some(id) == unk {
            // It says that the model knows no better, not that someone wrote it.
            let spelling = vec![id];
            return Ok(ControlToken { text, id, spelling });
        }
        let mut spelling = Vec::new();
        for character in text.chars() {
            spelling.extend_from_slice(encode_plain(model, character.encode_utf8(&mut [0; 4]))?.get_ids());
        }
        // A token of one character has no other spelling; dropping it beats forging it.
        spelling.retain(|spelled| *spelled != id);
        Ok(ControlToken { text, id, spelling })
    };
    control.into_iter().map(spell_one).collect()
}

/// Moves the added tokens that are matched as written out of the library, which is left with the others.
fn take_added_tokens(model: &mut HfTokenizer, control: &[(String, u32)]) -> Result<AddedTokens, TokenizerError> {
    let mut all: Vec<(u32, AddedToken)> = model.get_added_tokens_decoder().into_iter().collect();
    all.sort_by_key(|(id, _)| *id);
    let (mut ours, mut left) = (Vec::new(), Vec::new());
    for (id, token) in all {
        let is_control = control.binary_search_by_key(&id, |(_, id)| *id).is_ok();
        if token.normalized && !is_control {
            left.push((id, token));
            continue;
        }
        let flags = [
            ("single_word", token.single_word),
            ("lstrip", token.lstrip),
            ("rstrip", token.rstrip),
        ];
        if let Some(&(flag, _)) = flags.iter().find(|(_, is_set)| *is_set) {
            return Err(TokenizerError::UnsupportedAddedToken {
                content: token.content,
                flag,
            });
        }
        ours.push((token.content, id, is_control));
    }
    model.with_added_vocabulary(AddedVocabulary::new());
    for (id, token) in left {
        let content = token.content.clone();
        model
            .add_tokens([token])
            .map_err(|source| TokenizerError::Parse { source })?;
        let actual = model.token_to_id(&content);
        if actual != Some(id) {
            return Err(TokenizerError::AddedTokenMismatch {
                content,
                expected: id.to_string(),
                actual,
            });
        }
    }
    AddedTokens::new(&ours).map_err(|source| TokenizerError::AddedTokenSearch { source })
}
