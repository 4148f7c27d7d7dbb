//! Grammars that are written to take a server down.

use lapidary_text::Grammar;
use serde_json::{Map, Value, json};

pub(crate) fn grammars() -> Vec<(&'static str, Grammar)> {
    let regex = |name, regex: String| (name, Grammar::Regex(regex));
    let schema = |name, schema: Value| (name, Grammar::JsonSchema(schema));
    let lark = |name, grammar: String| (name, Grammar::Lark(grammar));
    vec![
        regex("a megabyte", "a".repeat(1 << 20)),
        regex("optionals", "a?b?".repeat(2000)),
        regex("groups in groups", format!("{}a{}", "(".repeat(4000), ")".repeat(4000))),
        regex("alternatives that overlap", "(a|aa)+b".repeat(900)),
        regex("repetitions in repetitions", "((a{1,100}){1,100}){1,100}".to_owned()),
        regex(
            "more of them",
            "(((((a{1,1000}){1,1000}){1,1000}){1,1000})b?){1,1000}".to_owned(),
        ),
        regex("an exponential automaton", "[ab]*a[ab]{200}".to_owned()),
        regex("letters of all scripts", r"(\p{L}{1,50}|\w{1,80}){1,50}".to_owned()),
        schema(
            "arrays in arrays",
            (0..120).fold(json!({}), |inner, _| json!({ "type": "array", "items": inner })),
        ),
        schema("a product of alternatives", product(10, 10)),
        schema("a small product", product(7, 3)),
        schema("a chain of references", chain(1000)),
        schema(
            "a circle",
            json!({ "$ref": "#/$defs/a", "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } } }),
        ),
        schema("itself", json!({ "allOf": [{ "$ref": "#" }, { "type": "object" }] })),
        schema(
            "without an end",
            json!({ "type": "object", "properties": { "a": { "$ref": "#" } }, "required": ["a"], "additionalProperties": false }),
        ),
        schema(
            "a long array",
            json!({ "type": "array", "minItems": 1_000_000, "items": { "type": "integer" } }),
        ),
        schema("a long string", json!({ "type": "string", "minLength": 1_000_000_000 })),
        schema(
            "many optional properties",
            json!({ "type": "object", "properties": properties(3000) }),
        ),
        schema("many remainders", json!({ "type": "integer", "multipleOf": 999_999 })),
        schema("a large prime", json!({ "type": "integer", "multipleOf": 982_451_653 })),
        schema(
            "a pattern",
            json!({ "type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$", "maxLength": 200 }),
        ),
        lark(
            "brackets",
            format!("start: {}\"a\"{}", "(".repeat(15_000), ")".repeat(15_000)),
        ),
        lark("a chain of rules", rules(2500)),
        lark("doubling terminals", doubling("T", 60)),
        lark("doubling rules", doubling("r", 60)),
        lark("left recursion", "start: start start | \"a\" |".to_owned()),
        lark(
            "intersections",
            "start: A\nA: /([ab]*a[ab]{30})/ & /([ab]*b[ab]{29})/ & /[ab]{40}/".to_owned(),
        ),
        (
            "many choices",
            Grammar::Choice((0..8000).map(|n| format!("number {n}")).collect()),
        ),
    ]
}

fn product(factors: usize, terms: usize) -> Value {
    let term =
        |factor, term| json!({ "type": "object", "properties": { format!("p{factor}_{term}"): { "type": "string" } } });
    let factor = |factor| json!({ "anyOf": (0..terms).map(|n| term(factor, n)).collect::<Vec<_>>() });
    json!({ "allOf": (0..factors).map(factor).collect::<Vec<_>>() })
}

fn chain(length: usize) -> Value {
    let link = |n: usize| {
        let next = format!("#/$defs/d{}", n + 1);
        let link = json!({ "type": "object", "properties": { "a": { "$ref": next } }, "required": ["a"], "additionalProperties": false });
        (format!("d{n}"), link)
    };
    let mut definitions: Map<String, Value> = (0..length).map(link).collect();
    definitions.insert(format!("d{length}"), json!({ "type": "string" }));
    json!({ "$ref": "#/$defs/d0", "$defs": definitions })
}

fn properties(count: usize) -> Map<String, Value> {
    (0..count)
        .map(|n| (format!("p{n}"), json!({ "type": "string" })))
        .collect()
}

fn rules(length: usize) -> String {
    let links: String = (0..length).map(|n| format!("r{n}: r{}\n", n + 1)).collect();
    format!("start: r0\n{links}r{length}: \"x\"\n")
}

fn doubling(name: &str, length: usize) -> String {
    let links: String = (0..length)
        .map(|n| format!("{name}{n}: {name}{} {name}{}\n", n + 1, n + 1))
        .collect();
    format!("start: {name}0\n{links}{name}{length}: \"x\"\n")
}
