//! Keeps text inside messages from acting as turn markers.
//!
//! A template only concatenates strings, so a message that contains `<start_of_turn>` would come out as a turn of its
//! own. Before rendering, every such text in a message is replaced by a placeholder that no client can guess; after
//! rendering the placeholders are put back and their places noted, for the tokenizer to read as plain text.

use std::hash::{BuildHasher as _, RandomState};
use std::ops::Range;

use aho_corasick::AhoCorasick;

use crate::added_tokens::leftmost_longest;
use crate::chat_template::TemplateVariables;
use crate::conversation::Turn;

/// A prompt as the template wrote it, and which parts of it are not what they look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    text: String,
    literals: Vec<Range<usize>>,
    is_repaired: bool,
}

impl Rendered {
    /// The prompt, message text included as the client wrote it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Byte ranges of [`Rendered::text`], ascending, that spell a special token but were written by a client.
    pub fn literals(&self) -> &[Range<usize>] {
        &self.literals
    }

    /// Whether the conversation had to be changed for the template: system text merged, neighbours joined.
    pub fn is_repaired(&self) -> bool {
        self.is_repaired
    }

    pub(crate) fn with_repaired(self, is_repaired: bool) -> Self {
        Self { is_repaired, ..self }
    }
}

/// The texts to look for in messages.
#[derive(Debug)]
pub(crate) struct ControlTexts {
    matcher: Option<AhoCorasick>,
    texts: Vec<String>,
}

impl ControlTexts {
    pub(crate) fn new(texts: Vec<String>) -> Result<Self, aho_corasick::BuildError> {
        Ok(Self {
            matcher: leftmost_longest(texts.iter())?,
            texts,
        })
    }
}

/// The placeholders of one rendering.
#[derive(Debug)]
pub(crate) struct Placeholders<'a> {
    control: &'a ControlTexts,
    nonce: String,
}

impl<'a> Placeholders<'a> {
    /// Picks a nonce that neither `turns` nor `variables` contain.
    pub(crate) fn new(control: &'a ControlTexts, turns: &[Turn], variables: &TemplateVariables) -> Self {
        let contains = |nonce: &String| {
            turns.iter().any(|turn| turn.content.contains(nonce))
                || variables
                    .iter()
                    .any(|(name, value)| name.contains(nonce) || value.to_string().contains(nonce))
        };
        let nonce = (0..)
            .map(fresh_nonce)
            .find(|nonce| !contains(nonce))
            .expect("finitely many turns contain finitely many nonces");
        Self { control, nonce }
    }

    /// `content` with placeholders for the control texts in it.
    pub(crate) fn hide(&self, content: &str) -> String {
        let Some(matcher) = &self.control.matcher else {
            return content.to_owned();
        };
        let mut hidden = String::with_capacity(content.len());
        let mut cursor = 0;
        for found in matcher.find_iter(content) {
            hidden.push_str(&content[cursor..found.start()]);
            hidden.push_str(&self.placeholder(found.pattern().as_usize()));
            cursor = found.end();
        }
        hidden.push_str(&content[cursor..]);
        hidden
    }

    /// `variables` with placeholders for the control texts in them, names included.
    pub(crate) fn hide_in(&self, variables: &TemplateVariables) -> TemplateVariables {
        let hide = |(name, value): (&String, &serde_json::Value)| (self.hide(name), self.hide_in_value(value));
        variables.iter().map(hide).collect()
    }

    fn hide_in_value(&self, value: &serde_json::Value) -> serde_json::Value {
        match value {
            serde_json::Value::String(text) => self.hide(text).into(),
            serde_json::Value::Array(values) => values.iter().map(|value| self.hide_in_value(value)).collect(),
            serde_json::Value::Object(object) => serde_json::Value::Object(self.hide_in(object)),
            plain => plain.clone(),
        }
    }

    /// A mark that a template carries along but no message contains.
    pub(crate) fn mark(&self) -> String {
        self.placeholder(self.control.texts.len())
    }

    /// Puts the texts back; `None` if the template took a placeholder apart.
    pub(crate) fn reveal(&self, hidden: &str) -> Option<Rendered> {
        let mut rendered = Rendered {
            text: String::with_capacity(hidden.len()),
            literals: Vec::new(),
            is_repaired: false,
        };
        let mut parts = hidden.split(self.nonce.as_str());
        rendered.text.push_str(parts.next()?);
        for part in parts {
            let (index, rest) = part.split_once(CLOSE)?;
            let text = self.control.texts.get(index.parse::<usize>().ok()?)?;
            let start = rendered.text.len();
            rendered.text.push_str(text);
            rendered.literals.push(start..rendered.text.len());
            rendered.text.push_str(rest);
        }
        // A template that cut a placeholder in two has left half a nonce; less than that no longer looks like one.
        (!rendered.text.contains(&self.nonce[..self.nonce.len() / 2])).then_some(rendered)
    }

    fn placeholder(&self, index: usize) -> String {
        format!("{}{index}{CLOSE}", self.nonce)
    }
}

/// Ends a placeholder. The nonce before it already tells where one is.
const CLOSE: char = ';';

/// Twenty digits from a hasher that the standard library keys from the system's randomness.
///
/// Digits survive `upper`, `lower`, `title`, `escape` and `tojson`, which templates apply to text.
fn fresh_nonce(attempt: u64) -> String {
    format!("{:020}", RandomState::new().hash_one(attempt))
}
