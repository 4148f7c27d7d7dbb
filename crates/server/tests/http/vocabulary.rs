//! Answers that may use some tokens only. The engine's executor draws at random from what the masks allow.

use std::collections::BTreeSet;

use lapidary_engine::Script;
use serde_json::{Value, json};

use crate::support::{END_OF_TURN, EOS, MODEL, Server, Setup};

fn drawing() -> Server {
    let mut setup = Setup::default();
    setup.scripted.script = Some(Script::new(|_| None));
    setup.start()
}

async fn tokens_of(server: &Server, text: &str) -> Vec<u64> {
    let body = json!({ "model": MODEL, "prompt": text, "add_special_tokens": false });
    let answer = server.post("/tokenize", body).await.json();
    answer["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap())
        .collect()
}

/// Answers to the same request at both endpoints, streamed and not: for each, its token ids, its text and its finish.
async fn answers(server: &Server, body: &Value) -> Vec<(Vec<u64>, String, String)> {
    let mut body = body.clone();
    body["prompt"] = json!("hello");
    body["messages"] = json!([{ "role": "user", "content": "hello" }]);
    body["return_token_ids"] = json!(true);
    let n = body["n"].as_u64().unwrap_or(1) as usize;
    let mut answers = Vec::new();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        for stream in [false, true] {
            body["stream"] = json!(stream);
            let answer = server.post(path, &body).await;
            assert_eq!(answer.status, 200, "{body}: {}", answer.body);
            let parts = if stream { answer.chunks() } else { vec![answer.json()] };
            let mut told = vec![(Vec::new(), String::new(), String::new()); n];
            for choice in parts.iter().flat_map(|part| part["choices"].as_array().unwrap()) {
                let (ids, text, finish) = &mut told[choice["index"].as_u64().unwrap() as usize];
                let texts = [
                    &choice["text"],
                    &choice["delta"]["content"],
                    &choice["message"]["content"],
                ];
                text.extend(texts.iter().filter_map(|text| text.as_str()));
                let new = choice["token_ids"].as_array().into_iter().flatten();
                ids.extend(new.map(|id| id.as_u64().unwrap()));
                finish.push_str(choice["finish_reason"].as_str().unwrap_or_default());
            }
            answers.extend(told);
        }
    }
    answers
}

