//! Answers in one piece.

use lapidary_server::Limits;
use serde_json::{Value, json};

use crate::support::{END_OF_TURN, EOS, Setup};

#[tokio::test]
async fn a_chat_is_answered_in_openais_shape() {
    let server = Setup::default().start();
    let answer = server.chat(json!({ "model": "tiny" })).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let body = answer.json();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let created = body["created"].as_u64().unwrap();
    assert_eq!(
        answer.body,
        format!(
            concat!(
                r#"{{"id":{id},"object":"chat.completion","created":{created},"model":"tiny","#,
                r#""system_fingerprint":"fp_test","choices":[{{"index":0,"message":{{"role":"assistant","#,
                r#""content":" hello world","refusal":null,"annotations":null,"audio":null,"function_call":null,"#,
                r#""reasoning":null}},"logprobs":null,"finish_reason":"stop","stop_reason":107}}],"#,
                r#""usage":{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":3,"#,
                r#""prompt_tokens_details":{{"cached_tokens":0}}}},"service_tier":null}}"#
            ),
            id = body["id"],
            created = created,
            prompt = body["usage"]["prompt_tokens"],
            total = body["usage"]["prompt_tokens"].as_u64().unwrap() + 3,
        )
    );
}

#[tokio::test]
async fn a_completion_is_answered_in_openais_shape() {
    let server = Setup::default().start();
    let body = server.complete(json!({ "prompt": "the" })).await.json();
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(body["object"], "text_completion");
    assert_eq!(
        body["choices"],
        json!([{ "index": 0, "text": " hello world", "logprobs": null, "finish_reason": "stop", "stop_reason": 107 }])
    );
    assert_eq!(body["usage"]["prompt_tokens"], 3, "BOS, t, he: {body}");
}

#[tokio::test]
async fn a_completion_has_16_tokens_unless_it_says_otherwise() {
    let server = Setup::answering(&["a"; 100]).start();
    let body = server.complete(json!({ "prompt": "x" })).await.json();
    assert_eq!(body["usage"]["completion_tokens"], 16);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][0]["stop_reason"], Value::Null);
}

#[tokio::test]
async fn a_chat_goes_on_until_the_context_is_full() {
    let server = Setup::answering(&["a"; 1000]).start();
    let usage = server.chat(json!({})).await.json()["usage"].clone();
    assert_eq!(usage["total_tokens"], 256);
}

#[tokio::test]
async fn max_completion_tokens_wins_over_max_tokens() {
    let server = Setup::answering(&["a"; 100]).start();
    let body = server
        .chat(json!({ "max_tokens": 50, "max_completion_tokens": 2.0 }))
        .await
        .json();
    assert_eq!(body["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn the_models_own_end_of_sequence_is_no_stop_reason() {
    let server = Setup::answering(&["a", "<eos>"]).start();
    let body = server.chat(json!({})).await.json();
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["stop_reason"], Value::Null);
    let body = server.chat(json!({ "stop_token_ids": [EOS] })).await.json();
    assert_eq!(body["choices"][0]["stop_reason"], EOS);
}

#[tokio::test]
async fn ignore_eos_goes_on_to_the_limit() {
    let server = Setup::answering(&["a"]).start();
    let body = server.chat(json!({ "ignore_eos": true, "max_tokens": 5 })).await.json();
    assert_eq!(body["usage"]["completion_tokens"], 5);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["choices"][0]["message"]["content"], "a");
    let shown = json!({ "ignore_eos": true, "max_tokens": 2, "skip_special_tokens": false });
    let body = server.chat(shown).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "a<end_of_turn>");
}

#[tokio::test]
async fn a_stop_string_across_tokens_ends_the_answer_before_it() {
    let server = Setup::answering(&["▁hello", "▁wor", "l", "d", "▁then", "▁the", "▁fox"]).start();
    let body = server.chat(json!({ "stop": ["ldt", "ld th"] })).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], " hello wor");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["stop_reason"], "ld th");
    assert_eq!(body["usage"]["completion_tokens"], 5, "tokens up to the stop string");
    let body = server
        .chat(json!({ "stop": "ld th", "include_stop_str_in_output": true }))
        .await
        .json();
    assert_eq!(body["choices"][0]["message"]["content"], " hello world th");
    server.assert_idle().await;
}

