//! How large a JSON schema becomes in the compiler's hands, found out by doing what it does without making anything.
//!
//! A schema is compiled in about the time its size suggests, except where it asks for two schemas at once: by `allOf`, or
//! by keywords beside `anyOf`, `oneOf` and `$ref`. The compiler puts such schemas together into one. It takes alternatives
//! apart for that and opens references, and what comes of it is a product: ten definitions, each of them one of two
//! references to the next, are a thousand schemas once anything is asked of them besides. References that nothing is asked
//! of besides are compiled once and cost nothing, however they go round in circles.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use llguidance::derivre::{Regex, RegexBuilder};
use llguidance::regex_to_lark;
use serde_json::{Map, Value};

use crate::grammar::GrammarError;

/// Objects, and arrays, that may stand in one place.
const MAX_ALTERNATIVES: usize = 256;

/// Objects and arrays that come of putting two together, with their properties and items; and scalars.
const MAX_MERGED: u64 = 4000;

/// Looks at two schemas, whatever comes of it. The compiler has a limit of 50,000 and counts a little less.
const MAX_STEPS: u64 = 100_000;

/// Schemas within schemas that are put together. The compiler's own limit.
const MAX_DEPTH: usize = 128;

/// Properties of one object. 1000 optional ones compile in 0.3 s, 3000 in 2 s.
const MAX_PROPERTIES: usize = 1000;

/// Pairs of properties of the same object, those of all objects together: what optional ones cost goes by them.
const MAX_PAIRS: u64 = 2_000_000;

/// Pairs of patterns for names of the same object, those of all objects together: the compiler looks whether a name can
/// match both. An object with 70 compiles in 30 ms, with 200 in 1 s.
const MAX_PATTERN_PAIRS: u64 = 5000;

/// States of the automaton of a pattern for names. The compiler's own limit.
const PATTERN_FUEL: u64 = 10_000;

/// What the schemas of one grammar grow to together.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    num_merged: u64,
    num_pairs: u64,
    num_pattern_pairs: u64,
    num_steps: u64,
}

impl Growth {
    /// Takes in a schema and all that it refers to.
    ///
    /// # Errors
    /// [`GrammarError::TooMany`] and [`GrammarError::TooDeep`].
    pub(crate) fn add(&mut self, schema: &Value) -> Result<(), GrammarError> {
        let mut document = Document {
            growth: self,
            root: schema,
            definitions: HashMap::new(),
            to_open: Vec::new(),
            open_unions: Vec::new(),
            patterns: HashMap::new(),
        };
        document.shape(schema)?;
        while let Some(reference) = document.to_open.pop() {
            document.open(reference)?;
        }
        document.check_open_unions()
    }

    fn merge(&mut self, num_schemas: usize) -> Result<(), GrammarError> {
        self.num_merged += num_schemas as u64;
        check("schemas put together", self.num_merged, MAX_MERGED)
    }

    fn object(&mut self, num_properties: usize, num_patterns: usize) -> Result<(), GrammarError> {
        check("properties of an object", num_properties as u64, MAX_PROPERTIES as u64)?;
        self.num_pairs += (num_properties * num_properties) as u64;
        check("pairs of properties within objects", self.num_pairs, MAX_PAIRS)?;
        self.num_pattern_pairs += (num_patterns * num_patterns) as u64;
        check("pairs of patterns for names", self.num_pattern_pairs, MAX_PATTERN_PAIRS)
    }

    fn step(&mut self) -> Result<(), GrammarError> {
        self.num_steps += 1;
        check("comparisons of schemas", self.num_steps, MAX_STEPS)
    }
}

/// Refuses what there are too many of.
pub(crate) fn check(what: &'static str, count: u64, limit: u64) -> Result<(), GrammarError> {
    if count <= limit {
        return Ok(());
    }
    Err(GrammarError::TooMany { what, limit })
}

