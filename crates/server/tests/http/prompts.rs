//! What prompts are made of: templates, their variables, continued messages, truncation; and what they would be.

use serde_json::{Value, json};

use crate::support::{Server, Setup, with_messages};

fn trusting() -> Server {
    let mut setup = Setup::default();
    setup.limits.trust_request_chat_template = true;
    setup.start()
}

/// The prompt of a chat, as text.
async fn prompt_of(server: &Server, body: Value) -> String {
    let rendered = server.post("/v1/chat/completions/render", with_messages(body)).await;
    assert_eq!(rendered.status, 200, "{}", rendered.body);
    let tokens = rendered.json()["token_ids"].clone();
    let text = server.post("/detokenize", json!({ "tokens": tokens })).await.json();
    text["prompt"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_final_message_is_continued_and_echoed() {
    let server = Setup::default().start();
    let mut body = json!({
        "messages": [{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "well then" }],
        "continue_final_message": true, "add_generation_prompt": false,
    });
    assert!(
        prompt_of(&server, body.clone())
            .await
            .ends_with("<start_of_turn>model\nwell then")
    );
    let answer = server.chat(body.clone()).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], " hello world");
    body["echo"] = json!(true);
    let answer = server.chat(body.clone()).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "well then hello world");
    body["stream"] = json!(true);
    let chunks = server.chat(body).await.chunks();
    let deltas = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), "well then hello world");
    let question = server.chat(json!({ "echo": true })).await.json();
    assert_eq!(
        question["choices"][0]["message"]["content"], " hello world",
        "the user's words are no answer"
    );
}

