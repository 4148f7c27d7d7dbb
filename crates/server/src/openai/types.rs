//! What clients may write into a request, as it stands on the wire. `null` means absent everywhere; unknown fields are
//! accepted. Nothing here is checked for range: see [`super::params`].

use std::fmt;

use lapidary_text::TemplateVariables;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::lenient::{Flag, Int, Number, Object};

/// Body of `/v1/chat/completions` and `/v1/completions`. They share all but a handful of fields; a field of the other
/// endpoint is accepted and ignored.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct GenerationBody {
    pub(crate) model: Option<String>,
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
    pub(crate) allowed_token_ids: Option<Vec<Int>>,
    pub(crate) bad_words: Option<Vec<String>>,
    pub(crate) seed: Option<Int>,
    pub(crate) stop: Option<Stop>,
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
    pub(crate) cache_salt: Option<String>,
    pub(crate) add_special_tokens: Option<Flag>,
    pub(crate) add_generation_prompt: Option<Flag>,
    pub(crate) continue_final_message: Option<Flag>,
    pub(crate) chat_template: Option<String>,
    pub(crate) chat_template_kwargs: Option<Object<TemplateVariables>>,
    pub(crate) truncate_prompt_tokens: Option<Int>,
    pub(crate) truncation_side: Option<String>,
    pub(crate) response_format: Option<Object<ResponseFormat>>,
    pub(crate) tools: Option<Vec<Object<Tool>>>,
    pub(crate) parallel_tool_calls: Option<Flag>,
    pub(crate) tool_choice: Option<Choice>,
    pub(crate) function_call: Option<Choice>,
    pub(crate) modalities: Option<Vec<String>>,
    pub(crate) audio: Extension,
    pub(crate) prediction: Extension,
    pub(crate) suffix: Extension,
    pub(crate) use_beam_search: Extension,
    pub(crate) structured_outputs: Option<Object<StructuredOutputs>>,
    pub(crate) guided_json: Option<Value>,
    pub(crate) guided_regex: Option<String>,
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
    pub(crate) messages: Option<Vec<Object<ChatMessage>>>,
    pub(crate) add_special_tokens: Option<Flag>,
    pub(crate) add_generation_prompt: Option<Flag>,
    pub(crate) continue_final_message: Option<Flag>,
    pub(crate) return_token_strs: Option<Flag>,
    pub(crate) chat_template: Option<String>,
    pub(crate) chat_template_kwargs: Option<Object<TemplateVariables>>,
}

/// Body of `/detokenize`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct DetokenizeBody {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Option<Vec<Int>>,
}

/// One message of a chat.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ChatMessage {
    pub(crate) role: Option<String>,
    pub(crate) content: Option<Content>,
    /// Of an assistant.
    pub(crate) tool_calls: Option<Vec<Object<ToolCall>>>,
    /// Of a tool: what it answers.
    pub(crate) tool_call_id: Option<String>,
    pub(crate) name: Option<String>,
}

/// A call that an assistant made.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ToolCall {
    pub(crate) id: Option<String>,
    pub(crate) function: Option<Object<CalledFunction>>,
}

/// What was called, and with what.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct CalledFunction {
    pub(crate) name: Option<String>,
    /// JSON as text; some clients send the JSON itself.
    pub(crate) arguments: Option<Value>,
}

/// One of `tools`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct Tool {
    pub(crate) r#type: Option<String>,
    pub(crate) function: Option<Object<ToolFunction>>,
}

/// A function that may be called.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct ToolFunction {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Option<Value>,
    pub(crate) strict: Option<Flag>,
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
    pub(crate) schema: Option<Value>,
}

/// `structured_outputs`, of which one field may be set.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default)]
pub(crate) struct StructuredOutputs {
    pub(crate) json: Option<Value>,
    pub(crate) regex: Option<String>,
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
    Ids(Vec<Int>),
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
                    Some(PromptItem::Text(text)) => rest(vec![text], seq).map(Prompt::Texts),
                    Some(PromptItem::Id(id)) => Ok(Prompt::Tokens(vec![rest(vec![id], seq)?])),
                    Some(PromptItem::Ids(ids)) => rest(vec![ids], seq).map(Prompt::Tokens),
                }
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

fn rest<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(mut items: Vec<T>, mut seq: A) -> Result<Vec<T>, A::Error> {
    while let Some(item) = seq.next_element()? {
        items.push(item);
    }
    Ok(items)
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
                rest(Vec::new(), seq).map(PromptItem::Ids)
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

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(Object(part)) = seq.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor)
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
                rest(Vec::new(), seq).map(Stop)
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
