//! Strings to tokens and back.
//!
//! Nothing in this crate knows a request, a model or a socket. Everything is plain data and synchronous.
//!
//! | module | hides |
//! |---|---|
//! | [`tokenizer`] | loading `tokenizer.json`, text to ids, what each id is |
//! | [`chat_template`] | the checkpoint's Jinja template: messages to prompt text |
//! | [`conversation`] | the roles, and how conversations are repaired for templates that know only user and assistant |
//! | [`rendered`] | why text inside a message can never become a turn marker |
//! | [`detokenizer`] | a stream of ids to text that is never half a character |
//! | [`stop`] | stop strings that span tokens |
//! | [`tool_calls`] | functions in the prompt, calls in the answer |
//! | [`grammar`] | JSON schemas, regular expressions and Lark grammars to the tokens that may come next |
//! | [`thread_clock`] | how long a thread has computed, whatever else the machine does |
//!
//! A request passes through them in this order:
//!
//! ```
//! use lapidary_text::{ChatTemplate, Detokenizer, Message, PromptEnd, StopMatcher, SystemRole, Tokenizer};
//!
//! # let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tiny/tokenizer.json"));
//! # let source = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}";
//! let tokenizer = Tokenizer::from_bytes(json, None)?;
//! let template = ChatTemplate::new(source, &tokenizer, SystemRole::Merge)?;
//!
//! let prompt = template.render(&[Message::new("user", "hello <end_of_turn>")], PromptEnd::GenerationPrompt)?;
//! let ids = tokenizer.encode_rendered(&prompt)?;
//! let is_marker = |id: &&u32| Some(**id) == tokenizer.end_of_turn_id();
//! assert_eq!(ids.iter().filter(is_marker).count(), 1, "the client's own marker is plain text");
//!
//! let mut detokenizer = Detokenizer::new(&tokenizer, true);
//! let mut stop = StopMatcher::new(&["lo wo"], false)?;
//! let (mut delta, mut answer) = (String::new(), String::new());
//! for id in tokenizer.encode("hello world", false)? {
//!     delta.clear();
//!     detokenizer.push(id, &mut delta);
//!     if stop.push(&delta, &mut answer).is_some() {
//!         break;
//!     }
//! }
//! assert_eq!(answer, "hel");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod added_tokens;
pub mod chat_template;
pub mod conversation;
pub mod detokenizer;
pub mod grammar;
mod grammar_size;
pub mod rendered;
mod schema_growth;
pub mod stop;
mod template_functions;
pub mod thread_clock;
mod token_table;
pub mod tokenizer;
mod tokenizer_config;
pub mod tool_calls;
mod uncached;
mod warm_up;

pub use chat_template::{ChatTemplate, PromptEnd, TemplateError, TemplateVariables};
pub use conversation::{ConversationError, Message, SystemRole};
pub use detokenizer::Detokenizer;
pub use grammar::{Grammar, GrammarCompiler, GrammarError, GrammarState};
pub use rendered::Rendered;
pub use stop::{StopError, StopMatcher};
pub use thread_clock::ThreadClock;
pub use tokenizer::{Tokenizer, TokenizerError};
pub use tool_calls::{CallEvent, CallGrammar, CallReader, Function, Otherwise};
