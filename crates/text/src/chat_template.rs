//! The checkpoint's chat template: messages to prompt text.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value, context};
use serde::Deserialize as _;
use thiserror::Error;

use crate::conversation::{ConversationError, Message, Role, SystemRole, TemplateAbilities, Turn, prepare};
use crate::rendered::{ControlTexts, Placeholders, Rendered};
use crate::template_functions::{self, Raised};
use crate::tokenizer::Tokenizer;
use crate::tokenizer_config::{TemplateField, TokenizerConfig};

/// The name the template has in its own error messages.
const TEMPLATE_NAME: &str = "chat_template";

/// Instructions that a client's own template may take to render: tens of milliseconds. Gemma's takes 40 a message.
const CLIENT_FUEL: u64 = 2_000_000;

/// Values that a client gives to a template beside the conversation, by name.
pub type TemplateVariables = serde_json::Map<String, serde_json::Value>;

/// Why a template cannot be loaded or a chat not be rendered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// A file is unreadable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// `tokenizer_config.json` is not JSON of the expected shape.
    #[error("cannot parse tokenizer_config.json")]
    Config {
        /// Where and why.
        source: serde_json::Error,
    },
    /// There are named templates, but none is named `default`.
    #[error("none of the chat templates is named \"default\"")]
    NoDefault,
    /// The template is not valid Jinja.
    #[error("the chat template is not valid")]
    Syntax {
        /// Where and why.
        source: minijinja::Error,
    },
    /// The control tokens cannot be searched for.
    #[error("cannot build the search for control tokens")]
    ControlSearch {
        /// What the library said.
        source: aho_corasick::BuildError,
    },
    /// The conversation is refused: the client's mistake.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// The template refused the conversation with `raise_exception`: the client's mistake, in the template's words.
    #[error("{message}")]
    Raised {
        /// The template's message.
        message: String,
    },
    /// The template failed: its own mistake, or a construct that is not supported.
    #[error("the chat template failed")]
    Render {
        /// Where and why.
        source: minijinja::Error,
    },
    /// The template changed the text of messages so that control tokens in it can no longer be told from real ones.
    #[error("the chat template rewrites message text that contains special tokens")]
    Rewritten,
    /// The template leaves out the last message, so that it cannot be continued.
    #[error("the chat template does not show the final message, which was to be continued")]
    NothingToContinue,
}

/// How the prompt ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptEnd {
    /// After the last message's turn (`add_generation_prompt` false).
    LastTurn,
    /// With the opening of the assistant's turn (`add_generation_prompt` true, the API's default).
    #[default]
    GenerationPrompt,
    /// Inside the last message, without its end marker, so that the model goes on with it (`continue_final_message`).
    FinalMessage,
}

/// A compiled template and what it is fed beside the messages.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
    control: ControlTexts,
    specials: SpecialTexts,
    system_role: SystemRole,
    abilities: TemplateAbilities,
}

/// The texts that transformers gives to templates; empty where the tokenizer has none.
#[derive(Debug)]
struct SpecialTexts {
    bos: String,
    eos: String,
    pad: String,
    unk: String,
}

impl SpecialTexts {
    fn new(tokenizer: &Tokenizer) -> Self {
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_str(id)).unwrap_or_default().to_owned();
        Self {
            bos: text(tokenizer.bos_id()),
            eos: text(tokenizer.eos_id()),
            pad: text(tokenizer.pad_id()),
            unk: text(tokenizer.unk_id()),
        }
    }
}

impl ChatTemplate {
    /// Loads a checkpoint's template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`.
    ///
    /// `None` if there is neither, as in base models.
    ///
    /// # Errors
    /// Files that cannot be read, and what [`ChatTemplate::new`] refuses.
    pub fn load(dir: &Path, tokenizer: &Tokenizer, system_role: SystemRole) -> Result<Option<Self>, TemplateError> {
        if let Some(source) = read_if_exists(dir.join("chat_template.jinja"))? {
            return Self::new(&source, tokenizer, system_role).map(Some);
        }
        match read_if_exists(dir.join("tokenizer_config.json"))? {
            Some(config) => Self::from_config(config.as_bytes(), tokenizer, system_role),
            None => Ok(None),
        }
    }

    /// Loads the template in the contents of a `tokenizer_config.json`; `None` if it has none.
    ///
    /// # Errors
    /// As [`ChatTemplate::load`].
    pub fn from_config(
        config: &[u8],
        tokenizer: &Tokenizer,
        system_role: SystemRole,
    ) -> Result<Option<Self>, TemplateError> {
        let config: TokenizerConfig =
            serde_json::from_slice(config).map_err(|source| TemplateError::Config { source })?;
        let source = match config.chat_template {
            None => return Ok(None),
            Some(TemplateField::One(source)) => source,
            Some(TemplateField::Named(templates)) => {
                let default = templates.into_iter().find(|named| named.name == "default");
                default.ok_or(TemplateError::NoDefault)?.template
            }
        };
        Self::new(&source, tokenizer, system_role).map(Some)
    }

