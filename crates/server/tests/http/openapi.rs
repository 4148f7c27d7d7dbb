//! Answers, held against the document that the server gives out.

use std::cell::RefCell;
use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::Request;
use lapidary_engine::Script;
use lapidary_server::access::{Access, ApiKeys, KeyLimits};
use serde_json::{Map, Value, json};

use crate::support::{Answer, Server, Setup};

/// The document of a server, and which of the fields that it describes were seen in answers.
struct Document {
    text: Value,
    seen: RefCell<BTreeSet<String>>,
}

/// A place in the document: a component, and fields below it, `Usage.prompt_tokens` for one.
type Place<'a> = (&'a str, &'a Value);

impl Document {
    async fn of(server: &Server) -> Self {
        let answer = server.get("/openapi.json").await;
        assert_eq!(answer.header("content-type"), Some("application/json"));
        Self {
            text: answer.json(),
            seen: RefCell::default(),
        }
    }

    fn component<'a>(&'a self, reference: &str) -> &'a Value {
        let pointer = reference.strip_prefix('#').expect("references are local");
        self.text.pointer(pointer).unwrap_or_else(|| panic!("no {reference}"))
    }

    /// Why `value` is not what the schema says; a key that the schema does not name is a fault, too.
    fn fault(&self, value: &Value, (place, schema): Place<'_>) -> Option<String> {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let fault = self.fault(value, (name_of(reference), self.component(reference)))?;
            return Some(format!("{reference}: {fault}"));
        }
        if let Some(alternatives) = schema.get("anyOf").and_then(Value::as_array) {
            let mut faults = Vec::new();
            for alternative in alternatives {
                faults.push(self.fault(value, (place, alternative))?);
            }
            return Some(faults.join(" | "));
        }
        if let Some(constant) = schema.get("const") {
            return (constant != value).then(|| format!("{value} is not {constant}"));
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return (!values.contains(value)).then(|| format!("{value} is none of {values:?}"));
        }
        let kinds = match schema.get("type") {
            Some(Value::Array(kinds)) => kinds.clone(),
            Some(kind) => vec![kind.clone()],
            None => return Some(format!("{value} where nothing may be")),
        };
        if !kinds.iter().any(|kind| is_kind(value, kind.as_str().unwrap())) {
            return Some(format!("{value} is no {kinds:?}"));
        }
        if let (Some(content), Some(text)) = (schema.get("contentSchema"), value.as_str()) {
            return match serde_json::from_str(text) {
                Ok(value) => self.fault(&value, (place, content)),
                Err(error) => Some(format!("{text}: {error}")),
            };
        }
        match value {
            Value::Array(items) => items
                .iter()
                .find_map(|item| self.fault(item, (place, &schema["items"]))),
            Value::Object(map) => self.object_fault(map, (place, schema)),
            _ => None,
        }
    }

    fn object_fault(&self, map: &Map<String, Value>, (place, schema): Place<'_>) -> Option<String> {
        let (properties, others) = (schema.get("properties"), schema.get("additionalProperties"));
        if properties.is_none() && others.is_none() {
            return None;
        }
        let mut required = schema["required"].as_array().into_iter().flatten();
        if let Some(missing) = required.find(|name| !map.contains_key(name.as_str().unwrap())) {
            return Some(format!("{missing} is missing"));
        }
        for (key, value) in map {
            let field = format!("{place}.{key}");
            let named = properties.and_then(|properties| properties.get(key));
            let fault = match named.or(others) {
                Some(schema) => self.fault(value, (&field, schema)),
                None => Some("is not documented".to_owned()),
            };
            if let Some(fault) = fault {
                return Some(format!("{field}: {fault}"));
            }
            if named.is_some() {
                self.seen.borrow_mut().insert(field);
            }
        }
        None
    }

    /// All fields of answers.
    fn fields(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let answers: Map<String, Value> = serde_json::from_str(include_str!("../../src/openapi/answers.json")).unwrap();
        for name in answers.keys() {
            add_fields(&mut found, name, &self.text["components"]["schemas"][name]);
        }
        found
    }

    /// Asserts that the answer to this operation is one that it documents.
    fn check(&self, method: &str, path: &str, answer: &Answer) {
        let responses = &self.text["paths"][path][method]["responses"];
        let mut response = &responses[answer.status.as_str()];
        assert!(
            response.is_object(),
            "{method} {path}: {} is not documented: {}",
            answer.status,
            answer.body
        );
        if let Some(reference) = response.get("$ref").and_then(Value::as_str) {
            response = self.component(reference);
        }
        for (name, _) in response["headers"].as_object().into_iter().flatten() {
            assert!(
                answer.header(&name.to_lowercase()).is_some(),
                "{path}: no header {name}"
            );
        }
        let content_type = answer
            .header("content-type")
            .unwrap_or_default()
            .split(';')
            .next()
            .unwrap();
        let Some(content) = response["content"].as_object() else {
            assert!(answer.body.is_empty(), "{path}: {}", answer.body);
            return;
        };
        let media = content
            .get(content_type)
            .unwrap_or_else(|| panic!("{path}: {content_type} is not documented"));
        match content_type {
            "application/json" => self.check_value(path, &answer.json(), &media["schema"]),
            "text/event-stream" => self.check_events(path, &answer.body, &media["schema"]),
            _ => {}
        }
    }

    fn check_events(&self, path: &str, body: &str, schema: &Value) {
        assert!(!body.is_empty());
        for event in body.split_terminator("\n\n") {
            let fields = event.lines().map(|line| line.split_once(": ").unwrap());
            let event: Value = fields.map(|(name, value)| (name.to_owned(), json!(value))).collect();
            self.check_value(path, &event, schema);
        }
    }

    fn check_value(&self, path: &str, value: &Value, schema: &Value) {
        let fault = self.fault(value, (path, schema));
        assert!(fault.is_none(), "{path}: {}\n{value}", fault.unwrap());
    }
}

