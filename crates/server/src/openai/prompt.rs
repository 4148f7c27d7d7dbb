//! Texts and chats to token ids, off the async threads where that takes long.

use std::sync::Arc;

use lapidary_engine::TokenId;
use lapidary_text::{ChatTemplate, PromptEnd, Rendered, TemplateError, Tokenizer, TokenizerError};

use super::messages::{convert, instruct};
use super::types::ChatMessage;
use crate::error::ApiError;
use crate::lenient::{Flag, Object};
use crate::state::{AppState, ServedModel};

/// Texts up to this many bytes are tokenised where they are: at 0.25 us a byte they hold up other requests for half a
/// millisecond at most, and a hop to another thread costs a tenth of that.
const MAX_INLINE_BYTES: usize = 2048;

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

    fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
        match self {
            Self::Text { text, add_bos } => tokenizer.encode(text, *add_bos),
            Self::Chat(rendered) => tokenizer.encode_rendered(rendered),
        }
    }
}

/// Tokenises, in order. A text that cannot fit the context however it is tokenised is refused unread.
pub(crate) async fn encode(
    state: &AppState,
    model: &ServedModel,
    sources: Vec<Source>,
    param: &'static str,
) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let mut num_bytes = 0;
    for source in &sources {
        check_bytes(model, source.text().len(), param)?;
        num_bytes += source.text().len();
    }
    let tokenizer = Arc::clone(&model.tokenizer);
    let work = move || {
        let encoded = sources.iter().map(|source| source.encode(&tokenizer).map(Arc::from));
        encoded.collect::<Result<Vec<_>, _>>()
    };
    state
        .compute(num_bytes > MAX_INLINE_BYTES, work)
        .await?
        .map_err(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "text could not be tokenised");
            ApiError::invalid(param, "The text cannot be tokenised.")
        })
}

/// Refuses a text of so many bytes if no tokenisation of it fits.
fn check_bytes(model: &ServedModel, num_bytes: usize, param: &'static str) -> Result<(), ApiError> {
    let at_least = model.tokenizer.min_num_tokens(num_bytes);
    if at_least <= model.max_model_len as usize {
        return Ok(());
    }
    let detail = format!(
        "However, your prompt contains at least {at_least} input tokens. Please reduce the length of the input prompt."
    );
    Err(ApiError::context_length(param, model.max_model_len, &detail))
}

/// Renders a chat with the model's template; `instructions` go in front of it.
pub(crate) fn render(
    model: &ServedModel,
    messages: Option<Vec<Object<ChatMessage>>>,
    instructions: Option<String>,
    end: PromptEnd,
) -> Result<Rendered, ApiError> {
    let template: &ChatTemplate = model.chat_template.as_deref().ok_or_else(|| {
        let message = "This model has no chat template; use /v1/completions.";
        ApiError::InvalidRequest {
            message: message.to_owned(),
            param: None,
            code: Some("no_chat_template"),
        }
    })?;
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
    check_bytes(model, num_bytes, "messages")?;
    template.render(&messages, end).map_err(|error| template_error(&error))
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
