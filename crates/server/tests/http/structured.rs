//! Answers that are held to a form. The engine's executor draws at random from what the masks allow.

use lapidary_engine::Script;
use lapidary_text::Grammar;
use serde_json::{Value, json};

use crate::hostile;
use crate::support::{Server, Setup};

/// A server whose answers are anything that is allowed.
fn drawing() -> Server {
    let mut setup = Setup::default();
    setup.scripted.script = Some(Script::new(|_| None));
    setup.start()
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "kind": { "enum": ["person", "company"] },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "zip": { "type": "string", "pattern": "^[0-9]{5}$" },
            "note": { "anyOf": [{ "type": "string", "maxLength": 3 }, { "type": "null" }] },
        },
        "required": ["kind", "age", "zip", "note"],
        "additionalProperties": false,
    })
}

fn is_person(text: &str) -> bool {
    let Ok(Value::Object(person)) = serde_json::from_str(text) else {
        return false;
    };
    let zip = person["zip"].as_str().unwrap();
    person.len() == 4
        && ["person", "company"].contains(&person["kind"].as_str().unwrap())
        && person["age"].as_u64().unwrap() <= 150
        && (zip.len() == 5 && zip.bytes().all(|byte| byte.is_ascii_digit()))
        && (person["note"].is_null() || person["note"].as_str().unwrap().chars().count() <= 3)
}

fn is_sum(text: &str) -> bool {
    text.split('+')
        .all(|number| number.parse::<u8>().is_ok_and(|number| number < 10))
}

#[tokio::test]
async fn every_way_to_ask_for_a_form_is_kept() {
    let server = drawing();
    let sum = "start: NUM (\"+\" NUM)~1..3\nNUM: /[0-9]/\n";
    type Judge = fn(&str) -> bool;
    let is_choice: Judge = |text| ["yes", "no"].contains(&text);
    let is_word: Judge = |text| text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_lowercase());
    let cases: [(Value, Judge); 11] = [
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "p", "strict": true, "schema": person() } } }),
            is_person,
        ),
        (json!({ "structured_outputs": { "json": person() } }), is_person),
        (
            json!({ "structured_outputs": { "json": person().to_string() } }),
            is_person,
        ),
        (
            json!({ "structured_outputs": { "regex": "[a-z]{4}", "json": null } }),
            is_word,
        ),
        (json!({ "structured_outputs": { "choice": ["yes", "no"] } }), is_choice),
        (json!({ "structured_outputs": { "grammar": sum } }), is_sum),
        (json!({ "guided_json": person() }), is_person),
        (json!({ "guided_regex": "[a-z]{4}" }), is_word),
        (
            json!({ "guided_choice": ["yes", "no"], "response_format": { "type": "text" } }),
            is_choice,
        ),
        (json!({ "guided_grammar": sum }), is_sum),
        (
            json!({ "guided_choice": ["yes", "no"], "ignore_eos": true, "min_tokens": 5 }),
            is_choice,
        ),
    ];
    for (mut body, is_kept) in cases {
        for seed in 0..3 {
            body["seed"] = json!(seed);
            body["max_tokens"] = json!(150);
            let answer = server.chat(body.clone()).await;
            let choice = answer.json()["choices"][0].clone();
            let text = choice["message"]["content"]
                .as_str()
                .unwrap_or_else(|| panic!("{}", answer.body));
            assert!(is_kept(text), "{text:?} for {body}");
            assert_eq!(choice["finish_reason"], "stop", "{body}");
            let mut completion = body.clone();
            completion["prompt"] = json!("the");
            let answer = server.complete(completion).await;
            let text = answer.json()["choices"][0]["text"].as_str().unwrap().to_owned();
            assert!(is_kept(&text), "{text:?} for {body}");
        }
    }
    server.assert_idle().await;
}

#[tokio::test]
async fn an_object_begins_like_one_however_it_ends() {
    let server = drawing();
    for field in ["response_format", "structured_outputs"] {
        let wanted = match field {
            "response_format" => json!({ "type": "json_object" }),
            _ => json!({ "json_object": true }),
        };
        let answer = server.chat(json!({ field: wanted, "max_tokens": 5 })).await;
        let choice = answer.json()["choices"][0].clone();
        let text = choice["message"]["content"].as_str().unwrap().trim_start().to_owned();
        assert!(text.starts_with('{'), "{text}");
    }
}

#[tokio::test]
async fn each_of_several_answers_is_held_to_the_form_by_itself() {
    // Few and many get their grammars in different places.
    for num_answers in [4, 8] {
        holds_each_to_the_form(num_answers).await;
    }
}

async fn holds_each_to_the_form(num_answers: usize) {
    let server = drawing();
    let body = json!({ "guided_json": person(), "n": num_answers, "seed": 1, "max_tokens": 150 });
    let answer = server.chat(body.clone()).await.json();
    let texts: Vec<&str> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["message"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), num_answers);
    assert!(texts.iter().all(|text| is_person(text)), "{texts:?}");
    assert!(texts.windows(2).any(|pair| pair[0] != pair[1]), "{texts:?}");
    let mut body = body;
    body["stream"] = json!(true);
    let chunks = server.chat(body).await.chunks();
    for (index, text) in texts.iter().enumerate() {
        let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let deltas = chunks.iter().filter(of_choice);
        let streamed: String = deltas
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
            .collect();
        assert_eq!(streamed, *text, "streamed or not, a seed gives the same answer");
    }
}

#[tokio::test]
async fn hostile_grammars_are_refused_and_hold_up_nobody() {
    let server = drawing();
    for (name, grammar) in hostile::grammars() {
        let outputs = match grammar {
            Grammar::Regex(regex) => json!({ "regex": regex }),
            Grammar::JsonSchema(schema) => json!({ "json": schema }),
            Grammar::Lark(grammar) => json!({ "grammar": grammar }),
            Grammar::Choice(choice) => json!({ "choice": choice }),
            Grammar::JsonObject | Grammar::Calls(_) => panic!("{name} has no field"),
        };
        let body = json!({ "structured_outputs": outputs, "max_tokens": 20 });
        // The one before may still have the only place, and so may the others'.
        let hostile = async {
            loop {
                let answer = server.chat(body.clone()).await;
                if answer.status != 429 {
                    return answer;
                }
            }
        };
        let others = async {
            for seed in 0..3 {
                // A busy machine may take longer over the hostile one than another grammar waits for its place.
                let answer = loop {
                    let answer = server
                        .chat(json!({ "guided_choice": ["yes", "no"], "seed": seed }))
                        .await;
                    if answer.status != 429 {
                        break answer;
                    }
                };
                assert_eq!(answer.status, 200, "{name}: {}", answer.body);
                let answer = server.chat(json!({ "max_tokens": 30, "seed": seed })).await;
                assert_eq!(answer.status, 200, "{name}: {}", answer.body);
            }
        };
        let (hostile, ()) = tokio::join!(hostile, others);
        assert!(
            hostile.status == 200 || hostile.status == 400,
            "{name}: {}",
            hostile.body
        );
        if hostile.status == 400 {
            assert!(
                hostile.json()["error"]["message"].as_str().unwrap().len() < 900,
                "{}",
                hostile.body
            );
        }
    }
    server.assert_idle().await;
}
