//! Answers, held against the document that the server gives out.

use axum::body::Body;
use axum::http::Request;
use lapidary_engine::Script;
use lapidary_server::access::{Access, ApiKeys, KeyLimits};
use serde_json::{Value, json};

use crate::support::{Answer, Server, Setup};

struct Document(Value);

impl Document {
    async fn of(server: &Server) -> Self {
        let answer = server.get("/openapi.json").await;
        assert_eq!(answer.header("content-type"), Some("application/json"));
        Self(answer.json())
    }

    fn component<'a>(&'a self, reference: &str) -> &'a Value {
        let pointer = reference.strip_prefix('#').expect("references are local");
        self.0.pointer(pointer).unwrap_or_else(|| panic!("no {reference}"))
    }

    /// Why `value` is not what `schema` says; a key that the schema does not name is a fault, too.
    fn fault(&self, value: &Value, schema: &Value) -> Option<String> {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let fault = self.fault(value, self.component(reference))?;
            return Some(format!("{reference}: {fault}"));
        }
        if let Some(alternatives) = schema.get("anyOf").and_then(Value::as_array) {
            let faults = alternatives.iter().map(|schema| self.fault(value, schema));
            return faults.collect::<Option<Vec<_>>>().map(|faults| faults.join(" | "));
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
                Ok(value) => self.fault(&value, content),
                Err(error) => Some(format!("{text}: {error}")),
            };
        }
        match value {
            Value::Array(items) => items.iter().find_map(|item| self.fault(item, &schema["items"])),
            Value::Object(map)
                if schema.get("properties").is_some() || schema.get("additionalProperties").is_some() =>
            {
                let required = schema.get("required").and_then(Value::as_array);
                let missing = required
                    .into_iter()
                    .flatten()
                    .find(|name| !map.contains_key(name.as_str().unwrap()));
                missing.map(|name| format!("{name} is missing in {value}")).or_else(|| {
                    map.iter().find_map(|(key, value)| {
                        let named = schema.get("properties").and_then(|properties| properties.get(key));
                        match named.or_else(|| schema.get("additionalProperties")) {
                            Some(schema) => self.fault(value, schema).map(|fault| format!("{key}: {fault}")),
                            None => Some(format!("{key} is not documented")),
                        }
                    })
                })
            }
            _ => None,
        }
    }

    /// Asserts that the answer to this operation is one that it documents.
    fn check(&self, method: &str, path: &str, answer: &Answer) {
        let responses = &self.0["paths"][path][method]["responses"];
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
        let fault = self.fault(value, schema);
        assert!(fault.is_none(), "{path}: {}\n{value}", fault.unwrap());
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

#[tokio::test]
async fn every_answer_is_as_documented() {
    let mut drawing = talkative();
    drawing.scripted.script = Some(Script::new(|_| None));
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
    }
}

#[tokio::test]
async fn small_endpoints_answer_as_documented() {
    for is_loaded in [true, false] {
        let server = Setup {
            is_loaded,
            ..Setup::default()
        }
        .start();
        let document = Document::of(&server).await;
        for (path, item) in document.0["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                if method == "get" {
                    let answer = server.get(&path.replace("{id}", "org/tiny")).await;
                    document.check(method, path, &answer);
                }
            }
        }
        let posts = [
            ("/ping", json!({})),
            ("/tokenize", json!({ "prompt": "hello", "return_token_strs": true })),
            ("/tokenize", json!({ "messages": [{ "role": "user", "content": "a" }] })),
            ("/detokenize", json!({ "tokens": [5, 6] })),
            (
                "/v1/completions/render",
                json!({ "prompt": ["a", "b"], "bad_words": ["x"], "logprobs": 1 }),
            ),
            (
                "/v1/chat/completions/render",
                json!({ "messages": [{ "role": "user", "content": "a" }] }),
            ),
        ];
        for (path, body) in posts {
            let answer = server.post(path, body).await;
            assert_eq!(answer.status == 200, is_loaded, "{path}: {}", answer.body);
            document.check("post", path, &answer);
        }
    }
}

#[tokio::test]
async fn errors_are_as_documented() {
    let server = Setup::answering(&["a"; 50]).failing_at([3]).start();
    let document = Document::of(&server).await;
    let failed = server.complete(json!({ "prompt": "a", "max_tokens": 9 })).await;
    document.check("post", "/v1/completions", &failed);
    for (path, item) in document.0["paths"].as_object().unwrap() {
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
