//! What clients may write into a request, as it stands on the wire. `null` means absent everywhere; unknown fields are
//! accepted. Nothing here is checked for range: see [`super::params`].

use std::fmt;

use lapidary_text::grammar::MAX_SCHEMA_BYTES;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::bounded::{Element, JsonText, ShortText, Worth, elements, list, too_many, without_white_space};
use crate::lenient::{Flag, Int, Number, Object};

/// Messages, items, and parts or calls of one of them: more than any context has room for.
pub(crate) const MAX_MESSAGES: usize = 64 << 10;

/// Functions of one request: OpenAI's limit.
pub(crate) const MAX_TOOLS: usize = 128;

/// Prompts of one request. Far fewer may run, which is checked with the numbers.
const MAX_PROMPTS: usize = 16 << 10;

/// Token ids of all prompts of one request: 512 contexts.
const MAX_PROMPT_IDS: usize = 4 << 20;

/// Stop strings. Far fewer are allowed, which is checked with the numbers.
const MAX_STOPS: usize = 1024;

/// Stop tokens of one request, beside the model's own.
const MAX_STOP_TOKEN_IDS: usize = 256;

/// Biased tokens of one request: each costs a write a step.
const MAX_LOGIT_BIASES: usize = 1024;

/// Tokens that an answer may use: twice the vocabulary of Gemma.
const MAX_ALLOWED_TOKEN_IDS: usize = 512 << 10;

/// Banned words of one request: each is tokenised twice.
const MAX_BAD_WORDS: usize = 1024;

/// Choices of one list: more are longer than a list of them may be.
const MAX_CHOICES: usize = 32 << 10;

/// Characters of a salt: all of them are hashed.
const MAX_SALT_CHARS: usize = 1024;

/// Short names from a short list.
pub(crate) const MAX_NAMES: usize = 64;

/// A schema, or a string whose text is one: that takes more, since its quotes are escaped.
pub(crate) type SchemaText = JsonText<{ 2 * MAX_SCHEMA_BYTES }>;

/// Values for a template. The known ones are switches.
pub(crate) type VariablesText = JsonText<{ 64 << 10 }>;

/// Body of `/v1/chat/completions` and `/v1/completions`. They share all but a handful of fields; a field of the other
/// endpoint is accepted and ignored.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct GenerationBody {
    pub(crate) model: Option<String>,
    #[serde(deserialize_with = "list::<MAX_MESSAGES, _, _>")]
    pub(crate) messages: Option<Vec<Object<ChatMessage>>>,
    pub(crate) prompt: Option<Prompt>,
    pub(crate) stream: Option<Flag>,
    pub(crate) stream_options: Option<Object<StreamOptions>>,
    pub(crate) n: Option<Int>,
    pub(crate) best_of: Option<Int>,
    pub(crate) max_tokens: Option<Int>,
    pub(crate) max_completion_tokens: Option<Int>,
    pub(crate) min_tokens: Option<Int>,
    pub(crate) temperature: Option<Number>,
    pub(crate) top_p: Option<Number>,
    pub(crate) top_k: Option<Int>,
    pub(crate) min_p: Option<Number>,
    pub(crate) presence_penalty: Option<Number>,
    pub(crate) frequency_penalty: Option<Number>,
    pub(crate) repetition_penalty: Option<Number>,
    pub(crate) logit_bias: Option<LogitBias>,
    #[serde(deserialize_with = "list::<MAX_ALLOWED_TOKEN_IDS, _, _>")]
    pub(crate) allowed_token_ids: Option<Vec<Int>>,
    #[serde(deserialize_with = "list::<MAX_BAD_WORDS, _, _>")]
    pub(crate) bad_words: Option<Vec<String>>,
    pub(crate) seed: Option<Int>,
    pub(crate) stop: Option<Stop>,
    #[serde(deserialize_with = "list::<MAX_STOP_TOKEN_IDS, _, _>")]
    pub(crate) stop_token_ids: Option<Vec<Int>>,
    pub(crate) ignore_eos: Option<Flag>,
    pub(crate) include_stop_str_in_output: Option<Flag>,
    pub(crate) skip_special_tokens: Option<Flag>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) top_logprobs: Option<Int>,
    pub(crate) prompt_logprobs: Option<Int>,
    pub(crate) echo: Option<Flag>,
    pub(crate) return_token_ids: Option<Flag>,
    pub(crate) return_tokens_as_token_ids: Option<Flag>,
    pub(crate) priority: Option<Int>,
    pub(crate) timeout: Option<Number>,
    pub(crate) queue_timeout: Option<Number>,
    pub(crate) cache_salt: Option<ShortText<MAX_SALT_CHARS>>,
    pub(crate) add_special_tokens: Option<Flag>,
    pub(crate) add_generation_prompt: Option<Flag>,
    pub(crate) continue_final_message: Option<Flag>,
    pub(crate) chat_template: Option<String>,
    pub(crate) chat_template_kwargs: Option<VariablesText>,
    pub(crate) truncate_prompt_tokens: Option<Int>,
    pub(crate) truncation_side: Option<String>,
    pub(crate) response_format: Option<Object<ResponseFormat>>,
    #[serde(deserialize_with = "list::<MAX_TOOLS, _, _>")]
    pub(crate) tools: Option<Vec<Object<Tool>>>,
    pub(crate) parallel_tool_calls: Option<Flag>,
    pub(crate) tool_choice: Option<Choice>,
    pub(crate) function_call: Option<Choice>,
    #[serde(deserialize_with = "list::<MAX_NAMES, _, _>")]
    pub(crate) modalities: Option<Vec<String>>,
    pub(crate) audio: Extension,
    pub(crate) prediction: Extension,
    pub(crate) suffix: Extension,
    pub(crate) use_beam_search: Extension,
    pub(crate) structured_outputs: Option<Object<StructuredOutputs>>,
    pub(crate) guided_json: Option<SchemaText>,
    pub(crate) guided_regex: Option<String>,
    #[serde(deserialize_with = "list::<MAX_CHOICES, _, _>")]
    pub(crate) guided_choice: Option<Vec<String>>,
    pub(crate) guided_grammar: Option<String>,
    pub(crate) prompt_embeds: Extension,
    pub(crate) logprob_token_ids: Extension,
}

