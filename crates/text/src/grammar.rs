//! Grammars: which tokens may come next so that a text keeps to a JSON schema, a regular expression or a Lark grammar.
//!
//! A [`GrammarCompiler`] is built once for a tokenizer and a model's vocabulary; each text that is to be held to a grammar
//! gets a [`GrammarState`], which is told every token and names those that may follow. A stop token is among them exactly
//! where the text may end.

use std::fmt;
use std::sync::Arc;
use std::thread;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use thiserror::Error;
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie};

use crate::grammar_size;
use crate::thread_clock::ThreadClock;
use crate::tokenizer::Tokenizer;
use crate::tool_calls::{CallGrammar, OPENING, Otherwise};
use crate::warm_up::Walker;

/// Bytes of a JSON schema, or of a list of choices, at most.
pub const MAX_SCHEMA_BYTES: usize = 128 << 10;

/// Bytes of a Lark grammar at most. Unlike a schema it can say a lot in few bytes.
pub const MAX_LARK_BYTES: usize = 32 << 10;

/// Bytes of a regular expression at most: an automaton grows faster than its expression.
pub const MAX_REGEX_BYTES: usize = 8 << 10;

/// Brackets within brackets at most: compilers recurse.
const MAX_NESTING: usize = 100;

/// What building the lexer may cost: about 20 us for each 1000.
const INITIAL_LEXER_FUEL: u64 = 500_000;

/// What one mask may cost the lexer: about 70 us for each 1000.
const STEP_LEXER_FUEL: u64 = 50_000;

/// States of one text's lexer at most, at 1 to 2 KB each.
const MAX_LEXER_STATES: usize = 20_000;

/// Symbols of a compiled grammar at most.
const MAX_GRAMMAR_SIZE: usize = 200_000;

/// Stack of the thread that compiles. Rules that name rules that name rules take a frame each.
const COMPILER_STACK_BYTES: usize = 256 << 20;

/// Of the thread that compiles, where 0 is that of all others: a seventieth of what each of them gets on a busy core. At 10
/// it is a tenth, and a flood of grammars is felt in every stream; a policy that only takes what nobody wants (`SCHED_IDLE`)
/// never finishes where the CPU decodes.
const COMPILER_NICENESS: i32 = 19;

/// Bytes of a message that are passed on.
const MAX_REASON_BYTES: usize = 300;

/// White space between the tokens of JSON: a space, or a line feed and its indentation. Unbounded, a model could go on
/// with it for ever.
const JSON_WHITE_SPACE: &str = r"\x20|\n[\x20\t]{0,40}";

/// The formats of strings that are kept. Others are annotations, as JSON Schema has it.
const FORMATS: [&str; 10] = [
    "date-time",
    "time",
    "date",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
];

/// What a text must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema. Properties come in the schema's order.
    JsonSchema(Value),
    /// A match of this regular expression, from start to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this Lark grammar, whose rule `start` is the whole.
    Lark(String),
    /// Calls of functions.
    Calls(CallGrammar),
}

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// It takes too much to compile.
    #[error("the {what} has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// Grammar, schema or regular expression.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It takes too much to compile for what it says, however short.
    #[error("too many {what}: the limit is {limit}")]
    TooMany {
        /// Parts of a grammar.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// Its brackets are nested too deep.
    #[error("the grammar is nested deeper than {limit} levels")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// It contradicts itself, uses what is not supported, or takes too much to compile.
    #[error("{reason}")]
    Invalid {
        /// In the compiler's words.
        reason: String,
    },
    /// The text went where the grammar cannot follow: a token that was not allowed, or masks that take too much.
    #[error("the grammar cannot be followed any further: {reason}")]
    Lost {
        /// In the parser's words.
        reason: String,
    },
    /// The vocabulary cannot be indexed.
    #[error("the vocabulary cannot be used for grammars: {reason}")]
    Vocabulary {
        /// What is wrong with it.
        reason: String,
    },
}

