//! Grammars: whatever a sampler draws from their masks is a text they describe.

use std::sync::LazyLock;

use lapidary_text::{
    CallEvent, CallGrammar, CallReader, Function, Grammar, GrammarCompiler, GrammarError, GrammarState, Otherwise,
};
use serde_json::{Value, json};

use crate::schemas::{Random, random_schema, validate};
use crate::{TINY, id};

const EOS: u32 = 1;
const END_OF_TURN: u32 = 107;

/// The model's vocabulary is larger than the tokenizer's and no multiple of 32.
const VOCAB_SIZE: usize = 801;

static COMPILER: LazyLock<GrammarCompiler> =
    LazyLock::new(|| GrammarCompiler::new(&TINY, VOCAB_SIZE, &[EOS, END_OF_TURN]).unwrap());

fn compile(grammar: &Grammar) -> GrammarState {
    COMPILER.compile(grammar).unwrap()
}

fn regex(regex: &str) -> Grammar {
    Grammar::Regex(regex.to_owned())
}

fn lark(grammar: &str) -> Grammar {
    Grammar::Lark(grammar.to_owned())
}

fn allowed(state: &mut GrammarState) -> Vec<u32> {
    let mask = state
        .allowed_tokens()
        .unwrap()
        .expect("the text is held to the grammar");
    assert_eq!(mask.len(), VOCAB_SIZE.div_ceil(32));
    let bits = |(&word, index): (&u32, u32)| {
        (0..32)
            .filter(move |bit| word >> bit & 1 == 1)
            .map(move |bit| index * 32 + bit)
    };
    let allowed: Vec<u32> = mask.iter().zip(0_u32..).flat_map(bits).collect();
    assert!(
        allowed.iter().all(|id| (*id as usize) < TINY.vocab_size()),
        "{allowed:?}"
    );
    allowed
}

/// Draws a text; `None` if it did not end. Once it is long, tokens that close something are preferred.
fn draw(mut state: GrammarState, random: &mut Random) -> Option<String> {
    let closing: Vec<u32> = ["\"", "]", "}", ",", ":"].map(id).to_vec();
    let mut tokens = Vec::new();
    for step in 0..600 {
        let allowed = allowed(&mut state);
        let may_end = allowed.contains(&EOS);
        assert_eq!(may_end, allowed.contains(&END_OF_TURN), "stop tokens are all alike");
        assert_eq!(may_end, state.may_end());
        if may_end && (allowed.len() == 2 || step > 60 || random.below(3) == 0) {
            return Some(TINY.decode(&tokens, false));
        }
        let candidates: Vec<u32> = allowed
            .iter()
            .copied()
            .filter(|id| ![EOS, END_OF_TURN].contains(id))
            .collect();
        let closes: Vec<u32> = closing.iter().copied().filter(|id| candidates.contains(id)).collect();
        let token = match closes.as_slice() {
            // The first that closes, so that nothing is opened anew.
            [first, ..] if step > 60 => *first,
            closes if !closes.is_empty() && random.below(3) > 0 => closes[random.below(closes.len())],
            _ => candidates[random.below(candidates.len())],
        };
        state.advance(token).unwrap();
        tokens.push(token);
    }
    None
}

#[test]
fn answers_to_a_thousand_random_schemas_are_valid() {
    let mut num_finished = 0;
    for seed in 0..1000 {
        let mut random = Random::new(seed);
        let schema = random_schema(&mut random);
        let state = match COMPILER.compile(&Grammar::JsonSchema(schema.clone())) {
            Ok(state) => state,
            Err(error) => panic!("seed {seed}: {error}: {schema}"),
        };
        let Some(text) = draw(state, &mut random) else { continue };
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("seed {seed}: {error}: {text}"));
        if let Err(fault) = validate(&schema, &value) {
            panic!("seed {seed}: {fault}\nschema: {schema}\nanswer: {text}");
        }
        num_finished += 1;
    }
    assert!(num_finished >= 950, "only {num_finished} of 1000 texts ended");
}

#[test]
fn an_object_is_any_object_and_nothing_else() {
    for seed in 0..50 {
        let text = draw(compile(&Grammar::JsonObject), &mut Random::new(seed));
        if let Some(text) = text {
            assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
        }
    }
}

#[test]
fn a_regular_expression_is_matched_from_start_to_end() {
    for pattern in [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        r"(yes|no|maybe)!?",
        r"[a-c]+@[a-z]{2,5}\.(com|org)",
        r"東京+|größe",
        r"/path/[a-z]+",
        "a\\\\b\\nc",
    ] {
        let full = ::regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
        for seed in 0..20 {
            let text = draw(compile(&regex(pattern)), &mut Random::new(seed)).expect("these end");
            assert!(full.is_match(&text), "{text:?} does not match {pattern}");
        }
    }
}