/// Body of `/tokenize`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct TokenizeBody {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    #[serde(deserialize_with = "list::<MAX_MESSAGES, _, _>")]
    pub(crate) messages: Option<Vec<Object<ChatMessage>>>,
    pub(crate) add_special_tokens: Option<Flag>,
    pub(crate) add_generation_prompt: Option<Flag>,
    pub(crate) continue_final_message: Option<Flag>,
    pub(crate) return_token_strs: Option<Flag>,
    pub(crate) chat_template: Option<String>,
    pub(crate) chat_template_kwargs: Option<VariablesText>,
}

/// Body of `/detokenize`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct DetokenizeBody {
    pub(crate) model: Option<String>,
    #[serde(deserialize_with = "list::<MAX_PROMPT_IDS, _, _>")]
    pub(crate) tokens: Option<Vec<Int>>,
}

/// One message of a chat.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ChatMessage {
    pub(crate) role: Option<String>,
    pub(crate) content: Option<Content>,
    /// Of an assistant.
    #[serde(deserialize_with = "list::<MAX_MESSAGES, _, _>")]
    pub(crate) tool_calls: Option<Vec<Object<ToolCall>>>,
    /// Of a tool: what it answers.
    pub(crate) tool_call_id: Option<String>,
    pub(crate) name: Option<String>,
}

impl Element for ChatMessage {
    fn worth(&self) -> Worth {
        worth_of_message(self.role.as_deref(), self.content.as_ref())
    }
}

/// Without a role a message is refused, and so are those without content of whoever must say something.
pub(crate) fn worth_of_message(role: Option<&str>, content: Option<&Content>) -> Worth {
    match (role, content) {
        (Some("assistant" | "tool" | "function"), _) | (Some(_), Some(_)) => Worth::Kept,
        (None, _) | (Some(_), None) => Worth::Last,
    }
}

/// A call that an assistant made.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ToolCall {
    pub(crate) id: Option<String>,
    pub(crate) function: Option<Object<CalledFunction>>,
}

impl Element for ToolCall {
    fn worth(&self) -> Worth {
        match self.function {
            None => Worth::Dropped,
            Some(_) => Worth::Kept,
        }
    }
}

/// What was called, and with what.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct CalledFunction {
    pub(crate) name: Option<String>,
    pub(crate) arguments: Option<Arguments>,
}

