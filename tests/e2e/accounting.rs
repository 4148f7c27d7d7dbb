//! Whatever clients do, the books balance.

use std::io;

use lapidary_tests::churn::{check_accounts, churn, settled};
use lapidary_tests::metrics::sum;
use lapidary_tests::process::ServerProcess;
use serde_json::json;

use crate::{chat, post, with};

const CHURN_REQUESTS: usize = 400;

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_leave_nothing_behind() -> io::Result<()> {
    let server = ServerProcess::demo(&[]).await?;
    let before = settled(&server).await?;
    let answered = churn(server.address, 0..CHURN_REQUESTS).await?;
    check_accounts(&before, &settled(&server).await?, CHURN_REQUESTS, answered)?;
    Ok(())
}

#[tokio::test]
async fn counters_are_the_sum_of_usage() -> io::Result<()> {
    let server = ServerProcess::demo(&[]).await?;
    let mut prompt_tokens = 0;
    let mut completion_tokens = 0;
    for question in ["What is 1 + 1?", "Count from 1 to 5.", "What is 1 + 1?"] {
        let usage = post(&server, "/v1/chat/completions", &with(chat(question), "n", 1))
            .await?
            .json()["usage"]
            .clone();
        prompt_tokens += usage["prompt_tokens"].as_u64().expect("a number");
        completion_tokens += usage["completion_tokens"].as_u64().expect("a number");
    }
    let text = settled(&server).await?;
    assert_eq!(sum(&text, "vllm:prompt_tokens_total", &[]), prompt_tokens as f64);
    assert_eq!(
        sum(&text, "vllm:generation_tokens_total", &[]),
        completion_tokens as f64
    );
    Ok(())
}

#[tokio::test]
async fn refused_requests_are_counted_too() -> io::Result<()> {
    let server = ServerProcess::demo(&[]).await?;
    let response = post(&server, "/v1/chat/completions", &json!({ "messages": [] })).await?;
    assert_eq!(response.head.status, 400);
    let text = settled(&server).await?;
    assert_eq!(
        sum(&text, "lapidary_requests_finished_total", &[("outcome", "invalid")]),
        1.0
    );
    assert_eq!(sum(&text, "lapidary_requests_finished_total", &[]), 1.0);
    Ok(())
}