fn name_of(reference: &str) -> &str {
    reference.rsplit('/').next().unwrap_or_default()
}

/// Names the fields that a schema has itself.
fn add_fields(found: &mut BTreeSet<String>, place: &str, schema: &Value) {
    let alternatives = schema.get("anyOf").and_then(Value::as_array);
    for alternative in alternatives.into_iter().flatten().chain(schema.get("items")) {
        add_fields(found, place, alternative);
    }
    for (key, schema) in schema["properties"].as_object().into_iter().flatten() {
        let field = format!("{place}.{key}");
        add_fields(found, &field, schema);
        found.insert(field);
    }
}

fn is_kind(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no kind {other}"),
    }
}

fn talkative() -> Setup {
    let mut setup = Setup::default();
    setup.engine.max_model_len = 2000;
    setup.limits.per_request_metrics = true;
    setup
}

/// Requests that bring out every field of an answer that can be asked for.
fn generating() -> Vec<(&'static str, Value)> {
    let messages = json!([{ "role": "user", "content": "hello" }]);
    let schema = json!({ "type": "object", "properties": { "n": { "enum": [1] } }, "required": ["n"] });
    let chat = "/v1/chat/completions";
    let extras = json!({ "return_token_ids": true, "prompt_logprobs": 2 });
    let with = |mut body: Value, more: &Value| {
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let tools = json!([{ "type": "function", "function": { "name": "pick", "parameters": schema } }]);
    let flat = json!([{ "type": "function", "name": "pick", "parameters": schema }]);
    let usage = json!({ "stream": true, "stream_options": { "include_usage": true, "continuous_usage_stats": true } });
    let include = json!({ "include": ["message.output_text.logprobs"], "top_logprobs": 2 });
    let plain = [
        (chat, json!({ "messages": messages, "max_tokens": 4 })),
        (
            chat,
            json!({ "messages": messages, "n": 2, "logprobs": true, "top_logprobs": 2, "max_tokens": 2 }),
        ),
        (chat, json!({ "messages": messages, "stop": "hello" })),
        (
            chat,
            json!({ "messages": messages, "tools": tools, "tool_choice": "required", "max_tokens": 60 }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": ["hello", "a b"], "logprobs": 2, "echo": true }),
        ),
        (
            "/v1/completions",
            json!({ "prompt": [5, 6], "max_tokens": 4, "stop_token_ids": [107] }),
        ),
        ("/invocations", json!({ "messages": messages })),
        ("/invocations", json!({ "prompt": "a" })),
        (
            "/v1/responses",
            with(json!({ "input": "hello", "metadata": { "a": "b" } }), &include),
        ),
        (
            "/v1/responses",
            json!({ "input": "a", "max_output_tokens": 1, "instructions": "b", "user": "c" }),
        ),
        (
            "/v1/responses",
            json!({ "input": "a", "text": { "format": { "type": "json_schema", "name": "x", "schema": schema } } }),
        ),
        (
            "/v1/responses",
            json!({ "input": "a", "tools": flat, "tool_choice": { "type": "function", "name": "pick" } }),
        ),
        (
            "/v1/responses",
            json!({ "input": "a", "tools": flat, "tool_choice": "none" }),
        ),
    ];
    let mut all = Vec::new();
    for (path, body) in plain {
        all.push((path, with(body.clone(), &extras)));
        all.push((
            path,
            with(body.clone(), &json!({ "stream": true, "return_token_ids": true })),
        ));
        if path != "/v1/responses" {
            all.push((path, with(body.clone(), &usage)));
        }
        all.push((path, body));
    }
    all
}

/// Every way to generate.
async fn check_generation() -> BTreeSet<String> {
    let mut drawing = talkative();
    drawing.scripted.script = Some(Script::new(|_| None));
    let mut seen = BTreeSet::new();
    for (server, keeps_forms) in [(talkative().start(), false), (drawing.start(), true)] {
        let document = Document::of(&server).await;
        let is_held = |body: &Value| body.get("tools").is_some() || body.get("text").is_some();
        for (path, body) in generating() {
            if keeps_forms || !is_held(&body) {
                let answer = server.post(path, &body).await;
                assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
                document.check("post", path, &answer);
            }
        }
        seen.append(&mut document.seen.take());
    }
    seen
}

/// Everything else, while there is no model, too.
async fn check_small_endpoints() -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for is_loaded in [true, false] {
        let server = Setup {
            is_loaded,
            ..Setup::default()
        }
        .start();
        let document = Document::of(&server).await;
        for (path, item) in document.text["paths"].as_object().unwrap() {
            if item.get("get").is_some() {
                let answer = server.get(&path.replace("{id}", "org/tiny")).await;
                document.check("get", path, &answer);
            }
        }
        let message = json!([{ "role": "user", "content": "a" }]);
        let posts = [
            ("/ping", json!({})),
            ("/tokenize", json!({ "prompt": "hello", "return_token_strs": true })),
            ("/tokenize", json!({ "messages": message })),
            ("/detokenize", json!({ "tokens": [5, 6] })),
            (
                "/v1/completions/render",
                json!({ "prompt": ["a", "b"], "bad_words": ["x"] }),
            ),
            ("/v1/chat/completions/render", json!({ "messages": message })),
        ];
        for (path, body) in posts {
            let answer = server.post(path, body).await;
            assert_eq!(answer.status == 200, is_loaded, "{path}: {}", answer.body);
            document.check("post", path, &answer);
        }
        seen.append(&mut document.seen.take());
    }
    seen
}

/// Faults of clients, and of the server before and after an answer began.
async fn check_errors() -> BTreeSet<String> {
    let server = Setup::answering(&["a"; 50]).failing_at([3, 8, 13]).start();
    let document = Document::of(&server).await;
    for (path, body, status) in [
        ("/v1/completions", json!({ "prompt": "a" }), 500),
        ("/v1/completions", json!({ "prompt": "a", "stream": true }), 200),
        ("/v1/responses", json!({ "input": "a", "stream": true }), 200),
    ] {
        let answer = server.post(path, body).await;
        assert_eq!(answer.status, status);
        assert!(answer.body.contains("internal_error"), "{}", answer.body);
        document.check("post", path, &answer);
    }
    for (path, item) in document.text["paths"].as_object().unwrap() {
        if item
            .get("post")
            .is_some_and(|operation| operation.get("requestBody").is_some())
        {
            for (body, status) in [("{", 400), ("{\"model\":\"nobody\"}", 404)] {
                let answer = server.post(path, body).await;
                // A response's input is checked before its model is.
                assert!(
                    answer.status == status || path == "/v1/responses",
                    "{path}: {}",
                    answer.body
                );
                document.check("post", path, &answer);
            }
        }
    }
    let nobody = server.get("/v1/models/nobody").await;
    document.check("get", "/v1/models/{id}", &nobody);
    assert_eq!(nobody.status, 404);
    document.seen.take()
}

/// What is said once nothing runs any more.
async fn check_death() -> BTreeSet<String> {
    let mut setup = Setup::default();
    setup.scripted.device_lost_at = Some(0);
    let server = setup.start();
    let document = Document::of(&server).await;
    let body = json!({ "prompt": "a" });
    let refused = server.post("/v1/completions", body).await;
    document.check("post", "/v1/completions", &refused);
    for path in ["/live", "/ready", "/health"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, 503, "{path}");
        document.check("get", path, &answer);
    }
    document.seen.take()
}

