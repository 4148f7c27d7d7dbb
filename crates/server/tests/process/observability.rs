//! What the process tells of its requests: lines in the log, traces.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

use super::{DEADLINE, LONGEST_ANSWER, Server, poll, read_response};

#[test]
fn every_request_has_one_line_in_the_log_with_what_it_used() {
    let server = Server::ready(&["serve", "demo"]);
    let body = r#"{"model":"demo","prompt":"Hello","max_tokens":4,"ignore_eos":true}"#;
    let request = |path: &str| read_response(server.send("POST", path, body)).0;
    assert_eq!(request("/v1/completions?secret=1"), 200);
    assert_eq!(request("/v1/nothing"), 404);
    let line = server.log_line("\"message\":\"request\"");
    for part in [
        r#""method":"POST","path":"/v1/completions","status":200,"outcome":"length""#,
        r#""completion_tokens":4"#,
        r#""total_ms":"#,
        r#""request_id":""#,
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(!line.contains("secret"), "{line}");
    let line = server.log_line("\"message\":\"request\"");
    assert!(line.contains(r#""path":"/v1/nothing","status":404"#), "{line}");
    // Not read to its end: the client leaves.
    drop(server.stream(LONGEST_ANSWER));
    let line = server.log_line("\"message\":\"request\"");
    assert!(line.contains(r#""outcome":"client_abort""#), "{line}");
    let mut stream = server.connect();
    write!(stream, "This is no HTTP.\r\n\r\n").unwrap();
    assert_eq!(read_response(stream).0, 400);
    let line = server.log_line("\"message\":\"request\"");
    assert!(line.contains(r#""outcome":"invalid","error":""#), "{line}");
    server.get("/ready");
    server.signal("TERM");
    for line in &server.log {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_ne!(event["message"], "request", "a second line, or one for a probe: {line}");
    }
}

#[test]
fn the_last_traces_are_exported_before_the_process_ends() {
    let collector = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", collector.local_addr().unwrap());
    let mut server = Server::ready(&[
        "serve",
        "demo",
        "--drain-grace",
        "0",
        "--otlp-traces-endpoint",
        &endpoint,
    ]);
    let body = r#"{"model":"demo","prompt":"Hello","max_tokens":2}"#;
    assert_eq!(read_response(server.send("POST", "/v1/completions", body)).0, 200);
    let line = server.log_line("\"message\":\"request\"");
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    server.signal("TERM");
    collector.set_nonblocking(true).unwrap();
    let (stream, _) = poll("the process to export", || collector.accept().ok());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut stream = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(stream.read_line(&mut head).unwrap() > 0, "{head}");
    }
    assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
    let length = head
        .to_ascii_lowercase()
        .split("content-length: ")
        .nth(1)
        .unwrap()
        .to_owned();
    let mut body = vec![0; length.lines().next().unwrap().parse().unwrap()];
    stream.read_exact(&mut body).unwrap();
    let trace_id = event["trace_id"].as_str().unwrap();
    assert!(String::from_utf8(body).unwrap().contains(trace_id), "{trace_id}");
    // A process that ends waits for a few seconds only: on a busy machine it may be gone.
    let _ = stream
        .get_mut()
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn an_fp8_kv_cache_answers_and_is_named_wherever_the_cache_is() {
    let server = Server::start(&["serve", "demo", "--kv-cache-dtype", "fp8"]);
    let missing = server.log_line("have no scale for keys or values");
    assert!(
        missing.contains("4 of 4 layers") && missing.contains("WARN"),
        "{missing}"
    );
    let cache = server.log_line("\"kv cache\"");
    // 4 layers, 2 heads of 128, keys and values, a byte each.
    for part in [r#""per_token":"2.00 KiB""#, r#""dtype":"fp8_e4m3""#] {
        assert!(cache.contains(part), "{part} in {cache}");
    }
    server.log_line("\"ready\"");
    let body = r#"{"model":"demo","messages":[{"role":"user","content":"What is 12 + 7?"}],"temperature":0}"#;
    let (status, answer) = read_response(server.send("POST", "/v1/chat/completions", body));
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(
        (status, &answer["choices"][0]["message"]["content"]),
        (200, &"12 + 7 = 19".into())
    );
    let (_, metrics) = server.get("/metrics");
    let info = metrics
        .lines()
        .find(|line| line.starts_with("vllm:cache_config_info{"))
        .unwrap();
    assert!(info.contains("cache_dtype=\"fp8\""), "{info}");
}
