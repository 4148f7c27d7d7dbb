//! The prompt of a chat.

use super::prompt::{Chat, encode_chat, prompt_end};
use super::types::{ChatMessage, Content, GenerationBody};
use super::{Params, Prompts};
use crate::error::ApiError;
use crate::lenient::{Flag, Object};
use crate::state::{AppState, ServedModel};

/// Renders and tokenises the messages.
pub(super) async fn prompts(
    state: &AppState,
    model: &ServedModel,
    body: GenerationBody,
    params: &Params,
    instructions: Option<String>,
) -> Result<Prompts, ApiError> {
    let wants_echo = body.echo.is_some_and(|Flag(echo)| echo);
    let echoes = body
        .messages
        .iter()
        .filter(|_| wants_echo)
        .filter_map(|messages| echo_of(messages));
    let echoes = echoes.collect();
    let chat = Chat {
        end: prompt_end(body.add_generation_prompt, body.continue_final_message)?,
        messages: body.messages,
        instructions,
        template: body.chat_template,
        variables: body.chat_template_kwargs,
        truncation: params.truncation,
    };
    Ok(Prompts {
        tokens: vec![encode_chat(state, model, chat).await?],
        echoes,
    })
}

/// An answer repeats what the assistant has said already, if that is what comes last.
fn echo_of(messages: &[Object<ChatMessage>]) -> Option<String> {
    let Object(last) = messages.last()?;
    match &last.content {
        Some(Content::Text(text)) if last.role.as_deref() == Some("assistant") => Some(text.clone()),
        _ => None,
    }
}
