//! The `tokenizers` library without its cache of words.
//!
//! The library keeps the tokens of up to 10,000 words in every thread that encodes. A Gemma tokenizer does not cut text
//! into words, so these would be whole messages of clients: hardly ever met again, and megabytes a thread that are never
//! given back. [`tokenizers::Tokenizer`] has no way to turn the cache off, other than copying the model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{Model, Result, Token, TokenizerImpl};

/// A whole `tokenizer.json`.
pub(crate) type HfTokenizer =
    TokenizerImpl<Uncached, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A model whose cache has no room.
pub(crate) struct Uncached(ModelWrapper);

impl<'de> Deserialize<'de> for Uncached {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let mut model = ModelWrapper::deserialize(deserializer)?;
        model.resize_cache(0);
        Ok(Self(model))
    }
}

impl Model for Uncached {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> Result<Vec<Token>> {
        self.0.tokenize(sequence)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.0.get_vocab()
    }

    fn get_vocab_size(&self) -> usize {
        self.0.get_vocab_size()
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        self.0.save(folder, prefix)
    }

    fn get_trainer(&self) -> TrainerWrapper {
        self.0.get_trainer()
    }
}