#[tokio::test]
async fn a_clients_template_is_used_where_clients_are_trusted() {
    let server = trusting();
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{{ mode }}";
    let body = json!({ "chat_template": template, "chat_template_kwargs": { "mode": "<end_of_turn>!" } });
    assert_eq!(
        prompt_of(&server, body.clone()).await,
        "<bos>[user: hello]<end_of_turn>!"
    );
    let tokenized = server.post("/tokenize", with_messages(body.clone())).await.json();
    let rendered = server
        .post("/v1/chat/completions/render", with_messages(body.clone()))
        .await
        .json();
    assert_eq!(tokenized["tokens"], rendered["token_ids"]);
    assert!(
        !rendered["token_ids"].as_array().unwrap().contains(&json!(107)),
        "a variable cannot end a turn: {rendered}"
    );
    let answer = server.chat(body).await.json();
    assert_eq!(answer["usage"]["prompt_tokens"], tokenized["count"]);
    for (template, message) in [
        ("{% for %}", "the chat template is not valid"),
        ("{{ messages.nothing.at.all() }}", "the chat template failed"),
        ("{{ raise_exception('No, thank you') }}", "No, thank you"),
    ] {
        let refused = server.chat(json!({ "chat_template": template })).await;
        assert_eq!(refused.status, 400);
        let error = refused.json()["error"].clone();
        assert!(error["message"].as_str().unwrap().starts_with(message), "{error}");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn strangers_bring_variables_but_no_template() {
    let server = Setup::default().start();
    let plain = prompt_of(&server, json!({})).await;
    let thinking = json!({ "chat_template_kwargs": { "enable_thinking": false } });
    assert_eq!(prompt_of(&server, thinking).await, plain);
    for path in ["/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"] {
        for (extra, param) in [
            (json!({ "chat_template": "x" }), "chat_template"),
            (
                json!({ "chat_template_kwargs": { "chat_template": "x" } }),
                "chat_template_kwargs.chat_template",
            ),
            (
                json!({ "chat_template_kwargs": { "messages": [] } }),
                "chat_template_kwargs.messages",
            ),
        ] {
            let refused = server.post(path, with_messages(extra)).await;
            assert_eq!(
                (refused.status.as_u16(), &refused.json()["error"]["param"]),
                (400, &json!(param)),
                "{path}"
            );
        }
    }
}

#[tokio::test]
async fn prompts_are_cut_to_what_was_asked_for() {
    let server = Setup::default().start();
    let tokens_of = async |body: Value| {
        let rendered = server.post("/v1/completions/render", body).await.json();
        rendered[0]["token_ids"].as_array().unwrap().clone()
    };
    let all = tokens_of(json!({ "prompt": "the quick brown fox jumps" })).await;
    let cut = |extra: Value| {
        let mut body = json!({ "prompt": "the quick brown fox jumps" });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let last = tokens_of(cut(json!({ "truncate_prompt_tokens": 4 }))).await;
    assert_eq!(last, [&all[..1], &all[all.len() - 3..]].concat(), "BOS stays");
    let first = tokens_of(cut(json!({ "truncate_prompt_tokens": 4, "truncation_side": "right" }))).await;
    assert_eq!(first, all[..4]);
    assert_eq!(tokens_of(cut(json!({ "truncate_prompt_tokens": 100 }))).await, all);
    let ids = json!({ "prompt": [5, 6, 7, 8], "truncate_prompt_tokens": 2 });
    assert_eq!(tokens_of(ids).await, [7, 8], "ids are taken as they are");

    // -1 leaves room for the answer.
    let long = json!({ "prompt": " hello".repeat(300), "truncate_prompt_tokens": -1, "max_tokens": 20, "echo": true });
    let answer = server.complete(long).await.json();
    assert_eq!(answer["usage"]["prompt_tokens"], 236);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert_eq!(text, " hello".repeat(235) + " hello world", "what is left is echoed");
    let chat = json!({
        "messages": [{ "role": "user", "content": " hello".repeat(300) }], "truncate_prompt_tokens": -1,
    });
    let answer = server.chat(chat).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["usage"]["prompt_tokens"]),
        (200, &json!(255))
    );
    let hopeless = json!({ "prompt": " hello".repeat(200_000), "truncate_prompt_tokens": 5 });
    assert_eq!(
        server.complete(hopeless).await.json()["error"]["code"],
        "context_length_exceeded"
    );
    server.assert_idle().await;
}

#[tokio::test]
async fn a_rendered_request_is_what_would_be_computed() {
    let server = Setup::default().start();
    let body = json!({ "prompt": [[2, 7], [5, 6]], "max_tokens": 3, "temperature": 0.25, "top_k": 4, "stop": "x" });
    let rendered = server.post("/v1/completions/render", &body).await.json();
    assert_eq!(rendered.as_array().unwrap().len(), 2);
    assert_eq!(rendered[1]["token_ids"], json!([5, 6]));
    let sampling = &rendered[1]["sampling_params"];
    assert_eq!(
        (&sampling["temperature"], &sampling["top_k"]),
        (&json!(0.25), &json!(4))
    );
    assert_eq!((&sampling["max_tokens"], &sampling["stop"]), (&json!(3), &json!(["x"])));
    assert!(rendered[0]["request_id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(rendered[0]["model"], "tiny");
    let chat = server
        .post("/v1/chat/completions/render", with_messages(json!({ "n": 2 })))
        .await
        .json();
    let answer = server.chat(json!({ "return_token_ids": true })).await.json();
    assert_eq!(chat["token_ids"], answer["prompt_token_ids"]);
    let room = 256 - chat["token_ids"].as_array().unwrap().len();
    assert_eq!(chat["sampling_params"]["max_tokens"], room);
    assert!(chat["request_id"].as_str().unwrap().starts_with("chatcmpl-"));
    let refused = server
        .post("/v1/completions/render", json!({ "prompt": [99_999] }))
        .await;
    assert_eq!(
        (refused.status.as_u16(), &refused.json()["error"]["param"]),
        (400, &json!("prompt[0]"))
    );
    assert_eq!(
        server.engine.stats().requests_finished,
        1,
        "rendering asks the engine for nothing"
    );
}
