//! What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` fields.

use std::borrow::Cow;
use std::sync::Arc;

use lapidary_text::grammar::{MAX_LARK_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES};
use lapidary_text::{Grammar, GrammarError};
use serde_json::Value;

use super::types::{GenerationBody, ResponseFormat, SchemaText, StructuredOutputs};
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Object};

/// A grammar as its client wrote it: it may wait for others to be compiled, and a schema takes far more memory than its
/// text.
#[derive(Debug)]
pub(crate) enum FormText {
    JsonObject,
    JsonSchema(SchemaText),
    /// A string whose text is a schema.
    QuotedSchema(SchemaText),
    Regex(String),
    Choice(Vec<String>),
    Lark(String),
}

impl FormText {
    /// The grammar.
    ///
    /// # Errors
    /// [`GrammarError::Invalid`]: a schema is not JSON.
    pub(super) fn grammar(&self) -> Result<Grammar, GrammarError> {
        let quoted = |text: &SchemaText| serde_json::from_str::<Value>(&text.parse::<String>()?);
        match self {
            Self::JsonObject => Ok(Grammar::JsonObject),
            Self::JsonSchema(text) => text.parse().map(Grammar::JsonSchema).map_err(|error| not_json(&error)),
            Self::QuotedSchema(text) => quoted(text).map(Grammar::JsonSchema).map_err(|error| not_json(&error)),
            Self::Regex(regex) => Ok(Grammar::Regex(regex.clone())),
            Self::Choice(choices) => Ok(Grammar::Choice(choices.clone())),
            Self::Lark(grammar) => Ok(Grammar::Lark(grammar.clone())),
        }
    }
}

/// What is wrong with a schema that cannot be parsed.
pub(super) fn not_json(error: &serde_json::Error) -> GrammarError {
    GrammarError::Invalid {
        reason: format!("the JSON schema is not JSON: {error}"),
    }
}

/// A grammar and the field it came from.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) text: Arc<FormText>,
    pub(crate) param: Cow<'static, str>,
    /// What to call it in a message.
    pub(crate) what: String,
}

impl Form {
    fn new(param: &'static str, text: FormText) -> Self {
        Self {
            text: Arc::new(text),
            param: param.into(),
            what: format!("Invalid grammar in '{param}'"),
        }
    }
}

/// The form that a request asks for.
pub(super) fn form(body: &GenerationBody) -> Result<Option<Form>, ApiError> {
    let mut forms = Vec::new();
    if let Some(Object(format)) = &body.response_format {
        forms.extend(response_format(format)?);
    }
    if let Some(Object(outputs)) = &body.structured_outputs {
        let asked = structured_outputs(outputs)?;
        if asked.is_empty() {
            return Err(ApiError::invalid(
                "structured_outputs",
                "You must use one kind of structured outputs constraint but none are specified.",
            ));
        }
        forms.extend(asked);
    }
    forms.extend(guided(body)?);
    if forms.len() > 1 {
        let param = forms.pop().map_or("structured_outputs".into(), |form| form.param);
        return Err(ApiError::invalid(
            param,
            "You can only use one kind of constraints for structured outputs ('json', 'regex' or 'choice').",
        ));
    }
    Ok(forms.pop())
}

fn response_format(format: &ResponseFormat) -> Result<Option<Form>, ApiError> {
    match format.r#type.as_deref() {
        None => Err(ApiError::missing("response_format.type")),
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Form::new("response_format", FormText::JsonObject))),
        Some("json_schema") => {
            let Some(Object(named)) = &format.json_schema else {
                return Err(ApiError::invalid(
                    "response_format.json_schema",
                    "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                ));
            };
            let param = "response_format.json_schema.schema";
            let schema = named.schema.clone().ok_or_else(|| ApiError::missing(param))?;
            let name = named.name.as_deref().unwrap_or_default();
            Ok(Some(Form {
                text: Arc::new(FormText::JsonSchema(schema)),
                param: param.into(),
                what: format!("Invalid schema for response_format '{}'", shorten(name)),
            }))
        }
        Some(kind @ "structural_tag") => Err(ApiError::unsupported(
            "response_format.type",
            format!("response_format of type '{kind}' is not supported."),
        )),
        Some(other) => Err(ApiError::invalid(
            "response_format.type",
            format!(
                "response_format.type must be 'text', 'json_object' or 'json_schema', got '{}'.",
                shorten(other)
            ),
        )),
    }
}

