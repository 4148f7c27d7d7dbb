//! References in JSON schemas: those that people send compile, those that multiply without end are refused.

use std::sync::LazyLock;

use lapidary_text::{CallGrammar, Function, Grammar, GrammarCompiler, GrammarError, Otherwise};
use serde_json::{Value, json};

use crate::TINY;

const EOS: u32 = 1;

static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(|| GrammarCompiler::new(&TINY, 801, &[EOS]).unwrap());

/// Whether `value` is what the schema describes.
fn takes(schema: &Value, value: &Value) -> bool {
    let compiled = COMPILER.compile(&Grammar::JsonSchema(schema.clone()));
    let mut state = compiled.unwrap_or_else(|error| panic!("{error}: {schema}"));
    for token in TINY.encode(&value.to_string(), false).unwrap() {
        let mask = state.allowed_tokens().unwrap().unwrap();
        if mask[token as usize / 32] >> (token % 32) & 1 == 0 {
            return false;
        }
        state.advance(token).unwrap();
    }
    state.may_end()
}

fn closed(properties: &Value) -> Value {
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    json!({ "type": "object", "required": required, "properties": properties, "additionalProperties": false })
}

fn reference(name: &str) -> Value {
    json!({ "$ref": format!("#/$defs/{name}") })
}

fn nullable(name: &str) -> Value {
    json!({ "anyOf": [reference(name), { "type": "null" }] })
}

#[test]
fn a_linked_list_compiles() {
    let mut list =
        closed(&json!({ "value": { "type": "integer" }, "next": { "anyOf": [{ "$ref": "#" }, { "type": "null" }] } }));
    assert!(takes(
        &list,
        &json!({ "value": 1, "next": { "value": 2, "next": null } })
    ));
    assert!(!takes(&list, &json!({ "value": 1, "next": 2 })));
    // What stands beside a reference to say what it is for is nothing that is asked of it.
    list["properties"]["next"]["description"] = json!("the rest");
    list["title"] = json!("List");
    assert!(takes(&list, &json!({ "value": 1, "next": null })));
}

#[test]
fn a_tree_that_inherits_compiles() {
    let schema = json!({
        "$ref": "#/$defs/node",
        "$defs": {
            "base": { "type": "object", "properties": { "id": { "type": "integer" } }, "required": ["id"] },
            "node": { "allOf": [reference("base"), {
                "properties": { "children": { "type": "array", "items": reference("node") }, "parent": nullable("node") },
                "required": ["children"],
            }] },
        },
    });
    assert!(takes(
        &schema,
        &json!({ "id": 1, "children": [{ "id": 2, "children": [] }] })
    ));
    assert!(!takes(&schema, &json!({ "id": 1, "children": [{ "id": 2 }] })));
}

#[test]
fn a_syntax_tree_compiles() {
    let mut definitions = json!({
        "expression": { "anyOf": [reference("literal"), reference("name"), reference("operation"), reference("call")] },
        "literal": { "anyOf": [{ "type": "number" }, { "type": "string" }, { "type": "boolean" }] },
        "name": closed(&json!({ "name": { "type": "string" } })),
        "operation": closed(&json!({ "operator": { "enum": ["+", "-"] }, "left": reference("expression"), "right": reference("expression") })),
        "call": closed(&json!({ "function": reference("expression"), "arguments": { "type": "array", "items": reference("expression") } })),
        "statement": { "anyOf": [reference("expression"), reference("block"), reference("branch"), reference("loop")] },
        "block": closed(&json!({ "body": { "type": "array", "items": reference("statement") } })),
        "branch": closed(&json!({ "test": reference("expression"), "then": reference("statement"), "else": nullable("statement") })),
    });
    definitions["loop"] = closed(&json!({ "while": reference("expression"), "do": reference("statement") }));
    // As many kinds as the syntax trees of large languages have.
    let kinds: Vec<Value> = (0..70)
        .map(|index| {
            let name = format!("kind{index}");
            definitions[&name] = closed(
                &json!({ "kind": { "const": name }, "of": nullable("statement"), "in": reference("expression") }),
            );
            reference(&name)
        })
        .collect();
    definitions["statement"]["anyOf"].as_array_mut().unwrap().extend(kinds);
    let schema = json!({ "$ref": "#/$defs/block", "$defs": definitions });
    let sum = json!({ "operator": "+", "left": { "name": "x" }, "right": 1 });
    let program = json!({ "body": [sum, { "test": true, "then": { "body": [] }, "else": { "kind": "kind7", "of": null, "in": sum } }] });
    assert!(takes(&schema, &program));
    assert!(!takes(
        &schema,
        &json!({ "body": [{ "kind": "kind70", "of": null, "in": 1 }] })
    ));
}

#[test]
fn alternatives_beside_what_they_have_in_common_compile() {
    let definition = |index: usize| {
        let fields = json!({ "kind": { "const": format!("k{index}") }, "size": { "type": "integer" } });
        (
            format!("d{index}"),
            json!({ "type": "object", "properties": fields, "required": ["kind"] }),
        )
    };
    let common: Value = (0..25)
        .map(|index| (format!("c{index}"), json!({ "type": "string" })))
        .collect();
    let schema = json!({
        "type": "object",
        "properties": common,
        "oneOf": (0..40).map(|index| reference(&format!("d{index}"))).collect::<Vec<_>>(),
        "$defs": (0..40).map(definition).collect::<Value>(),
    });
    COMPILER.compile(&Grammar::JsonSchema(schema)).unwrap();
}

#[test]
fn references_that_nothing_is_asked_of_may_double_for_ever() {
    let mut definitions = json!({ "d60": closed(&json!({ "x": { "type": "integer" } })) });
    for index in 0..60 {
        let next = reference(&format!("d{}", index + 1));
        definitions[format!("d{index}")] = json!({ "anyOf": [next, next] });
    }
    let schema = json!({ "$ref": "#/$defs/d0", "$defs": definitions });
    assert!(takes(&schema, &json!({ "x": 1 })));
}

#[test]
fn what_multiplies_is_refused_before_it_is_compiled() {
    for (name, grammar) in crate::hostile::multiplying() {
        let error = COMPILER.compile(&grammar).expect_err(name);
        let is_refused = matches!(error, GrammarError::TooMany { .. } | GrammarError::TooDeep { .. });
        assert!(is_refused, "{name}: {error}");
    }
}

#[test]
fn the_functions_of_a_request_may_not_grow_together_beyond_what_one_may() {
    let calls = |num_functions: usize| {
        let function = |index| Function {
            name: format!("f{index}"),
            description: None,
            parameters: crate::hostile::doubling_references(6),
        };
        Grammar::Calls(CallGrammar {
            functions: (0..num_functions).map(function).collect(),
            is_parallel: false,
            otherwise: Otherwise::Never,
        })
    };
    assert!(COMPILER.compile(&calls(4)).is_ok());
    let error = COMPILER.compile(&calls(100)).unwrap_err();
    assert!(matches!(error, GrammarError::TooMany { .. }), "{error}");
}
