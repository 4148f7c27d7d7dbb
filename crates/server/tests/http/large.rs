//! Parts of a request that would take far more memory than their text: refused while they are read, by the field's name.

use serde_json::{Value, json};

use crate::support::{Server, Setup};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";

fn chat(field: &str, value: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    body[field] = value;
    body
}

fn response(field: &str, value: Value) -> Value {
    let mut body = json!({ "input": "hi" });
    body[field] = value;
    body
}

/// A schema of so many bytes and half as many values.
fn schema(num_bytes: usize) -> Value {
    json!({ "x": vec![0; num_bytes / 2] })
}

async fn assert_refused(server: &Server, path: &str, body: &Value, param: &str, code: &str) {
    let answer = server.post(path, body.to_string()).await;
    assert_eq!(answer.status, 400, "{path} {param}: {}", answer.body);
    let error = &answer.json()["error"];
    assert_eq!(
        (&error["param"], &error["code"]),
        (&json!(param), &json!(code)),
        "{path}: {error}"
    );
}

#[tokio::test]
async fn lists_are_read_up_to_their_limits() {
    let server = Setup::default().start();
    let message = json!({ "role": "user", "content": "" });
    let call = json!({ "id": "a" });
    let biases: Value = (0..1025)
        .map(|id| (id.to_string(), json!(1)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let pairs: Value = (0..17)
        .map(|key| (key.to_string(), json!("a")))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let tool = json!({ "type": "function", "name": "f" });
    for (path, body, param) in [
        (CHAT, json!({ "messages": vec![&message; (64 << 10) + 1] }), "messages"),
        (
            "/tokenize",
            json!({ "messages": vec![&message; (64 << 10) + 1] }),
            "messages",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "assistant", "tool_calls": vec![&call; (64 << 10) + 1] }] }),
            "messages[0].tool_calls",
        ),
        (
            CHAT,
            json!({ "messages": [{ "role": "user", "content": vec![json!({ "text": "" }); (64 << 10) + 1] }] }),
            "messages[0].content",
        ),
        (CHAT, chat("stop", json!(vec!["a"; 1025])), "stop"),
        (CHAT, chat("stop_token_ids", json!(vec![5; 257])), "stop_token_ids"),
        (CHAT, chat("logit_bias", biases), "logit_bias"),
        (CHAT, chat("bad_words", json!(vec!["a"; 1025])), "bad_words"),
        (
            CHAT,
            chat("allowed_token_ids", json!(vec![5; (512 << 10) + 1])),
            "allowed_token_ids",
        ),
        (CHAT, chat("modalities", json!(vec!["text"; 65])), "modalities"),
        (
            CHAT,
            chat("guided_choice", json!(vec![""; (32 << 10) + 1])),
            "guided_choice",
        ),
        (COMPLETIONS, json!({ "prompt": vec!["a"; (16 << 10) + 1] }), "prompt"),
        (COMPLETIONS, json!({ "prompt": vec![[5]; (16 << 10) + 1] }), "prompt"),
        (RESPONSES, json!({ "input": vec![&message; (64 << 10) + 1] }), "input"),
        (RESPONSES, response("tools", json!(vec![tool; 129])), "tools"),
        (RESPONSES, response("include", json!(vec!["a"; 65])), "include"),
        (RESPONSES, response("metadata", pairs), "metadata"),
    ] {
        assert_refused(&server, path, &body, param, "array_above_max_length").await;
    }
}