#[tokio::test]
async fn only_allowed_tokens_come_and_a_stop_token_only_if_it_is_one() {
    let server = drawing();
    let allowed = [250_u64, 400, 548, 640, 720];
    let body = json!({ "allowed_token_ids": allowed, "n": 3, "max_tokens": 20, "seed": 1 });
    let answers_without_stop = answers(&server, &body).await;
    assert_eq!(answers_without_stop.len(), 12);
    let mut seen = BTreeSet::new();
    for (ids, _, finish) in &answers_without_stop {
        assert_eq!((ids.len(), finish.as_str()), (20, "length"));
        seen.extend(ids.iter().copied());
    }
    assert_eq!(seen, BTreeSet::from(allowed), "all of them, and no others");
    let body = json!({ "allowed_token_ids": [548, END_OF_TURN], "n": 3, "max_tokens": 60, "seed": 1 });
    for (ids, _, finish) in answers(&server, &body).await {
        let (last, before) = ids.split_last().unwrap();
        assert_eq!((*last, finish.as_str()), (u64::from(END_OF_TURN), "stop"));
        assert!(before.iter().all(|id| *id == 548), "{ids:?}");
    }
    let body = json!({ "allowed_token_ids": [548, EOS], "min_tokens": 7, "max_tokens": 9, "ignore_eos": false });
    for (ids, ..) in answers(&server, &body).await {
        assert!(ids.len() >= 7 && ids[..7].iter().all(|id| *id == 548), "{ids:?}");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn bad_words_never_come_whether_they_are_one_token_or_several() {
    let server = drawing();
    let (word, spaced) = (tokens_of(&server, "hello").await, tokens_of(&server, " hello").await);
    assert!(word.len() > 1 && spaced.len() == 1, "{word:?} {spaced:?}");
    let allowed: Vec<u64> = word.iter().chain(&spaced).copied().collect();
    let body = json!({ "allowed_token_ids": allowed, "n": 8, "max_tokens": 100, "seed": 3 });
    let says_it = |ids: &[u64]| ids.windows(word.len()).any(|window| window == word);
    let free = answers(&server, &body).await;
    assert!(free.iter().any(|(ids, ..)| says_it(ids)), "the word comes up by chance");
    assert!(free.iter().any(|(ids, ..)| ids.contains(&spaced[0])));
    let mut banning = body;
    // White space in front of a word makes no difference.
    banning["bad_words"] = json!(["  hello"]);
    let held = answers(&server, &banning).await;
    for (ids, text, _) in &held {
        assert!(!says_it(ids) && !ids.contains(&spaced[0]), "{text}");
        let parts = word.iter().filter(|id| ids.contains(id)).count();
        assert!(parts > 1, "parts of the word may come: {text}");
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn what_others_ask_for_changes_nothing() {
    let server = drawing();
    let word = tokens_of(&server, "hello").await;
    let body = json!({ "allowed_token_ids": word, "bad_words": ["hello"], "max_tokens": 40, "seed": 5, "n": 2 });
    let alone = answers(&server, &body).await;
    let others = [
        json!({ "max_tokens": 40, "seed": 1, "n": 4 }),
        json!({ "bad_words": ["a", "world"], "max_tokens": 40, "seed": 2, "n": 4 }),
        json!({ "guided_regex": "[a-z ]{40}", "max_tokens": 40, "seed": 3, "n": 4 }),
    ];
    let (together, ..) = tokio::join!(
        answers(&server, &body),
        answers(&server, &others[0]),
        answers(&server, &others[1]),
        answers(&server, &others[2])
    );
    assert_eq!(alone, together);
}

#[tokio::test]
async fn a_form_and_a_vocabulary_are_both_kept() {
    let server = drawing();
    for seed in 0..4 {
        let choice = json!({ "guided_choice": ["yes", "no"], "bad_words": ["yes"], "seed": seed });
        for (_, text, finish) in answers(&server, &choice).await {
            assert!(["yes", "no"].contains(&text.as_str()), "{text}");
            assert_eq!(finish, "stop");
        }
        // Complete, it ends, though no stop token is among those allowed.
        let letters: Vec<u64> = [
            tokens_of(&server, "y").await,
            tokens_of(&server, "e").await,
            tokens_of(&server, "s").await,
        ]
        .concat();
        let body =
            json!({ "guided_choice": ["yes", "no"], "allowed_token_ids": letters, "seed": seed, "min_tokens": 9 });
        for (_, text, finish) in answers(&server, &body).await {
            assert_eq!((text.as_str(), finish.as_str()), ("yes", "stop"));
        }
    }
    let body = json!({ "prompt": "a", "guided_choice": ["yes", "no"], "allowed_token_ids": [548] });
    let answer = server.complete(body).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(answer.json()["error"]["code"], "grammar_failed");
    let body =
        json!({ "prompt": "a", "allowed_token_ids": tokens_of(&server, " hello").await, "bad_words": ["hello"] });
    let answer = server.complete(body).await;
    assert_eq!(answer.status, 400, "nothing is left: {}", answer.body);
    server.assert_idle().await;
}

#[tokio::test]
async fn vocabularies_that_make_no_sense_are_refused() {
    let server = drawing();
    let cases = [
        (json!({ "allowed_token_ids": [] }), "allowed_token_ids", "empty!"),
        (
            json!({ "allowed_token_ids": [5, -1] }),
            "allowed_token_ids[1]",
            "out-of-vocab",
        ),
        (
            json!({ "allowed_token_ids": [733] }),
            "allowed_token_ids[0]",
            "out-of-vocab",
        ),
        (json!({ "allowed_token_ids": ["a"] }), "allowed_token_ids[0]", "integer"),
        (json!({ "allowed_token_ids": 5 }), "allowed_token_ids", ""),
        (json!({ "bad_words": ["a", ""] }), "bad_words", "empty string"),
        (json!({ "bad_words": "a" }), "bad_words", ""),
        (json!({ "bad_words": vec!["a"; 1025] }), "bad_words", "1024"),
        (json!({ "bad_words": ["a".repeat(40_000)] }), "bad_words", "32768"),
    ];
    for (mut body, param, part) in cases {
        body["prompt"] = json!("a");
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let answer = match path {
                "/v1/completions" => server.complete(body.clone()).await,
                _ => server.chat(body.clone()).await,
            };
            assert_eq!(answer.status, 400, "{}", answer.body);
            let error = answer.json()["error"].clone();
            assert_eq!(error["param"], param, "{error}");
            assert!(error["message"].as_str().unwrap().contains(part), "{error}");
        }
    }
    for body in [
        json!({ "bad_words": [] }),
        json!({ "bad_words": null, "allowed_token_ids": null }),
    ] {
        assert_eq!(server.chat(body).await.status, 200);
    }
    let rendered = server.post(
        "/v1/completions/render",
        json!({ "prompt": "a", "allowed_token_ids": [5], "bad_words": ["x"] }),
    );
    let sampling = rendered.await.json()[0]["sampling_params"].clone();
    assert_eq!(
        (&sampling["allowed_token_ids"], &sampling["bad_words"]),
        (&json!([5]), &json!(["x"]))
    );
}
