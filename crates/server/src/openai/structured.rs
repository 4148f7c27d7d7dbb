//! What an answer must look like: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` fields.

use std::borrow::Cow;

use lapidary_text::Grammar;
use serde_json::Value;

use super::types::{GenerationBody, ResponseFormat, StructuredOutputs};
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Object};

/// A grammar and the field it came from.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) grammar: Grammar,
    pub(crate) param: Cow<'static, str>,
    /// What to call it in a message.
    pub(crate) what: String,
}

impl Form {
    fn new(param: &'static str, grammar: Grammar) -> Self {
        Self {
            grammar,
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
        Some("json_object") => Ok(Some(Form::new("response_format", Grammar::JsonObject))),
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
                grammar: Grammar::JsonSchema(schema),
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
        forms.push(json("structured_outputs.json", schema)?);
    }
    if let Some(regex) = given(outputs.regex.as_ref()) {
        forms.push(Form::new("structured_outputs.regex", Grammar::Regex(regex.clone())));
    }
    if let Some(choice) = &outputs.choice {
        forms.push(Form::new("structured_outputs.choice", Grammar::Choice(choice.clone())));
    }
    if let Some(grammar) = given(outputs.grammar.as_ref()) {
        forms.push(Form::new("structured_outputs.grammar", Grammar::Lark(grammar.clone())));
    }
    if outputs.json_object == Some(Flag(true)) {
        forms.push(Form::new("structured_outputs.json_object", Grammar::JsonObject));
    }
    Ok(forms)
}

/// vLLM's names before it had `structured_outputs`.
fn guided(body: &GenerationBody) -> Result<Vec<Form>, ApiError> {
    let mut forms = Vec::new();
    if let Some(schema) = &body.guided_json {
        forms.push(json("guided_json", schema)?);
    }
    if let Some(regex) = given(body.guided_regex.as_ref()) {
        forms.push(Form::new("guided_regex", Grammar::Regex(regex.clone())));
    }
    if let Some(choice) = &body.guided_choice {
        forms.push(Form::new("guided_choice", Grammar::Choice(choice.clone())));
    }
    if let Some(grammar) = given(body.guided_grammar.as_ref()) {
        forms.push(Form::new("guided_grammar", Grammar::Lark(grammar.clone())));
    }
    Ok(forms)
}

/// Forms in a browser send what was left empty.
fn given(text: Option<&String>) -> Option<&String> {
    text.filter(|text| !text.is_empty())
}

/// A schema, which vLLM takes as an object or as its text.
fn json(param: &'static str, schema: &Value) -> Result<Form, ApiError> {
    let schema = match schema {
        Value::String(text) => serde_json::from_str(text)
            .map_err(|error| ApiError::invalid(param, format!("The JSON schema in '{param}' is not JSON: {error}.")))?,
        schema => schema.clone(),
    };
    Ok(Form::new(param, Grammar::JsonSchema(schema)))
}
