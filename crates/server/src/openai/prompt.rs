//! Texts and chats to token ids, off the async threads where that takes long.

use std::sync::Arc;

use lapidary_engine::TokenId;
use lapidary_text::{
    ChatTemplate, Message, PromptEnd, Rendered, TemplateError, TemplateVariables, Tokenizer, TokenizerError,
};

use super::messages::{convert, instruct};
use super::types::{Arguments, ChatMessage, Content, VariablesText};
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Object};
use crate::state::{AppState, ServedModel};

/// Texts up to this many bytes are tokenised where they are: at 0.25 us a byte they hold up other requests for half a
/// millisecond at most, and a hop to another thread costs a tenth of that.
pub(super) const MAX_INLINE_BYTES: usize = 2048;

/// What rendering a message costs beside its text, as text.
const MESSAGE_BYTES: usize = 64;

/// As many token ids are checked, written or turned into text where they are: a tenth of a millisecond.
pub(super) const MAX_INLINE_IDS: usize = 4096;

/// Texts of up to so many contexts are tokenised where what does not fit is cut off.
const MAX_TRUNCATED_CONTEXTS: usize = 16;

/// How much of a prompt is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Truncation {
    /// At most.
    pub(crate) num_tokens: u32,
    /// The end is kept, not the beginning.
    pub(crate) keeps_end: bool,
}

impl Truncation {
    /// Cuts; the first `num_fixed` tokens stay and count.
    pub(crate) fn cut<T>(self, tokens: &mut Vec<T>, num_fixed: usize) {
        let num_tokens = self.num_tokens as usize;
        let num_excess = tokens.len().saturating_sub(num_tokens);
        if num_excess > 0 && self.keeps_end {
            let start = num_fixed.min(num_tokens);
            tokens.drain(start..start + num_excess);
        } else {
            tokens.truncate(num_tokens);
        }
    }
}

/// What is to be tokenised.
pub(crate) enum Source {
    /// Text of a client, with or without BOS.
    Text { text: String, add_bos: bool },
    /// A rendered chat.
    Chat(Rendered),
}

impl Source {
    fn text(&self) -> &str {
        match self {
            Self::Text { text, .. } => text,
            Self::Chat(rendered) => rendered.text(),
        }
    }

    fn encode(&self, tokenizer: &Tokenizer, truncation: Option<Truncation>) -> Result<Vec<TokenId>, TokenizerError> {
        let (mut tokens, num_fixed) = match self {
            Self::Text { text, add_bos } => (tokenizer.encode(text, *add_bos)?, usize::from(*add_bos)),
            Self::Chat(rendered) => (tokenizer.encode_rendered(rendered)?, 0),
        };
        if let Some(truncation) = truncation {
            truncation.cut(&mut tokens, num_fixed);
        }
        Ok(tokens)
    }
}

/// Tokenises, in order. A text that cannot fit the context however it is tokenised is refused unread.
pub(crate) async fn encode(
    state: &AppState,
    model: &ServedModel,
    sources: Vec<Source>,
    truncation: Option<Truncation>,
    param: &'static str,
) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let mut num_bytes = 0;
    for source in &sources {
        check_bytes(model, source.text().len(), truncation, param)?;
        num_bytes += source.text().len();
    }
    let tokenizer = Arc::clone(&model.tokenizer);
    let work = move || {
        let encoded = sources.iter().map(|source| source.encode(&tokenizer, truncation));
        encoded
            .map(|tokens| tokens.map(Arc::from))
            .collect::<Result<Vec<_>, _>>()
    };
    let encoded = state.compute(num_bytes > MAX_INLINE_BYTES, work).await?;
    encoded.map_err(|error| untokenisable(&error, param))
}

fn untokenisable(error: &TokenizerError, param: &'static str) -> ApiError {
    tracing::warn!(error = error as &dyn std::error::Error, "text could not be tokenised");
    ApiError::invalid(param, "The text cannot be tokenised.")
}

/// Refuses a text of so many bytes if no tokenisation of it fits, or if too much of it would be cut.
pub(super) fn check_bytes(
    model: &ServedModel,
    num_bytes: usize,
    truncation: Option<Truncation>,
    param: &'static str,
) -> Result<(), ApiError> {
    let at_least = model.tokenizer.min_num_tokens(num_bytes);
    let num_contexts = if truncation.is_some() {
        MAX_TRUNCATED_CONTEXTS
    } else {
        1
    };
    if at_least <= model.max_model_len as usize * num_contexts {
        return Ok(());
    }
    let detail = format!(
        "However, your prompt contains at least {at_least} input tokens. Please reduce the length of the input prompt."
    );
    Err(ApiError::context_length(param, model.max_model_len, &detail))
}

