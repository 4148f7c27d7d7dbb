//! Function calls for a model that has no form of its own for them.
//!
//! What the prompt says about functions, what an answer that calls some looks like, and reading such an answer as it
//! comes. Gemma-2 was trained on no such form; this is the most common one among models that were:
//!
//! ```text
//! <tool_call>
//! {"name": "get_weather", "arguments": {"city": "Paris"}}
//! </tool_call>
//! ```

use std::fmt::Write;

use serde_json::{Value, json};

/// What an answer that calls functions begins with. A text that begins otherwise is just text.
pub(crate) const OPENING: &str = "<tool_call>";

const BEFORE_NAME: &str = "<tool_call>\n{\"name\": ";
const BEFORE_ARGUMENTS: &str = ", \"arguments\": ";
const AFTER_ARGUMENTS: &str = "}\n</tool_call>";

/// Calls in one answer at most: a model gone astray could call for ever.
const MAX_CALLS: usize = 16;

/// A function that an answer may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// Letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON schema of its arguments: an object's.
    pub parameters: Value,
}

/// What an answer may be beside calls.
#[derive(Debug, Clone, PartialEq)]
pub enum Otherwise {
    /// It must be calls.
    Never,
    /// Any text that does not begin like a call.
    Text,
    /// JSON of this schema.
    Json(Value),
}

/// Answers that call functions.
#[derive(Debug, Clone, PartialEq)]
pub struct CallGrammar {
    /// Those that may be called, at least one.
    pub functions: Vec<Function>,
    /// Whether an answer may have several calls.
    pub is_parallel: bool,
    /// What else it may be.
    pub otherwise: Otherwise,
}

impl CallGrammar {
    /// The same without the functions' schemas: any object is taken for arguments.
    #[must_use]
    pub fn without_schemas(&self) -> Self {
        let mut lenient = self.clone();
        for function in &mut lenient.functions {
            function.parameters = json!({ "type": "object" });
        }
        lenient
    }

    /// All schemas in it.
    pub(crate) fn schemas(&self) -> impl Iterator<Item = &Value> {
        let form = match &self.otherwise {
            Otherwise::Json(schema) => Some(schema),
            Otherwise::Never | Otherwise::Text => None,
        };
        self.functions.iter().map(|function| &function.parameters).chain(form)
    }

    /// In Lark; `prepare` adds what a schema is compiled with.
    pub(crate) fn to_lark<E>(&self, mut prepare: impl FnMut(Value) -> Result<Value, E>) -> Result<String, E> {
        let mut lark = String::new();
        let mut line = |line: std::fmt::Arguments<'_>| writeln!(lark, "{line}").expect("strings grow");
        match &self.otherwise {
            Otherwise::Never => line(format_args!("start: calls")),
            Otherwise::Text => {
                line(format_args!("start: (calls | TEXT)?"));
                line(format_args!("TEXT: /{}/", not_beginning_with(OPENING)));
            }
            Otherwise::Json(schema) => {
                line(format_args!("start: calls | form"));
                line(format_args!("form: %json {}", prepare(schema.clone())?));
            }
        }
        match self.is_parallel {
            true => line(format_args!("calls: call (\"\\n\" call){{0,{}}}", MAX_CALLS - 1)),
            false => line(format_args!("calls: call")),
        }
        let names: Vec<String> = (0..self.functions.len()).map(|index| format!("call_{index}")).collect();
        line(format_args!("call: {}", names.join(" | ")));
        for (function, rule) in self.functions.iter().zip(&names) {
            let name = Value::from(function.name.as_str());
            let before = Value::from(format!("{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}"));
            line(format_args!(
                "{rule}: {before} arguments_{rule} {}",
                Value::from(AFTER_ARGUMENTS)
            ));
            line(format_args!(
                "arguments_{rule}: %json {}",
                prepare(function.parameters.clone())?
            ));
        }
        Ok(lark)
    }

