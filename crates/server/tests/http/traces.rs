//! A span of each request reaches a collector, and a collector that is not there is nobody's problem.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use lapidary_server::config::{Sampler, Token, TraceConfig};
use lapidary_server::traces::Tracer;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{Server, Setup, post_request, with_messages};

const DEADLINE: Duration = Duration::from_secs(30);
const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

/// What a collector got: the head of a request and its body.
type Received = (String, Value);

/// Takes what it gets and answers with `status`. Ends with the last connection to it.
fn collector(status: u16) -> (String, Receiver<Received>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/v1/traces", listener.local_addr().unwrap());
    let (sender, received) = channel();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream);
        while let Some((head, body)) = read_request(&mut reader) {
            // First it is there to be seen, then the exporter hears that it was taken, and a flush ends.
            if sender.send((head, body)).is_err() {
                break;
            }
            let answer = format!("HTTP/1.1 {status} X\r\ncontent-length: 2\r\n\r\n{{}}");
            reader.get_mut().write_all(answer.as_bytes()).unwrap();
        }
    });
    (endpoint, received)
}

fn read_request(reader: &mut impl BufRead) -> Option<Received> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap() == 0 {
            return None;
        }
    }
    let head = head.to_ascii_lowercase();
    let length = head.split("content-length: ").nth(1).unwrap();
    let mut body = vec![0; length.lines().next().unwrap().parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    Some((head, serde_json::from_slice(&body).unwrap()))
}

fn traced(setup: Setup, endpoint: &str) -> Server {
    let server = setup.start();
    let tracer = Tracer::start(TraceConfig {
        endpoint: endpoint.to_owned(),
        headers: vec![("x-key".to_owned(), Token::new("secret"))],
        resource: vec![("service.name".to_owned(), "gem".to_owned())],
        sampler: Sampler::default(),
        ca_bundle: None,
    });
    server.state.traces.set(tracer.unwrap()).unwrap();
    server
}

/// Spans that have arrived, in order.
async fn spans(server: &Server, received: &Receiver<Received>) -> Vec<Value> {
    server.state.traces.get().unwrap().flush(DEADLINE).await;
    let bodies = received.try_iter().map(|(_, body)| body);
    bodies
        .flat_map(|body| {
            body["resourceSpans"][0]["scopeSpans"][0]["spans"]
                .as_array()
                .unwrap()
                .clone()
        })
        .collect()
}

fn attribute(span: &Value, key: &str) -> Value {
    let attributes = span["attributes"].as_array().unwrap();
    let found = attributes.iter().find(|attribute| attribute["key"] == key);
    let value = &found.unwrap_or_else(|| panic!("no {key} in {span:#}"))["value"];
    value.as_object().unwrap().values().next().unwrap().clone()
}

fn has(span: &Value, key: &str) -> bool {
    span["attributes"]
        .as_array()
        .unwrap()
        .iter()
        .any(|attribute| attribute["key"] == key)
}

fn with_parent(path: &str, flags: &str, body: Value) -> Request<Body> {
    let mut request = post_request(path, body);
    let parent = format!("00-{TRACE_ID}-{PARENT_ID}-{flags}");
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    request.headers_mut().insert("x-request-id", "req-7".parse().unwrap());
    request
}

async fn count(server: &Server, fate: &str) -> f64 {
    server
        .metric("lapidary_trace_spans_total", &format!("fate=\"{fate}\""))
        .await
}