/// A chat and how it is to be rendered.
#[derive(Debug)]
pub(crate) struct Chat {
    /// What was said.
    pub(crate) messages: Option<Vec<Object<ChatMessage>>>,
    /// What goes in front of it.
    pub(crate) instructions: Option<String>,
    /// How the prompt ends.
    pub(crate) end: PromptEnd,
    /// The client's own template.
    pub(crate) template: Option<String>,
    /// The client's variables.
    pub(crate) variables: Option<VariablesText>,
    /// What is left of the prompt.
    pub(crate) truncation: Option<Truncation>,
}

impl Chat {
    /// About how much text there is to render.
    fn num_bytes(&self) -> usize {
        let messages = self.messages.iter().flatten();
        let messages: usize = messages.map(|Object(message)| MESSAGE_BYTES + num_bytes(message)).sum();
        let instructions = self.instructions.as_ref().map_or(0, String::len);
        let variables = self.variables.as_ref().map_or(0, |variables| variables.as_str().len());
        messages + instructions + variables
    }

    /// Whether others should not have to wait for it.
    fn is_long(&self) -> bool {
        // A client's template may loop.
        self.template.is_some() || self.num_bytes() > MAX_INLINE_BYTES
    }

    /// Renders and tokenises it, however long that takes.
    fn encode(self, model: &ServedModel, is_trusted: bool) -> Result<Arc<[TokenId]>, ApiError> {
        let variables = self
            .variables
            .as_ref()
            .map_or_else(|| Ok(TemplateVariables::new()), variables)?;
        check_variables(&variables, self.template.is_some(), is_trusted)?;
        let messages = convert_all(model, self.messages, self.instructions, self.truncation)?;
        let rendered = match self.template {
            None => own_template(model)?
                .render_with(&messages, self.end, &variables)
                .map_err(|error| template_error(&error)),
            Some(source) => ChatTemplate::from_client(&source, &model.tokenizer, model.system_role)
                .and_then(|template| template.render_with(&messages, self.end, &variables))
                .map_err(|error| client_template_error(&error)),
        };
        let source = Source::Chat(rendered?);
        check_bytes(model, source.text().len(), self.truncation, "messages")?;
        let tokens = source.encode(&model.tokenizer, self.truncation);
        tokens.map(Arc::from).map_err(|error| untokenisable(&error, "messages"))
    }
}

/// Bytes of what a message says.
fn num_bytes(message: &ChatMessage) -> usize {
    let content = match &message.content {
        None => 0,
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => {
            let texts = parts.iter().flat_map(|part| [&part.text, &part.refusal]);
            texts.flatten().map(String::len).sum()
        }
    };
    let calls = message.tool_calls.iter().flatten();
    let functions = calls.filter_map(|Object(call)| call.function.as_ref());
    let arguments = functions.filter_map(|Object(function)| function.arguments.as_ref());
    content + arguments.map(|Arguments(text)| text.len()).sum::<usize>()
}

/// Renders and tokenises a chat with the model's template, or the client's where clients are trusted that far.
pub(crate) async fn encode_chat(state: &AppState, model: &ServedModel, chat: Chat) -> Result<Arc<[TokenId]>, ApiError> {
    let is_trusted = state.limits.trust_request_chat_template;
    compute_with(state, model, chat.is_long(), move |model| {
        chat.encode(model, is_trusted)
    })
    .await
}

/// [`AppState::compute`] for work that needs the model.
///
/// # Errors
/// Those of the work.
pub(super) async fn compute_with<T: Send + 'static>(
    state: &AppState,
    model: &ServedModel,
    is_long: bool,
    work: impl FnOnce(&ServedModel) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if !is_long {
        return work(model);
    }
    let there = state.clone();
    let work = move || match there.model.get() {
        Some(model) => work(model),
        None => Err(ApiError::Internal {
            is_deterministic: false,
        }),
    };
    state.compute(true, work).await?
}

/// The client's variables. They stay text for as long as they wait.
fn variables(text: &VariablesText) -> Result<TemplateVariables, ApiError> {
    text.parse().map_err(|error| ApiError::InvalidRequest {
        message: format!("Invalid value for 'chat_template_kwargs': {error}."),
        param: Some("chat_template_kwargs".into()),
        code: Some("invalid_type"),
    })
}

fn own_template(model: &ServedModel) -> Result<&ChatTemplate, ApiError> {
    model.chat_template.as_deref().ok_or_else(|| {
        let message = "This model has no chat template; use /v1/completions.";
        ApiError::InvalidRequest {
            message: message.to_owned(),
            param: None,
            code: Some("no_chat_template"),
        }
    })
}

/// A template is a program, and whoever may change it may also say what the model takes for a turn.
fn check_variables(variables: &TemplateVariables, has_template: bool, is_trusted: bool) -> Result<(), ApiError> {
    if !is_trusted && (has_template || variables.contains_key("chat_template")) {
        let param = if has_template {
            "chat_template"
        } else {
            "chat_template_kwargs.chat_template"
        };
        let message = "Chat template is passed with request, but --trust-request-chat-template is not set. Refused \
                       request with untrusted chat template.";
        return Err(ApiError::unsupported(param, message));
    }
    let reserved = ChatTemplate::RESERVED_VARIABLES
        .into_iter()
        .chain(["chat_template", "continue_final_message"]);
    match reserved.into_iter().find(|name| variables.contains_key(*name)) {
        None => Ok(()),
        Some(name) => Err(ApiError::invalid(
            format!("chat_template_kwargs.{name}"),
            format!("chat_template_kwargs cannot set '{name}': it has a field of its own, or is the model's."),
        )),
    }
}