    /// What the prompt says about the functions: it belongs in front of the conversation.
    #[must_use]
    pub fn instructions(&self) -> String {
        let mut text = String::from("You can call functions. They are described here, one a line:\n");
        for function in &self.functions {
            let mut described = json!({ "name": function.name });
            if let Some(description) = &function.description {
                described["description"] = json!(description);
            }
            described["parameters"] = function.parameters.clone();
            writeln!(text, "{described}").expect("strings grow");
        }
        let when = match self.otherwise {
            Otherwise::Never => "Answer with",
            Otherwise::Text | Otherwise::Json(_) => "If one of them helps, answer with nothing but",
        };
        let several = if self.is_parallel {
            " Several calls follow each other."
        } else {
            ""
        };
        write!(
            text,
            "{when} a call of this form:\n{}\n{several}",
            call("name of the function", "{arguments as JSON}")
        )
        .expect("strings grow");
        let end = text.trim_end().len();
        text.truncate(end);
        text
    }
}

/// A call as an answer has it.
#[must_use]
pub fn call(name: &str, arguments: &str) -> String {
    let name = Value::from(name);
    format!("{BEFORE_NAME}{name}{BEFORE_ARGUMENTS}{arguments}{AFTER_ARGUMENTS}")
}

/// What a function gave back, as the next turn has it.
#[must_use]
pub fn result(name: Option<&str>, content: &str) -> String {
    let name = name
        .map(|name| format!(" name={}", Value::from(name)))
        .unwrap_or_default();
    format!("<tool_response{name}>\n{content}\n</tool_response>")
}

/// A regular expression for texts of one character or more that do not begin with `prefix`; a beginning of it will do.
fn not_beginning_with(prefix: &str) -> String {
    prefix.chars().rev().fold(String::new(), |rest, character| {
        let rest = if rest.is_empty() {
            rest
        } else {
            format!("|{character}({rest})?")
        };
        format!("[^{character}](?s:.*){rest}")
    })
}

/// What a piece of an answer adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallEvent {
    /// Text that calls nothing.
    Text(String),
    /// A call begins: the function's name.
    Call(String),
    /// More of the arguments of the call that began last.
    Arguments(String),
}