    /// Compiles a template from its text.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] if it is not valid Jinja.
    pub fn new(source: &str, tokenizer: &Tokenizer, system_role: SystemRole) -> Result<Self, TemplateError> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut env = Environment::new();
        env.set_syntax(syntax.map_err(|source| TemplateError::Syntax { source })?);
        template_functions::install(&mut env);
        let control = ControlTexts::new(tokenizer.control_texts().map(str::to_owned).collect())
            .map_err(|source| TemplateError::ControlSearch { source })?;
        let specials = SpecialTexts::new(tokenizer);
        let mut template = Self {
            env,
            source: String::new(),
            control,
            specials,
            system_role,
            abilities: TemplateAbilities {
                system: false,
                repeats: false,
            },
        };
        template.install(source)?;
        Ok(template)
    }

    fn install(&mut self, source: &str) -> Result<(), TemplateError> {
        self.env
            .add_template_owned(TEMPLATE_NAME, template_functions::without_generation_tags(source))
            .map_err(|source| TemplateError::Syntax { source })?;
        source.clone_into(&mut self.source);
        self.abilities = self.find_abilities();
        Ok(())
    }

    /// Compiles a template that came with a request: it may use only so much time.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn from_client(source: &str, tokenizer: &Tokenizer, system_role: SystemRole) -> Result<Self, TemplateError> {
        let mut template = Self::new("", tokenizer, system_role)?;
        template.env.set_fuel(Some(CLIENT_FUEL));
        template.install(source)?;
        Ok(template)
    }

    /// Names that are the template's own: what a client gives for them has no effect.
    pub const RESERVED_VARIABLES: [&str; 8] = [
        "messages",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "tools",
        "documents",
    ];

    /// The template's text as it was loaded.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// Takes some 10 us and time linear in the text.
    ///
    /// # Errors
    /// [`TemplateError::Conversation`] and [`TemplateError::Raised`] are the client's mistakes; the rest are the
    /// template's.
    pub fn render(&self, messages: &[Message], end: PromptEnd) -> Result<Rendered, TemplateError> {
        self.render_with(messages, end, &TemplateVariables::new())
    }

    /// Renders a conversation with variables of the client's. As in messages, special tokens in them are plain text.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        end: PromptEnd,
        variables: &TemplateVariables,
    ) -> Result<Rendered, TemplateError> {
        let mut turns = prepare(messages, self.system_role, self.abilities)?;
        let is_repaired = !turns
            .iter()
            .map(|turn| &turn.content)
            .eq(messages.iter().map(|message| &message.content));
        let placeholders = Placeholders::new(&self.control, &turns, variables);
        let variables = serde_json::Value::Object(placeholders.hide_in(variables));
        let variables = Value::deserialize(variables).expect("a template knows everything that JSON does");
        for turn in &mut turns {
            turn.content = placeholders.hide(&turn.content);
        }
        let hidden = match end {
            PromptEnd::LastTurn => self.render_turns(&turns, false, variables)?,
            PromptEnd::GenerationPrompt => self.render_turns(&turns, true, variables)?,
            PromptEnd::FinalMessage => self.render_open(turns, &placeholders.mark(), variables)?,
        };
        let rendered = placeholders.reveal(&hidden).ok_or(TemplateError::Rewritten)?;
        Ok(rendered.with_repaired(is_repaired))
    }

    /// Renders up to the end of the last content, which `mark` finds again.
    fn render_open(&self, mut turns: Vec<Turn>, mark: &str, variables: Value) -> Result<String, TemplateError> {
        let Some(last) = turns.last_mut() else {
            return Err(ConversationError::NoMessages.into());
        };
        let trailing_spaces = match last.content.trim_end() {
            "" => String::new(),
            kept => last.content[kept.len()..].to_owned(),
        };
        // The space after the mark tells whether the template trims: if so, it would have trimmed the content too.
        last.content.push_str(mark);
        last.content.push(' ');
        let text = self.render_turns(&turns, false, variables)?;
        let (before, after) = text.rsplit_once(mark).ok_or(TemplateError::NothingToContinue)?;
        let is_trimmed = !after.starts_with(' ');
        Ok(if is_trimmed {
            before.strip_suffix(&trailing_spaces).unwrap_or(before)
        } else {
            before
        }
        .to_owned())
    }

    fn render_turns(
        &self,
        turns: &[Turn],
        add_generation_prompt: bool,
        variables: Value,
    ) -> Result<String, TemplateError> {
        let template = self
            .env
            .get_template(TEMPLATE_NAME)
            .map_err(|source| TemplateError::Syntax { source })?;
        let messages: Vec<_> = turns
            .iter()
            .map(|turn| context! { role => turn.role.name(), content => turn.content.as_str() })
            .collect();
        let context = context! {
            messages,
            add_generation_prompt,
            bos_token => self.specials.bos.as_str(),
            eos_token => self.specials.eos.as_str(),
            pad_token => self.specials.pad.as_str(),
            unk_token => self.specials.unk.as_str(),
            tools => (),
            documents => (),
            ..variables
        };
        template
            .render(context)
            .map_err(|source| match raised_message(&source) {
                Some(message) => TemplateError::Raised { message },
                None => TemplateError::Render { source },
            })
    }

    /// Tries what the plain Gemma-2 template refuses.
    fn find_abilities(&self) -> TemplateAbilities {
        let probe = |role, content: &str| Turn {
            role,
            content: content.to_owned(),
        };
        let shows = |turns: &[Turn]| {
            let text = self.render_turns(turns, true, Value::default()).unwrap_or_default();
            turns.iter().all(|turn| text.contains(&turn.content))
        };
        let system = [probe(Role::System, "instruction"), probe(Role::User, "question")];
        let repeats = [probe(Role::User, "first"), probe(Role::User, "second")];
        TemplateAbilities {
            system: shows(&system),
            repeats: shows(&repeats),
        }
    }
}

fn read_if_exists(path: PathBuf) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TemplateError::Read { path, source }),
    }
}

fn raised_message(error: &minijinja::Error) -> Option<String> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref::<Raised>() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}