/// JSON as text; some clients send the JSON itself.
#[derive(Debug)]
pub(crate) struct Arguments(pub(crate) String);

/// One of `tools`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Tool {
    pub(crate) r#type: Option<String>,
    pub(crate) function: Option<Object<ToolFunction>>,
}

impl Element for Tool {}

/// A function that may be called.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ToolFunction {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Option<SchemaText>,
    pub(crate) strict: Option<Flag>,
}

impl ToolFunction {
    /// Bytes of what it says.
    pub(crate) fn num_bytes(&self) -> usize {
        let parameters = self.parameters.as_ref().map_or("", SchemaText::as_str);
        self.description.as_ref().map_or(0, String::len) + parameters.len()
    }
}

/// A message's content: text, or parts.
#[derive(Debug)]
pub(crate) enum Content {
    /// `"content": "…"`.
    Text(String),
    /// `"content": [{"type": "text", "text": "…"}]`.
    Parts(Vec<ContentPart>),
}

/// One part of a message's content.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ContentPart {
    pub(crate) r#type: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) refusal: Option<String>,
}

impl Element for ContentPart {
    fn worth(&self) -> Worth {
        match self.text.is_some() || self.refusal.is_some() {
            true => Worth::Kept,
            false => Worth::Last,
        }
    }
}

/// What a completion continues.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// One or more texts.
    Texts(Vec<String>),
    /// One or more lists of token ids.
    Tokens(Vec<Vec<Int>>),
}

/// `stream_options`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<Flag>,
    pub(crate) continuous_usage_stats: Option<Flag>,
}

/// `stop`: one string or several.
#[derive(Debug)]
pub(crate) struct Stop(pub(crate) Vec<String>);

/// `logit_bias` in the order written; keys are still text.
#[derive(Debug)]
pub(crate) struct LogitBias(pub(crate) Vec<(String, Number)>);

/// `logprobs`: a boolean for chat, a count for completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Logprobs {
    /// `true` or `false`.
    Flag(bool),
    /// How many alternatives.
    Count(i64),
}

/// `response_format`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ResponseFormat {
    pub(crate) r#type: Option<String>,
    pub(crate) json_schema: Option<Object<NamedSchema>>,
}

/// A schema with its name. `strict` makes no difference: a schema is always kept to.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct NamedSchema {
    pub(crate) name: Option<String>,
    pub(crate) schema: Option<SchemaText>,
}

/// `structured_outputs`, of which one field may be set.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct StructuredOutputs {
    pub(crate) json: Option<SchemaText>,
    pub(crate) regex: Option<String>,
    #[serde(deserialize_with = "list::<MAX_CHOICES, _, _>")]
    pub(crate) choice: Option<Vec<String>>,
    pub(crate) grammar: Option<String>,
    pub(crate) json_object: Option<Flag>,
    pub(crate) structural_tag: Extension,
}

/// `tool_choice` or `function_call`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// `none`, `auto`, `required`.
    Mode(String),
    /// An object, which names a tool as a rule.
    Named {
        /// Its `type`.
        kind: Option<String>,
        /// `name` of its `function`.
        name: Option<String>,
    },
}

/// A parameter that is known but not supported. Values that ask for nothing (`null`, `false`, empty) are no use of it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extension {
    /// Whether the client wants something.
    pub(crate) is_used: bool,
}

/// The elements of a `prompt` array: the first one decides.
enum PromptItem {
    Text(String),
    Id(Int),
    Ids(Ids),
}

/// A list of token ids.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Ids(#[serde(deserialize_with = "ids")] Vec<Int>);

fn ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Int>, D::Error> {
    let ids = list::<MAX_PROMPT_IDS, _, _>(deserializer)?;
    ids.ok_or_else(|| D::Error::custom("null is no array of token ids"))
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of strings, an array of token ids or an array of those")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Texts(vec![text.to_owned()]))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Texts(vec![text]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                match seq.next_element()? {
                    None => Ok(Prompt::Texts(Vec::new())),
                    Some(PromptItem::Text(text)) => elements(vec![text], seq, MAX_PROMPTS).map(Prompt::Texts),
                    Some(PromptItem::Id(id)) => Ok(Prompt::Tokens(vec![elements(vec![id], seq, MAX_PROMPT_IDS)?])),
                    Some(PromptItem::Ids(ids)) => lists(ids, seq).map(Prompt::Tokens),
                }
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