fn convert_all(
    model: &ServedModel,
    messages: Option<Vec<Object<ChatMessage>>>,
    instructions: Option<String>,
    truncation: Option<Truncation>,
) -> Result<Vec<Message>, ApiError> {
    let messages = messages.ok_or_else(|| ApiError::missing("messages"))?;
    // A turn takes tokens of its own: rendering a million empty ones must not cost what their refusal does not.
    if messages.len() > model.max_model_len as usize {
        let detail = format!("However, you sent {} messages.", messages.len());
        return Err(ApiError::context_length("messages", model.max_model_len, &detail));
    }
    let mut messages = convert(messages)?;
    if let Some(instructions) = instructions {
        instruct(&mut messages, instructions, model.system_role);
    }
    // Templates trim. Rendering, too, takes time that a hopeless text should not cost.
    let num_bytes = messages.iter().map(|message| message.content.trim().len()).sum();
    check_bytes(model, num_bytes, truncation, "messages")?;
    Ok(messages)
}

/// Refuses a list of token ids longer than the context before any of it is looked at.
pub(crate) fn check_num_tokens(model: &ServedModel, num_tokens: usize, param: &'static str) -> Result<(), ApiError> {
    if num_tokens <= model.max_model_len as usize {
        return Ok(());
    }
    let num_tokens = u32::try_from(num_tokens).unwrap_or(u32::MAX);
    Err(ApiError::too_long(param, model.max_model_len, num_tokens, None))
}

/// How a prompt ends, from the two flags that say so.
pub(crate) fn prompt_end(
    add_generation_prompt: Option<Flag>,
    continue_final: Option<Flag>,
) -> Result<PromptEnd, ApiError> {
    match (add_generation_prompt, continue_final) {
        (Some(Flag(true)), Some(Flag(true))) => Err(ApiError::invalid(
            "continue_final_message",
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        )),
        (_, Some(Flag(true))) => Ok(PromptEnd::FinalMessage),
        (Some(Flag(false)), _) => Ok(PromptEnd::LastTurn),
        _ => Ok(PromptEnd::GenerationPrompt),
    }
}

/// What is wrong with a client's own template is the client's mistake too.
fn client_template_error(error: &TemplateError) -> ApiError {
    let message = match error {
        TemplateError::Syntax { source } | TemplateError::Render { source } => {
            format!("{error}: {}.", shorten(&source.to_string()))
        }
        error => return template_error(error),
    };
    ApiError::invalid("chat_template", message)
}

fn template_error(error: &TemplateError) -> ApiError {
    match error {
        TemplateError::Conversation(refused) => {
            let param = refused
                .message_index()
                .map_or("messages".to_owned(), |index| format!("messages[{index}].role"));
            ApiError::invalid(param, format!("{error}."))
        }
        TemplateError::Raised { .. } | TemplateError::Rewritten | TemplateError::NothingToContinue => {
            ApiError::invalid("messages", format!("{error}."))
        }
        error => {
            tracing::error!(error = error as &dyn std::error::Error, "chat template failed");
            ApiError::Internal { is_deterministic: true }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::openai::types::TokenizeBody;

    fn is_long(body: &serde_json::Value) -> bool {
        let body: TokenizeBody = serde_json::from_str(&body.to_string()).unwrap();
        let chat = Chat {
            messages: body.messages,
            instructions: None,
            end: PromptEnd::default(),
            template: body.chat_template,
            variables: body.chat_template_kwargs,
            truncation: None,
        };
        chat.is_long()
    }

    #[test]
    fn whatever_makes_a_chat_long_is_counted() {
        let text = "a".repeat(MAX_INLINE_BYTES);
        let said = |content: serde_json::Value| json!({ "messages": [{ "role": "user", "content": content }] });
        let call = json!([{ "function": { "name": "f", "arguments": &text } }]);
        let with = |field: &str, value: serde_json::Value| {
            let mut body = said(json!("a"));
            body[field] = value;
            body
        };
        assert!(!is_long(&said(json!("a"))));
        assert!(is_long(&said(json!(text))));
        assert!(is_long(&said(json!([{ "text": text }]))));
        assert!(is_long(
            &json!({ "messages": [{ "role": "assistant", "tool_calls": call }] })
        ));
        assert!(is_long(
            &json!({ "messages": vec![json!({ "role": "user", "content": "" }); 100] })
        ));
        assert!(is_long(&with("chat_template_kwargs", json!({ "a": text }))));
        assert!(is_long(&with(
            "chat_template",
            json!("{% for i in range(9999) %}{% endfor %}")
        )));
    }
}
