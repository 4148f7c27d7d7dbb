//! async-openai against the demo model: its types refuse what the API's description does not have.
//! Usage: `lapidary-async-openai http://127.0.0.1:8000`

use std::error::Error;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{ChatCompletionMessageToolCalls, FinishReason};
use async_openai::types::responses::ResponseStreamEvent;
use futures_util::{StreamExt, TryStreamExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

type Outcome = Result<(), Box<dyn Error>>;

/// A request of the client's own type, with the fields of `extra` beside the usual ones.
fn ask<T: DeserializeOwned>(extra: Value) -> Result<T, serde_json::Error> {
    let mut body = json!({ "model": "demo", "temperature": 0 });
    for (key, value) in extra.as_object().into_iter().flatten() {
        body[key] = value.clone();
    }
    serde_json::from_value(body)
}

fn sum() -> Value {
    json!([{ "role": "user", "content": "What is 12 + 7?" }])
}

async fn chats(client: &Client<OpenAIConfig>) -> Outcome {
    let chat = client.chat();
    let logprobs = json!({ "messages": sum(), "logprobs": true, "top_logprobs": 2, "n": 2 });
    let whole = chat.create(ask(logprobs)?).await?;
    assert_eq!(whole.choices.len(), 2);
    let choice = &whole.choices[0];
    let text = choice.message.content.as_deref().unwrap_or_default();
    assert!(text.contains("19"), "{text}");
    assert_eq!(choice.finish_reason, Some(FinishReason::Stop));
    let tokens = choice.logprobs.as_ref().and_then(|logprobs| logprobs.content.as_ref());
    assert!(tokens.is_some_and(|tokens| tokens.iter().all(|token| token.top_logprobs.len() >= 2)));

    let streamed = json!({ "messages": sum(), "stream_options": { "include_usage": true } });
    let chunks: Vec<_> = chat.create_stream(ask(streamed)?).await?.try_collect().await?;
    let deltas = chunks.iter().flat_map(|chunk| &chunk.choices);
    let again: String = deltas.filter_map(|choice| choice.delta.content.as_deref()).collect();
    assert_eq!(again, text);
    let usage = chunks.last().and_then(|chunk| chunk.usage.as_ref());
    assert!(usage.is_some_and(|usage| usage.completion_tokens > 0));
    Ok(())
}

async fn schemas_and_tools(client: &Client<OpenAIConfig>) -> Outcome {
    let chat = client.chat();
    let parameters = json!({
        "type": "object", "properties": { "votes": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["votes"], "additionalProperties": false,
    });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "votes", "strict": true, "schema": parameters } });
    let shaped = chat
        .create(ask(json!({ "messages": sum(), "response_format": format }))?)
        .await?;
    let shaped: Value = serde_json::from_str(shaped.choices[0].message.content.as_deref().unwrap_or_default())?;
    assert!(shaped["votes"].is_u64(), "{shaped}");

    let tool = json!({ "type": "function", "function": { "name": "vote", "parameters": parameters } });
    let forced = json!({ "messages": sum(), "tools": [tool], "tool_choice": "required", "max_completion_tokens": 200 });
    let called = chat.create(ask(forced.clone())?).await?;
    let message = &called.choices[0].message;
    let Some([ChatCompletionMessageToolCalls::Function(call), ..]) = message.tool_calls.as_deref() else {
        return Err(format!("no call: {message:?}").into());
    };
    assert_eq!(call.function.name, "vote");
    serde_json::from_str::<Value>(&call.function.arguments)?;

    let chunks: Vec<_> = chat.create_stream(ask(forced)?).await?.try_collect().await?;
    let deltas = chunks.iter().flat_map(|chunk| &chunk.choices);
    let calls = deltas.flat_map(|choice| choice.delta.tool_calls.iter().flatten());
    let first = calls
        .filter(|call| call.index == 0)
        .filter_map(|call| call.function.as_ref());
    let arguments: String = first.filter_map(|function| function.arguments.as_deref()).collect();
    assert_eq!(arguments, call.function.arguments);
    Ok(())
}

async fn completions(client: &Client<OpenAIConfig>) -> Outcome {
    let lists = json!({ "prompt": ["One", "Two"], "max_tokens": 3, "logprobs": 2 });
    let whole = client.completions().create(ask(lists)?).await?;
    assert_eq!(
        whole.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(),
        [0, 1]
    );
    let streamed = client
        .completions()
        .create_stream(ask(json!({ "prompt": "One", "max_tokens": 3 }))?)
        .await?;
    let chunks: Vec<_> = streamed.try_collect().await?;
    let text: String = chunks
        .iter()
        .flat_map(|chunk| &chunk.choices)
        .map(|choice| choice.text.as_str())
        .collect();
    assert_eq!(text, whole.choices[0].text);
    Ok(())
}

async fn responses(client: &Client<OpenAIConfig>) -> Outcome {
    let input = json!({ "input": "What is 12 + 7?" });
    let whole = client.responses().create(ask(input.clone())?).await?;
    let text = whole.output_text().unwrap_or_default();
    assert!(text.contains("19"), "{text}");
    let mut events = client.responses().create_stream(ask(input)?).await?;
    let (mut again, mut is_complete) = (String::new(), false);
    while let Some(event) = events.next().await {
        match event? {
            ResponseStreamEvent::ResponseOutputTextDelta(delta) => again.push_str(&delta.delta),
            ResponseStreamEvent::ResponseCompleted(_) => is_complete = true,
            _ => {}
        }
    }
    assert!(is_complete && again == text, "{again:?} instead of {text:?}");
    Ok(())
}

async fn errors(client: &Client<OpenAIConfig>) -> Outcome {
    let mut unknown = json!({ "messages": sum() });
    unknown["model"] = "nope".into();
    match client.chat().create(ask(unknown)?).await {
        Err(OpenAIError::ApiError(error)) => {
            assert_eq!(error.status_code.as_u16(), 404);
            assert_eq!(error.api_error.code.as_deref(), Some("model_not_found"));
        }
        other => return Err(format!("{other:?}").into()),
    }
    match client.chat().create(ask(json!({ "messages": [] }))?).await {
        Err(OpenAIError::ApiError(error)) => assert_eq!(error.api_error.param.as_deref(), Some("messages")),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let url = std::env::args().nth(1).ok_or("where is the server?")?;
    let config = OpenAIConfig::new()
        .with_api_base(format!("{url}/v1"))
        .with_api_key("none");
    let client = Client::with_config(config);
    assert_eq!(client.models().list().await?.data[0].id, "demo");
    chats(&client).await?;
    schemas_and_tools(&client).await?;
    completions(&client).await?;
    responses(&client).await?;
    errors(&client).await?;
    println!("async-openai: all passed");
    Ok(())
}