#[tokio::test]
async fn answers_have_the_fields_that_are_documented_and_no_others() {
    let mut seen = check_generation().await;
    seen.append(&mut check_small_endpoints().await);
    seen.append(&mut check_errors().await);
    seen.append(&mut check_death().await);
    let fields = Document::of(&Setup::default().start()).await.fields();
    let unseen: Vec<_> = fields.difference(&seen).collect();
    assert!(unseen.is_empty(), "documented, and in no answer: {unseen:?}");
}

#[tokio::test]
async fn the_document_needs_a_key_and_is_found_below_the_root_path() {
    let keys = ApiKeys::new(vec!["secret".parse().unwrap()], None, KeyLimits::default()).unwrap();
    let access = Access {
        keys: Some(keys),
        root_path: "/gem".to_owned(),
        ..Access::default()
    };
    let server = Setup {
        access,
        ..Setup::default()
    }
    .start();
    for path in ["/openapi.json", "/gem/openapi.json"] {
        assert_eq!(server.get(path).await.status, 401);
        let request = Request::get(path).header("authorization", "Bearer secret");
        let answer = server.send(request.body(Body::empty()).unwrap()).await;
        let document = answer.json();
        assert_eq!(document["servers"], json!([{ "url": "/gem" }]));
        assert_eq!(document["security"], json!([{ "key": [] }]));
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
    }
}
