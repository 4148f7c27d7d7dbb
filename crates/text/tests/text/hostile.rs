//! Grammars that are written to take a server down.

use lapidary_text::Grammar;
use serde_json::{Map, Value, json};

pub(crate) fn grammars() -> Vec<(&'static str, Grammar)> {
    let regex = |name, regex: String| (name, Grammar::Regex(regex));
    let schema = |name, schema: Value| (name, Grammar::JsonSchema(schema));
    let lark = |name, grammar: String| (name, Grammar::Lark(grammar));
    let mut all = vec![
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
    ];
    all.extend(multiplying());
    all
}

/// Schemas that say little and stand for a lot: the compiler puts schemas together, and opens references for that.
pub(crate) fn multiplying() -> Vec<(&'static str, Grammar)> {
    let schema = |name, schema: Value| (name, Grammar::JsonSchema(schema));
    let with = |definitions: Map<String, Value>, parts: Value| json!({ "allOf": parts, "$defs": definitions });
    let both = json!([definition("a", 0), definition("b", 0)]);
    let large = json!({ "type": "object", "properties": properties(300) });
    let anything: Map<String, Value> = (0..900).map(|n| (format!("p{n}"), json!({}))).collect();
    let within = product(3, 7).to_string();
    vec![
        schema("doubling references", doubling_references(12)),
        schema("references that double without end", doubling_references(60)),
        schema(
            "doubling references beside a type",
            json!({ "type": "object", "$ref": "#/$defs/a0", "$defs": doubling_definitions("a", 12) }),
        ),
        schema(
            "doubling references beside a large object",
            with(doubling_definitions("a", 5), json!([definition("a", 0), large])),
        ),
        schema(
            "objects whose properties double",
            with(
                [doubling_properties("a", 12), doubling_properties("b", 12)]
                    .into_iter()
                    .flatten()
                    .collect(),
                both.clone(),
            ),
        ),
        schema(
            "a tree that is another tree too",
            with(
                ["a", "b"]
                    .iter()
                    .map(|name| (format!("{name}0"), twice(&definition(name, 0))))
                    .collect(),
                both,
            ),
        ),
        schema("a product behind references", product_of_references(3, 16)),
        schema(
            "a product within a property",
            json!({ "type": "array", "items": { "allOf": [
            { "properties": { "x": product_of_references(1, 40)["$defs"]["f0"] } },
            { "properties": { "x": product(1, 40) } },
        ] } }),
        ),
        schema("alternatives behind alternatives", alternatives(5, 200)),
        schema(
            "choices of choices",
            json!({ "allOf": [{ "enum": words(200) }, { "enum": words(200) }] }),
        ),
        schema(
            "many large objects",
            json!({ "properties": (0..8).map(|n| (format!("o{n}"), json!({ "properties": anything }))).collect::<Value>() }),
        ),
        schema(
            "patterns of names",
            json!({ "patternProperties": (0..400).map(|n| (format!("^a{n}$"), json!({}))).collect::<Map<_, _>>() }),
        ),
        (
            "a schema within a grammar",
            Grammar::Lark(format!("start: \"x\" form\nform: %json {within}\n")),
        ),
        (
            "remainders within a grammar",
            Grammar::Lark("start: %json {\"multipleOf\": 999999}".to_owned()),
        ),
    ]
}

/// A chain of `length` definitions, each of them one of two references to the next, of which one thing more is asked.
pub(crate) fn doubling_references(length: usize) -> Value {
    json!({ "allOf": [definition("a", 0), { "type": "object" }], "$defs": doubling_definitions("a", length) })
}

fn definition(name: &str, n: usize) -> Value {
    json!({ "$ref": format!("#/$defs/{name}{n}") })
}

fn doubling_definitions(name: &str, length: usize) -> Map<String, Value> {
    let link = |n: usize| {
        let next = definition(name, n + 1);
        (format!("{name}{n}"), json!({ "anyOf": [next, next] }))
    };
    let last = json!({ "type": "object", "properties": properties(1) });
    (0..length)
        .map(link)
        .chain([(format!("{name}{length}"), last)])
        .collect()
}

fn doubling_properties(name: &str, length: usize) -> Map<String, Value> {
    let link = |n: usize| (format!("{name}{n}"), twice(&definition(name, n + 1)));
    let last = (format!("{name}{length}"), json!({ "type": "string" }));
    (0..length).map(link).chain([last]).collect()
}

/// An object with two properties that are `part`.
fn twice(part: &Value) -> Value {
    json!({ "type": "object", "properties": { "left": part, "right": part } })
}

fn product_of_references(factors: usize, terms: usize) -> Value {
    let product = product(factors, terms);
    let factor = |factor: usize| (format!("f{factor}"), product["allOf"][factor].clone());
    let references: Vec<Value> = (0..factors).map(|factor| definition("f", factor)).collect();
    json!({ "allOf": references, "$defs": (0..factors).map(factor).collect::<Map<_, _>>() })
}

fn alternatives(groups: usize, each: usize) -> Value {
    let object = |n: usize| json!({ "type": "object", "properties": { format!("p{n}"): { "type": "string" } } });
    let group = |group: usize| {
        let objects: Vec<Value> = (group * each..(group + 1) * each).map(object).collect();
        (format!("g{group}"), json!({ "anyOf": objects }))
    };
    let references: Vec<Value> = (0..groups).map(|group| definition("g", group)).collect();
    json!({ "anyOf": references, "$defs": (0..groups).map(group).collect::<Map<_, _>>() })
}

fn words(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("word {n}")).collect()
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