fn structured_outputs(outputs: &StructuredOutputs) -> Result<Vec<Form>, ApiError> {
    if outputs.structural_tag.is_used {
        return Err(ApiError::unsupported(
            "structured_outputs.structural_tag",
            "structural_tag is not supported.",
        ));
    }
    let mut forms = Vec::new();
    if let Some(schema) = &outputs.json {
        forms.push(json("structured_outputs.json", schema));
    }
    if let Some(text) = given(outputs.regex.as_ref()) {
        forms.push(regex("structured_outputs.regex", text)?);
    }
    if let Some(choices) = &outputs.choice {
        forms.push(choice("structured_outputs.choice", choices)?);
    }
    if let Some(text) = given(outputs.grammar.as_ref()) {
        forms.push(lark("structured_outputs.grammar", text)?);
    }
    if outputs.json_object == Some(Flag(true)) {
        forms.push(Form::new("structured_outputs.json_object", FormText::JsonObject));
    }
    Ok(forms)
}

/// vLLM's names before it had `structured_outputs`.
fn guided(body: &GenerationBody) -> Result<Vec<Form>, ApiError> {
    let mut forms = Vec::new();
    if let Some(schema) = &body.guided_json {
        forms.push(json("guided_json", schema));
    }
    if let Some(text) = given(body.guided_regex.as_ref()) {
        forms.push(regex("guided_regex", text)?);
    }
    if let Some(choices) = &body.guided_choice {
        forms.push(choice("guided_choice", choices)?);
    }
    if let Some(text) = given(body.guided_grammar.as_ref()) {
        forms.push(lark("guided_grammar", text)?);
    }
    Ok(forms)
}

/// Forms in a browser send what was left empty.
fn given(text: Option<&String>) -> Option<&String> {
    text.filter(|text| !text.is_empty())
}

/// A schema, which vLLM takes as an object or as its text.
fn json(param: &'static str, schema: &SchemaText) -> Form {
    let text = match schema.is_string() {
        true => FormText::QuotedSchema(schema.clone()),
        false => FormText::JsonSchema(schema.clone()),
    };
    Form::new(param, text)
}

fn regex(param: &'static str, text: &str) -> Result<Form, ApiError> {
    check_bytes(param, "regular expression", text.len(), MAX_REGEX_BYTES)?;
    Ok(Form::new(param, FormText::Regex(text.to_owned())))
}

fn choice(param: &'static str, choices: &[String]) -> Result<Form, ApiError> {
    let num_bytes = choices.iter().map(String::len).sum();
    check_bytes(param, "list of choices", num_bytes, MAX_SCHEMA_BYTES)?;
    Ok(Form::new(param, FormText::Choice(choices.to_owned())))
}

fn lark(param: &'static str, text: &str) -> Result<Form, ApiError> {
    check_bytes(param, "grammar", text.len(), MAX_LARK_BYTES)?;
    Ok(Form::new(param, FormText::Lark(text.to_owned())))
}

/// What the compiler would refuse is not copied, and waits for no compiler.
fn check_bytes(param: &'static str, what: &'static str, bytes: usize, limit: usize) -> Result<(), ApiError> {
    if bytes <= limit {
        return Ok(());
    }
    let error = GrammarError::TooLarge { what, bytes, limit };
    Err(ApiError::invalid(
        param,
        format!("Invalid grammar in '{param}': {error}."),
    ))
}
