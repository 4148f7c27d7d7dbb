//! Functions that an answer may call: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`.
//!
//! Gemma-2 has no form for calls. The functions go into the prompt, the answer is held to a form by a grammar
//! (`lapidary_text::tool_calls`), and read back.

use std::sync::Arc;

use lapidary_text::{CallGrammar, Function, Grammar, GrammarError, GrammarState, Otherwise};
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::params::Params;
use super::structured::{Form, FormText, not_json};
use super::types::{Choice, GenerationBody, SchemaText, Tool};
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Object};
use crate::state::ServedModel;

/// Bytes of all functions of one request, those that may not be called included: many times what a prompt has room for.
const MAX_TOOLS_BYTES: usize = 1 << 20;

/// Bytes of a function's name: OpenAI's limit.
const MAX_NAME_BYTES: usize = 64;

/// The functions of a request.
#[derive(Debug)]
pub(crate) struct Tools {
    calls: Arc<CallTexts>,
    /// Some function asks for its schema to be kept, so none may be let go.
    is_strict: bool,
}

impl Tools {
    /// Whether the answer has to be a call.
    pub(crate) fn is_forced(&self) -> bool {
        matches!(self.calls.otherwise, Beside::Nothing)
    }
}

/// What an answer may be; schemas as text, since it may wait for others to be compiled.
#[derive(Debug)]
struct CallTexts {
    functions: Vec<FunctionText>,
    is_parallel: bool,
    otherwise: Beside,
}

#[derive(Debug)]
struct FunctionText {
    name: String,
    description: Option<String>,
    /// An object.
    parameters: Option<SchemaText>,
}

/// What an answer may be beside calls.
#[derive(Debug)]
enum Beside {
    Nothing,
    Text,
    /// Of JSON.
    Form(Arc<FormText>),
}

impl CallTexts {
    fn grammar(&self) -> Result<CallGrammar, GrammarError> {
        let otherwise = match &self.otherwise {
            Beside::Nothing => Otherwise::Never,
            Beside::Text => Otherwise::Text,
            Beside::Form(form) => match form.grammar()? {
                Grammar::JsonSchema(schema) => Otherwise::Json(schema),
                _ => Otherwise::Json(json!({ "type": "object" })),
            },
        };
        Ok(CallGrammar {
            functions: self
                .functions
                .iter()
                .map(FunctionText::function)
                .collect::<Result<_, _>>()?,
            is_parallel: self.is_parallel,
            otherwise,
        })
    }
}

impl FunctionText {
    fn function(&self) -> Result<Function, GrammarError> {
        let mut parameters = match &self.parameters {
            None => json!({ "properties": {}, "additionalProperties": false }),
            Some(text) => text.parse::<Value>().map_err(|error| not_json(&error))?,
        };
        if parameters.get("type").is_none() {
            parameters["type"] = json!("object");
        }
        Ok(Function {
            name: self.name.clone(),
            description: self.description.clone(),
            parameters,
        })
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
    check_bytes(tools)?;
    let functions = tools
        .iter()
        .enumerate()
        .map(|(index, Object(tool))| function(index, tool));
    let mut functions = functions.collect::<Result<Vec<_>, _>>()?;
    let otherwise = match mode {
        Mode::None => return Ok(None),
        Mode::Auto => otherwise(form)?,
        Mode::Required => Beside::Nothing,
        Mode::Named(name) => {
            functions.retain(|(function, _)| function.name == name);
            functions.truncate(1);
            if functions.is_empty() {
                let message = "The tool specified in `tool_choice` does not match any of the specified `tools`.";
                return Err(ApiError::invalid("tool_choice", message));
            }
            Beside::Nothing
        }
    };
    let is_strict = functions.iter().any(|(_, is_strict)| *is_strict);
    Ok(Some(Tools {
        calls: Arc::new(CallTexts {
            functions: functions.into_iter().map(|(function, _)| function).collect(),
            is_parallel: body.parallel_tool_calls.is_none_or(|Flag(is_parallel)| is_parallel),
            otherwise,
        }),
        is_strict,
    }))
}

fn check_bytes(tools: &[Object<Tool>]) -> Result<(), ApiError> {
    let functions = tools.iter().filter_map(|Object(tool)| tool.function.as_ref());
    let num_bytes: usize = functions.map(|Object(function)| function.num_bytes()).sum();
    if num_bytes <= MAX_TOOLS_BYTES {
        return Ok(());
    }
    Err(ApiError::InvalidRequest {
        message: format!("tools has {num_bytes} bytes, the limit is {MAX_TOOLS_BYTES}."),
        param: Some("tools".into()),
        code: Some("string_above_max_length"),
    })
}

/// What a request's answers are held to, and what a prompt has to say of that.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) grammar: Option<GrammarState>,
    pub(super) instructions: Option<String>,
}

