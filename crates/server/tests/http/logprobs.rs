//! Log-probabilities in both shapes.

use serde_json::{Value, json};

use crate::support::Setup;

#[tokio::test]
async fn a_chat_names_each_token_with_its_bytes_and_alternatives() {
    let server = Setup::answering(&["▁hello", "<0xC3>", "<0xA9>", "!"]).start();
    let body = server.chat(json!({ "logprobs": true, "top_logprobs": 2 })).await.json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(body["choices"][0]["logprobs"]["refusal"], Value::Null);
    assert_eq!(
        content.len(),
        5,
        "one for each completion token, the stop token included: {content:?}"
    );
    assert_eq!(content[0]["token"], " hello");
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"], json!([32, 104, 101, 108, 108, 111]));
    assert_eq!(
        content[0]["top_logprobs"][0],
        json!({ "token": " hello", "logprob": -0.5, "bytes": content[0]["bytes"] })
    );
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(content[1]["bytes"], json!([0xC3]), "a byte token's bytes are its byte");
    assert_eq!(content[4]["token"], "<end_of_turn>");
    let plain = server.chat(json!({ "logprobs": true })).await.json();
    assert_eq!(plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    assert_eq!(
        server.chat(json!({ "logprobs": false })).await.json()["choices"][0]["logprobs"],
        Value::Null
    );
}

#[tokio::test]
async fn a_completion_has_parallel_arrays_with_offsets_in_characters() {
    let server = Setup::answering(&["▁straße", "<0xC3>", "<0xA9>", "▁hello", "!"]).start();
    let body = server.complete(json!({ "prompt": "müde", "logprobs": 1 })).await.json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(body["choices"][0]["text"], " straßeé hello!");
    assert_eq!(logprobs["text_offset"], json!([0, 7, 7, 8, 14, 15]));
    assert_eq!(
        logprobs["tokens"],
        json!([" straße", "\u{fffd}", "\u{fffd}", " hello", "!", "<end_of_turn>"])
    );
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["top_logprobs"][3], json!({ " hello": -0.5 }));
}

#[tokio::test]
async fn a_streams_chunks_carry_each_token_once_and_in_order() {
    let server = Setup::answering(&["▁hello", "<0xC3>", "<0xA9>", "▁wor", "l", "d", "!"]).start();
    for (path, stop) in [
        ("/v1/chat/completions", json!(null)),
        ("/v1/completions", json!(["ld!x", "orl"])),
    ] {
        let body = json!({
            "messages": [{ "role": "user", "content": "hello" }], "prompt": "hello", "stop": stop,
            "logprobs": if path.contains("chat") { json!(true) } else { json!(1) },
        });
        let entries = |logprobs: &Value| -> Vec<Value> {
            let arrays = if path.contains("chat") {
                &logprobs["content"]
            } else {
                &logprobs["tokens"]
            };
            arrays.as_array().cloned().unwrap_or_default()
        };
        let whole = server.post(path, &body).await.json();
        let mut stream = body.clone();
        stream["stream"] = json!(true);
        let chunks = server.post(path, stream).await.chunks();
        let streamed: Vec<Value> = chunks
            .iter()
            .flat_map(|c| entries(&c["choices"][0]["logprobs"]))
            .collect();
        assert_eq!(streamed, entries(&whole["choices"][0]["logprobs"]));
        assert_eq!(
            streamed.len() as u64,
            whole["usage"]["completion_tokens"].as_u64().unwrap()
        );
    }
}