/// Compiles grammars for one model.
pub struct GrammarCompiler {
    factory: ParserFactory,
    walker: Walker,
    vocab_size: usize,
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler")
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

impl GrammarCompiler {
    /// Indexes the vocabulary, which takes about a second for Gemma-2's 256,000 tokens.
    ///
    /// `vocab_size` is the model's; tokens that only the model has are never allowed. A text ends with one of
    /// `stop_token_ids`.
    ///
    /// # Errors
    /// [`GrammarError::Vocabulary`]: no stop token, or one outside of the vocabulary.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, stop_token_ids: &[u32]) -> Result<Self, GrammarError> {
        let vocabulary = |reason: String| GrammarError::Vocabulary { reason };
        let known = stop_token_ids.iter().all(|id| (*id as usize) < vocab_size);
        let (Some(&eos), true, Ok(num_words)) = (stop_token_ids.first(), known, u32::try_from(vocab_size)) else {
            return Err(vocabulary(format!(
                "stop tokens {stop_token_ids:?} of {vocab_size} tokens"
            )));
        };
        let words: Vec<Vec<u8>> = (0..num_words).map(|id| word(tokenizer, id)).collect();
        let walker = Walker::new(&words);
        let trie = TokTrie::from(&TokRxInfo::new(num_words, eos), &words).with_eos_tokens(stop_token_ids);
        // The model decides how it spells what the grammar forces: nothing is tokenised here.
        let env: Arc<dyn toktrie::TokenizerEnv + Sync> = Arc::new(ApproximateTokEnv::new(trie));
        // Without slices, a JSON string would walk all of the vocabulary for each token.
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| vocabulary(error.to_string()))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Self {
            factory,
            walker,
            vocab_size,
        })
    }

    /// Compiles a grammar, on a thread of its own for want of stack, and waits for it: milliseconds for what people write,
    /// a few seconds at most whatever they write.
    ///
    /// # Errors
    /// All but [`GrammarError::Lost`] and [`GrammarError::Vocabulary`].
    pub fn compile(&self, grammar: &Grammar) -> Result<GrammarState, GrammarError> {
        self.compile_timed(grammar, &ThreadClock::default())
    }

    /// [`Self::compile`] with a clock that shows meanwhile how long the compiler has computed.
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub fn compile_timed(&self, grammar: &Grammar, clock: &ThreadClock) -> Result<GrammarState, GrammarError> {
        let is_optional = matches!(grammar, Grammar::Calls(calls) if calls.otherwise == Otherwise::Text);
        let hold = if is_optional { Hold::Undecided(0) } else { Hold::Fast };
        thread::scope(|scope| {
            let build = || {
                yield_to_others();
                clock.time(|| self.build(source(grammar)?, hold))
            };
            let thread = thread::Builder::new().stack_size(COMPILER_STACK_BYTES);
            let thread = thread
                .spawn_scoped(scope, build)
                .map_err(|error| invalid(&error.to_string()))?;
            thread
                .join()
                .unwrap_or_else(|_panic| Err(invalid("the compiler panicked")))
        })
    }

    fn build(&self, source: TopLevelGrammar, hold: Hold) -> Result<GrammarState, GrammarError> {
        let mut matcher = Matcher::new(self.factory.create_parser(source));
        if let Some(reason) = matcher.get_error() {
            return Err(invalid(&reason));
        }
        // A grammar that allows nothing at all, or too much to keep track of, shows it here.
        matcher
            .compute_mask_or_eos()
            .map_err(|error| invalid(&error.to_string()))?;
        Ok(GrammarState {
            matcher: self.walker.warm_up(matcher),
            vocab_size: self.vocab_size,
            hold,
        })
    }
}

/// Where a text stands in its grammar.
pub struct GrammarState {
    matcher: Matcher,
    vocab_size: usize,
    hold: Hold,
}

/// Whether the text is held to the grammar at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Fast,
    /// It has begun like a call, with so many bytes of [`OPENING`].
    Undecided(usize),
    /// It is no call, and free.
    Released,
}

impl Hold {
    fn step(self, token: &[u8]) -> Self {
        let Self::Undecided(num_matched) = self else {
            return self;
        };
        let rest = &OPENING.as_bytes()[num_matched..];
        if token.starts_with(rest) {
            Self::Fast
        } else if rest.starts_with(token) {
            Self::Undecided(num_matched + token.len())
        } else {
            Self::Released
        }
    }
}

impl Clone for GrammarState {
    /// A state that goes on by itself, without locks in common.
    fn clone(&self) -> Self {
        Self {
            matcher: self.matcher.deep_clone(),
            vocab_size: self.vocab_size,
            hold: self.hold,
        }
    }
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarState")
            .field("stop_reason", &self.matcher.stop_reason())
            .finish_non_exhaustive()
    }
}

