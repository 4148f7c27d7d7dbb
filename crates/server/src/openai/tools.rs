//! Functions that an answer may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`.
//!
//! Gemma-2 has no form for calls. The functions go into the prompt, the answer is held to a form by a grammar
//! (`lapidary_text::tool_calls`), and read back.

use lapidary_text::{CallGrammar, Function, Grammar, GrammarState, Otherwise};
use serde_json::{Value, json};

use super::params::Params;
use super::structured::Form;
use super::types::{Choice, GenerationBody, Tool};
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Object};
use crate::state::ServedModel;

/// Functions of one request: OpenAI's limit.
const MAX_TOOLS: usize = 128;

/// Bytes of a function's name: OpenAI's limit.
const MAX_NAME_BYTES: usize = 64;

/// The functions of a request.
#[derive(Debug)]
pub(crate) struct Tools {
    /// What an answer may be.
    pub(crate) calls: CallGrammar,
    /// Some function asks for its schema to be kept, so none may be let go.
    is_strict: bool,
}

impl Tools {
    /// Whether the answer has to be a call.
    pub(crate) fn is_forced(&self) -> bool {
        self.calls.otherwise == Otherwise::Never
    }
}

/// Which functions may, must or must not be called.
enum Mode<'a> {
    None,
    Auto,
    Required,
    Named(&'a str),
}

/// The functions that an answer may call; `form` is what it is held to otherwise.
pub(super) fn tools(body: &GenerationBody, form: Option<&Form>) -> Result<Option<Tools>, ApiError> {
    refuse_function_call(body)?;
    let mode = mode(body)?;
    let Some(tools) = body.tools.as_deref() else {
        return Ok(None);
    };
    if tools.len() > MAX_TOOLS {
        return Err(ApiError::InvalidRequest {
            message: format!("tools has {} functions, the limit is {MAX_TOOLS}.", tools.len()),
            param: Some("tools".into()),
            code: Some("array_above_max_length"),
        });
    }
    let functions = tools
        .iter()
        .enumerate()
        .map(|(index, Object(tool))| function(index, tool));
    let mut functions = functions.collect::<Result<Vec<_>, _>>()?;
    let otherwise = match mode {
        Mode::None => return Ok(None),
        Mode::Auto => otherwise(form)?,
        Mode::Required => Otherwise::Never,
        Mode::Named(name) => {
            functions.retain(|(function, _)| function.name == name);
            functions.truncate(1);
            if functions.is_empty() {
                let message = "The tool specified in `tool_choice` does not match any of the specified `tools`.";
                return Err(ApiError::invalid("tool_choice", message));
            }
            Otherwise::Never
        }
    };
    let is_strict = functions.iter().any(|(_, is_strict)| *is_strict);
    Ok(Some(Tools {
        calls: CallGrammar {
            functions: functions.into_iter().map(|(function, _)| function).collect(),
            is_parallel: body.parallel_tool_calls.is_none_or(|Flag(is_parallel)| is_parallel),
            otherwise,
        },
        is_strict,
    }))
}

/// What a request's answers are held to, compiled.
pub(super) async fn compile(model: &ServedModel, params: &Params) -> Result<Option<GrammarState>, ApiError> {
    let grammars = &model.grammars;
    match (&params.tools, &params.form) {
        (Some(tools), _) => {
            let what = "Invalid schema among the functions of 'tools'";
            let compiled = grammars
                .compile(Grammar::Calls(tools.calls.clone()), "tools", what)
                .await;
            match compiled {
                // Schemas that nobody insists on may say more than can be kept: any object will do then.
                Err(ApiError::InvalidRequest { .. }) if !tools.is_strict => {
                    let lenient = Grammar::Calls(tools.calls.without_schemas());
                    grammars.compile(lenient, "tools", what).await.map(Some)
                }
                compiled => compiled.map(Some),
            }
        }
        (None, Some(form)) => {
            let compiled = grammars.compile(form.grammar.clone(), &form.param, &form.what);
            compiled.await.map(Some)
        }
        (None, None) => Ok(None),
    }
}