#[test]
fn a_text_may_end_exactly_where_it_is_complete() {
    let mut state = compile(&regex("ab?c?"));
    for (next, is_complete) in [("a", false), ("c", true)] {
        assert_eq!(state.may_end(), is_complete);
        assert_eq!(allowed(&mut state).contains(&END_OF_TURN), is_complete);
        state.advance(id(next)).unwrap();
    }
    assert_eq!(allowed(&mut state), [EOS, END_OF_TURN], "nothing can follow");
    assert!(state.may_end());
}

#[test]
fn one_of_the_choices_is_taken() {
    let choices = ["yes", "no", "yes and no", "\"quoted\" \\ \n", "größe", "a|b", "東"];
    let grammar = Grammar::Choice(choices.map(str::to_owned).to_vec());
    let mut seen = Vec::new();
    for seed in 0..100 {
        let text = draw(compile(&grammar), &mut Random::new(seed)).expect("choices end");
        assert!(choices.contains(&text.as_str()), "{text:?}");
        seen.push(text);
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() >= 5, "{seen:?}");
}

#[test]
fn a_lark_grammar_is_followed() {
    let grammar = lark("start: expr\nexpr: NUM (\"+\" NUM)*\nNUM: /[0-9]{1,3}/\n");
    for seed in 0..20 {
        let text = draw(compile(&grammar), &mut Random::new(seed)).expect("sums end");
        assert!(text.split('+').all(|number| number.parse::<u32>().is_ok()), "{text}");
    }
}

#[test]
fn properties_come_in_the_schemas_order_and_white_space_is_bounded() {
    let schema = json!({
        "type": "object",
        "properties": { "b": { "type": "integer" }, "a": { "type": "integer" } },
        "required": ["b", "a"],
        "additionalProperties": false,
        // A client's own options do not count.
        "x-guidance": { "whitespace_pattern": "x*" },
    });
    let mut state = compile(&Grammar::JsonSchema(schema));
    for token in ["{", "\"", "b", "\"", ":", "▁"] {
        state.advance(id(token)).unwrap();
    }
    assert!(!allowed(&mut state).contains(&id("▁")), "one space is enough");
    assert!(!allowed(&mut state).contains(&id("x")));
    for token in ["1", ",", "\n", "▁▁▁▁", "\""] {
        state.advance(id(token)).unwrap();
    }
    assert!(allowed(&mut state).contains(&id("a")));
    assert!(!allowed(&mut state).contains(&id("b")));
}

#[test]
fn control_tokens_are_no_text() {
    for grammar in [regex("(?s:.*)"), Grammar::JsonSchema(json!({ "type": "string" }))] {
        let mut state = compile(&grammar);
        if grammar != regex("(?s:.*)") {
            state.advance(id("\"")).unwrap();
        }
        let allowed = allowed(&mut state);
        for control in ["<bos>", "<pad>", "<start_of_turn>"] {
            assert!(!allowed.contains(&id(control)), "{control}");
        }
        assert!(allowed.contains(&id("a")) && allowed.contains(&id("<unused7>")));
    }
}

#[test]
fn states_go_on_by_themselves() {
    let mut first = compile(&regex("abc|xyz"));
    let mut second = first.clone();
    first.advance(id("a")).unwrap();
    second.advance(id("x")).unwrap();
    assert!(allowed(&mut first).contains(&id("b")) && !allowed(&mut first).contains(&id("y")));
    assert!(allowed(&mut second).contains(&id("y")) && !allowed(&mut second).contains(&id("b")));
    let error = first.advance(id("y")).unwrap_err();
    assert!(matches!(error, GrammarError::Lost { .. }), "{error}");
    assert!(first.allowed_tokens().is_err(), "a lost state stays lost");
}

#[test]
fn what_cannot_be_compiled_says_why() {
    let schema = Grammar::JsonSchema;
    let cases = [
        (regex("("), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"[^\s\S]"), "NoExtension"),
        (regex(&"a".repeat(1 << 20)), "1048576 bytes, the limit is 8192"),
        (schema(json!({ "type": "strin" })), "Invalid type: strin"),
        (schema(json!({ "not": { "type": "string" } })), "\"not\""),
        (
            schema(json!({ "$ref": "http://example.com/x.json" })),
            "http://example.com/x.json",
        ),
        (schema(json!({ "$ref": "#/$defs/no" })), "no"),
        (schema(json!("string")), "must be an object"),
        (schema(json!({ "$ref": "#" })), "NoExtension"),
        (lark("root ::= \"a\""), "Expected token"),
        (lark("start: missing"), "missing"),
        (lark("foo: \"a\""), "no start rule"),
        (Grammar::Choice(Vec::new()), "at least one choice"),
    ];
    for (grammar, expected) in cases {
        let error = COMPILER.compile(&grammar).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.len() < 700 && !error.contains('\n'), "{error}");
    }
    let error = GrammarCompiler::new(&TINY, VOCAB_SIZE, &[]).unwrap_err();
    assert!(matches!(error, GrammarError::Vocabulary { .. }));
}