impl GrammarState {
    /// Takes in a token.
    ///
    /// # Errors
    /// [`GrammarError::Lost`]: it was not allowed.
    pub fn advance(&mut self, token: u32) -> Result<(), GrammarError> {
        if let Hold::Undecided(_) = self.hold {
            let env = self.matcher.tok_env().map_err(|error| lost(&error.to_string()))?;
            self.hold = self.hold.step(env.tok_trie().token(token));
        }
        if self.hold == Hold::Released {
            return Ok(());
        }
        self.matcher
            .consume_token(token)
            .map_err(|error| lost(&error.to_string()))
    }

    /// The tokens that may come next, `[ceil(vocab_size / 32)]`: bit `t % 32` of word `t / 32` stands for token `t`.
    /// `None`: anything, from now on.
    ///
    /// # Errors
    /// [`GrammarError::Lost`]: working it out takes too much.
    pub fn allowed_tokens(&mut self) -> Result<Option<Arc<[u32]>>, GrammarError> {
        if self.hold == Hold::Released {
            return Ok(None);
        }
        let mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|error| lost(&error.to_string()))?;
        let num_words = self.vocab_size.div_ceil(32);
        let mut words = mask.as_slice()[..num_words].to_vec();
        // What lies beyond the vocabulary in its last word is nobody's.
        let num_unused = num_words * 32 - self.vocab_size;
        if let Some(last) = words.last_mut() {
            *last &= u32::MAX >> num_unused;
        }
        Ok(Some(words.into()))
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> bool {
        self.hold == Hold::Released || self.matcher.is_stopped() || self.matcher.is_accepting().unwrap_or(false)
    }
}

/// What a token adds to a text: nothing for one that only the model knows, and no bytes that a grammar could ask for if it
/// is a control token.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    if tokenizer.is_control(id) {
        let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        word.extend(tokenizer.token_str(id).unwrap_or_default().bytes());
        return word;
    }
    tokenizer.token_bytes(id).unwrap_or_default()
}

/// Lowers this thread's priority, for good: while it compiles, others have tokens to compute.
fn yield_to_others() {
    // Where the system does not let it, grammars merely get a larger share of a busy machine.
    let _ = rustix::process::setpriority_process(None, COMPILER_NICENESS);
}

fn limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: INITIAL_LEXER_FUEL,
        step_lexer_fuel: STEP_LEXER_FUEL,
        max_lexer_states: MAX_LEXER_STATES,
        max_grammar_size: MAX_GRAMMAR_SIZE,
        // A client is told what is wrong, not the state of the parser.
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Checks what the compiler does not bound, and puts the grammar in its terms.
fn source(grammar: &Grammar) -> Result<TopLevelGrammar, GrammarError> {
    match grammar {
        Grammar::JsonObject => Ok(TopLevelGrammar::from_json_schema(with_options(
            json!({ "type": "object" }),
        )?)),
        Grammar::JsonSchema(schema) => {
            check_size("JSON schema", schema.to_string().len(), MAX_SCHEMA_BYTES)?;
            grammar_size::check_schemas([schema])?;
            Ok(TopLevelGrammar::from_json_schema(with_options(schema.clone())?))
        }
        Grammar::Regex(regex) => {
            check_size("regular expression", regex.len(), MAX_REGEX_BYTES)?;
            grammar_size::check_regex(regex)?;
            Ok(TopLevelGrammar::from_regex(regex))
        }
        Grammar::Choice(choices) => {
            if choices.is_empty() {
                return Err(invalid("there must be at least one choice"));
            }
            let alternatives: Vec<String> = choices
                .iter()
                .map(|choice| Value::from(choice.as_str()).to_string())
                .collect();
            let alternatives = alternatives.join(" | ");
            check_size("list of choices", alternatives.len(), MAX_SCHEMA_BYTES)?;
            Ok(TopLevelGrammar::from_lark(format!(
                "start: CHOICE\nCHOICE: {alternatives}"
            )))
        }
        Grammar::Lark(grammar) => {
            check_size("grammar", grammar.len(), MAX_LARK_BYTES)?;
            if lark_nesting(grammar) > MAX_NESTING {
                return Err(GrammarError::TooDeep { limit: MAX_NESTING });
            }
            grammar_size::check_lark(grammar)?;
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
        Grammar::Calls(calls) => {
            grammar_size::check_schemas(calls.schemas())?;
            let lark = calls.to_lark(with_options)?;
            check_size("list of functions", lark.len(), MAX_SCHEMA_BYTES)?;
            Ok(TopLevelGrammar::from_lark(lark))
        }
    }
}

/// A schema with the options it is compiled by. A client's own could undo what is promised.
fn with_options(schema: Value) -> Result<Value, GrammarError> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        schema @ Value::Object(_) => schema,
        _ => return Err(invalid("a JSON schema must be an object")),
    };
    drop_unknown_formats(&mut schema);
    schema["x-guidance"] = json!({ "whitespace_pattern": JSON_WHITE_SPACE });
    Ok(schema)
}

