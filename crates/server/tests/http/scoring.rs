//! Log-probabilities of prompts: `echo` with `logprobs`, as evaluation harnesses send it, and `prompt_logprobs`.

use lapidary_engine::{ScriptedExecutor, TokenId};
use serde_json::{Value, json};

use crate::support::{Setup, tokenizer};

fn ids(values: &Value) -> Vec<TokenId> {
    let values = values.as_array().unwrap();
    values.iter().map(|id| id.as_u64().unwrap() as TokenId).collect()
}

/// `null` for the first token, then what the scripted engine makes of the rest.
fn expected_scores(prompt: &[TokenId]) -> Vec<Value> {
    let scores = ScriptedExecutor::expected_scores(prompt)
        .into_iter()
        .map(|score| json!(score));
    std::iter::once(Value::Null).chain(scores).collect()
}

#[tokio::test]
async fn batches_of_token_prompts_are_scored_as_harnesses_ask() {
    let server = Setup::answering(&["▁hello", "<eos>"]).start();
    let prompts = [vec![2, 65, 66, 67], (10..40).collect(), vec![9]];
    let body =
        json!({ "prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": true, "temperature": 0, "seed": 1234 });
    let answer = server.complete(body).await.json();
    for (index, prompt) in prompts.iter().enumerate() {
        let choice = &answer["choices"][index];
        assert_eq!(choice["index"], index);
        let logprobs = &choice["logprobs"];
        let mut scores = expected_scores(prompt);
        // The generated token follows those of the prompt.
        scores.push(json!(-0.5));
        assert_eq!(logprobs["token_logprobs"], json!(scores), "prompt {index}");
        for array in ["tokens", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[array].as_array().unwrap().len(), prompt.len() + 1, "{array}");
        }
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        for position in 1..prompt.len() {
            let top = logprobs["top_logprobs"][position].as_object().unwrap();
            let own = &top[logprobs["tokens"][position].as_str().unwrap()];
            assert!(own.is_number(), "the prompt's token is among its alternatives: {top:?}");
        }
        assert!(choice.get("prompt_logprobs").is_none(), "nobody asked for it");
    }
    assert_eq!(answer["usage"]["prompt_tokens"], 35);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    server.assert_idle().await;
}

#[tokio::test]
async fn a_prompt_can_be_scored_without_an_answer() {
    let server = Setup::default().start();
    let body =
        json!({ "prompt": "hello world", "max_tokens": 0, "logprobs": 2, "echo": true, "return_token_ids": true });
    let answer = server.complete(body.clone()).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("hello world"), &json!("length"))
    );
    let prompt = ids(&choice["prompt_token_ids"]);
    assert_eq!(prompt[0], 2, "BOS is a token of the prompt, though not of its text");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["token_logprobs"], json!(expected_scores(&prompt)));
    assert_eq!(logprobs["tokens"][0], "<bos>");
    let mut offset = 0;
    for (index, token) in prompt.iter().enumerate() {
        assert_eq!(logprobs["text_offset"][index], offset);
        if *token != 2 {
            offset += logprobs["tokens"][index].as_str().unwrap().chars().count();
        }
    }
    assert_eq!(offset, "hello world".len());
    assert_eq!(choice["token_ids"], json!([]));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    // Equal requests are computed anew: what is in the cache has no scores.
    let again = server.complete(body).await.json();
    assert_eq!(again["choices"], answer["choices"]);
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let one = json!({ "prompt": [5], "max_tokens": 0, "logprobs": 0, "echo": true });
    let logprobs = server.complete(one).await.json()["choices"][0]["logprobs"].clone();
    assert_eq!(
        logprobs["token_logprobs"],
        json!([null]),
        "nothing predicts a first token"
    );
    server.assert_idle().await;
}

