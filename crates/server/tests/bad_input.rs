//! What a client can get wrong: each fault has its status, names its culprit in an error of four keys, and harms nothing.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod support;

use axum::body::Body;
use axum::http::Request;
use serde_json::{Value, json};

use crate::support::{Server, Setup, post_request};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Body, the error's `param` and `code`; the status is 400.
type Fault = (String, Option<&'static str>, &'static str);

fn fault(body: &Value, param: &'static str, code: &'static str) -> Fault {
    (body.to_string(), Some(param), code)
}

/// A chat with one more field.
fn chat(field: &str, value: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    body[field] = value;
    body
}

/// A completion with one more field.
fn completion(field: &str, value: Value) -> Value {
    let mut body = json!({ "prompt": "hi" });
    body[field] = value;
    body
}

async fn check(server: &Server, path: &str, faults: Vec<Fault>) {
    for (body, param, code) in faults {
        let answer = server.post(path, &body).await;
        let shown: String = body.chars().take(200).collect();
        assert_eq!(answer.status, 400, "{shown}: {}", answer.body);
        let error = answer.json()["error"].clone();
        let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"], "{shown}");
        assert_eq!(error["type"], "invalid_request_error", "{shown}");
        assert_eq!(error["code"], code, "{shown}: {error}");
        assert_eq!(error["param"].as_str(), param, "{shown}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(!message.is_empty() && message.len() < 600, "{shown}: {message}");
        assert!(answer.header("x-request-id").is_some());
    }
}

/// After all that, the server answers and has counted every refusal.
async fn assert_healthy(server: &Server, num_faults: u64) {
    assert_eq!(server.get("/health").await.status, 200);
    let counted: u64 = server
        .outcomes()
        .await
        .iter()
        .filter(|(outcome, _)| outcome == "invalid")
        .map(|(_, n)| n)
        .sum();
    assert_eq!(counted, num_faults);
    assert_eq!(server.chat(json!({})).await.status, 200);
    server.assert_idle().await;
}

#[tokio::test]
async fn bodies_that_are_no_json_object() {
    let server = Setup::default().start();
    let deep_unknown = format!("{{\"unknown\":{}", "[".repeat(100_000));
    let bodies = [
        "",
        "   ",
        "{",
        "}",
        "[]",
        "null",
        "true",
        "42",
        "\"text\"",
        "{\"messages\":",
        "{\"messages\":[}",
        "{'a':1}",
        "{\"a\":1,}",
        "{\"temperature\":NaN}",
        "{\"temperature\":Infinity}",
        "{\"temperature\":1e999}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"\\ud800\"}]}",
        "{\"a\":1}{\"b\":2}",
        "{\"a\":\"\n\"}",
        "{\"a\" 1}",
        "{\"temperature\":1,\"temperature\":2}",
        "{\"a\":01}",
        "model=tiny",
        "{\"a\":\u{1}}",
        &deep_unknown,
    ];
    let faults: Vec<Fault> = bodies
        .iter()
        .map(|body| ((*body).to_owned(), None, "invalid_json"))
        .collect();
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    let deep = format!(
        "{{\"prompt\":\"a\",\"x\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert_eq!(
        server.post(COMPLETIONS, deep).await.status,
        200,
        "a field nobody reads is skipped, however deep"
    );
    let deep = format!("{{\"prompt\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(server.post(COMPLETIONS, deep).await.status, 400);
    assert_healthy(&server, num_faults + 1).await;
}

#[tokio::test]
async fn bytes_that_are_no_text() {
    let server = Setup::default().start();
    let bodies: [&[u8]; 3] = [
        b"{\"prompt\":\"\xff\xfe\"}",
        b"\x00\x01\x02",
        b"{\"user\":\"\xc3\x28\",\"prompt\":\"a\"}",
    ];
    for body in bodies {
        let answer = server
            .send(Request::post(COMPLETIONS).body(Body::from(body)).unwrap())
            .await;
        assert_eq!(answer.status, 400, "{body:?}");
        assert_eq!(answer.json()["error"]["code"], "invalid_json");
    }
    let bom = "\u{feff}{\"prompt\":\"a\",\"max_tokens\":1}";
    assert_eq!(
        server.post(COMPLETIONS, bom).await.status,
        200,
        "a byte order mark is no fault"
    );
}

#[tokio::test]
async fn fields_of_the_wrong_type() {
    let server = Setup::default().start();
    let wrong = |field: &'static str, value: Value| fault(&chat(field, value), field, "invalid_type");
    let faults = vec![
        wrong("messages", json!("hi")),
        wrong("messages", json!({ "role": "user" })),
        wrong("model", json!(1)),
        wrong("temperature", json!("hot")),
        wrong("temperature", json!([1])),
        wrong("top_p", json!(true)),
        wrong("top_k", json!(1.5)),
        wrong("n", json!("2")),
        wrong("n", json!(1.5)),
        wrong("max_tokens", json!("10")),
        wrong("max_tokens", json!(1e30)),
        wrong("max_completion_tokens", json!({})),
        wrong("seed", json!(9_300_000_000_000_000_000_u64)),
        wrong("seed", json!("x")),
        wrong("stream", json!("true")),
        wrong("stream", json!(2)),
        wrong("stream_options", json!(true)),
        wrong("stream_options", json!([true, true])),
        wrong("stop", json!(1)),
        fault(&chat("stop", json!(["a", 1])), "stop[1]", "invalid_type"),
        wrong("logit_bias", json!([1, 2])),
        fault(&chat("logit_bias", json!({ "5": "x" })), "logit_bias.5", "invalid_type"),
        wrong("logprobs", json!("yes")),
        wrong("tools", json!({})),
        wrong("tool_choice", json!(1)),
        wrong("response_format", json!("text")),
        wrong("chat_template_kwargs", json!("x")),
        wrong("truncate_prompt_tokens", json!("5")),
        wrong("priority", json!("high")),
        wrong("ignore_eos", json!("no")),
        fault(
            &chat("stop_token_ids", json!([1, "2"])),
            "stop_token_ids[1]",
            "invalid_type",
        ),
        fault(&json!({ "messages": ["hi"] }), "messages[0]", "invalid_type"),
        fault(&json!({ "messages": [["user", "hi"]] }), "messages[0]", "invalid_type"),
        fault(
            &json!({ "messages": [{ "role": 1, "content": "hi" }] }),
            "messages[0].role",
            "invalid_type",
        ),
        fault(
            &json!({ "messages": [{ "role": "user", "content": 1 }] }),
            "messages[0].content",
            "invalid_type",
        ),
        fault(
            &json!({ "messages": [{ "role": "user", "content": ["a"] }] }),
            "messages[0].content[0]",
            "invalid_type",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn values_out_of_range() {
    let server = Setup::default().start();
    let bad = |field: &'static str, value: Value, code: &'static str| fault(&chat(field, value), field, code);
    let faults = vec![
        bad("temperature", json!(-0.1), "decimal_out_of_range"),
        bad("temperature", json!(2.1), "decimal_out_of_range"),
        bad("top_p", json!(0), "decimal_out_of_range"),
        bad("top_p", json!(1.01), "decimal_out_of_range"),
        bad("top_k", json!(-2), "integer_below_min_value"),
        bad("min_p", json!(1.5), "decimal_out_of_range"),
        bad("presence_penalty", json!(2.5), "decimal_out_of_range"),
        bad("frequency_penalty", json!(-3), "decimal_out_of_range"),
        bad("repetition_penalty", json!(0), "decimal_out_of_range"),
        bad("repetition_penalty", json!(-1), "decimal_out_of_range"),
        bad("repetition_penalty", json!(1e-60), "decimal_out_of_range"),
        bad("n", json!(0), "integer_below_min_value"),
        bad("n", json!(-1), "integer_below_min_value"),
        bad("n", json!(129), "integer_above_max_value"),
        bad("max_tokens", json!(0), "integer_below_min_value"),
        bad("max_tokens", json!(-5), "integer_below_min_value"),
        bad("max_completion_tokens", json!(0), "integer_below_min_value"),
        bad("min_tokens", json!(-1), "integer_below_min_value"),
        bad("priority", json!(1_i64 << 40), "integer_above_max_value"),
        bad("priority", json!(-1), "unsupported_parameter"),
        bad("timeout", json!(0), "invalid_value"),
        bad("queue_timeout", json!(-0.5), "invalid_value"),
        bad("truncate_prompt_tokens", json!(0), "integer_below_min_value"),
        bad("truncate_prompt_tokens", json!(-2), "integer_below_min_value"),
        bad("truncate_prompt_tokens", json!(257), "integer_above_max_value"),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    let mut minimum = chat("max_tokens", json!(5));
    minimum["min_tokens"] = json!(6);
    let faults = vec![fault(&minimum, "min_tokens", "integer_above_max_value")];
    check(&server, CHAT, faults).await;
    assert_healthy(&server, num_faults + 1).await;
}

#[tokio::test]
async fn values_that_make_no_sense() {
    let server = Setup::default().start();
    let bad = |field: &'static str, value: Value, code: &'static str| fault(&chat(field, value), field, code);
    let many_stops: Vec<String> = (0..17).map(|index| index.to_string()).collect();
    let faults = vec![
        bad("stop", json!(""), "invalid_value"),
        bad("stop", json!(["a", ""]), "invalid_value"),
        bad("stop", json!(many_stops), "array_above_max_length"),
        bad("stop", json!("x".repeat(5000)), "invalid_value"),
        fault(
            &chat("stop_token_ids", json!([-1])),
            "stop_token_ids[0]",
            "invalid_value",
        ),
        fault(
            &chat("stop_token_ids", json!([1, 99_999])),
            "stop_token_ids[1]",
            "invalid_value",
        ),
        bad("stop_token_ids", json!(vec![1; 257]), "array_above_max_length"),
        bad("logit_bias", json!({ "abc": 1 }), "invalid_value"),
        bad("logit_bias", json!({ "99999": 1 }), "invalid_value"),
        bad("logit_bias", json!({ "-1": 1 }), "invalid_value"),
        bad("top_logprobs", json!(3), "invalid_value"),
        bad("cache_salt", json!(""), "invalid_value"),
        fault(
            &json!({ "messages": [{ "role": "user", "content": "a" }], "truncate_prompt_tokens": 5, "truncation_side": "up" }),
            "truncation_side",
            "invalid_value",
        ),
        bad("stream_options", json!({ "include_usage": true }), "invalid_value"),
        bad("tools", json!([]), "invalid_value"),
        bad("tool_choice", json!("auto"), "invalid_value"),
        fault(
            &chat("response_format", json!({})),
            "response_format.type",
            "missing_required_parameter",
        ),
        fault(
            &chat("response_format", json!({ "type": "xml" })),
            "response_format.type",
            "invalid_value",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    let mut logprobs = chat("logprobs", json!(true));
    for count in [21, -1] {
        logprobs["top_logprobs"] = json!(count);
        check(
            &server,
            CHAT,
            vec![fault(&logprobs, "top_logprobs", "integer_above_max_value")],
        )
        .await;
    }
    logprobs["top_logprobs"] = json!(-2);
    check(&server, CHAT, vec![fault(&logprobs, "top_logprobs", "invalid_value")]).await;
    let mut ends = chat("add_generation_prompt", json!(true));
    ends["continue_final_message"] = json!(true);
    check(
        &server,
        CHAT,
        vec![fault(&ends, "continue_final_message", "invalid_value")],
    )
    .await;
    assert_healthy(&server, num_faults + 4).await;
}

#[tokio::test]
async fn conversations_that_are_none() {
    let server = Setup::default().start();
    let messages = |value: Value, param, code| fault(&json!({ "messages": value }), param, code);
    let image = json!([{ "type": "text", "text": "a" }, { "type": "image_url", "image_url": { "url": "x" } }]);
    let faults = vec![
        fault(&json!({}), "messages", "missing_required_parameter"),
        fault(&json!({ "messages": null }), "messages", "missing_required_parameter"),
        messages(json!([]), "messages", "invalid_value"),
        messages(json!([{}]), "messages[0].role", "missing_required_parameter"),
        messages(
            json!([{ "role": "user" }]),
            "messages[0].content",
            "missing_required_parameter",
        ),
        messages(
            json!([{ "role": "user", "content": null }]),
            "messages[0].content",
            "missing_required_parameter",
        ),
        messages(
            json!([{ "role": "wizard", "content": "a" }]),
            "messages[0].role",
            "invalid_value",
        ),
        messages(
            json!([{ "role": "", "content": "a" }]),
            "messages[0].role",
            "invalid_value",
        ),
        fault(
            &json!({ "messages": [{ "role": "user", "content": "a" }, { "role": "wizard", "content": "a" }],
                     "tools": [{ "type": "function", "function": { "name": "now" } }] }),
            "messages[1].role",
            "invalid_value",
        ),
        // Results of calls are said together.
        messages(
            json!([{ "role": "tool", "content": "1" }, { "role": "tool", "content": "2" }, { "role": "wizard", "content": "a" }]),
            "messages[2].role",
            "invalid_value",
        ),
        messages(
            json!([{ "role": "user", "content": image }]),
            "messages[0].content[1].type",
            "unsupported_parameter",
        ),
        messages(
            json!([{ "role": "user", "content": [{ "type": "input_audio" }] }]),
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        messages(
            json!([{ "role": "user", "content": [{ "type": "text" }] }]),
            "messages[0].content[0].text",
            "unsupported_parameter",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn forms_that_cannot_be_kept() {
    let server = Setup::default().start();
    let schema = |schema: Value| {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema } });
        let param = "response_format.json_schema.schema";
        fault(&chat("response_format", format), param, "invalid_value")
    };
    let outputs = |outputs: Value, param| fault(&chat("structured_outputs", outputs), param, "invalid_value");
    let mut two_fields = chat("guided_regex", json!("a"));
    two_fields["response_format"] = json!({ "type": "json_object" });
    let faults = vec![
        fault(
            &chat("response_format", json!({ "type": "json_schema" })),
            "response_format.json_schema",
            "invalid_value",
        ),
        fault(
            &chat(
                "response_format",
                json!({ "type": "json_schema", "json_schema": { "name": "x" } }),
            ),
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        schema(json!({ "type": "strin" })),
        schema(json!([1])),
        schema(json!({ "$ref": "http://localhost/schema.json" })),
        schema(json!({ "not": {} })),
        outputs(json!({}), "structured_outputs"),
        outputs(json!({ "regex": "", "json_object": false }), "structured_outputs"),
        outputs(json!({ "regex": "(" }), "structured_outputs.regex"),
        outputs(json!({ "regex": "a", "choice": ["a"] }), "structured_outputs.choice"),
        outputs(json!({ "choice": [] }), "structured_outputs.choice"),
        outputs(json!({ "grammar": "root ::= x" }), "structured_outputs.grammar"),
        outputs(json!({ "json": "{" }), "structured_outputs.json"),
        fault(&chat("guided_regex", json!("[")), "guided_regex", "invalid_value"),
        fault(&chat("guided_choice", json!("a")), "guided_choice", "invalid_type"),
        fault(&two_fields, "guided_regex", "invalid_value"),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn tools_that_are_none() {
    let server = Setup::default().start();
    let tool = |function: Value| json!([{ "type": "function", "function": function }]);
    let bad = |tools: Value, param| fault(&chat("tools", tools), param, "invalid_value");
    let choose = |choice: Value, param, code| {
        let mut body = chat("tools", tool(json!({ "name": "f" })));
        body["tool_choice"] = choice;
        fault(&body, param, code)
    };
    let mut beside_regex = chat("tools", tool(json!({ "name": "f" })));
    beside_regex["guided_regex"] = json!("a");
    let faults = vec![
        bad(json!([{ "type": "function" }]), "tools[0].function"),
        bad(tool(json!({})), "tools[0].function.name"),
        bad(tool(json!({ "name": "a b" })), "tools[0].function.name"),
        bad(tool(json!({ "name": "a".repeat(65) })), "tools[0].function.name"),
        bad(
            tool(json!({ "name": "f", "parameters": [] })),
            "tools[0].function.parameters",
        ),
        bad(
            tool(json!({ "name": "f", "parameters": { "type": "string" } })),
            "tools[0].function.parameters",
        ),
        fault(
            &chat("tools", json!([{ "type": "web_search" }])),
            "tools[0].type",
            "unsupported_parameter",
        ),
        fault(&chat("tools", json!([1])), "tools[0]", "invalid_type"),
        fault(
            &chat("tools", json!(vec![tool(json!({ "name": "f" }))[0].clone(); 129])),
            "tools",
            "array_above_max_length",
        ),
        choose(json!("always"), "tool_choice", "invalid_value"),
        choose(
            json!({ "type": "function", "function": { "name": "g" } }),
            "tool_choice",
            "invalid_value",
        ),
        choose(
            json!({ "type": "function" }),
            "tool_choice.function.name",
            "missing_required_parameter",
        ),
        choose(
            json!({ "type": "allowed_tools" }),
            "tool_choice.type",
            "unsupported_parameter",
        ),
        fault(&chat("tool_choice", json!("required")), "tool_choice", "invalid_value"),
        fault(&beside_regex, "tools", "unsupported_parameter"),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn parameters_that_are_not_supported() {
    let server = Setup::default().start();
    let no = |field: &'static str, value: Value| fault(&chat(field, value), field, "unsupported_parameter");
    let faults = vec![
        no("audio", json!({ "voice": "x" })),
        no("modalities", json!(["text", "audio"])),
        no("prediction", json!({ "type": "content" })),
        no("use_beam_search", json!(true)),
        no("best_of", json!(3)),
        no("logprob_token_ids", json!([5])),
        no("chat_template", json!("{{ messages }}")),
        no("function_call", json!({ "name": "f" })),
        fault(
            &chat("response_format", json!({ "type": "structural_tag" })),
            "response_format.type",
            "unsupported_parameter",
        ),
        fault(
            &chat("structured_outputs", json!({ "structural_tag": { "a": 1 } })),
            "structured_outputs.structural_tag",
            "unsupported_parameter",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, CHAT, faults).await;
    let faults = vec![
        fault(&completion("suffix", json!("x")), "suffix", "unsupported_parameter"),
        fault(&completion("best_of", json!(2)), "best_of", "unsupported_parameter"),
    ];
    check(&server, COMPLETIONS, faults).await;
    assert_healthy(&server, num_faults + 2).await;
}

#[tokio::test]
async fn prompts_that_are_none() {
    let server = Setup::default().start();
    let prompt = |value: Value, param, code| fault(&json!({ "prompt": value }), param, code);
    let faults = vec![
        fault(&json!({}), "prompt", "missing_required_parameter"),
        prompt(json!([]), "prompt", "invalid_value"),
        prompt(json!([[]]), "prompt[0]", "invalid_value"),
        prompt(json!([[5], []]), "prompt[1]", "invalid_value"),
        prompt(json!([-1]), "prompt[0]", "invalid_value"),
        prompt(json!([99_999]), "prompt[0]", "invalid_value"),
        prompt(json!([[5], [99_999]]), "prompt[1]", "invalid_value"),
        prompt(json!(vec!["a"; 129]), "prompt", "array_above_max_length"),
        prompt(json!({ "text": "a" }), "prompt", "invalid_type"),
        prompt(json!(5), "prompt", "invalid_type"),
        prompt(json!(["a", 5]), "prompt[1]", "invalid_type"),
        prompt(json!([5, "a"]), "prompt[1]", "invalid_type"),
        prompt(json!([5, 1.5]), "prompt[1]", "invalid_type"),
        fault(
            &completion("logprobs", json!(21)),
            "logprobs",
            "integer_above_max_value",
        ),
        fault(&completion("logprobs", json!(-2)), "logprobs", "invalid_value"),
        fault(&completion("logprobs", json!(true)), "logprobs", "invalid_value"),
        fault(
            &completion("max_tokens", json!(0)),
            "max_tokens",
            "integer_below_min_value",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, COMPLETIONS, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn scores_that_cannot_be() {
    let server = Setup::default().start();
    let scored = |count: i64| completion("prompt_logprobs", json!(count));
    let mut streamed = scored(1);
    streamed["stream"] = json!(true);
    let faults = vec![
        fault(&scored(21), "prompt_logprobs", "integer_above_max_value"),
        fault(&scored(-1), "prompt_logprobs", "integer_above_max_value"),
        fault(&scored(-2), "prompt_logprobs", "invalid_value"),
        fault(&streamed, "prompt_logprobs", "invalid_value"),
        fault(
            &completion("prompt_logprobs", json!("all")),
            "prompt_logprobs",
            "invalid_type",
        ),
    ];
    let num_faults = faults.len() as u64;
    check(&server, COMPLETIONS, faults).await;
    assert_healthy(&server, num_faults).await;
}

#[tokio::test]
async fn more_scores_than_an_answer_holds() {
    let mut setup = Setup::default();
    setup.limits.max_scored_logprobs = 100;
    let server = setup.start();
    let scored = |num_tokens: usize, logprobs: u32, n: u32| json!({ "prompt": vec![5; num_tokens], "echo": true, "max_tokens": 0, "logprobs": logprobs, "n": n });
    for (body, status) in [
        (scored(50, 1, 1), 200),
        (scored(51, 1, 1), 400),
        (scored(10, 9, 1), 200),
        (scored(10, 4, 3), 400),
    ] {
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
    }
    assert_healthy(&server, 2).await;
}

#[tokio::test]
async fn prompts_that_do_not_fit() {
    let server = Setup::default().start();
    let long = json!({ "prompt": " hello".repeat(300) });
    let hopeless = json!({ "prompt": " hello".repeat(20_000) });
    let greedy = completion("max_tokens", json!(1000));
    let faults = [long, hopeless, greedy, completion("max_tokens", json!(5e12))];
    for body in &faults {
        let answer = server.post(COMPLETIONS, body).await;
        assert_eq!(answer.status, 400);
        let error = answer.json()["error"].clone();
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["param"], "prompt");
        let message = error["message"].as_str().unwrap();
        assert!(
            message.starts_with("This model's maximum context length is 256 tokens. However, "),
            "{message}"
        );
    }
    let mut full = json!({ "messages": [{ "role": "user", "content": " hello".repeat(300) }] });
    full["max_tokens"] = json!(1);
    let error = server.post(CHAT, full).await.json()["error"].clone();
    assert_eq!(
        (error["code"].as_str(), error["param"].as_str()),
        (Some("context_length_exceeded"), Some("messages"))
    );
    assert_healthy(&server, faults.len() as u64 + 1).await;
}

#[tokio::test]
async fn models_that_are_not_served() {
    let server = Setup::default().start();
    for name in ["gpt-4", "", "tiny ", &"x".repeat(100_000)] {
        let answer = server.chat(json!({ "model": name })).await;
        assert_eq!(answer.status, 404);
        let error = answer.json()["error"].clone();
        assert_eq!(error["code"], "model_not_found");
        assert_eq!(error["param"], "model");
        assert!(error["message"].as_str().unwrap().len() < 400);
    }
    assert_healthy(&server, 4).await;
}

#[tokio::test]
async fn bodies_that_are_too_large() {
    let mut setup = Setup::default();
    setup.limits.max_body_bytes = 1000;
    let server = setup.start();
    let large = json!({ "prompt": "a".repeat(2000) }).to_string();
    let mut announced = post_request(COMPLETIONS, &large);
    announced
        .headers_mut()
        .insert("content-length", large.len().to_string().parse().unwrap());
    for request in [
        announced,
        post_request(COMPLETIONS, &large),
        post_request("/tokenize", &large),
    ] {
        let answer = server.send(request).await;
        assert_eq!(answer.status, 413);
        assert_eq!(answer.json()["error"]["code"], "request_too_large");
        assert_eq!(answer.json()["error"].as_object().unwrap().len(), 4);
    }
    assert_healthy(&server, 2).await;
}

#[tokio::test]
async fn faults_of_the_small_endpoints() {
    let server = Setup::default().start();
    let faults = vec![
        fault(&json!({}), "prompt", "missing_required_parameter"),
        fault(&json!({ "prompt": 1 }), "prompt", "invalid_type"),
        fault(&json!({ "prompt": "a", "messages": [] }), "messages", "invalid_value"),
        fault(&json!({ "messages": [] }), "messages", "invalid_value"),
        (String::new(), None, "invalid_json"),
    ];
    check(&server, "/tokenize", faults).await;
    let faults = vec![
        fault(&json!({}), "tokens", "missing_required_parameter"),
        fault(&json!({ "tokens": "a" }), "tokens", "invalid_type"),
        fault(&json!({ "tokens": [1, 99_999] }), "tokens[1]", "invalid_value"),
        fault(&json!({ "tokens": [1, -1] }), "tokens[1]", "invalid_value"),
    ];
    check(&server, "/detokenize", faults).await;
    assert_healthy(&server, 0).await;
}

#[tokio::test]
async fn headers_that_make_no_sense() {
    let server = Setup::default().start();
    for name in ["x-request-timeout", "x-queue-timeout"] {
        for value in ["soon", "-1", "0", "NaN", "inf", "1e300"] {
            let mut request = post_request(CHAT, chat("n", json!(1)));
            request.headers_mut().insert(name, value.parse().unwrap());
            let answer = server.send(request).await;
            assert_eq!(answer.status, 400, "{value}");
            assert_eq!(answer.json()["error"]["param"], name);
        }
    }
    assert_healthy(&server, 12).await;
}

#[tokio::test]
async fn lists_that_no_context_holds_are_refused_unread() {
    let server = Setup::default().start();
    let ids = vec![5; 500_000];
    let turns: Vec<Value> = (0..60_000)
        .map(|turn| json!({ "role": if turn % 2 == 0 { "user" } else { "assistant" }, "content": "" }))
        .collect();
    let faults = [
        (COMPLETIONS, json!({ "prompt": ids, "echo": true }), "prompt"),
        (CHAT, json!({ "messages": turns }), "messages"),
        ("/detokenize", json!({ "tokens": ids }), "tokens"),
        ("/tokenize", json!({ "messages": turns }), "messages"),
    ];
    for (path, body, param) in faults {
        let answer = server.post(path, body).await;
        assert_eq!(answer.status, 400, "{path}");
        let error = answer.json()["error"].clone();
        assert_eq!(
            (error["code"].as_str(), error["param"].as_str()),
            (Some("context_length_exceeded"), Some(param)),
            "{path}"
        );
    }
    assert_healthy(&server, 2).await;
}

#[tokio::test]
async fn answers_that_can_never_be_queued_together_are_refused_for_good() {
    let mut setup = Setup::default();
    setup.engine.max_queued_requests = 4;
    let server = setup.start();
    check(&server, CHAT, vec![fault(&chat("n", json!(8)), "n", "invalid_value")]).await;
    assert_healthy(&server, 1).await;
}
