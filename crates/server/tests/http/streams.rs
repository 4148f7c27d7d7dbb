//! Answers as server-sent events.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{Setup, post_request, with_messages};

/// `id` and `created` differ from run to run.
fn normalised(body: &str) -> String {
    let mut events = Vec::new();
    for event in body.split_terminator("\n\n") {
        match event.strip_prefix("data: ").map(serde_json::from_str::<Value>) {
            Some(Ok(chunk)) => {
                let event = event.replace(chunk["id"].as_str().unwrap(), "ID");
                events.push(event.replace(&format!("\"created\":{}", chunk["created"]), "\"created\":0"));
            }
            _ => events.push(event.to_owned()),
        }
    }
    events.join("\n")
}

#[tokio::test]
async fn a_chat_streams_role_text_finish_usage_and_end() {
    let server = Setup::default().start();
    let body = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let answer = server.chat(body).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(answer.header("cache-control"), Some("no-cache"));
    assert_eq!(answer.header("x-accel-buffering"), Some("no"));
    let head = concat!(
        r#"data: {"id":"ID","object":"chat.completion.chunk","created":0,"model":"tiny","#,
        r#""system_fingerprint":"fp_test","choices":["#
    );
    let choice = |rest: &str| format!(r#"{head}{{"index":0,{rest}}}],"usage":null}}"#);
    let prompt_tokens = answer.chunks().last().unwrap()["usage"]["prompt_tokens"]
        .as_u64()
        .unwrap();
    let usage = format!(
        r#"{{"prompt_tokens":{prompt_tokens},"total_tokens":{},"completion_tokens":3,"prompt_tokens_details":{{"cached_tokens":0}}}}"#,
        prompt_tokens + 3
    );
    let expected = [
        choice(r#""delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null"#),
        choice(r#""delta":{"content":" hello"},"logprobs":null,"finish_reason":null"#),
        choice(r#""delta":{"content":" world"},"logprobs":null,"finish_reason":null"#),
        choice(r#""delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":107"#),
        format!(r#"{head}],"usage":{usage}}}"#),
        "data: [DONE]".to_owned(),
    ];
    assert_eq!(normalised(&answer.body), expected.join("\n"));
    assert!(answer.body.ends_with("\n\ndata: [DONE]\n\n"));
}

#[tokio::test]
async fn a_completion_streams_text_and_finish() {
    let server = Setup::answering(&["▁hello"]).start();
    let answer = server
        .complete(json!({ "prompt": "the", "stream": true, "echo": true }))
        .await;
    let head = concat!(
        r#"data: {"id":"ID","object":"text_completion","created":0,"model":"tiny","#,
        r#""system_fingerprint":"fp_test","choices":[{"index":0,"#
    );
    let expected = [
        format!(r#"{head}"text":"the","logprobs":null,"finish_reason":null}}]}}"#),
        format!(r#"{head}"text":" hello","logprobs":null,"finish_reason":null}}]}}"#),
        format!(r#"{head}"text":"","logprobs":null,"finish_reason":"stop","stop_reason":107}}]}}"#),
        "data: [DONE]".to_owned(),
    ];
    assert_eq!(normalised(&answer.body), expected.join("\n"));
}

#[tokio::test]
async fn continuous_usage_is_in_every_chunk_and_never_falls() {
    let server = Setup::default().start();
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let chunks = server
        .chat(json!({ "stream": true, "stream_options": options, "n": 2 }))
        .await
        .chunks();
    let tokens: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert!(tokens.is_sorted(), "{tokens:?}");
    assert_eq!(tokens.last(), Some(&6));
}

#[tokio::test]
async fn every_choice_has_one_role_and_one_finish() {
    let server = Setup::default().start();
    let chunks = server.chat(json!({ "stream": true, "n": 3 })).await.chunks();
    for index in 0..3 {
        let of_choice: Vec<_> = chunks
            .iter()
            .map(|c| &c["choices"][0])
            .filter(|c| c["index"] == index)
            .collect();
        assert_eq!(of_choice[0]["delta"]["role"], "assistant");
        assert_eq!(of_choice.iter().filter(|c| c["delta"].get("role").is_some()).count(), 1);
        assert_eq!(of_choice.iter().filter(|c| !c["finish_reason"].is_null()).count(), 1);
        assert_eq!(of_choice.last().unwrap()["finish_reason"], "stop");
        let text: String = of_choice
            .iter()
            .filter_map(|c| c["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, " hello world");
    }
}

#[tokio::test]
async fn a_stream_says_what_the_whole_answer_says() {
    let server = Setup::answering(&["▁hello", "<0xC3>", "<0xA9>", "▁wor", "l", "d", "\n", "\"", "▁then"]).start();
    for extra in [
        json!({}),
        json!({ "stop": ["ld\n\"", "x"] }),
        json!({ "stop": "t", "include_stop_str_in_output": true }),
    ] {
        let mut body = with_messages(extra);
        let whole = server.chat(body.clone()).await.json();
        body["stream"] = json!(true);
        let chunks = server.chat(body).await.chunks();
        let text: String = chunks
            .iter()
            .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
        assert_eq!(
            chunks.last().unwrap()["choices"][0]["stop_reason"],
            whole["choices"][0]["stop_reason"]
        );
    }
}

#[tokio::test]
async fn no_line_of_a_stream_can_be_split_by_its_text() {
    let server = Setup::answering(&["\n", "<0xE2>", "<0x80>", "<0xA8>", "<0xC2>", "<0x85>", "a"]).start();
    let answer = server.chat(json!({ "stream": true })).await;
    assert!(!answer.body.contains(['\u{2028}', '\u{85}', '\r']));
    let text: String = answer
        .chunks()
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(text, "\n\u{2028}\u{85}a");
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_is_pinged_and_its_status_waits_for_the_first() {
    let (setup, gate) = Setup::default().gated();
    let server = setup.start();
    let body = with_messages(json!({ "stream": true }));
    // Nothing comes before the keep-alive interval is over: then the status and a comment.
    let started = tokio::time::Instant::now();
    let response = server
        .router
        .clone()
        .oneshot(post_request("/v1/chat/completions", body))
        .await
        .unwrap();
    assert_eq!(started.elapsed().as_secs(), 15);
    assert_eq!(response.status(), 200);
    let mut body = response.into_body();
    let mut next =
        async || String::from_utf8(body.frame().await.unwrap().unwrap().into_data().unwrap().to_vec()).unwrap();
    assert_eq!(next().await, ": ping\n\n");
    assert_eq!(next().await, ": ping\n\n");
    assert!(started.elapsed() >= Duration::from_secs(30));
    drop(gate);
    let mut rest = String::new();
    while !rest.ends_with("data: [DONE]\n\n") {
        rest += &next().await;
    }
    assert!(rest.replace(": ping\n\n", "").starts_with("data: {"));
}

#[tokio::test]
async fn a_client_that_is_late_to_read_makes_no_token_late() {
    let server = Setup::answering(&["a"; 50]).start();
    let began = Instant::now();
    let body = with_messages(json!({ "stream": true }));
    let response = server
        .router
        .clone()
        .oneshot(post_request("/v1/chat/completions", body));
    let response = response.await.unwrap();
    server.engine.idle().await;
    let generated_within = began.elapsed();
    // For longer than all of it took, the rest of the answer lies there.
    while began.elapsed() < 3 * generated_within {
        tokio::task::yield_now().await;
    }
    response.into_body().collect().await.unwrap();
    let between_tokens = server.metric("vllm:inter_token_latency_seconds_sum", "").await;
    assert!(between_tokens > 0.0);
    assert!(
        between_tokens <= generated_within.as_secs_f64(),
        "{between_tokens} s of {generated_within:?}"
    );
}

#[tokio::test]
async fn tokens_that_wait_for_a_slow_client_share_frames() {
    let server = Setup::answering(&["a"; 200]).start();
    let body = with_messages(json!({ "stream": true }));
    let response = server
        .router
        .clone()
        .oneshot(post_request("/v1/chat/completions", body))
        .await
        .unwrap();
    server.engine.idle().await;
    let mut body = response.into_body();
    let mut num_frames = 0;
    while let Some(frame) = body.frame().await {
        num_frames += 1;
        assert!(
            frame.unwrap().into_data().unwrap().len() < 32 << 10,
            "frames are bounded"
        );
    }
    assert!(num_frames < 20, "{num_frames} frames for 200 tokens");
}
