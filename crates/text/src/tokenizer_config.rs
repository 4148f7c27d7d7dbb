//! The parts of `tokenizer_config.json` that matter here; everything else in the file is ignored.

use std::collections::BTreeMap;

use serde::Deserialize;
use tokenizers::AddedToken;

#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizerConfig {
    pub(crate) bos_token: Option<TokenText>,
    pub(crate) eos_token: Option<TokenText>,
    pub(crate) pad_token: Option<TokenText>,
    pub(crate) unk_token: Option<TokenText>,
    pub(crate) add_bos_token: Option<bool>,
    pub(crate) chat_template: Option<TemplateField>,
    /// Keyed by the id in decimal. transformers lets these override what `tokenizer.json` says of the same token.
    #[serde(default)]
    pub(crate) added_tokens_decoder: BTreeMap<String, AddedToken>,
}

/// A token is written as its text, or as the object transformers serialises an `AddedToken` to.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum TokenText {
    Plain(String),
    Object { content: String },
}

impl TokenText {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Object { content: text } => text,
        }
    }
}

/// One template, or several of which the one named `default` is for chat.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum TemplateField {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
pub(crate) struct NamedTemplate {
    pub(crate) name: String,
    pub(crate) template: String,
}