#[tokio::test]
async fn a_stream_begins_with_the_scored_prompt() {
    let server = Setup::default().start();
    for max_tokens in [0, 2] {
        let mut body =
            json!({ "prompt": "hello world", "max_tokens": max_tokens, "logprobs": 1, "echo": true, "n": 2 });
        let whole = server.complete(body.clone()).await.json();
        body["stream"] = json!(true);
        let chunks = server.complete(body).await.chunks();
        for index in [0, 1] {
            let choices = chunks.iter().map(|chunk| &chunk["choices"][0]);
            let choices: Vec<_> = choices.filter(|choice| choice["index"] == index).collect();
            let text: String = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
            assert_eq!(text, whole["choices"][index]["text"].as_str().unwrap());
            for array in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let parts = choices.iter().filter_map(|choice| choice["logprobs"][array].as_array());
                let joined: Vec<_> = parts.flatten().cloned().collect();
                assert_eq!(json!(joined), whole["choices"][index]["logprobs"][array], "{array}");
            }
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn prompt_logprobs_are_keyed_by_token_id() {
    let server = Setup::default().start();
    let body = json!({ "prompt": [[2, 70, 71], [80, 81]], "max_tokens": 1, "prompt_logprobs": 2 });
    let answer = server.complete(body).await.json();
    let score = ScriptedExecutor::expected_scores(&[2, 70, 71]);
    let names = tokenizer();
    let entry = |token: TokenId, logprob: f32, rank: u32| json!({ "logprob": logprob, "rank": rank, "decoded_token": names.token_text(token).unwrap() });
    // The scripted engine's alternatives are the token itself and the next one.
    let expected = json!([null,
        { "70": entry(70, score[0], 1), "71": entry(71, -1.5, 2) },
        { "71": entry(71, score[1], 1), "72": entry(72, -1.5, 2) },
    ]);
    assert_eq!(answer["choices"][0]["prompt_logprobs"], expected);
    assert_eq!(answer["choices"][1]["prompt_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(
        answer["choices"][0]["logprobs"],
        Value::Null,
        "those of the answer were not asked for"
    );

    let chat = server
        .chat(json!({ "prompt_logprobs": 0, "max_tokens": 1, "return_token_ids": true }))
        .await
        .json();
    let prompt = ids(&chat["prompt_token_ids"]);
    let logprobs = chat["prompt_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), prompt.len());
    let scores = ScriptedExecutor::expected_scores(&prompt);
    for ((entry, token), score) in logprobs.iter().zip(&prompt).skip(1).zip(scores) {
        assert_eq!(entry[token.to_string()]["logprob"], json!(score));
        assert_eq!(entry.as_object().unwrap().len(), 1);
    }
    let none = server
        .chat(json!({ "prompt_logprobs": 1, "max_tokens": 0 }))
        .await
        .json();
    assert_eq!(none["choices"][0]["message"]["content"], "");
    assert_eq!(none["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn alternatives_are_as_many_as_each_field_asks_for() {
    let server = Setup::default().start();
    let body = json!({
        "prompt": [2, 70, 71], "max_tokens": 0, "echo": true, "logprobs": 1, "prompt_logprobs": 3,
        "return_tokens_as_token_ids": true,
    });
    let choice = server.complete(body).await.json()["choices"][0].clone();
    assert_eq!(
        choice["logprobs"]["tokens"],
        json!(["token_id:2", "token_id:70", "token_id:71"])
    );
    let top = choice["logprobs"]["top_logprobs"][1].as_object().unwrap();
    assert_eq!(top.keys().collect::<Vec<_>>(), ["token_id:70"]);
    assert_eq!(choice["prompt_logprobs"][1].as_object().unwrap().len(), 3);
}

#[tokio::test]
async fn token_ids_come_with_text_or_without() {
    let server = Setup::answering(&["▁hello", "<0xC3>", "<0xA9>", "!"]).start();
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let mut body = json!({
            "messages": [{ "role": "user", "content": "hi" }], "prompt": "hi", "return_token_ids": true,
        });
        let whole = server.post(path, &body).await.json();
        let token_ids = ids(&whole["choices"][0]["token_ids"]);
        assert_eq!(
            token_ids.len() as u64,
            whole["usage"]["completion_tokens"].as_u64().unwrap()
        );
        body["stream"] = json!(true);
        let chunks = server.post(path, &body).await.chunks();
        let streamed = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array());
        assert_eq!(ids(&json!(streamed.flatten().collect::<Vec<_>>())), token_ids);
        let prompt_of = |answer: &Value| match path.contains("chat") {
            true => answer["prompt_token_ids"].clone(),
            false => answer["choices"][0]["prompt_token_ids"].clone(),
        };
        assert!(!ids(&prompt_of(&whole)).is_empty());
        assert_eq!(prompt_of(&chunks[0]), prompt_of(&whole));
        assert!(
            chunks[1..].iter().all(|chunk| prompt_of(chunk).is_null()),
            "once is enough"
        );
    }
}

#[tokio::test]
async fn a_prompt_as_long_as_the_context_is_scored_in_pieces() {
    let mut setup = Setup::default();
    setup.engine.max_num_seqs = 7;
    let server = setup.start();
    let prompt: Vec<TokenId> = (0..256).collect();
    let body = json!({ "prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1 });
    let answer = server.complete(body).await.json();
    assert_eq!(
        answer["choices"][0]["logprobs"]["token_logprobs"],
        json!(expected_scores(&prompt))
    );
    assert!(server.engine.stats().steps >= 255 / 7);
    server.assert_idle().await;
}