fn mode(body: &GenerationBody) -> Result<Mode<'_>, ApiError> {
    let has_tools = body.tools.is_some();
    if body.tools.as_ref().is_some_and(Vec::is_empty) {
        let message =
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.";
        return Err(ApiError::invalid("tools", message));
    }
    match &body.tool_choice {
        None if has_tools => Ok(Mode::Auto),
        None => Ok(Mode::None),
        Some(Choice::Mode(mode)) if mode == "none" => Ok(Mode::None),
        Some(_) if !has_tools => Err(ApiError::invalid(
            "tool_choice",
            "When using `tool_choice`, `tools` must be set.",
        )),
        Some(Choice::Mode(mode)) => match mode.as_str() {
            "auto" => Ok(Mode::Auto),
            "required" => Ok(Mode::Required),
            other => Err(ApiError::invalid(
                "tool_choice",
                format!(
                    "tool_choice must be 'none', 'auto', 'required' or name a function, got '{}'.",
                    shorten(other)
                ),
            )),
        },
        Some(Choice::Named { kind, name }) => match (kind.as_deref(), name) {
            (None | Some("function"), Some(name)) => Ok(Mode::Named(name)),
            (None | Some("function"), None) => Err(ApiError::missing("tool_choice.function.name")),
            (Some(other), _) => Err(ApiError::unsupported(
                "tool_choice.type",
                format!("tool_choice of type '{}' is not supported.", shorten(other)),
            )),
        },
    }
}

/// OpenAI's older parameters: a forced `function_call` is not supported.
fn refuse_function_call(body: &GenerationBody) -> Result<(), ApiError> {
    match &body.function_call {
        None => Ok(()),
        Some(Choice::Mode(mode)) if mode == "none" || mode == "auto" => Ok(()),
        Some(_) => Err(ApiError::unsupported(
            "function_call",
            "function_call is not supported. Use tools and tool_choice.",
        )),
    }
}

fn function(index: usize, tool: &Tool) -> Result<(Function, bool), ApiError> {
    let invalid = |field: &str, message: &str| ApiError::invalid(format!("tools[{index}].{field}"), message);
    if let Some(kind) = tool.r#type.as_deref().filter(|kind| *kind != "function") {
        let message = format!("Tools of type '{}' are not supported.", shorten(kind));
        return Err(ApiError::unsupported(format!("tools[{index}].type"), message));
    }
    let Some(Object(function)) = &tool.function else {
        return Err(invalid("function", "A tool must have a function."));
    };
    let name = function.name.clone().unwrap_or_default();
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(is_plain) {
        let message = "A function's name must be 1 to 64 letters, digits, underscores, dots and dashes.";
        return Err(invalid("function.name", message));
    }
    let mut parameters = match &function.parameters {
        None => json!({ "properties": {}, "additionalProperties": false }),
        Some(schema @ Value::Object(_)) => schema.clone(),
        Some(_) => return Err(invalid("function.parameters", "parameters must be a JSON schema.")),
    };
    match parameters.get("type") {
        None => parameters["type"] = json!("object"),
        Some(kind) if kind == "object" => {}
        Some(_) => return Err(invalid("function.parameters", "parameters must be of type 'object'.")),
    }
    let described = Function {
        name,
        description: function.description.clone(),
        parameters,
    };
    Ok((described, function.strict == Some(Flag(true))))
}

/// What an answer may be that calls nothing.
fn otherwise(form: Option<&Form>) -> Result<Otherwise, ApiError> {
    match form.map(|form| &form.grammar) {
        None => Ok(Otherwise::Text),
        Some(Grammar::JsonObject) => Ok(Otherwise::Json(json!({ "type": "object" }))),
        Some(Grammar::JsonSchema(schema)) => Ok(Otherwise::Json(schema.clone())),
        Some(_) => Err(ApiError::unsupported(
            "tools",
            "Beside tools that may be called, only JSON and JSON schemas can be kept to.",
        )),
    }
}