#[tokio::test]
async fn json_and_names_are_read_up_to_their_limits() {
    const SCHEMA: usize = (256 << 10) + 100;
    let server = Setup::default().start();
    let format = json!({ "type": "json_schema", "json_schema": { "name": "a", "schema": schema(SCHEMA) } });
    let flat = json!({ "format": { "type": "json_schema", "name": "a", "schema": schema(SCHEMA) } });
    let tool = |parameters: Value| json!({ "type": "function", "function": { "name": "f", "parameters": parameters } });
    let long_key = format!("metadata.{}", "k".repeat(65));
    let (key, value) = (json!({ "k".repeat(65): ""  }), json!({ "k": "é".repeat(513) }));
    for (path, body, param) in [
        (
            CHAT,
            chat("response_format", format),
            "response_format.json_schema.schema",
        ),
        (CHAT, chat("guided_json", schema(SCHEMA)), "guided_json"),
        (
            CHAT,
            chat("structured_outputs", json!({ "json": schema(SCHEMA) })),
            "structured_outputs.json",
        ),
        (
            CHAT,
            chat("tools", json!([tool(schema(SCHEMA))])),
            "tools[0].function.parameters",
        ),
        // Each of them may be so long.
        (CHAT, chat("tools", json!(vec![tool(schema(200 << 10)); 6])), "tools"),
        (
            CHAT,
            chat("chat_template_kwargs", schema((64 << 10) + 100)),
            "chat_template_kwargs",
        ),
        (
            "/tokenize",
            chat("chat_template_kwargs", schema((64 << 10) + 100)),
            "chat_template_kwargs",
        ),
        (RESPONSES, response("text", flat), "text.format.schema"),
        (RESPONSES, response("metadata", key), &long_key),
        (RESPONSES, response("metadata", value), "metadata.k"),
        (RESPONSES, response("user", json!("u".repeat(1025))), "user"),
        (CHAT, chat("cache_salt", json!("u".repeat(1025))), "cache_salt"),
    ] {
        assert_refused(&server, path, &body, param, "string_above_max_length").await;
    }
    // Those the compiler knows; now nothing waits for it.
    for (field, text) in [
        ("guided_regex", "a".repeat(8193)),
        ("guided_grammar", "a".repeat(32769)),
    ] {
        assert_refused(&server, CHAT, &chat(field, json!(text)), field, "invalid_value").await;
    }
    let choices = json!(vec!["a".repeat(1024); 129]);
    assert_refused(
        &server,
        CHAT,
        &chat("guided_choice", choices),
        "guided_choice",
        "invalid_value",
    )
    .await;
}

#[tokio::test]
async fn what_follows_a_fault_is_not_kept() {
    let server = Setup::default().start();
    let image = json!({ "type": "image_url", "image_url": { "url": "x".repeat(1 << 20) } });
    let part = json!({ "type": "text" });
    for (body, param, code) in [
        (
            json!({ "messages": [{}, 5] }),
            "messages[0].role",
            "missing_required_parameter",
        ),
        (
            json!({ "messages": [{ "role": "user" }, 5] }),
            "messages[0].content",
            "missing_required_parameter",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "text": "a" }, image, 5] }] }),
            "messages[0].content[1].type",
            "unsupported_parameter",
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [part, 5] }] }),
            "messages[0].content[0].text",
            "unsupported_parameter",
        ),
        // No fault, so that the next one is.
        (
            json!({ "messages": [{ "role": "tool" }, { "role": "user", "content": 5 }] }),
            "messages[1].content",
            "invalid_type",
        ),
    ] {
        assert_refused(&server, CHAT, &body, param, code).await;
    }
    for item in [
        json!({ "role": "tool" }),
        json!({ "role": "assistant" }),
        json!({ "type": "reasoning" }),
        json!({ "type": "function_call" }),
        json!({ "type": "function_call_output" }),
    ] {
        let body = json!({ "input": [item, { "role": "user", "content": 5 }] });
        assert_refused(&server, RESPONSES, &body, "input[1].content", "invalid_type").await;
    }
}

#[tokio::test]
async fn what_clients_send_is_far_from_the_limits() {
    let mut setup = Setup::default();
    setup.engine.max_model_len = 1 << 16;
    setup.scripted.kv_cache.num_blocks = 1 << 12;
    let server = setup.start();
    let turn = [
        json!({ "role": "user", "content": [{ "type": "text", "text": "a" }] }),
        json!({ "role": "assistant", "content": "b" }),
    ];
    let history: Vec<&Value> = turn.iter().cycle().take(4001).collect();
    let answer = server
        .post("/tokenize", json!({ "messages": history }).to_string())
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut body = chat("stop", json!(vec!["zz"; 16]));
    body["tools"] = (0..128)
        .map(|index| json!({ "type": "function", "function": { "name": format!("f{index}"), "parameters": { "type": "object" } } }))
        .collect();
    body["tool_choice"] = json!("none");
    let answer = server.post(CHAT, body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    // As long as the context, for as many prompts as may be.
    let body = json!({ "prompt": vec![vec![5; 4095]; 128], "max_tokens": 1 });
    let answer = server.post("/v1/completions/render", body.to_string()).await;
    assert_eq!(answer.status, 200, "{}", &answer.body[..answer.body.len().min(500)]);
    let metadata: serde_json::Map<_, _> = (0..16)
        .map(|key| (format!("{key:064}"), json!("é".repeat(512))))
        .collect();
    let answer = server
        .post(RESPONSES, response("metadata", metadata.into()).to_string())
        .await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}
