//! What answers tell about themselves, and the names that other platforms have for what is here.

use serde_json::{Value, json};

use crate::support::Setup;

#[tokio::test]
async fn times_are_part_of_the_answer_where_the_operator_wants_them() {
    let mut setup = Setup::default();
    setup.limits.per_request_metrics = true;
    let server = setup.start();
    let check = |metrics: &Value| {
        let time = |name: &str| metrics[name].as_f64().unwrap_or_else(|| panic!("{name} of {metrics}"));
        assert!(time("time_to_first_token_ms") >= time("queue_time_ms"), "{metrics}");
        assert!(
            time("generation_time_ms") > 0.0 && time("tokens_per_second") > 0.0,
            "{metrics}"
        );
        assert!(time("mean_itl_ms") <= time("generation_time_ms"), "{metrics}");
    };
    check(&server.chat(json!({})).await.json()["metrics"]);
    check(&server.complete(json!({ "prompt": "a" })).await.json()["metrics"]);
    let stream = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let chunks = server.chat(stream).await.chunks();
    let (last, others) = chunks.split_last().unwrap();
    check(&last["metrics"]);
    assert!(
        others.iter().all(|chunk| chunk.get("metrics").is_none()),
        "on the usage chunk alone"
    );
    let nothing = server
        .complete(json!({ "prompt": "a", "echo": true, "max_tokens": 0 }))
        .await
        .json();
    assert_eq!(nothing["metrics"]["time_to_first_token_ms"], Value::Null);
    let quiet = Setup::default().start().chat(json!({})).await.json();
    assert!(quiet.get("metrics").is_none());
}

#[tokio::test]
async fn usage_ends_every_stream_and_hides_the_cache_where_the_operator_wants_it() {
    let mut setup = Setup::default();
    setup.limits.force_include_usage = true;
    setup.limits.prompt_tokens_details = false;
    let server = setup.start();
    for options in [
        json!(null),
        json!({ "include_usage": false }),
        json!({ "continuous_usage_stats": true }),
    ] {
        let is_continuous = options["continuous_usage_stats"] == true;
        let chunks = server
            .chat(json!({ "stream": true, "stream_options": options }))
            .await
            .chunks();
        let (last, others) = chunks.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["completion_tokens"], 3);
        assert_eq!(last["usage"]["prompt_tokens_details"], Value::Null);
        assert!(
            others.iter().all(|chunk| chunk["usage"].is_object() == is_continuous),
            "{others:?}"
        );
    }
}

#[tokio::test]
async fn usage_is_counted_along_where_it_is_asked_for() {
    let server = Setup::default().start();
    let options = json!({ "include_usage": true, "continuous_usage_stats": true });
    let chunks = server
        .chat(json!({ "stream": true, "stream_options": options }))
        .await
        .chunks();
    let counts: Vec<_> = chunks
        .iter()
        .map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert!(
        counts.is_sorted() && counts[0] <= 1 && counts.last() == Some(&3),
        "{counts:?}"
    );
    assert!(chunks[0]["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn sagemaker_finds_both_endpoints_behind_its_own() {
    let server = Setup::default().start();
    let chat = server
        .post(
            "/invocations",
            json!({ "messages": [{ "role": "user", "content": "hi" }] }),
        )
        .await
        .json();
    assert_eq!(chat["object"], "chat.completion");
    let completion = server
        .post("/invocations", json!({ "prompt": "hi", "stream": false }))
        .await
        .json();
    assert_eq!(completion["object"], "text_completion");
    for (body, code) in [("{}", "missing_required_parameter"), ("{", "invalid_json")] {
        let refused = server.post("/invocations", body).await;
        assert_eq!(
            (refused.status.as_u16(), &refused.json()["error"]["code"]),
            (400, &json!(code))
        );
    }
    let outcomes = server.outcomes().await;
    assert_eq!(
        outcomes.iter().map(|(_, count)| count).sum::<u64>(),
        4,
        "each is counted: {outcomes:?}"
    );
}

#[tokio::test]
async fn probes_answer_to_the_names_of_other_platforms() {
    let loading = Setup {
        is_loaded: false,
        ..Setup::default()
    };
    for (server, ready) in [(loading.start(), 503), (Setup::default().start(), 200)] {
        for path in ["/ping", "/v1/health/ready", "/v2/health/ready"] {
            assert_eq!(server.get(path).await.status, ready, "{path}");
        }
        for path in ["/v1/health/live", "/v2/health/live", "/is_sleeping", "/load"] {
            assert_eq!(server.get(path).await.status, 200, "{path}");
        }
        assert_eq!(server.post("/ping", "").await.status, ready);
        assert_eq!(server.get("/is_sleeping").await.json(), json!({ "is_sleeping": false }));
    }
}

#[tokio::test]
async fn the_load_is_what_runs_and_waits() {
    let (mut setup, gate) = Setup::default().gated();
    setup.engine.max_num_seqs = 1;
    let server = setup.start();
    assert_eq!(server.get("/load").await.json(), json!({ "server_load": 0 }));
    let requests = (0..3).map(|_| server.chat(json!({})));
    let requests: Vec<_> = requests.map(Box::pin).collect();
    let mut all = Box::pin(join_all(requests));
    assert!(poll_once(&mut all).await.is_none(), "no step has run");
    while server.get("/load").await.json() != json!({ "server_load": 3 }) {
        tokio::task::yield_now().await;
    }
    drop(gate);
    all.await;
    server.engine.idle().await;
    assert_eq!(server.get("/load").await.json(), json!({ "server_load": 0 }));
}

async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| match std::pin::Pin::new(&mut *future).poll(context) {
        std::task::Poll::Ready(output) => std::task::Poll::Ready(Some(output)),
        std::task::Poll::Pending => std::task::Poll::Ready(None),
    })
    .await
}

/// Waits for all, side by side.
async fn join_all<F: Future + Unpin>(mut futures: Vec<F>) {
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| std::pin::Pin::new(future).poll(context).is_pending());
        match futures.is_empty() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}