/// Some compile, most do not; none may take a process down, or a mask for ever.
#[test]
fn hostile_grammars_end() {
    for (name, grammar) in crate::hostile::grammars() {
        let Ok(mut state) = COMPILER.compile(&grammar) else {
            continue;
        };
        let mut random = Random::new(7);
        for _ in 0..40 {
            let Ok(Some(mask)) = state.allowed_tokens() else { break };
            let allowed: Vec<u32> = (0..VOCAB_SIZE as u32)
                .filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1)
                .collect();
            assert!(!allowed.is_empty(), "{name}");
            let token = allowed[random.below(allowed.len())];
            if [EOS, END_OF_TURN].contains(&token) || state.advance(token).is_err() {
                break;
            }
        }
    }
}

fn weather(otherwise: Otherwise, is_parallel: bool) -> CallGrammar {
    let function = |name: &str, parameters: Value| Function {
        name: name.to_owned(),
        description: None,
        parameters,
    };
    let units = json!({ "enum": ["C", "F"] });
    let parameters = json!({ "type": "object", "properties": { "unit": { "$ref": "#/$defs/u" } }, "required": ["unit"],
                             "additionalProperties": false, "$defs": { "u": units } });
    CallGrammar {
        functions: vec![
            function("get_weather", parameters),
            function(
                "now",
                json!({ "type": "object", "properties": {}, "additionalProperties": false }),
            ),
        ],
        is_parallel,
        otherwise,
    }
}

fn read_calls(text: &str) -> Vec<(String, Value)> {
    let (mut reader, mut events) = (CallReader::default(), Vec::new());
    reader.push(text, &mut events);
    reader.finish(&mut events);
    let mut calls = Vec::new();
    for event in events {
        match event {
            CallEvent::Call(name) => calls.push((name, Value::Null)),
            CallEvent::Arguments(arguments) => calls.last_mut().unwrap().1 = serde_json::from_str(&arguments).unwrap(),
            CallEvent::Text(text) => panic!("text: {text}"),
        }
    }
    calls
}

#[test]
fn forced_calls_are_calls_of_what_there_is() {
    let mut numbers = Vec::new();
    for seed in 0..60 {
        let is_parallel = seed % 2 == 0;
        let state = compile(&Grammar::Calls(weather(Otherwise::Never, is_parallel)));
        let Some(text) = draw(state, &mut Random::new(seed)) else {
            continue;
        };
        let calls = read_calls(&text);
        assert!(!calls.is_empty() && (is_parallel || calls.len() == 1), "{text}");
        for (name, arguments) in &calls {
            match name.as_str() {
                "get_weather" => assert!(
                    [json!({ "unit": "C" }), json!({ "unit": "F" })].contains(arguments),
                    "{text}"
                ),
                "now" => assert_eq!(*arguments, json!({})),
                other => panic!("no function {other}"),
            }
        }
        numbers.push(calls.len());
    }
    assert!(
        numbers.len() > 30 && numbers.iter().any(|number| *number > 1),
        "{numbers:?}"
    );
}

#[test]
fn a_text_that_begins_otherwise_is_free_and_a_call_is_not() {
    let push = |state: &mut GrammarState, text: &str| {
        for token in TINY.encode(text, false).unwrap() {
            if let Some(mask) = state.allowed_tokens().unwrap() {
                assert!(
                    mask[token as usize / 32] >> (token % 32) & 1 == 1,
                    "{:?} in {text:?}",
                    TINY.token_str(token)
                );
            }
            state.advance(token).unwrap();
        }
    };
    let calls = Grammar::Calls(weather(Otherwise::Text, true));
    for text in ["hello", "<tool", "<b>x", "<tool_calls>", "\n<tool_call>", "東"] {
        let mut state = compile(&calls);
        assert!(state.may_end(), "an answer may be empty");
        push(&mut state, text);
        assert!(state.may_end(), "{text}");
        assert_eq!(state.allowed_tokens().unwrap().is_none(), text != "<tool", "{text}");
    }
    let mut state = compile(&calls);
    push(&mut state, "<tool_call>");
    assert!(!state.may_end());
    assert!(!allowed(&mut state).contains(&id("x")));
    push(&mut state, "\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>");
    assert!(state.may_end());
    let mut state = compile(&Grammar::Calls(weather(Otherwise::Json(json!({ "const": "x" })), true)));
    assert!(!state.may_end() && !allowed(&mut state).contains(&id("h")));
    push(&mut state, "\"x\"");
    assert_eq!(allowed(&mut state), [EOS, END_OF_TURN]);
}
