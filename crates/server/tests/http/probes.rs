//! Probes and metrics.

use std::collections::HashSet;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use lapidary_server::Phase;
use serde_json::json;
use tokio::time::timeout;

use crate::support::Setup;

const DEADLINE: Duration = Duration::from_secs(60);

/// What dashboards, gateways and our own documents count on.
const FAMILIES: &[&str] = &[
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:engine_sleep_state",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:prompt_tokens_by_source_total",
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
    "vllm:request_max_num_generation_tokens",
    "vllm:request_prefill_kv_computed_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total",
    "http_requests_total",
    "http_request_duration_seconds",
    "http_request_duration_highr_seconds",
    "http_request_size_bytes",
    "http_response_size_bytes",
    "lapidary_requests_received_total",
    "lapidary_requests_finished_total",
    "lapidary_inter_token_latency_seconds",
    "lapidary_e2e_request_latency_seconds",
    "lapidary_queue_time_seconds",
    "lapidary_build_info",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_cpu_seconds_total",
    "process_open_fds",
    "process_max_fds",
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
                "summary" => {
                    let suffix = name.strip_prefix(&family).unwrap();
                    assert!(["_sum", "_count"].contains(&suffix), "{line}");
                }
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
    for path in ["/live", "/ready", "/health", "/metrics"] {
        // The engine stays where it is until all have answered: to wait for it is to wait for ever.
        let answer = timeout(DEADLINE, server.get(path)).await.expect("the probe waits");
        assert_eq!(answer.status, 200, "{path}");
    }
    drop(gate);
    assert_eq!(stuck.await.unwrap().unwrap().status(), 200);
}

/// Upper bounds of a histogram's buckets, as they are written.
fn bounds(scrape: &str, family: &str) -> Vec<String> {
    let prefix = format!("{family}_bucket{{");
    let of_family = scrape.lines().filter(|line| line.starts_with(&prefix));
    of_family
        .map(|line| {
            line.split("le=\"")
                .nth(1)
                .unwrap()
                .split('"')
                .next()
                .unwrap()
                .to_owned()
        })
        .collect()
}

/// Dashboards that compare servers add up buckets by their bounds.
#[tokio::test]
async fn buckets_are_vllms_to_the_bound() {
    const PER_TOKEN: &str = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80 +Inf";
    const REQUEST: &str = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680 +Inf";
    // Of a context of 256 tokens.
    const TOKENS: &str = "1 2 5 10 20 50 100 200 +Inf";
    let server = Setup::default().start();
    server.chat(json!({})).await;
    let scrape = server.get("/metrics").await.body;
    for (family, expected) in [
        (
            "vllm:time_to_first_token_seconds",
            "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560 +Inf",
        ),
        ("vllm:inter_token_latency_seconds", PER_TOKEN),
        ("vllm:time_per_output_token_seconds", PER_TOKEN),
        ("vllm:request_time_per_output_token_seconds", PER_TOKEN),
        ("vllm:e2e_request_latency_seconds", REQUEST),
        ("vllm:request_queue_time_seconds", REQUEST),
        ("vllm:request_inference_time_seconds", REQUEST),
        ("vllm:request_prefill_time_seconds", REQUEST),
        ("vllm:request_decode_time_seconds", REQUEST),
        ("vllm:request_prompt_tokens", TOKENS),
        ("vllm:request_generation_tokens", TOKENS),
        ("vllm:request_max_num_generation_tokens", TOKENS),
        ("vllm:request_prefill_kv_computed_tokens", TOKENS),
        ("vllm:request_params_max_tokens", TOKENS),
        ("vllm:request_params_n", "1 2 5 10 20 +Inf"),
        (
            "vllm:iteration_tokens_total",
            "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 +Inf",
        ),
        (
            "http_request_duration_highr_seconds",
            "0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1 1.5 2 2.5 3 3.5 4 4.5 5 7.5 10 30 60 +Inf",
        ),
    ] {
        assert_eq!(bounds(&scrape, family).join(" "), expected, "{family}");
    }
    // A GPU's tokens take 1 to 10 ms, all of which is vLLM's first bucket.
    let fine = bounds(&scrape, "lapidary_inter_token_latency_seconds");
    let between = |bound: &&String| (0.001..=0.01).contains(&bound.parse::<f64>().unwrap());
    assert_eq!(fine.iter().filter(between).count(), 14, "{fine:?}");
}

