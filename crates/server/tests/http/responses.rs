//! `/v1/responses` without state: the chat behind it, in the newer shape.

use http_body_util::BodyExt;
use lapidary_engine::{EngineConfig, Script};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{Answer, Server, Setup, post_request};

fn drawing() -> Server {
    let mut setup = Setup {
        engine: EngineConfig {
            max_model_len: 2000,
            ..EngineConfig::default()
        },
        ..Setup::default()
    };
    setup.scripted.script = Some(Script::new(|_| None));
    setup.start()
}

async fn respond(server: &Server, body: Value) -> Answer {
    server.post("/v1/responses", body).await
}

/// Names and data of all events; each name is its data's type, and they are numbered.
fn events(answer: &Answer) -> Vec<Value> {
    let events = answer.body.split_terminator("\n\n").map(|event| {
        let (name, data) = event.split_once("\ndata: ").expect("an event");
        let data: Value = serde_json::from_str(data).expect("data is JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
        data
    });
    let events: Vec<Value> = events.collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    events
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_text_is_answered_in_openais_shape() {
    let server = Setup::default().start();
    let answer = respond(
        &server,
        json!({ "model": "tiny", "input": "the fox", "metadata": { "a": "b" } }),
    )
    .await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!(
        (&body["object"], &body["status"]),
        (&json!("response"), &json!("completed"))
    );
    assert_eq!(body["metadata"], json!({ "a": "b" }));
    for absent in [
        "error",
        "incomplete_details",
        "instructions",
        "previous_response_id",
        "max_output_tokens",
    ] {
        assert_eq!(body.get(absent), Some(&Value::Null), "{absent}");
    }
    let item = &body["output"][0];
    assert!(item["id"].as_str().unwrap().starts_with("msg_"));
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    let ignored = json!({ "input": "the fox", "text": { "format": { "type": "text", "schema": 5 } } });
    let format = respond(&server, ignored).await.json()["text"]["format"].clone();
    assert_eq!(format, json!({ "type": "text" }));
    let part = json!({ "type": "output_text", "text": " hello world", "annotations": [], "logprobs": [] });
    assert_eq!(item["content"], json!([part]));
    let usage = &body["usage"];
    assert_eq!(usage["output_tokens"], 3);
    let sum = usage["input_tokens"].as_u64().unwrap() + 3;
    assert_eq!(usage["total_tokens"], sum);
    assert_eq!(server.outcomes().await, [("stop".to_owned(), 2)]);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_stream_tells_what_the_body_says() {
    let server = Setup::default().start();
    let answer = respond(&server, json!({ "input": "the fox", "stream": true })).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let events = events(&answer);
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(types(&events), expected);
    assert_eq!(events[0]["response"]["status"], "in_progress");
    assert_eq!(events[2]["item"]["content"], json!([]));
    assert_eq!(
        (&events[4]["delta"], &events[5]["delta"]),
        (&json!(" hello"), &json!(" world"))
    );
    assert_eq!(events[6]["text"], " hello world");
    let id = &events[2]["item"]["id"];
    assert!(
        events[3..8]
            .iter()
            .all(|event| event["item_id"] == *id && event["output_index"] == 0)
    );
    assert_eq!(events[9]["response"]["output"], json!([events[8]["item"]]));
    assert_eq!(events[9]["response"]["usage"]["output_tokens"], 3);
}

#[tokio::test]
async fn log_probabilities_come_with_the_text_if_they_are_included() {
    let server = Setup::answering(&["▁hello", "<0xC3>", "<0xA9>"]).start();
    let mut body =
        json!({ "input": "the fox", "include": ["message.output_text.logprobs", "reasoning.encrypted_content"] });
    let plain = respond(&server, body.clone()).await.json();
    let logprobs = plain["output"][0]["content"][0]["logprobs"].as_array().unwrap().clone();
    let tokens: Vec<_> = logprobs.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(tokens, [" hello", "\u{fffd}", "\u{fffd}", "<end_of_turn>"]);
    assert_eq!(
        logprobs[1],
        json!({ "token": "\u{fffd}", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": [] })
    );
    body["top_logprobs"] = json!(2);
    let whole = respond(&server, body.clone()).await.json();
    assert_eq!(whole["top_logprobs"], 2);
    let part = whole["output"][0]["content"][0].clone();
    assert_eq!(part["logprobs"][0]["top_logprobs"].as_array().unwrap().len(), 2);
    body["stream"] = json!(true);
    let events = events(&respond(&server, body.clone()).await);
    let of_type = |kind: &'static str| events.iter().filter(move |event| event["type"] == kind);
    let deltas = of_type("response.output_text.delta");
    let streamed: Vec<Value> = deltas
        .flat_map(|event| event["logprobs"].as_array().unwrap().clone())
        .collect();
    let mut told = part["logprobs"].clone();
    for entry in told.as_array_mut().unwrap() {
        entry.as_object_mut().unwrap().remove("bytes");
        for alternative in entry["top_logprobs"].as_array_mut().unwrap() {
            alternative.as_object_mut().unwrap().remove("bytes");
        }
    }
    assert_eq!(json!(streamed), told, "events have no bytes");
    let done = of_type("response.output_text.done").next().unwrap();
    assert_eq!(done["logprobs"], told);
    let closed = of_type("response.content_part.done").next().unwrap();
    assert_eq!(closed["part"], part);
    let added = of_type("response.content_part.added").next().unwrap();
    assert_eq!(added["part"]["logprobs"], json!([]));
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0], part);

    body = json!({ "input": "the fox", "top_logprobs": 2 });
    let without = respond(&server, body).await.json();
    assert_eq!(without["output"][0]["content"][0]["logprobs"], json!([]));
}

#[tokio::test]
async fn calls_have_no_log_probabilities() {
    let server = drawing();
    let tools = json!([{ "type": "function", "name": "pick", "parameters": { "type": "object", "properties": {} } }]);
    let body = json!({ "input": "pick", "tools": tools, "tool_choice": "required", "parallel_tool_calls": false,
        "include": ["message.output_text.logprobs"] });
    let answer = respond(&server, body).await.json();
    let kinds: Vec<_> = answer["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["type"])
        .collect();
    assert_eq!(kinds, ["function_call"], "{answer}");
}

#[tokio::test]
async fn what_is_cut_off_is_incomplete() {
    let server = Setup::answering(&["a"; 50]).start();
    let body = json!({ "input": [{ "role": "user", "content": "x" }], "max_output_tokens": 4 });
    let answer = respond(&server, body.clone()).await.json();
    assert_eq!(answer["status"], "incomplete");
    assert_eq!(answer["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(answer["output"][0]["content"][0]["text"], "aaaa");
    let mut body = body;
    body["stream"] = json!(true);
    let events = events(&respond(&server, body).await);
    assert_eq!(types(&events).last(), Some(&"response.incomplete"));
}

#[tokio::test]
async fn forms_and_calls_are_kept_and_their_results_taken() {
    let server = drawing();
    let format = json!({ "type": "json_schema", "name": "x", "strict": true, "schema": { "enum": ["yes", "no"] } });
    let answer = respond(&server, json!({ "input": "?", "text": { "format": format } }))
        .await
        .json();
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(["\"yes\"", "\"no\""].contains(&text), "{answer}");
    assert_eq!(answer["text"]["format"]["name"], "x");

    let tools = json!([{ "type": "function", "name": "pick", "parameters": {
        "type": "object", "properties": { "n": { "enum": [1, 2] } }, "required": ["n"], "additionalProperties": false } }]);
    let choice = json!({ "type": "function", "name": "pick" });
    let body = json!({ "input": "pick", "tools": tools, "tool_choice": choice, "parallel_tool_calls": false });
    let answer = respond(&server, body.clone()).await.json();
    let call = answer["output"][0].clone();
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("pick")),
        "{answer}"
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(
        [json!({ "n": 1 }), json!({ "n": 2 })].contains(&arguments),
        "{arguments}"
    );
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let events = events(&respond(&server, streamed).await);
    let kinds = types(&events);
    assert_eq!(kinds[2], "response.output_item.added");
    assert_eq!(kinds[3], "response.function_call_arguments.delta");
    assert_eq!(
        &kinds[kinds.len() - 3..],
        [
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed"
        ]
    );
    let deltas = events.iter().filter_map(|event| event["delta"].as_str());
    assert_eq!(
        deltas.collect::<String>(),
        events[events.len() - 3]["arguments"].as_str().unwrap()
    );

    let history = json!([
        { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "pick" }] },
        { "type": "reasoning", "summary": [] },
        call,
        { "type": "function_call_output", "call_id": call["call_id"], "output": "done" },
    ]);
    let body = json!({ "input": history, "instructions": "be kind", "tools": tools, "tool_choice": "none", "max_output_tokens": 3 });
    let answer = respond(&server, body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.json()["instructions"], "be kind");
}

#[tokio::test]
async fn faults_are_named_in_the_requests_own_words() {
    let server = Setup::default().start();
    let cases = [
        (json!({}), "input"),
        (
            json!({ "input": "a", "previous_response_id": "resp_1" }),
            "previous_response_id",
        ),
        (json!({ "input": "a", "background": true }), "background"),
        (json!({ "input": "a", "max_output_tokens": 0 }), "max_output_tokens"),
        (json!({ "input": "a", "temperature": 3 }), "temperature"),
        (
            json!({ "input": [{ "type": "item_reference", "id": "x" }] }),
            "input[0].type",
        ),
        (
            json!({ "instructions": "x", "input": [{ "role": "user" }] }),
            "input[0].content",
        ),
        (
            json!({ "instructions": "x", "input": [{ "type": "reasoning" }, { "role": "user" }] }),
            "input[1].content",
        ),
        (
            json!({ "input": [{ "type": "reasoning" }, { "role": "wizard", "content": "a" }] }),
            "input[1].role",
        ),
        (
            json!({ "input": [{ "role": "user", "content": [{ "type": "input_image" }] }] }),
            "input[0].content[0].type",
        ),
        (
            json!({ "input": "a", "text": { "format": { "type": "json_schema", "name": "x", "schema": { "type": "no" } } } }),
            "text.format.schema",
        ),
        (
            json!({ "input": "a", "tools": [{ "type": "web_search" }] }),
            "tools[0].type",
        ),
        (
            json!({ "input": "a", "tools": [{ "type": "function" }] }),
            "tools[0].name",
        ),
        (json!({ "input": "x ".repeat(2000) }), "input"),
        (
            json!({ "input": "a", "include": ["reasoning.encrypted_content", "thoughts"] }),
            "include[1]",
        ),
        (json!({ "input": "a", "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "input": "a", "metadata": 5 }), "metadata"),
        (json!({ "input": "a", "metadata": { "a": "b", "c": 1 } }), "metadata.c"),
        (json!({ "input": "a", "top_logprobs": -1 }), "top_logprobs"),
    ];
    let num_cases = cases.len() as u64;
    for (body, param) in cases {
        let answer = respond(&server, body.clone()).await;
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        assert_eq!(answer.json()["error"]["param"], param, "{}", answer.body);
    }
    assert_eq!(server.outcomes().await, [("invalid".to_owned(), num_cases)]);
}

#[tokio::test]
async fn a_failure_after_the_first_event_is_one_more() {
    let server = Setup::answering(&["a"; 50]).failing_at([3]).start();
    let answer = respond(&server, json!({ "input": "x", "stream": true })).await;
    let events = events(&answer);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["status"], "failed");
    assert_eq!(last["response"]["error"]["code"], "internal_error");
    server.assert_idle().await;
}

/// The status and a comment are sent by then: clients take a failure for one of a response that they know.
#[tokio::test(start_paused = true)]
async fn a_failure_before_the_first_token_is_that_of_a_response_that_began() {
    let (setup, gate) = Setup::default().failing_at([0, 1]).gated();
    let server = setup.start();
    let body = json!({ "input": "x", "stream": true });
    let response = server.router.clone().oneshot(post_request("/v1/responses", body));
    let (parts, body) = response.await.unwrap().into_parts();
    assert_eq!(parts.status, 200);
    drop(gate);
    let bytes = body.collect().await.unwrap().to_bytes();
    let answer = Answer {
        status: parts.status,
        headers: parts.headers,
        body: String::from_utf8(bytes.to_vec()).unwrap().replace(": ping\n\n", ""),
    };
    let events = events(&answer);
    assert_eq!(
        types(&events),
        ["response.created", "response.in_progress", "response.failed"]
    );
    assert_eq!(events[2]["response"]["error"]["code"], "internal_error");
    server.assert_idle().await;
}
