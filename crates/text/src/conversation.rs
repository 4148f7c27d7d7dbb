//! Roles, and the repair of conversations for templates that insist on user and assistant in turn.

use thiserror::Error;

/// What separates texts that share a turn, as in Gemma 3's own template.
const SEPARATOR: &str = "\n\n";

/// One message of a conversation as a client sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `developer`, `user` or `assistant`; anything else is refused when the chat is rendered.
    pub role: String,
    /// The text; empty where the client sent null.
    pub content: String,
    /// Its place among those that the client sent, where that is not its place here: errors name it.
    pub index: Option<usize>,
}

impl Message {
    /// A message with plain text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            index: None,
        }
    }

    /// A message of several text parts, joined with line feeds.
    pub fn from_parts<S: AsRef<str>>(role: impl Into<String>, parts: &[S]) -> Self {
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        Self::new(role, parts.join("\n"))
    }
}

/// What to do with conversations that the template has no form for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SystemRole {
    /// Put system text before the user text that follows it, and join neighbours of one role.
    #[default]
    Merge,
    /// Refuse system messages, and let the template judge the rest.
    Error,
}

/// Why a conversation is refused before the template sees it.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConversationError {
    /// There is nothing to answer.
    #[error("messages must not be empty")]
    NoMessages,
    /// The role has no turn in the template. Roles are never passed on unchecked: they could carry turn markers.
    #[error("messages[{index}].role {role:?} is not supported: it must be one of system, developer, user, assistant")]
    UnknownRole {
        /// Which message.
        index: usize,
        /// Its role, shortened.
        role: String,
    },
    /// The template has no system turn and merging is off.
    #[error("messages[{index}].role {role:?} is not supported by this model's chat template")]
    SystemNotSupported {
        /// Which message.
        index: usize,
        /// `system` or `developer`.
        role: &'static str,
    },
}

impl ConversationError {
    /// The message at fault, if it is one.
    pub fn message_index(&self) -> Option<usize> {
        match self {
            Self::NoMessages => None,
            Self::UnknownRole { index, .. } | Self::SystemNotSupported { index, .. } => Some(*index),
        }
    }
}

/// A checked role. `developer` is OpenAI's newer name for `system`, and no template knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    /// The name that Hugging Face templates compare with.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// What the template is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Turn {
    pub(crate) role: Role,
    pub(crate) content: String,
}

/// Which conversations a template accepts, found by trying it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TemplateAbilities {
    /// A system message may come first.
    pub(crate) system: bool,
    /// Two messages of one role may follow each other.
    pub(crate) repeats: bool,
}

/// Checks the roles and fits the conversation to what the template accepts. No text is ever dropped.
pub(crate) fn prepare(
    messages: &[Message],
    policy: SystemRole,
    abilities: TemplateAbilities,
) -> Result<Vec<Turn>, ConversationError> {
    if messages.is_empty() {
        return Err(ConversationError::NoMessages);
    }
    let turns = messages
        .iter()
        .enumerate()
        .map(|(index, message)| check(index, message, policy, abilities));
    let turns = turns.collect::<Result<Vec<_>, _>>()?;
    match policy {
        SystemRole::Merge if !(abilities.system && abilities.repeats) => Ok(repair(turns, abilities)),
        SystemRole::Merge | SystemRole::Error => Ok(turns),
    }
}

fn check(
    index: usize,
    message: &Message,
    policy: SystemRole,
    abilities: TemplateAbilities,
) -> Result<Turn, ConversationError> {
    let index = message.index.unwrap_or(index);
    let refuse_system = policy == SystemRole::Error && !abilities.system;
    let role = match message.role.as_str() {
        "system" if refuse_system => return Err(ConversationError::SystemNotSupported { index, role: "system" }),
        "developer" if refuse_system => {
            return Err(ConversationError::SystemNotSupported {
                index,
                role: "developer",
            });
        }
        "system" | "developer" => Role::System,
        "user" => Role::User,
        // Gemma's own name for it, which some clients have learned from the template.
        "assistant" | "model" => Role::Assistant,
        other => {
            return Err(ConversationError::UnknownRole {
                index,
                role: other.chars().take(32).collect(),
            });
        }
    };
    Ok(Turn {
        role,
        content: message.content.clone(),
    })
}

/// Makes user and assistant alternate, beginning with user; one system turn may lead if the template has it.
fn repair(turns: Vec<Turn>, abilities: TemplateAbilities) -> Vec<Turn> {
    let mut repaired: Vec<Turn> = Vec::with_capacity(turns.len() + 1);
    let mut turns = turns.into_iter().peekable();
    if abilities.system {
        let leading: Vec<Turn> = std::iter::from_fn(|| turns.next_if(|turn| turn.role == Role::System)).collect();
        for turn in leading {
            append(&mut repaired, turn);
        }
    }
    for turn in turns {
        match turn.role {
            // In the order it was written: a user turn takes it up, whichever comes next.
            Role::System => append(
                &mut repaired,
                Turn {
                    role: Role::User,
                    content: turn.content,
                },
            ),
            Role::User => append(&mut repaired, turn),
            Role::Assistant => {
                // The template counts on a user turn first; an empty one puts no words into anyone's mouth.
                if repaired.last().is_none_or(|last| last.role == Role::System) {
                    repaired.push(Turn {
                        role: Role::User,
                        content: String::new(),
                    });
                }
                append(&mut repaired, turn);
            }
        }
    }
    repaired
}

/// Adds a turn, or its text to the last turn if that has the same role.
fn append(turns: &mut Vec<Turn>, turn: Turn) {
    match turns.last_mut() {
        Some(last) if last.role == turn.role => {
            if !last.content.is_empty() && !turn.content.is_empty() {
                last.content.push_str(SEPARATOR);
            }
            last.content.push_str(&turn.content);
        }
        _ => turns.push(turn),
    }
}