#[tokio::test]
async fn a_request_is_a_span_of_its_clients_trace() {
    let (endpoint, received) = collector(200);
    let server = traced(Setup::default(), &endpoint);
    let body = json!({ "stream": true, "temperature": 0.5, "top_p": 0.25, "max_tokens": 7, "n": 1 });
    let request = with_parent("/v1/chat/completions", "01", with_messages(body));
    let answer = server.send(request).await;
    assert_eq!(answer.status, 200);
    server.state.traces.get().unwrap().flush(DEADLINE).await;
    let (head, body) = received.recv_timeout(DEADLINE).unwrap();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(
        head.contains("content-type: application/json\r\n") && head.contains("x-key: secret\r\n"),
        "{head}"
    );
    let resource = &body["resourceSpans"][0]["resource"]["attributes"][0];
    assert_eq!(
        resource,
        &json!({ "key": "service.name", "value": { "stringValue": "gem" } })
    );
    let span = &body["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
    assert_eq!(span["traceId"], TRACE_ID);
    assert_eq!(span["parentSpanId"], PARENT_ID);
    assert_eq!(span["spanId"].as_str().unwrap().len(), 16);
    assert_eq!((&span["name"], &span["kind"]), (&json!("llm_request"), &json!(2)));
    assert_eq!(span["status"], Value::Null);
    for (key, value) in [
        ("gen_ai.request.id", json!("req-7")),
        ("gen_ai.request.model", json!("tiny")),
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.temperature", json!(0.5)),
        ("gen_ai.request.top_p", json!(0.25)),
        ("gen_ai.request.max_tokens", json!("7")),
        ("gen_ai.request.n", json!("1")),
        ("gen_ai.usage.num_sequences", json!("1")),
        ("gen_ai.usage.completion_tokens", json!("3")),
        ("http.response.status_code", json!("200")),
        ("lapidary.outcome", json!("stop")),
    ] {
        assert_eq!(attribute(span, key), value, "{key}");
    }
    assert!(
        attribute(span, "gen_ai.usage.prompt_tokens")
            .as_str()
            .unwrap()
            .parse::<u32>()
            .unwrap()
            > 0
    );
    let seconds = |name: &str| attribute(span, &format!("gen_ai.latency.{name}")).as_f64().unwrap();
    let parts = seconds("time_in_queue") + seconds("time_in_model_prefill") + seconds("time_in_model_decode");
    assert!((0.0..=seconds("e2e")).contains(&parts), "{parts} of {}", seconds("e2e"));
    assert!(seconds("time_to_first_token") <= seconds("e2e"));
    let inference = seconds("time_in_model_prefill") + seconds("time_in_model_decode");
    assert!((inference - seconds("time_in_model_inference")).abs() < 1e-6);
    let nanos = |key: &str| span[key].as_str().unwrap().parse::<u128>().unwrap();
    let duration = (nanos("endTimeUnixNano") - nanos("startTimeUnixNano")) as f64 / 1e9;
    assert!((duration - seconds("e2e")).abs() < 1e-6);
    assert_eq!(
        (count(&server, "exported").await, count(&server, "dropped").await),
        (1.0, 0.0)
    );
}

#[tokio::test]
async fn however_a_request_ends_it_is_one_span() {
    let (endpoint, received) = collector(200);
    let server = traced(Setup::answering(&["a"; 200]), &endpoint);
    assert_eq!(server.post("/v1/completions", "{").await.status, 400);
    assert_eq!(
        server.complete(json!({ "prompt": "a", "max_tokens": 1 })).await.status,
        200
    );
    let left = post_request(
        "/v1/completions",
        json!({ "prompt": "a", "stream": true, "max_tokens": 200 }),
    );
    drop(server.router.clone().oneshot(left).await.unwrap());
    let responses = json!({ "input": "a", "max_output_tokens": 1 });
    assert_eq!(server.post("/v1/responses", responses).await.status, 200);
    // No generation, or somebody else decided that the trace is not recorded.
    server.get("/v1/models").await;
    server.get("/health").await;
    let unsampled = with_parent("/v1/completions", "00", json!({ "prompt": "a", "max_tokens": 1 }));
    assert_eq!(server.send(unsampled).await.status, 200);

    let spans = spans(&server, &received).await;
    let outcomes: Vec<Value> = spans.iter().map(|span| attribute(span, "lapidary.outcome")).collect();
    assert_eq!(outcomes, ["invalid", "length", "client_abort", "length"]);
    assert!(!has(&spans[0], "gen_ai.request.temperature"), "it was not understood");
    assert!(has(&spans[1], "gen_ai.latency.time_to_first_token"));
    let traces: std::collections::HashSet<&str> = spans.iter().map(|span| span["traceId"].as_str().unwrap()).collect();
    assert_eq!(traces.len(), spans.len(), "each begins a trace of its own");
}

#[tokio::test]
async fn an_error_of_ours_is_an_error_of_the_span() {
    let (endpoint, received) = collector(200);
    let server = traced(Setup::default().failing_at([0]), &endpoint);
    assert_eq!(server.chat(json!({})).await.status, 500);
    let spans = spans(&server, &received).await;
    assert_eq!(spans[0]["status"], json!({ "code": 2, "message": "engine_error" }));
}

#[tokio::test]
async fn without_a_collector_requests_are_answered_and_spans_counted_as_dropped() {
    // Nobody listens there any more.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (refusing, _received) = collector(503);
    for endpoint in [format!("http://{address}/v1/traces"), refusing] {
        let server = traced(Setup::default(), &endpoint);
        for _ in 0..3 {
            assert_eq!(server.chat(json!({})).await.status, 200);
        }
        server.state.traces.get().unwrap().flush(DEADLINE).await;
        assert_eq!(
            (count(&server, "exported").await, count(&server, "dropped").await),
            (0.0, 3.0),
            "{endpoint}"
        );
    }
}

#[tokio::test]
async fn without_a_place_for_traces_there_are_no_counts_of_them() {
    let server = Setup::default().start();
    assert!(!server.get("/metrics").await.body.contains("trace_spans"));
}