/// What the Kubernetes Gateway API Inference Extension asks of a model server, with vLLM's labels.
#[tokio::test]
async fn the_inference_gateway_finds_its_gauges() {
    let server = Setup::default().start();
    let scrape = server.get("/metrics").await.body;
    for gauge in [
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
    ] {
        assert!(scrape.contains(&format!("# TYPE {gauge} gauge\n")), "{gauge}");
        let sample = format!("\n{gauge}{{model_name=\"tiny\",engine=\"0\"}} 0\n");
        assert!(scrape.contains(&sample), "{gauge}");
    }
    let config = scrape
        .lines()
        .find(|line| line.starts_with("vllm:cache_config_info{"))
        .unwrap();
    for label in ["block_size=\"16\"", "num_gpu_blocks=\"256\"", "cache_dtype=\"auto\""] {
        assert!(config.contains(label), "{config}");
    }
}

#[tokio::test]
async fn every_outcome_and_reason_is_there_before_it_happens() {
    let server = Setup {
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let scrape = server.get("/metrics").await.body;
    for endpoint in ["chat", "completions", "responses", "unknown"] {
        for outcome in [
            "stop",
            "length",
            "client_abort",
            "timeout",
            "unauthorized",
            "rate_limited",
            "queue_full",
            "invalid",
            "not_ready",
            "shutdown",
            "engine_error",
        ] {
            let sample = format!("{{endpoint=\"{endpoint}\",outcome=\"{outcome}\"}} 0\n");
            assert!(scrape.contains(&sample), "{endpoint} {outcome}");
        }
    }
    for reason in ["stop", "length", "abort", "error"] {
        assert!(
            scrape.contains(&format!("finished_reason=\"{reason}\"}} 0\n")),
            "{reason}"
        );
    }
}

#[tokio::test]
async fn the_longest_of_several_answers_and_the_computed_part_of_a_prompt_are_observed() {
    let server = Setup::default().start();
    let body = json!({ "prompt": ["a".repeat(40), "b"], "n": 2, "max_tokens": 3 });
    assert_eq!(server.complete(body).await.status, 200);
    let longest = "vllm:request_max_num_generation_tokens";
    assert_eq!(
        server.metric(&format!("{longest}_count"), "").await,
        2.0,
        "one for each prompt"
    );
    assert_eq!(server.metric(&format!("{longest}_sum"), "").await, 6.0);
    let computed = server.metric("vllm:request_prefill_kv_computed_tokens_sum", "").await;
    let prompts = server.metric("vllm:request_prompt_tokens_sum", "").await;
    assert!(
        computed > 0.0 && computed < prompts,
        "siblings share blocks: {computed} of {prompts}"
    );
    let all = server.metric("vllm:prompt_tokens_by_source_total", "").await;
    assert_eq!(all, server.metric("vllm:prompt_tokens_total", "").await);
}

#[tokio::test]
async fn http_requests_are_counted_by_where_they_went_and_how_large_they_were() {
    let server = Setup::default().start();
    let body = json!({ "prompt": "a" }).to_string();
    let mut request = crate::support::post_request("/v1/completions", &body);
    request.headers_mut().insert("content-length", body.len().into());
    let answer = server.send(request).await;
    server.get("/v1/models/tiny").await;
    server.get("/v1/models/no-such-model").await;
    server.get("/made/up/by/a/client").await;
    server.get("/health").await;
    let text = server.get("/metrics").await.body;
    let mut counted: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("http_requests_total"))
        .collect();
    counted.sort_unstable();
    assert_eq!(
        counted,
        [
            "{handler=\"/v1/completions\",method=\"POST\",status=\"2xx\"} 1",
            "{handler=\"/v1/models/{id}\",method=\"GET\",status=\"2xx\"} 1",
            "{handler=\"/v1/models/{id}\",method=\"GET\",status=\"4xx\"} 1",
            "{handler=\"none\",method=\"GET\",status=\"4xx\"} 1",
        ]
    );
    let completions = "handler=\"/v1/completions\"";
    let sizes = [
        server.metric("http_request_size_bytes_sum", completions).await,
        server.metric("http_response_size_bytes_sum", completions).await,
        server.metric("http_request_size_bytes_count", completions).await,
    ];
    assert_eq!(sizes, [body.len() as f64, answer.body.len() as f64, 1.0]);
}