/// A schema, as far as it matters to what becomes of it.
#[derive(Debug, Clone)]
enum Shape<'a> {
    Any,
    Never,
    Scalar { kind: Kind, is_constrained: bool },
    Array(Rc<Items<'a>>),
    Object(Rc<Members<'a>>),
    Union(Rc<Union<'a>>),
    Reference(&'a str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

const KINDS: [Kind; 6] = [
    Kind::Null,
    Kind::Boolean,
    Kind::Number,
    Kind::String,
    Kind::Array,
    Kind::Object,
];

impl Kind {
    fn of_type(name: &str) -> Option<Self> {
        Some(match name {
            "null" => Self::Null,
            "boolean" => Self::Boolean,
            "number" | "integer" => Self::Number,
            "string" => Self::String,
            "array" => Self::Array,
            "object" => Self::Object,
            _ => return None,
        })
    }

    /// What a keyword is about.
    fn of_keyword(keyword: &str) -> Option<Self> {
        Some(match keyword {
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => Self::Number,
            "minLength" | "maxLength" | "pattern" | "format" => Self::String,
            "items" | "prefixItems" | "additionalItems" | "minItems" | "maxItems" => Self::Array,
            "properties"
            | "patternProperties"
            | "additionalProperties"
            | "required"
            | "minProperties"
            | "maxProperties" => Self::Object,
            _ => return None,
        })
    }
}

#[derive(Debug)]
struct Items<'a> {
    first: Vec<Shape<'a>>,
    rest: Shape<'a>,
}

impl<'a> Items<'a> {
    fn get(&self, index: usize) -> &Shape<'a> {
        self.first.get(index).unwrap_or(&self.rest)
    }
}

#[derive(Debug)]
struct Members<'a> {
    properties: BTreeMap<&'a str, Shape<'a>>,
    patterns: BTreeMap<&'a str, Shape<'a>>,
    rest: Shape<'a>,
}

/// Alternatives, none of which is a union itself.
#[derive(Debug)]
struct Union<'a> {
    options: Vec<Shape<'a>>,
    count: Count,
    /// Those of the options that are references.
    references: Vec<&'a str>,
}

/// Alternatives by what they begin with; scalars become one regular expression and do not count.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    objects: usize,
    arrays: usize,
}

impl Count {
    fn add(&mut self, other: Self) -> Result<(), GrammarError> {
        self.objects += other.objects;
        self.arrays += other.arrays;
        let most = self.objects.max(self.arrays);
        check("alternatives", most as u64, MAX_ALTERNATIVES as u64)
    }

    fn of(shape: &Shape<'_>) -> Self {
        match shape {
            Shape::Object(_) => Self { objects: 1, arrays: 0 },
            Shape::Array(_) => Self { objects: 0, arrays: 1 },
            Shape::Union(union) => union.count,
            Shape::Any => Self { objects: 1, arrays: 1 },
            Shape::Never | Shape::Scalar { .. } | Shape::Reference(_) => Self::default(),
        }
    }
}

/// A schema and what its references lead to.
struct Document<'a, 'g> {
    growth: &'g mut Growth,
    root: &'a Value,
    /// By reference. One whose shape is being found out is [`Shape::Never`]: the compiler refuses what is its own part.
    definitions: HashMap<&'a str, Shape<'a>>,
    /// References that were met.
    to_open: Vec<&'a str>,
    /// Unions with references among their alternatives.
    open_unions: Vec<Rc<Union<'a>>>,
    patterns: HashMap<&'a str, Option<Regex>>,
}

