//! The prompt of a chat.

use super::Prompts;
use super::prompt::{Source, encode, prompt_end, render};
use super::tools::Tools;
use super::types::GenerationBody;
use crate::error::ApiError;
use crate::state::{AppState, ServedModel};

/// Renders and tokenises the messages.
pub(super) async fn prompts(
    state: &AppState,
    model: &ServedModel,
    body: GenerationBody,
    tools: Option<&Tools>,
) -> Result<Prompts, ApiError> {
    let end = prompt_end(body.add_generation_prompt, body.continue_final_message)?;
    let instructions = tools.map(|tools| tools.calls.instructions());
    let rendered = render(model, body.messages, instructions, end)?;
    let tokens = encode(state, model, vec![Source::Chat(rendered)], "messages").await?;
    Ok(Prompts {
        tokens,
        echoes: Vec::new(),
    })
}
