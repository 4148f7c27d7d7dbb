//! `/tokenize` and `/detokenize`.

use serde_json::json;

use crate::support::{MODEL, Setup};

#[tokio::test]
async fn a_prompt_is_tokenised_with_and_without_bos() {
    let server = Setup::default().start();
    let body = server
        .post("/tokenize", json!({ "model": MODEL, "prompt": " hello" }))
        .await
        .json();
    assert_eq!(body["count"], 2);
    assert_eq!(body["tokens"][0], 2);
    assert_eq!(body["max_model_len"], 256);
    assert_eq!(body["token_strs"], json!(null));
    let bare = json!({ "prompt": " hello", "add_special_tokens": false, "return_token_strs": true });
    let body = server.post("/tokenize", bare).await.json();
    assert_eq!(body["token_strs"], json!(["▁hello"]));
    let tokens = body["tokens"].clone();
    assert_eq!(
        server.post("/detokenize", json!({ "tokens": tokens })).await.json(),
        json!({ "prompt": " hello" })
    );
}

#[tokio::test]
async fn messages_are_tokenised_as_a_chat_would_be() {
    let server = Setup::default().start();
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let count = async |extra: serde_json::Value| {
        let mut body = extra;
        body["messages"] = messages.clone();
        server.post("/tokenize", body).await.json()["count"].as_u64().unwrap()
    };
    let chat = server
        .chat(json!({ "messages": messages, "max_tokens": 1 }))
        .await
        .json();
    let with_prompt = count(json!({})).await;
    assert_eq!(with_prompt, chat["usage"]["prompt_tokens"].as_u64().unwrap());
    let without = count(json!({ "add_generation_prompt": false })).await;
    assert!(without < with_prompt);
    let open = json!({ "continue_final_message": true, "add_generation_prompt": false });
    assert!(count(open).await < without);
}

#[tokio::test]
async fn a_long_prompt_is_tokenised_off_the_async_threads() {
    let mut setup = Setup::default();
    setup.engine.max_model_len = 4096;
    let server = setup.start();
    let body = server
        .post("/tokenize", json!({ "prompt": " hello".repeat(1000) }))
        .await
        .json();
    assert_eq!(body["count"], 1001);
}

#[tokio::test]
async fn a_client_without_a_tokenizer_learns_what_it_needs() {
    let server = Setup::default().start();
    let info = server.get("/tokenizer_info").await.json();
    assert_eq!(
        (&info["bos_token"], &info["eos_token"]),
        (&json!("<bos>"), &json!("<eos>"))
    );
    assert_eq!(
        (&info["pad_token"], &info["add_bos_token"]),
        (&json!("<pad>"), &json!(true))
    );
    assert_eq!(info["model_max_length"], 256);
    let template = info["chat_template"].as_str().unwrap();
    assert!(template.contains("<start_of_turn>"), "the checkpoint's own: {template}");
}