/// The compiler refuses formats that it does not know.
fn drop_unknown_formats(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(drop_unknown_formats),
        Value::Object(map) => {
            let is_unknown = |name: &str| !FORMATS.contains(&name);
            if map.get("format").and_then(Value::as_str).is_some_and(is_unknown) {
                map.shift_remove("format");
            }
            // Those hold values, not schemas.
            let schemas = map
                .iter_mut()
                .filter(|(key, _)| !matches!(key.as_str(), "enum" | "const" | "default" | "examples"));
            schemas.for_each(|(_, part)| drop_unknown_formats(part));
        }
        _ => {}
    }
}

fn check_size(what: &'static str, bytes: usize, limit: usize) -> Result<(), GrammarError> {
    if bytes <= limit {
        return Ok(());
    }
    Err(GrammarError::TooLarge { what, bytes, limit })
}

/// How deep the brackets of a Lark grammar are nested, outside of its strings and regular expressions.
fn lark_nesting(grammar: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut quote = None;
    let mut bytes = grammar.bytes();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (Some(_), b'\\') => {
                bytes.next();
            }
            // Neither spans lines: a slash that opens nothing must not hide what follows.
            (Some(_), b'\n') => quote = None,
            (Some(open), _) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'"' | b'/') => quote = Some(byte),
            (None, b'(' | b'[' | b'{') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (None, b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            (None, _) => {}
        }
    }
    deepest
}

fn invalid(reason: &str) -> GrammarError {
    GrammarError::Invalid { reason: clean(reason) }
}

fn lost(reason: &str) -> GrammarError {
    GrammarError::Lost { reason: clean(reason) }
}

/// The part of a message that its reader can use: neither dumps nor drawings.
fn clean(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default();
    if line.starts_with("panic: ") {
        return "it is not supported".to_owned();
    }
    let shortened = &line[..line.floor_char_boundary(MAX_REASON_BYTES)];
    let shortened = shortened.trim_end_matches(['.', ':']);
    // Where a drawing of a regular expression follows, the fault is named below it.
    match reason.lines().find(|line| line.starts_with("error: ")) {
        Some(fault) => format!("{shortened}: {}", &fault[..fault.floor_char_boundary(MAX_REASON_BYTES)]),
        None => shortened.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_in_strings_and_regular_expressions_are_not_nested() {
        assert_eq!(lark_nesting(r#"start: "((((" /[({]/ ("a" | ["b"])"#), 2);
        assert_eq!(lark_nesting(r#"start: "\"((" (("#), 2);
        assert_eq!(lark_nesting("start: / (\n((("), 3, "a lone slash ends with its line");
        assert_eq!(lark_nesting(&"(".repeat(5000)), 5000);
    }

    #[test]
    fn formats_that_nobody_knows_are_dropped() {
        let mut schema = json!({
            "properties": { "format": { "type": "string", "format": "password" }, "day": { "format": "date" } },
            "anyOf": [{ "format": "int32" }],
            "enum": [{ "format": "x" }],
        });
        drop_unknown_formats(&mut schema);
        let expected = json!({
            "properties": { "format": { "type": "string" }, "day": { "format": "date" } },
            "anyOf": [{}],
            "enum": [{ "format": "x" }],
        });
        assert_eq!(schema, expected);
    }

    #[test]
    fn messages_lose_dumps_and_excess() {
        assert_eq!(clean("no such rule.\n<state>\nx"), "no such rule");
        assert_eq!(clean("panic: index out of bounds\n<backtrace>"), "it is not supported");
        assert_eq!(clean(&"é".repeat(1000)).len(), MAX_REASON_BYTES);
    }
}