#[tokio::test]
async fn text_that_only_began_a_stop_string_is_given_out_at_the_end() {
    let server = Setup::default().start();
    let body = server.chat(json!({ "stop": ["world!"] })).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], " hello world");
    assert_eq!(body["choices"][0]["stop_reason"], END_OF_TURN);
}

#[tokio::test]
async fn a_stop_token_is_shown_on_demand() {
    let server = Setup::answering(&["▁hello", "▁world", "▁fox"]).start();
    let world = server
        .post("/tokenize", r#"{"prompt":" world","add_special_tokens":false}"#)
        .await
        .json();
    let world = world["tokens"][0].clone();
    let body = server.chat(json!({ "stop_token_ids": [world] })).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], " hello");
    assert_eq!(body["choices"][0]["stop_reason"], world);
    let shown = json!({ "stop_token_ids": [world], "include_stop_str_in_output": true });
    assert_eq!(
        server.chat(shown).await.json()["choices"][0]["message"]["content"],
        " hello world"
    );
}

#[tokio::test]
async fn characters_of_several_tokens_come_out_whole() {
    let server = Setup::answering(&["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!"]).start();
    let body = server.chat(json!({})).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "😀!");
}

#[tokio::test]
async fn n_answers_for_each_of_several_prompts_are_numbered_in_order() {
    let server = Setup::default().start();
    let body = server.complete(json!({ "prompt": ["the", [2, 300]], "n": 2 })).await;
    assert_eq!(body.status, 400, "texts and ids do not mix");
    let body = server
        .complete(json!({ "prompt": ["the", "a"], "n": 2, "echo": true }))
        .await
        .json();
    let texts: Vec<_> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!(
        texts,
        ["the hello world", "the hello world", "a hello world", "a hello world"]
    );
    let indices: Vec<_> = body["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(body["usage"]["prompt_tokens"], 3 + 2, "each prompt once: {body}");
    assert_eq!(body["usage"]["completion_tokens"], 4 * 3);
}

#[tokio::test]
async fn prompts_of_token_ids_are_taken_as_they_are() {
    let server = Setup::default().start();
    for (prompt, num_tokens, num_choices) in [
        (json!([300, 301.0]), 2, 1),
        (json!([[300], [301, 302]]), 3, 2),
        (json!("▁"), 2, 1),
    ] {
        let body = server
            .complete(json!({ "prompt": prompt, "max_tokens": 1 }))
            .await
            .json();
        assert_eq!(body["usage"]["prompt_tokens"], num_tokens, "{body}");
        assert_eq!(body["choices"].as_array().unwrap().len(), num_choices);
    }
}

#[tokio::test]
async fn echo_alone_returns_the_prompt() {
    let server = Setup::default().start();
    let body = server
        .complete(json!({ "prompt": "hello", "echo": true, "max_tokens": 0 }))
        .await
        .json();
    assert_eq!(body["choices"][0]["text"], "hello");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn equal_seeds_give_equal_answers_and_no_seed_does_not() {
    let mut setup = Setup::default();
    setup.scripted.script = Some(lapidary_engine::Script::new(|_| None));
    let server = setup.start();
    let ask = |seed: Value| json!({ "prompt": "the", "max_tokens": 12, "n": 2, "seed": seed, "ignore_eos": true });
    let texts = async |seed: Value| server.complete(ask(seed)).await.json()["choices"].clone();
    let (first, second) = (texts(json!(7)).await, texts(json!(7)).await);
    assert_eq!(first, second);
    assert_ne!(first[0]["text"], first[1]["text"], "siblings have seeds of their own");
    assert_ne!(texts(Value::Null).await, texts(Value::Null).await);
    let batch = json!({ "prompt": ["x", "the"], "max_tokens": 12, "seed": 7, "ignore_eos": true });
    let batch = server.complete(batch).await.json();
    assert_eq!(
        batch["choices"][1]["text"], first[0]["text"],
        "a prompt's answer does not depend on its neighbours"
    );
}

#[tokio::test]
async fn null_means_absent_and_unknown_fields_are_ignored() {
    let server = Setup::default().start();
    let body = json!({
        "model": null, "temperature": null, "top_p": null, "n": null, "stream": null, "stop": null, "max_tokens": null,
        "stream_options": null, "tools": null, "tool_choice": null, "response_format": null, "logit_bias": null,
        "logprobs": null, "top_logprobs": null, "seed": null, "user": "u", "metadata": { "a": "b" }, "store": true,
        "service_tier": "auto", "parallel_tool_calls": true, "verbosity": "low", "no_such_field": [1, { "a": [] }],
        "suffix": null, "best_of": null, "audio": null, "prediction": null, "modalities": ["text"],
        "messages": [{ "role": "user", "content": "hello", "name": "bob", "extra": 1 }],
    });
    assert_eq!(server.chat(body).await.status, 200);
}

#[tokio::test]
async fn conversations_real_clients_send_are_answered() {
    let server = Setup::default().start();
    for messages in [
        json!([{ "role": "system", "content": "be kind" }, { "role": "user", "content": "hi" }]),
        json!([{ "role": "developer", "content": "be kind" }, { "role": "user", "content": "hi" }]),
        json!([{ "role": "user", "content": "a" }, { "role": "user", "content": "b" }]),
        json!([{ "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]),
        json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": null, "tool_calls": [] },
               { "role": "user", "content": "b" }]),
    ] {
        let answer = server.chat(json!({ "messages": messages })).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
}

#[tokio::test]
async fn a_prompt_seen_before_is_reported_as_cached() {
    let server = Setup::default().start();
    let long = json!({ "prompt": " hello world".repeat(20), "max_tokens": 1 });
    let first = server.complete(long.clone()).await.json()["usage"].clone();
    let second = server.complete(long).await.json()["usage"].clone();
    assert_eq!(first["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(first["prompt_tokens"], second["prompt_tokens"]);
    assert_ne!(second["prompt_tokens_details"]["cached_tokens"], 0, "{second}");
}

#[tokio::test]
async fn a_cache_salt_separates_tenants() {
    let server = Setup::default().start();
    let ask = |salt| {
        let prompt = " hello world".repeat(20);
        json!({ "prompt": prompt, "max_tokens": 1, "cache_salt": salt })
    };
    server.complete(ask("one")).await;
    let other = server.complete(ask("two")).await.json()["usage"].clone();
    assert_eq!(other["prompt_tokens_details"]["cached_tokens"], 0);
}

#[tokio::test]
async fn counters_are_the_sum_of_usage() {
    let server = Setup::default().start();
    let (mut prompt, mut completion) = (0.0, 0.0);
    for body in [
        json!({ "prompt": ["a", "the b"], "n": 3 }),
        json!({ "prompt": "hello", "stop": "llo", "max_tokens": 9 }),
        json!({ "prompt": "hello", "echo": true, "max_tokens": 0 }),
        json!({ "prompt": "hello", "max_tokens": 1 }),
    ] {
        let usage = server.complete(body).await.json()["usage"].clone();
        prompt += usage["prompt_tokens"].as_f64().unwrap();
        completion += usage["completion_tokens"].as_f64().unwrap();
    }
    assert_eq!(server.metric("vllm:prompt_tokens_total", "").await, prompt);
    assert_eq!(server.metric("vllm:generation_tokens_total", "").await, completion);
    assert_eq!(server.metric("vllm:time_to_first_token_seconds_count", "").await, 8.0);
    let later = server.metric("vllm:inter_token_latency_seconds_count", "").await;
    assert_eq!(later, completion - 8.0, "each token is a first one or a later one");
    assert_eq!(
        server
            .metric("vllm:request_success_total", "finished_reason=\"stop\"")
            .await,
        7.0
    );
    assert_eq!(
        server
            .metric("vllm:request_success_total", "finished_reason=\"length\"")
            .await,
        2.0
    );
    assert_eq!(
        server.outcomes().await,
        [("stop".to_owned(), 2), ("length".to_owned(), 2)]
    );
}

#[tokio::test]
async fn priorities_are_taken_where_the_operator_wants_them() {
    let server = Setup {
        limits: Limits {
            allows_priority: true,
            ..Limits::default()
        },
        ..Setup::default()
    }
    .start();
    assert_eq!(server.chat(json!({ "priority": -1 })).await.status, 200);
    let server = Setup::default().start();
    assert_eq!(server.chat(json!({ "priority": 0 })).await.status, 200);
    let refused = server.chat(json!({ "priority": 1 })).await;
    assert_eq!(refused.status, 400);
    assert!(
        refused.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("--scheduling-policy priority")
    );
}