impl<'a> Document<'a, '_> {
    fn shape(&mut self, schema: &'a Value) -> Result<Shape<'a>, GrammarError> {
        let keywords = match schema {
            Value::Object(keywords) => keywords,
            Value::Bool(false) => return Ok(Shape::Never),
            // What is no schema is for the compiler to refuse.
            _ => return Ok(Shape::Any),
        };
        let mut shape = self.plain(keywords)?;
        for (keyword, argument) in keywords {
            shape = self.apply(shape, keyword, argument)?;
        }
        Ok(shape)
    }

    /// `shape` with one more keyword, of those that bring in other schemas.
    fn apply(&mut self, shape: Shape<'a>, keyword: &str, argument: &'a Value) -> Result<Shape<'a>, GrammarError> {
        let parts = argument.as_array().map_or(&[][..], Vec::as_slice);
        let other = match (keyword, argument) {
            ("const", _) => self.constant(argument)?,
            ("enum", _) => {
                let options: Result<_, _> = parts.iter().map(|value| self.constant(value)).collect();
                self.union(options?)?
            }
            ("anyOf" | "oneOf", _) => {
                let options: Result<_, _> = parts.iter().map(|part| self.shape(part)).collect();
                self.union(options?)?
            }
            ("allOf", _) => {
                return parts.iter().try_fold(shape, |shape, part| {
                    let part = self.shape(part)?;
                    self.intersect(shape, part, 0)
                });
            }
            ("$ref", Value::String(reference)) => {
                self.to_open.push(reference);
                Shape::Reference(reference)
            }
            _ => return Ok(shape),
        };
        self.intersect(shape, other, 0)
    }

    /// What the other keywords say.
    fn plain(&mut self, keywords: &'a Map<String, Value>) -> Result<Shape<'a>, GrammarError> {
        let is_about = |kind| keywords.keys().any(|keyword| Kind::of_keyword(keyword) == Some(kind));
        let kinds: Vec<Kind> = match keywords.get("type") {
            Some(Value::String(name)) => Kind::of_type(name).into_iter().collect(),
            Some(types) => {
                let names = types.as_array().into_iter().flatten().filter_map(Value::as_str);
                names.filter_map(Kind::of_type).collect()
            }
            None if KINDS.into_iter().any(is_about) => KINDS.to_vec(),
            None => return Ok(Shape::Any),
        };
        let mut options = Vec::with_capacity(kinds.len());
        for kind in kinds {
            options.push(match kind {
                Kind::Array => self.array(keywords)?,
                Kind::Object => self.object(keywords)?,
                scalar => Shape::Scalar {
                    kind: scalar,
                    is_constrained: is_about(scalar),
                },
            });
        }
        self.union(options)
    }

    fn array(&mut self, keywords: &'a Map<String, Value>) -> Result<Shape<'a>, GrammarError> {
        // Older drafts have an array as `items` where newer ones have `prefixItems`.
        let (first, rest) = match (keywords.get("items"), keywords.get("prefixItems")) {
            (Some(Value::Array(first)), _) => (first.as_slice(), keywords.get("additionalItems")),
            (rest, Some(Value::Array(first))) => (first.as_slice(), rest),
            (rest, _) => (&[][..], rest),
        };
        let first: Result<_, _> = first.iter().map(|item| self.shape(item)).collect();
        Ok(Shape::Array(Rc::new(Items {
            first: first?,
            rest: self.optional(rest)?,
        })))
    }

    fn object(&mut self, keywords: &'a Map<String, Value>) -> Result<Shape<'a>, GrammarError> {
        let mut properties = self.named(keywords.get("properties"))?;
        let patterns = self.named(keywords.get("patternProperties"))?;
        self.growth.object(properties.len(), patterns.len())?;
        for (name, property) in &mut properties {
            if let Some(pattern) = self.matching(&patterns, name)? {
                *property = self.intersect(property.clone(), pattern, 0)?;
            }
        }
        Ok(Shape::Object(Rc::new(Members {
            properties,
            patterns,
            rest: self.optional(keywords.get("additionalProperties"))?,
        })))
    }

    fn named(&mut self, schemas: Option<&'a Value>) -> Result<BTreeMap<&'a str, Shape<'a>>, GrammarError> {
        let schemas = schemas.and_then(Value::as_object).into_iter().flatten();
        schemas
            .map(|(name, schema)| Ok((name.as_str(), self.shape(schema)?)))
            .collect()
    }

    fn optional(&mut self, schema: Option<&'a Value>) -> Result<Shape<'a>, GrammarError> {
        schema.map_or(Ok(Shape::Any), |schema| self.shape(schema))
    }

    fn constant(&mut self, value: &'a Value) -> Result<Shape<'a>, GrammarError> {
        let scalar = |kind| Shape::Scalar {
            kind,
            is_constrained: true,
        };
        Ok(match value {
            Value::Null => scalar(Kind::Null),
            Value::Bool(_) => scalar(Kind::Boolean),
            Value::Number(_) => scalar(Kind::Number),
            Value::String(_) => scalar(Kind::String),
            Value::Array(values) => {
                let first: Result<_, _> = values.iter().map(|value| self.constant(value)).collect();
                Shape::Array(Rc::new(Items {
                    first: first?,
                    rest: Shape::Never,
                }))
            }
            Value::Object(values) => {
                let properties: Result<_, _> = values
                    .iter()
                    .map(|(name, value)| Ok((name.as_str(), self.constant(value)?)))
                    .collect();
                Shape::Object(Rc::new(Members {
                    properties: properties?,
                    patterns: BTreeMap::new(),
                    rest: Shape::Never,
                }))
            }
        })
    }

    fn union(&mut self, shapes: Vec<Shape<'a>>) -> Result<Shape<'a>, GrammarError> {
        let mut count = Count::default();
        let mut options = Vec::with_capacity(shapes.len());
        for shape in shapes {
            count.add(Count::of(&shape))?;
            match shape {
                Shape::Never => {}
                Shape::Union(nested) => options.extend(nested.options.iter().cloned()),
                shape => options.push(shape),
            }
        }
        if options.len() <= 1 {
            return Ok(options.pop().unwrap_or(Shape::Never));
        }
        let reference = |option: &Shape<'a>| match option {
            Shape::Reference(reference) => Some(*reference),
            _ => None,
        };
        let references = options.iter().filter_map(reference).collect();
        let union = Rc::new(Union {
            options,
            count,
            references,
        });
        if !union.references.is_empty() {
            self.open_unions.push(Rc::clone(&union));
        }
        Ok(Shape::Union(union))
    }

    /// What is both.
    fn intersect(&mut self, one: Shape<'a>, other: Shape<'a>, depth: usize) -> Result<Shape<'a>, GrammarError> {
        self.growth.step()?;
        if depth > MAX_DEPTH {
            return Err(GrammarError::TooDeep { limit: MAX_DEPTH });
        }
        Ok(match (one, other) {
            (Shape::Any, shape) | (shape, Shape::Any) => shape,
            (Shape::Never, _) | (_, Shape::Never) => Shape::Never,
            (Shape::Reference(reference), shape) | (shape, Shape::Reference(reference)) => {
                let opened = self.open(reference)?;
                self.intersect(opened, shape, depth + 1)?
            }
            (Shape::Union(union), shape) | (shape, Shape::Union(union)) => {
                let options = union.options.iter().cloned();
                let each: Result<_, _> = options
                    .map(|option| self.intersect(option, shape.clone(), depth + 1))
                    .collect();
                self.union(each?)?
            }
            (Shape::Array(one), Shape::Array(other)) => self.intersect_arrays(&one, &other, depth)?,
            (Shape::Object(one), Shape::Object(other)) => self.intersect_objects(&one, &other, depth)?,
            (
                Shape::Scalar { kind, is_constrained },
                Shape::Scalar {
                    kind: other,
                    is_constrained: is_other_constrained,
                },
            ) if kind == other => {
                if is_constrained && is_other_constrained {
                    self.growth.merge(1)?;
                }
                Shape::Scalar {
                    kind,
                    is_constrained: is_constrained || is_other_constrained,
                }
            }
            _ => Shape::Never,
        })
    }

    fn intersect_arrays(
        &mut self,
        one: &Items<'a>,
        other: &Items<'a>,
        depth: usize,
    ) -> Result<Shape<'a>, GrammarError> {
        let num_first = one.first.len().max(other.first.len());
        self.growth.merge(1 + num_first)?;
        let mut item = |one: &Shape<'a>, other: &Shape<'a>| self.intersect(one.clone(), other.clone(), depth + 1);
        let first: Result<_, _> = (0..num_first)
            .map(|index| item(one.get(index), other.get(index)))
            .collect();
        Ok(Shape::Array(Rc::new(Items {
            first: first?,
            rest: item(&one.rest, &other.rest)?,
        })))
    }

    fn intersect_objects(
        &mut self,
        one: &Members<'a>,
        other: &Members<'a>,
        depth: usize,
    ) -> Result<Shape<'a>, GrammarError> {
        let mut properties = BTreeMap::new();
        for name in one.properties.keys().chain(other.properties.keys()) {
            if !properties.contains_key(name) {
                let (in_one, in_other) = (self.property(one, name)?, self.property(other, name)?);
                properties.insert(*name, self.intersect(in_one, in_other, depth + 1)?);
            }
        }
        let mut patterns = BTreeMap::new();
        for pattern in one.patterns.keys().chain(other.patterns.keys()) {
            let of = |members: &Members<'a>| members.patterns.get(pattern).unwrap_or(&members.rest).clone();
            if !patterns.contains_key(pattern) {
                patterns.insert(*pattern, self.intersect(of(one), of(other), depth + 1)?);
            }
        }
        self.growth.object(properties.len(), patterns.len())?;
        self.growth.merge(1 + properties.len() + patterns.len())?;
        Ok(Shape::Object(Rc::new(Members {
            properties,
            patterns,
            rest: self.intersect(one.rest.clone(), other.rest.clone(), depth + 1)?,
        })))
    }

    /// What a property of this name has to be.
    fn property(&mut self, members: &Members<'a>, name: &str) -> Result<Shape<'a>, GrammarError> {
        if let Some(property) = members.properties.get(name) {
            return Ok(property.clone());
        }
        let matching = self.matching(&members.patterns, name)?;
        Ok(matching.unwrap_or_else(|| members.rest.clone()))
    }

    /// The schema whose pattern a name matches. The compiler refuses objects where there could be two.
    fn matching(
        &mut self,
        schemas: &BTreeMap<&'a str, Shape<'a>>,
        name: &str,
    ) -> Result<Option<Shape<'a>>, GrammarError> {
        for (pattern, shape) in schemas {
            self.growth.step()?;
            let regex = self.patterns.entry(pattern).or_insert_with(|| automaton(pattern));
            if regex.as_mut().is_some_and(|regex| regex.is_match(name)) {
                return Ok(Some(shape.clone()));
            }
        }
        Ok(None)
    }

    /// What a reference leads to; [`Shape::Never`] where that is nothing, which the compiler refuses.
    fn open(&mut self, reference: &'a str) -> Result<Shape<'a>, GrammarError> {
        if let Some(shape) = self.definitions.get(reference) {
            return Ok(shape.clone());
        }
        self.definitions.insert(reference, Shape::Never);
        let shape = lookup(self.root, reference).map_or(Ok(Shape::Never), |schema| self.shape(schema))?;
        self.definitions.insert(reference, shape.clone());
        Ok(shape)
    }

    /// Counts alternatives behind references, each of them once: that is how often the compiler makes them.
    fn check_open_unions(&mut self) -> Result<(), GrammarError> {
        for union in std::mem::take(&mut self.open_unions) {
            let mut count = union.count;
            let mut seen = HashSet::new();
            let mut to_open = union.references.clone();
            while let Some(reference) = to_open.pop() {
                if !seen.insert(reference) {
                    continue;
                }
                self.growth.step()?;
                let shape = self.open(reference)?;
                count.add(Count::of(&shape))?;
                match shape {
                    Shape::Union(union) => to_open.extend(&union.references),
                    Shape::Reference(reference) => to_open.push(reference),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// As the compiler does it: without escapes, and only within the document.
fn lookup<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    if reference == "#" {
        return Some(root);
    }
    let path = reference.strip_prefix("#/")?;
    let mut names = path.split('/').filter(|_| !path.is_empty());
    names.try_fold(root, |value, name| match value {
        Value::Array(values) => values.get(name.parse::<usize>().ok()?),
        value => value.get(name),
    })
}

/// `None` where the compiler would refuse the pattern.
fn automaton(pattern: &str) -> Option<Regex> {
    let mut builder = RegexBuilder::new();
    let regex = builder.mk_regex_for_serach(&regex_to_lark(pattern, "dw")).ok()?;
    builder.to_regex_limited(regex, PATTERN_FUEL).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check_schema(schema: &Value) -> Result<(), GrammarError> {
        Growth::default().add(schema)
    }

    fn any_of(num: usize) -> Value {
        let branch = |n| json!({ "properties": { format!("p{n}"): { "type": "string" } } });
        json!({ "anyOf": (0..num).map(branch).collect::<Vec<_>>() })
    }

    fn object(num_properties: usize) -> Value {
        let properties: Map<_, _> = (0..num_properties).map(|n| (format!("p{n}"), json!({}))).collect();
        json!({ "items": { "properties": properties } })
    }

    #[test]
    fn alternatives_multiply_within_a_schema_and_not_across_properties() {
        let within = |num| json!({ "allOf": [any_of(16), any_of(num)] });
        assert!(check_schema(&within(16)).is_ok());
        let error = check_schema(&json!({ "items": within(17) })).unwrap_err();
        assert_eq!(error.to_string(), "too many alternatives: the limit is 256");
        let across = json!({ "properties": { "anyOf": any_of(200), "b": any_of(200) }, "anyOf": [{}, {}] });
        assert!(check_schema(&across).is_ok(), "a property may have a keyword's name");
        let nested = json!({ "anyOf": [any_of(200), { "oneOf": [any_of(56), {}] }] });
        assert!(check_schema(&nested).is_err());
    }

    #[test]
    fn objects_have_no_more_properties_than_compile_in_time() {
        assert!(check_schema(&object(MAX_PROPERTIES)).is_ok());
        assert!(check_schema(&object(MAX_PROPERTIES + 1)).is_err());
        assert!(
            check_schema(&json!({ "enum": [object(MAX_PROPERTIES + 1)] })).is_ok(),
            "a value"
        );
    }

    #[test]
    fn references_are_opened_where_something_is_asked_of_them() {
        let definitions = json!({ "a": any_of(16), "b": any_of(17), "c": { "anyOf": [{ "$ref": "#/$defs/a" }, { "$ref": "#/$defs/b" }] } });
        let with = |keyword: &str, names: &[&str]| {
            let references: Vec<_> = names
                .iter()
                .map(|name| json!({ "$ref": format!("#/$defs/{name}") }))
                .collect();
            json!({ keyword: references, "$defs": definitions })
        };
        assert!(check_schema(&with("allOf", &["a", "a"])).is_ok());
        assert!(check_schema(&with("allOf", &["a", "b"])).is_err());
        assert!(check_schema(&with("allOf", &["a", "c"])).is_err(), "33 times 16");
        assert!(check_schema(&with("anyOf", &["a", "b", "c"])).is_ok());
        let mut beside = with("anyOf", &["a"]);
        beside["$ref"] = json!("#/$defs/b");
        assert!(check_schema(&beside).is_err());
    }

    #[test]
    fn alternatives_behind_references_count_once() {
        let union = |num: usize, from: usize| {
            let references = (from..from + num).map(|n| json!({ "$ref": format!("#/$defs/o{n}") }));
            json!({ "anyOf": references.collect::<Vec<_>>() })
        };
        let schema = |num: usize| {
            let mut definitions: Map<_, _> = (0..300)
                .map(|n| (format!("o{n}"), json!({ "type": "object" })))
                .collect();
            definitions.insert("half".to_owned(), union(128, 0));
            definitions.insert("rest".to_owned(), union(num, 100));
            // It goes round in circles.
            definitions["half"]["anyOf"][0] = json!({ "$ref": "#/$defs/rest" });
            definitions["rest"]["anyOf"][0] = json!({ "$ref": "#/$defs/half" });
            json!({ "items": { "$ref": "#/$defs/half" }, "$defs": definitions })
        };
        // 1 to 127, and from 101 on.
        assert!(check_schema(&schema(156)).is_ok());
        assert!(check_schema(&schema(157)).is_ok());
        assert!(check_schema(&schema(158)).is_err());
    }

    #[test]
    fn shared_properties_are_put_together_and_others_are_not() {
        let tree = |name: &str| json!({ "type": "object", "properties": { name: { "$ref": "#/$defs/a" }, "x": { "type": "string" } } });
        let both = |one: &str, other: &str| {
            json!({ "allOf": [{ "$ref": "#/$defs/a" }, { "$ref": "#/$defs/b" }],
                                                    "$defs": { "a": tree(one), "b": tree(other) } })
        };
        assert!(check_schema(&both("left", "right")).is_ok());
        let error = check_schema(&both("left", "left")).unwrap_err();
        assert!(matches!(error, GrammarError::TooDeep { .. }), "{error}");
    }

    #[test]
    fn patterns_of_names_are_put_together_with_the_names_they_match() {
        let schema = |pattern: &str| {
            let patterns = json!({ pattern: any_of(17) });
            json!({ "type": "object", "properties": { "x-a": any_of(16) }, "patternProperties": patterns })
        };
        assert!(check_schema(&schema("^y-")).is_ok());
        assert!(check_schema(&schema("^x-")).is_err());
        let beside =
            json!({ "allOf": [schema("^y-"), { "type": "object", "patternProperties": { "^x-": any_of(17) } }] });
        assert!(check_schema(&beside).is_err());
    }

    #[test]
    fn patterns_of_names_are_few() {
        let schema = |num_objects: usize, num_patterns: usize| {
            let patterns: Map<_, _> = (0..num_patterns).map(|n| (format!("^{n}$"), json!({}))).collect();
            json!({ "prefixItems": vec![json!({ "patternProperties": patterns }); num_objects] })
        };
        assert!(check_schema(&schema(1, 70)).is_ok());
        assert!(check_schema(&schema(1, 71)).is_err());
        assert!(check_schema(&schema(1000, 2)).is_ok());
        assert!(check_schema(&schema(2, 70)).is_err());
    }

    #[test]
    fn a_type_asks_nothing_of_a_list_of_texts() {
        let texts: Vec<String> = (0..5000).map(|n| n.to_string()).collect();
        let schema = json!({ "properties": { "a": { "type": "string", "enum": texts }, "b": { "type": ["string", "null"], "enum": texts } } });
        assert!(check_schema(&schema).is_ok());
        let both = json!({ "allOf": [{ "enum": &texts[..70] }, { "enum": &texts[..70] }] });
        assert!(check_schema(&both).is_err());
    }

    #[test]
    fn what_leads_nowhere_or_is_its_own_part_is_for_the_compiler_to_refuse() {
        for reference in [
            "#/$defs/no",
            "#/$defs/a/3",
            "#/$defs/a/x",
            "http://example.com/x",
            "#no",
            "",
        ] {
            let schema = json!({ "allOf": [{ "$ref": reference }, { "type": "object" }], "$defs": { "a": [{}] } });
            assert!(check_schema(&schema).is_ok(), "{reference}");
        }
        let circle = json!({ "allOf": [{ "$ref": "#" }, { "type": "object" }] });
        assert!(check_schema(&circle).is_ok());
    }

    #[test]
    fn references_lead_to_schemas_by_the_names_on_the_way() {
        let root = json!({ "$defs": { "a": { "anyOf": [{ "title": "0" }, { "title": "1" }] } } });
        assert_eq!(lookup(&root, "#"), Some(&root));
        assert_eq!(lookup(&root, "#/"), Some(&root));
        assert_eq!(lookup(&root, "#/$defs/a/anyOf/1").unwrap()["title"], "1");
        assert_eq!(lookup(&root, "#/$defs/b"), None);
    }
}