/// Compiles what a request's answers are held to.
pub(super) async fn compile(model: &ServedModel, params: &Params) -> Result<Held, ApiError> {
    let grammars = &model.grammars;
    match (&params.tools, &params.form) {
        (Some(tools), _) => {
            let what = "Invalid schema among the functions of 'tools'";
            let make = |keeps_schemas: bool| {
                let calls = Arc::clone(&tools.calls);
                move || {
                    let calls = calls.grammar()?;
                    let instructions = calls.instructions();
                    let calls = if keeps_schemas { calls } else { calls.without_schemas() };
                    Ok((Grammar::Calls(calls), instructions))
                }
            };
            let compiled = match grammars.compile(make(true), "tools", what).await {
                // Schemas that nobody insists on may say more than can be kept: any object will do then.
                Err(ApiError::InvalidRequest { .. }) if !tools.is_strict => {
                    grammars.compile(make(false), "tools", what).await
                }
                compiled => compiled,
            };
            compiled.map(|(grammar, instructions)| Held {
                grammar: Some(grammar),
                instructions: Some(instructions),
            })
        }
        (None, Some(form)) => {
            let text = Arc::clone(&form.text);
            let make = move || Ok((text.grammar()?, ()));
            let (grammar, ()) = grammars.compile(make, &form.param, &form.what).await?;
            Ok(Held {
                grammar: Some(grammar),
                instructions: None,
            })
        }
        (None, None) => Ok(Held::default()),
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

fn function(index: usize, tool: &Tool) -> Result<(FunctionText, bool), ApiError> {
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
    if let Some(schema) = &function.parameters {
        #[derive(serde::Deserialize)]
        struct Typed<'a> {
            #[serde(borrow)]
            r#type: Option<&'a RawValue>,
        }
        let typed = serde_json::from_str(schema.as_str());
        let Ok(Typed { r#type }) = typed
            .map_err(drop)
            .and_then(|typed| schema.is_object().then_some(typed).ok_or(()))
        else {
            return Err(invalid("function.parameters", "parameters must be a JSON schema."));
        };
        if r#type.is_some_and(|kind| kind.get() != "\"object\"") {
            return Err(invalid("function.parameters", "parameters must be of type 'object'."));
        }
    }
    let described = FunctionText {
        name,
        description: function.description.clone(),
        parameters: function.parameters.clone(),
    };
    Ok((described, function.strict == Some(Flag(true))))
}

/// What an answer may be that calls nothing.
fn otherwise(form: Option<&Form>) -> Result<Beside, ApiError> {
    let Some(form) = form else { return Ok(Beside::Text) };
    match *form.text {
        FormText::JsonObject | FormText::JsonSchema(_) | FormText::QuotedSchema(_) => {
            Ok(Beside::Form(Arc::clone(&form.text)))
        }
        FormText::Regex(_) | FormText::Choice(_) | FormText::Lark(_) => Err(ApiError::unsupported(
            "tools",
            "Beside tools that may be called, only JSON and JSON schemas can be kept to.",
        )),
    }
}