/// Reads an answer as it comes: calls, or text.
#[derive(Debug, Clone, Default)]
pub struct CallReader {
    state: ReaderState,
    /// Not understood yet.
    pending: String,
    num_calls: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ReaderState {
    /// It may still begin like a call.
    #[default]
    Start,
    Text,
    /// Before or within what comes before a call's arguments.
    Head,
    /// Within a call's arguments.
    Arguments(Json),
}

/// How far a JSON object is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Json {
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl Json {
    /// Whether `byte` ends the object.
    fn step(&mut self, byte: u8) -> bool {
        if self.is_in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.is_in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.is_in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

impl CallReader {
    /// Calls that began so far.
    #[must_use]
    pub fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Takes a piece of the answer in.
    pub fn push(&mut self, text: &str, events: &mut Vec<CallEvent>) {
        self.pending.push_str(text);
        while self.advance(events) {}
    }

    /// Ends the answer: what was held back is text after all, unless it belongs to a call that was cut off.
    pub fn finish(&mut self, events: &mut Vec<CallEvent>) {
        let rest = std::mem::take(&mut self.pending);
        if self.state == ReaderState::Start && !rest.is_empty() {
            events.push(CallEvent::Text(rest));
        }
    }

    /// Whether there may be more to understand.
    fn advance(&mut self, events: &mut Vec<CallEvent>) -> bool {
        match self.state {
            ReaderState::Start if self.pending.starts_with(OPENING) => self.state = ReaderState::Head,
            ReaderState::Start if OPENING.starts_with(self.pending.as_str()) => return false,
            ReaderState::Start => self.state = ReaderState::Text,
            ReaderState::Text => {
                if !self.pending.is_empty() {
                    events.push(CallEvent::Text(std::mem::take(&mut self.pending)));
                }
                return false;
            }
            ReaderState::Head => return self.read_head(events),
            ReaderState::Arguments(json) => return self.read_arguments(json, events),
        }
        true
    }

    fn read_head(&mut self, events: &mut Vec<CallEvent>) -> bool {
        let Some((head, rest)) = self.pending.split_once(BEFORE_ARGUMENTS) else {
            return false;
        };
        let name = head.split_once(BEFORE_NAME).map_or("", |(_, name)| name);
        let name = serde_json::from_str(name).unwrap_or_else(|_| name.to_owned());
        let rest = rest.to_owned();
        events.push(CallEvent::Call(name));
        self.num_calls += 1;
        self.pending = rest;
        self.state = ReaderState::Arguments(Json::default());
        true
    }

    fn read_arguments(&mut self, mut json: Json, events: &mut Vec<CallEvent>) -> bool {
        let end = self.pending.bytes().position(|byte| json.step(byte));
        let length = end.map_or(self.pending.len(), |last| last + 1);
        if length > 0 {
            events.push(CallEvent::Arguments(self.pending.drain(..length).collect()));
        }
        self.state = match end {
            Some(_) => ReaderState::Head,
            None => ReaderState::Arguments(json),
        };
        end.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grammar(otherwise: Otherwise) -> CallGrammar {
        let function = |name: &str| Function {
            name: name.to_owned(),
            description: Some("Says hello.".to_owned()),
            parameters: json!({ "type": "object" }),
        };
        CallGrammar {
            functions: vec![function("hello"), function("bye")],
            is_parallel: true,
            otherwise,
        }
    }

    /// Name and arguments of each call, and the text, however the answer is cut.
    fn read(answer: &str, piece: usize) -> (Vec<(String, String)>, String) {
        let (mut reader, mut events) = (CallReader::default(), Vec::new());
        let characters: Vec<char> = answer.chars().collect();
        for piece in characters.chunks(piece) {
            reader.push(&piece.iter().collect::<String>(), &mut events);
        }
        reader.finish(&mut events);
        let (mut calls, mut text) = (Vec::<(String, String)>::new(), String::new());
        for event in events {
            match event {
                CallEvent::Text(more) => text.push_str(&more),
                CallEvent::Call(name) => calls.push((name, String::new())),
                CallEvent::Arguments(more) => calls.last_mut().expect("a call began").1.push_str(&more),
            }
        }
        assert_eq!(calls.len(), reader.num_calls());
        (calls, text)
    }

    #[test]
    fn what_was_written_is_read_however_it_is_cut() {
        let arguments = r#"{"a": {"b": ["}", "\"]", "é\\"]}, "c": 1}"#;
        let answer = format!("{}\n{}", call("hello", arguments), call("bye.2", "{}"));
        for piece in 1..=answer.len() {
            let (calls, text) = read(&answer, piece);
            let expected = [("hello", arguments), ("bye.2", "{}")];
            assert_eq!(
                calls,
                expected.map(|(name, arguments)| (name.to_owned(), arguments.to_owned()))
            );
            assert_eq!(text, "");
        }
    }

    #[test]
    fn what_does_not_begin_like_a_call_is_text() {
        for text in [
            "hello",
            "<tool",
            "<tool_calls>",
            " <tool_call>\n{",
            "<",
            "",
            "x<tool_call>\n{\"name\": \"f\", \"arguments\": {}",
        ] {
            for piece in 1..=text.len().max(1) {
                assert_eq!(read(text, piece), (Vec::new(), text.to_owned()), "{text:?}");
            }
        }
    }

    #[test]
    fn a_call_that_is_cut_off_keeps_what_it_had() {
        let answer = call("hello", r#"{"city": "Paris"}"#);
        assert_eq!(read(&answer[..20], 3), (Vec::new(), String::new()));
        let (calls, _) = read(&answer[..answer.len() - 20], 3);
        assert_eq!(calls[0].0, "hello");
        assert!(r#"{"city": "Paris"}"#.starts_with(&calls[0].1));
    }

    #[test]
    fn instructions_name_every_function_and_the_form() {
        let text = grammar(Otherwise::Text).instructions();
        assert!(
            text.contains(
                "\n{\"name\":\"hello\",\"description\":\"Says hello.\",\"parameters\":{\"type\":\"object\"}}\n"
            )
        );
        assert!(
            text.contains("{\"name\":\"bye\"") && text.contains("<tool_call>\n{\"name\": "),
            "{text}"
        );
        assert!(
            text.contains("If one of them helps") && text.ends_with("Several calls follow each other."),
            "{text}"
        );
        assert!(grammar(Otherwise::Never).instructions().contains("Answer with a call"));
    }

    #[test]
    fn results_name_their_function() {
        assert_eq!(
            result(Some("f"), "12 C"),
            "<tool_response name=\"f\">\n12 C\n</tool_response>"
        );
        assert_eq!(result(None, "x"), "<tool_response>\nx\n</tool_response>");
    }
}
