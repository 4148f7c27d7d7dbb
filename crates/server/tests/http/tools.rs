//! Functions: in the prompt, in the answer, in what comes back.

use std::collections::HashMap;
use std::sync::Mutex;

use lapidary_engine::{EngineConfig, Script};
use serde_json::{Value, json};

use crate::support::{END_OF_TURN, Server, Setup, tokenizer};

const TWO_CALLS: &str = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Par}is\"}}\n</tool_call>\n\
                         <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";

fn start(script: Script) -> Server {
    let mut setup = Setup {
        // Descriptions of functions are long for a vocabulary of letters.
        engine: EngineConfig {
            max_model_len: 2000,
            ..EngineConfig::default()
        },
        ..Setup::default()
    };
    setup.scripted.script = Some(script);
    setup.start()
}

/// Answers are anything that is allowed.
fn drawing() -> Server {
    start(Script::new(|_| None))
}

/// Answers are this text, whatever is allowed: what is not fails the request.
fn saying(text: &str) -> Server {
    let tokens = tokenizer().encode(text, false).unwrap();
    let told = Mutex::new(HashMap::new());
    start(Script::new(move |row| {
        let mut told = told.lock().unwrap();
        let count: &mut usize = told.entry(row.request_id).or_default();
        *count += 1;
        Some(tokens.get(*count - 1).copied().unwrap_or(END_OF_TURN))
    }))
}

fn tools() -> Value {
    json!([
        { "type": "function", "function": {
            "name": "get_weather", "description": "The weather.",
            "parameters": { "type": "object", "properties": { "city": { "type": "string", "maxLength": 9 } },
                            "required": ["city"], "additionalProperties": false } } },
        { "type": "function", "function": { "name": "now" } },
    ])
}

fn named(name: &str) -> Value {
    json!({ "type": "function", "function": { "name": name } })
}

/// Name and arguments of each call, after a check of the rest.
fn calls(message: &Value) -> Vec<(String, Value)> {
    assert_eq!(message["content"], Value::Null, "{message}");
    let read = |call: &Value| {
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        assert_eq!(call["type"], "function");
        let function = &call["function"];
        let arguments = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
        (function["name"].as_str().unwrap().to_owned(), arguments)
    };
    message["tool_calls"].as_array().unwrap().iter().map(read).collect()
}

