//! Probes and metrics.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method, Request};
use lapidary_server::Phase;
use serde_json::json;

use crate::support::Setup;

/// What dashboards, gateways and our own documents count on.
const FAMILIES: &[&str] = &[
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total",
    "lapidary_requests_finished_total",
    "lapidary_build_info",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_start_time_seconds",
];

#[tokio::test]
async fn a_loading_server_is_alive_and_not_ready() {
    let server = Setup {
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    server.state.lifecycle.enter(Phase::LoadingWeights);
    server.state.lifecycle.set_progress(1, 4);
    assert_eq!(server.get("/live").await.status, 200);
    assert_eq!(server.get("/health").await.status, 503);
    let ready = server.get("/ready").await;
    assert_eq!(ready.status, 503);
    assert_eq!(ready.json(), json!({ "status": "loading_weights", "progress": 0.25 }));
    let refused = server.chat(json!({})).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["error"]["code"], "model_loading");
    assert!(refused.header("retry-after").is_some());
    assert_eq!(server.outcomes().await, [("not_ready".to_owned(), 1)]);
}

#[tokio::test]
async fn a_ready_server_says_so() {
    let server = Setup::default().start();
    for path in ["/live", "/ready", "/health", "/metrics", "/version"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
        let head = Request::builder()
            .method(Method::HEAD)
            .uri(path)
            .body(Body::empty())
            .unwrap();
        let head = server.send(head).await;
        assert_eq!((head.status.as_u16(), head.body.as_str()), (200, ""), "{path}");
    }
    assert_eq!(server.get("/health").await.body, "");
    assert_eq!(
        server.get("/ready").await.json(),
        json!({ "status": "ready", "progress": 1.0 })
    );
    assert_eq!(
        server.get("/version").await.json(),
        json!({ "version": env!("CARGO_PKG_VERSION") })
    );
}

#[tokio::test]
async fn a_draining_server_is_not_ready_but_answers() {
    let server = Setup::default().start();
    server.state.lifecycle.enter(Phase::Draining);
    assert_eq!(server.get("/live").await.status, 200);
    assert_eq!(server.get("/ready").await.status, 503);
    assert_eq!(
        server.chat(json!({})).await.status,
        200,
        "a balancer may not have noticed yet"
    );
    server.engine.drain();
    let refused = server.chat(json!({})).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["error"]["code"], "shutting_down");
    assert!(refused.header("retry-after").is_some());
}

#[tokio::test]
async fn metrics_are_well_formed() {
    let server = Setup::default().start();
    server.chat(json!({ "n": 2 })).await;
    let scrape = server.get("/metrics").await;
    assert_eq!(
        scrape.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let mut families = HashSet::new();
    let mut samples = HashSet::new();
    let (mut family, mut kind) = (String::new(), String::new());
    for line in scrape.body.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap().to_owned();
            assert!(families.insert(family.clone()), "{family} twice");
            assert!(help.len() > family.len() + 2, "{family} has no help");
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            kind = typed
                .strip_prefix(&format!("{family} "))
                .expect("TYPE follows HELP")
                .to_owned();
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(samples.insert(sample.to_owned()), "{sample} twice");
            let name = sample.split('{').next().unwrap();
            match kind.as_str() {
                "histogram" => {
                    let suffix = name.strip_prefix(&family).unwrap();
                    assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}");
                }
                "counter" => assert!(name == family && name.ends_with("_total"), "{line}"),
                "gauge" => assert!(name == family && !name.ends_with("_total"), "{line}"),
                kind => panic!("{kind}"),
            }
        }
    }
    for name in FAMILIES {
        assert!(families.contains(*name), "{name} is missing");
    }
}

#[tokio::test]
async fn a_scrape_while_the_engine_is_stuck_in_a_step_does_not_wait() {
    let (setup, gate) = Setup::default().gated();
    let server = setup.start();
    let stuck = server.router.clone();
    let request = crate::support::post_request("/v1/chat/completions", crate::support::with_messages(json!({})));
    let stuck = tokio::spawn(async move { tower::ServiceExt::oneshot(stuck, request).await });
    while server.engine.stats().num_running + server.engine.stats().num_queued == 0 {
        tokio::task::yield_now().await;
    }
    let started = Instant::now();
    for path in ["/live", "/ready", "/health", "/metrics"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(gate);
    assert_eq!(stuck.await.unwrap().unwrap().status(), 200);
}