/// Lists of token ids, bounded together.
fn lists<'de, A: SeqAccess<'de>>(first: Ids, mut seq: A) -> Result<Vec<Vec<Int>>, A::Error> {
    let mut num_ids = first.0.len();
    let mut lists = vec![first.0];
    while let Some(Ids(ids)) = seq.next_element()? {
        num_ids += ids.len();
        if num_ids > MAX_PROMPT_IDS {
            return Err(too_many(MAX_PROMPT_IDS));
        }
        if lists.len() == MAX_PROMPTS {
            return Err(too_many(MAX_PROMPTS));
        }
        lists.push(ids);
    }
    Ok(lists)
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = PromptItem;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text.to_owned()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<PromptItem, E> {
                Ok(PromptItem::Id(Int(value)))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<PromptItem, E> {
                Int::deserialize(serde::de::value::U64Deserializer::new(value)).map(PromptItem::Id)
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<PromptItem, E> {
                Int::deserialize(serde::de::value::F64Deserializer::new(value)).map(PromptItem::Id)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<PromptItem, A::Error> {
                elements(Vec::new(), seq, MAX_PROMPT_IDS).map(|ids| PromptItem::Ids(Ids(ids)))
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;
        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of content parts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                let parts = elements::<Object<ContentPart>, _>(Vec::new(), seq, MAX_MESSAGES)?;
                Ok(Content::Parts(parts.into_iter().map(|Object(part)| part).collect()))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
    }
}

impl<'de> Deserialize<'de> for Arguments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = <&RawValue>::deserialize(deserializer)?.get();
        if json.starts_with('"') {
            return serde_json::from_str(json).map(Self).map_err(D::Error::custom);
        }
        Ok(Self(without_white_space(json)))
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Stop, A::Error> {
                elements(Vec::new(), seq, MAX_STOPS).map(Stop)
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BiasVisitor;
        impl<'de> Visitor<'de> for BiasVisitor {
            type Value = LogitBias;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LogitBias, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    if entries.len() == MAX_LOGIT_BIASES {
                        return Err(too_many(MAX_LOGIT_BIASES));
                    }
                    entries.push(entry);
                }
                Ok(LogitBias(entries))
            }
        }
        deserializer.deserialize_any(BiasVisitor)
    }
}

impl<'de> Deserialize<'de> for Logprobs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LogprobsVisitor;
        impl Visitor<'_> for LogprobsVisitor {
            type Value = Logprobs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean or an integer")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Logprobs, E> {
                Ok(Logprobs::Flag(value))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Logprobs, E> {
                Ok(Logprobs::Count(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Logprobs, E> {
                Int::deserialize(serde::de::value::U64Deserializer::new(value)).map(|Int(count)| Logprobs::Count(count))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Logprobs, E> {
                Int::deserialize(serde::de::value::F64Deserializer::new(value)).map(|Int(count)| Logprobs::Count(count))
            }
        }
        deserializer.deserialize_any(LogprobsVisitor)
    }
}

impl<'de> Deserialize<'de> for Choice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor;
        impl<'de> Visitor<'de> for ChoiceVisitor {
            type Value = Choice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an object")
            }

            fn visit_str<E: Error>(self, mode: &str) -> Result<Choice, E> {
                Ok(Choice::Mode(mode.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Choice, A::Error> {
                let tool = Tool::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Choice::Named {
                    kind: tool.r#type,
                    name: tool.function.and_then(|Object(function)| function.name),
                })
            }
        }
        deserializer.deserialize_any(ChoiceVisitor)
    }
}

impl<'de> Deserialize<'de> for Extension {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ExtensionVisitor;
        impl<'de> Visitor<'de> for ExtensionVisitor {
            type Value = bool;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_unit<E: Error>(self) -> Result<bool, E> {
                Ok(false)
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<bool, E> {
                Ok(value)
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<bool, E> {
                Ok(true)
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<bool, E> {
                Ok(!value.is_empty())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
                let mut is_used = false;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    is_used = true;
                }
                Ok(is_used)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
                let mut is_used = false;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    is_used = true;
                }
                Ok(is_used)
            }
        }
        deserializer
            .deserialize_any(ExtensionVisitor)
            .map(|is_used| Self { is_used })
    }
}