#[tokio::test]
async fn a_forced_call_is_one_of_what_was_asked_for() {
    let server = drawing();
    for (choice, names) in [
        (json!("required"), vec!["get_weather", "now"]),
        (named("now"), vec!["now"]),
        (named("get_weather"), vec!["get_weather"]),
    ] {
        for seed in 0..4 {
            let body = json!({ "tools": tools(), "tool_choice": choice, "seed": seed, "parallel_tool_calls": false });
            let answer = server.chat(body).await;
            let choice = answer.json()["choices"][0].clone();
            let calls = calls(&choice["message"]);
            assert_eq!(calls.len(), 1, "{choice}");
            assert!(names.contains(&calls[0].0.as_str()), "{choice}");
            match calls[0].0.as_str() {
                "now" => assert_eq!(calls[0].1, json!({})),
                _ => assert!(calls[0].1["city"].as_str().unwrap().chars().count() <= 9),
            }
            assert_eq!(choice["finish_reason"], "tool_calls");
            assert_eq!(choice["stop_reason"], Value::Null);
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn several_calls_are_told_apart() {
    let server = saying(TWO_CALLS);
    for choice in [json!("auto"), json!("required"), Value::Null] {
        let answer = server
            .chat(json!({ "tools": tools(), "tool_choice": choice, "n": 2 }))
            .await;
        for choice in answer.json()["choices"].as_array().unwrap() {
            let expected = [
                ("get_weather".to_owned(), json!({ "city": "Par}is" })),
                ("now".to_owned(), json!({})),
            ];
            assert_eq!(calls(&choice["message"]), expected);
            assert_eq!(choice["finish_reason"], "tool_calls");
        }
    }
}

#[tokio::test]
async fn calls_are_streamed_name_first_then_arguments() {
    let server = saying(TWO_CALLS);
    for (choice, content) in [("auto", json!("")), ("required", Value::Null)] {
        let body = json!({ "tools": tools(), "tool_choice": choice, "stream": true });
        let chunks = server.chat(body).await.chunks();
        let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        assert_eq!(choices[0]["delta"], json!({ "role": "assistant", "content": content }));
        let mut calls: Vec<(String, String)> = Vec::new();
        for choice in &choices[1..choices.len() - 1] {
            assert_eq!(
                (&choice["logprobs"], &choice["finish_reason"]),
                (&Value::Null, &Value::Null)
            );
            let call = &choice["delta"]["tool_calls"][0];
            if let Some(name) = call["function"].get("name") {
                assert_eq!(call["index"], calls.len());
                assert!(call["id"].as_str().unwrap().starts_with("call_"));
                assert_eq!(
                    (&call["type"], &call["function"]["arguments"]),
                    (&json!("function"), &json!(""))
                );
                calls.push((name.as_str().unwrap().to_owned(), String::new()));
            } else {
                assert_eq!(call["index"], calls.len() - 1);
                assert_eq!(call.as_object().unwrap().len(), 2, "{call}");
                calls
                    .last_mut()
                    .unwrap()
                    .1
                    .push_str(call["function"]["arguments"].as_str().unwrap());
            }
        }
        let expected = [("get_weather", "{\"city\": \"Par}is\"}"), ("now", "{}")];
        assert_eq!(
            calls,
            expected.map(|(name, arguments)| (name.to_owned(), arguments.to_owned()))
        );
        assert!(choices.len() > 6, "arguments come in pieces");
        let last = choices.last().unwrap();
        assert_eq!(
            (&last["delta"], &last["finish_reason"]),
            (&json!({}), &json!("tool_calls"))
        );
    }
}

#[tokio::test]
async fn text_stays_text_where_functions_are_only_offered() {
    for text in [
        " hello world",
        "<tool",
        "<b>",
        "a <tool_call>\n{",
        "{\"name\": \"now\"}",
    ] {
        let server = saying(text);
        let body = json!({ "tools": tools(), "logprobs": true });
        let choice = server.chat(body.clone()).await.json()["choices"][0].clone();
        assert_eq!(choice["message"]["content"], text);
        assert_eq!(choice["message"].get("tool_calls"), None);
        assert_eq!(choice["finish_reason"], "stop");
        let mut body = body;
        body["stream"] = json!(true);
        let chunks = server.chat(body).await.chunks();
        let deltas = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
        assert_eq!(deltas.collect::<String>(), text);
        let entries = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
        assert_eq!(
            entries.map(Vec::len).sum::<usize>(),
            choice["logprobs"]["content"].as_array().unwrap().len()
        );
    }
}

#[tokio::test]
async fn a_call_that_is_cut_off_ends_for_its_length() {
    let server = saying(TWO_CALLS);
    let body = json!({ "tools": tools(), "tool_choice": "required", "max_tokens": 70 });
    let choice = server.chat(body).await.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "length");
    let function = &choice["message"]["tool_calls"][0]["function"];
    assert_eq!(function["name"], "get_weather");
    assert!("{\"city\": \"Par}is\"}".starts_with(function["arguments"].as_str().unwrap()));
}

#[tokio::test]
async fn functions_are_in_the_prompt_only_where_they_may_be_called() {
    let server = saying("a");
    let prompt_tokens = async |body: Value| {
        server.chat(body).await.json()["usage"]["prompt_tokens"]
            .as_u64()
            .unwrap()
    };
    let without = prompt_tokens(json!({})).await;
    assert_eq!(
        prompt_tokens(json!({ "tools": tools(), "tool_choice": "none" })).await,
        without
    );
    assert!(prompt_tokens(json!({ "tools": tools() })).await > without + 100);
}

#[tokio::test]
async fn calls_and_results_of_earlier_turns_are_rendered() {
    let server = saying("a");
    let call = |id: &str, name: &str, arguments: Value| json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } });
    let messages = json!([
        { "role": "user", "content": "the weather?" },
        { "role": "assistant", "content": null, "tool_calls": [
            call("1", "get_weather", json!("{\"city\": \"Paris\"}")), call("2", "now", json!({ "a": 1 })) ] },
        { "role": "tool", "tool_call_id": "1", "content": [{ "type": "text", "text": "12 C" }] },
        { "role": "tool", "tool_call_id": "2", "content": null },
        { "role": "user", "content": "thanks" },
    ]);
    let tokens = server.post("/tokenize", json!({ "messages": messages })).await.json()["tokens"].clone();
    let prompt = server.post("/detokenize", json!({ "tokens": tokens })).await.json()["prompt"].clone();
    let expected = concat!(
        "<bos><start_of_turn>user\nthe weather?<end_of_turn>\n<start_of_turn>model\n",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": {\"a\":1}}\n</tool_call><end_of_turn>\n<start_of_turn>user\n",
        "<tool_response name=\"get_weather\">\n12 C\n</tool_response>\n<tool_response name=\"now\">\n\n</tool_response>",
        "\n\nthanks<end_of_turn>\n<start_of_turn>model\n",
    );
    assert_eq!(prompt, expected);
    let answer = server.chat(json!({ "messages": messages, "tools": tools() })).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
}

#[tokio::test]
async fn a_schema_that_cannot_be_kept_is_let_go_unless_it_is_strict() {
    let server = drawing();
    let tool = |strict| {
        let parameters = json!({ "type": "object", "properties": { "a": { "not": { "type": "string" } } } });
        json!([{ "type": "function", "function": { "name": "f", "parameters": parameters, "strict": strict } }])
    };
    for strict in [json!(false), Value::Null] {
        let answer = server.chat(json!({ "tools": tool(strict), "max_tokens": 3 })).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    let answer = server.chat(json!({ "tools": tool(json!(true)) })).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["param"], "tools");
}

#[tokio::test]
async fn an_answer_in_a_form_may_be_a_call_instead() {
    let form = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "enum": ["yes", "no"] } } });
    let body = json!({ "tools": tools(), "response_format": form });
    let mut seen = Vec::new();
    let server = drawing();
    for seed in 0..12 {
        let mut body = body.clone();
        body["seed"] = json!(seed);
        let choice = server.chat(body).await.json()["choices"][0].clone();
        match choice["message"]["content"].as_str() {
            Some(text) => assert!(["\"yes\"", "\"no\""].contains(&text), "{text}"),
            None => assert!(!calls(&choice["message"]).is_empty()),
        }
        seen.push(choice["message"]["content"].is_null());
    }
    assert!(seen.contains(&true) && seen.contains(&false), "{seen:?}");
    let choice = saying(TWO_CALLS).chat(body).await.json()["choices"][0].clone();
    assert_eq!(calls(&choice["message"]).len(), 2);
}
