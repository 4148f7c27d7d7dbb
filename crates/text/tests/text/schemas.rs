//! Random JSON schemas of the kind people send, and a validator for them that knows nothing of grammars.

use regex::Regex;
use serde_json::{Map, Value, json};

/// Splitmix64: the same numbers for the same seed, for ever.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % bound as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

const NAMES: [&str; 12] = [
    "name",
    "age",
    "tags",
    "address",
    "kind",
    "first name",
    "größe",
    "x",
    "id",
    "created_at",
    "items",
    "$note",
];
const WORDS: [&str; 8] = [
    "person",
    "company",
    "other",
    "a \"quoted\" word",
    "наука",
    "",
    "line\nfeed",
    "back\\slash",
];
const PATTERNS: [&str; 6] = [
    "^[0-9]{5}$",
    "^[A-Z]{2}-[0-9]+$",
    "^(red|green|blue)$",
    "^[a-z]+(_[a-z]+)*$",
    "^$|^x+$",
    "^#[0-9a-f]{6}$",
];
/// Formats and what their texts look like.
const FORMATS: [(&str, &str); 6] = [
    ("date", r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"),
    (
        "time",
        r"^([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$",
    ),
    (
        "date-time",
        r"^[0-9]{4}-[01][0-9]-[0-3][0-9][tT][0-2][0-9]:[0-5][0-9]:[0-6][0-9](\.[0-9]+)?([zZ]|[+-][0-2][0-9]:[0-5][0-9])$",
    ),
    ("uuid", r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"),
    ("ipv4", r"^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(\.|$)){4}$"),
    ("email", r"^[^@\s]+@[^@\s]+$"),
];

/// An object at the top, as OpenAI demands, with definitions that its parts refer to.
pub(crate) fn random_schema(random: &mut Random) -> Value {
    let mut schema = object(random, 3);
    schema["$defs"] = json!({
        "point": { "type": "object", "properties": { "x": { "type": "number" }, "y": { "type": "integer" } },
                   "required": ["x", "y"], "additionalProperties": false },
        "tree": { "type": "object", "properties": { "label": { "type": "string", "maxLength": 10 },
                  "children": { "type": "array", "items": { "$ref": "#/$defs/tree" }, "maxItems": 2 } },
                  "required": ["label"], "additionalProperties": false },
    });
    schema
}

fn object(random: &mut Random, depth: usize) -> Value {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for _ in 0..1 + random.below(4) {
        let name = *random.pick(&NAMES);
        if properties.insert(name.to_owned(), value(random, depth - 1)).is_none() && random.chance(70) {
            required.push(name);
        }
    }
    let mut object = json!({ "type": "object", "properties": properties, "required": required });
    if random.chance(85) {
        object["additionalProperties"] = json!(false);
    }
    object
}

fn value(random: &mut Random, depth: usize) -> Value {
    let num_kinds = if depth == 0 { 8 } else { 12 };
    match random.below(num_kinds) {
        0 | 1 => string(random),
        2 => integer(random),
        3 => number(random),
        4 => json!({ "type": "boolean" }),
        5 => {
            let mut words: Vec<Value> = (0..1 + random.below(4)).map(|_| json!(random.pick(&WORDS))).collect();
            words.dedup();
            if random.chance(30) {
                words.extend([json!(7), json!(null)]);
            }
            json!({ "enum": words })
        }
        6 => json!({ "const": random.pick(&WORDS) }),
        7 => json!({ "$ref": random.pick(&["#/$defs/point", "#/$defs/tree"]) }),
        8 | 9 => object(random, depth),
        10 => array(random, depth),
        _ => json!({ "anyOf": [value(random, depth - 1), { "type": "null" }] }),
    }
}

fn string(random: &mut Random) -> Value {
    match random.below(4) {
        0 => json!({ "type": "string", "description": "any" }),
        1 => {
            let shortest = random.below(4);
            json!({ "type": "string", "minLength": shortest, "maxLength": shortest + random.below(12) })
        }
        2 => json!({ "type": "string", "pattern": random.pick(&PATTERNS) }),
        _ => json!({ "type": "string", "format": random.pick(&FORMATS).0 }),
    }
}

fn integer(random: &mut Random) -> Value {
    let low = random.below(2000) as i64 - 1000;
    let high = low + 5 + random.below(3000) as i64;
    match random.below(5) {
        0 => json!({ "type": "integer" }),
        1 => json!({ "type": "integer", "minimum": low }),
        2 => json!({ "type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high }),
        3 => json!({ "type": "integer", "minimum": 0, "maximum": 150, "multipleOf": 1 + random.below(7) }),
        _ => json!({ "type": "integer", "minimum": low, "maximum": high }),
    }
}

fn number(random: &mut Random) -> Value {
    let low = (random.below(2000) as f64 - 1000.0) / 8.0;
    match random.below(3) {
        0 => json!({ "type": "number" }),
        1 => json!({ "type": ["number", "null"] }),
        _ => json!({ "type": "number", "minimum": low, "maximum": low + 0.25 + random.below(100) as f64 }),
    }
}

fn array(random: &mut Random, depth: usize) -> Value {
    let mut array = json!({ "type": "array", "items": value(random, depth - 1) });
    if random.chance(60) {
        let fewest = random.below(3);
        array["minItems"] = json!(fewest);
        array["maxItems"] = json!(fewest + random.below(4));
    }
    array
}

/// Whether `value` is what `schema` describes; the fault otherwise.
pub(crate) fn validate(schema: &Value, value: &Value) -> Result<(), String> {
    check(schema, schema, value).map_err(|fault| format!("{fault} in {value}"))
}

fn check(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    for (keyword, argument) in schema.as_object().expect("schemas are objects") {
        let holds = match keyword.as_str() {
            "$defs" | "description" | "required" | "additionalProperties" => true,
            "$ref" => {
                let path = argument.as_str().unwrap().trim_start_matches('#');
                check(root, root.pointer(path).expect("references lead somewhere"), value)?;
                true
            }
            "type" => match argument {
                Value::Array(types) => types.iter().any(|name| has_type(name, value)),
                name => has_type(name, value),
            },
            "enum" => argument.as_array().unwrap().contains(value),
            "const" => argument == value,
            "anyOf" => argument
                .as_array()
                .unwrap()
                .iter()
                .any(|option| check(root, option, value).is_ok()),
            "properties" => return check_object(root, schema, value).and(check_rest(schema, value)),
            "items" => {
                for item in value.as_array().into_iter().flatten() {
                    check(root, argument, item)?;
                }
                true
            }
            _ => return check_rest(schema, value),
        };
        if !holds {
            return Err(format!("{keyword} {argument} does not hold"));
        }
    }
    check_rest(schema, value)
}

fn has_type(name: &Value, value: &Value) -> bool {
    match name.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        // 1.0 is an integer for JSON Schema.
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("no type {other}"),
    }
}

fn check_object(root: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let object = value.as_object().ok_or("not an object")?;
    let properties = schema["properties"].as_object().unwrap();
    for name in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(name.as_str().unwrap()) {
            return Err(format!("{name} is missing"));
        }
    }
    for (name, part) in object {
        match properties.get(name) {
            Some(schema) => check(root, schema, part)?,
            None if schema["additionalProperties"] == json!(false) => return Err(format!("{name:?} is not allowed")),
            None => {}
        }
    }
    Ok(())
}

/// Bounds of numbers, strings and arrays.
fn check_rest(schema: &Value, value: &Value) -> Result<(), String> {
    let bound = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
    let within = |what: &str, size: f64, low: Option<f64>, high: Option<f64>| {
        let is_within = low.is_none_or(|low| size >= low) && high.is_none_or(|high| size <= high);
        is_within
            .then_some(())
            .ok_or(format!("{what} {size} is not within {low:?} and {high:?}"))
    };
    match value {
        Value::Number(_) => {
            let number = value.as_f64().unwrap();
            within("number", number, bound("minimum"), bound("maximum"))?;
            if bound("exclusiveMinimum").is_some_and(|low| number <= low)
                || bound("exclusiveMaximum").is_some_and(|high| number >= high)
            {
                return Err(format!("{number} is on a bound"));
            }
            if bound("multipleOf").is_some_and(|factor| number % factor != 0.0) {
                return Err(format!("{number} is no multiple"));
            }
        }
        Value::String(text) => {
            within(
                "length",
                text.chars().count() as f64,
                bound("minLength"),
                bound("maxLength"),
            )?;
            let format = schema.get("format").and_then(Value::as_str);
            let format = format.map(|name| FORMATS.iter().find(|(known, _)| *known == name).unwrap().1);
            let pattern = schema.get("pattern").and_then(Value::as_str);
            for pattern in pattern.into_iter().chain(format) {
                if !Regex::new(pattern).unwrap().is_match(text) {
                    return Err(format!("{text:?} does not match {pattern}"));
                }
            }
        }
        Value::Array(items) => within("array of", items.len() as f64, bound("minItems"), bound("maxItems"))?,
        _ => {}
    }
    Ok(())
}

#[test]
fn the_validator_finds_faults() {
    let schema = json!({
        "type": "object",
        "properties": {
            "a": { "type": "integer", "minimum": 3, "multipleOf": 2 }, "b": { "type": "string", "format": "date" },
            "c": { "type": "array", "items": { "$ref": "#/$defs/d" }, "maxItems": 1 }, "e": { "anyOf": [{ "const": "x" }, { "type": "null" }] },
        },
        "required": ["a"], "additionalProperties": false, "$defs": { "d": { "enum": [1, "y"] } },
    });
    for good in [
        json!({ "a": 4 }),
        json!({ "a": 6.0, "b": "2024-02-30", "c": ["y"], "e": null }),
    ] {
        assert_eq!(validate(&schema, &good), Ok(()));
    }
    for bad in [
        json!([]),
        json!({}),
        json!({ "a": 2 }),
        json!({ "a": 5 }),
        json!({ "a": 4.5 }),
        json!({ "a": 4, "b": "2024-13-01" }),
        json!({ "a": 4, "c": ["z"] }),
        json!({ "a": 4, "c": [1, 1] }),
        json!({ "a": 4, "e": "y" }),
        json!({ "a": 4, "f": 1 }),
    ] {
        assert!(validate(&schema, &bad).is_err(), "{bad}");
    }
}
