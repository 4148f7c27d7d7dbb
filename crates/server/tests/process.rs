//! The real binary: how it starts, what it says when it cannot, and how it ends.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

#[path = "process/bench.rs"]
mod bench;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

#[path = "process/access.rs"]
mod access;
#[path = "process/observability.rs"]
mod observability;

/// Far above what anything here takes, far below what a stuck test may cost.
const DEADLINE: Duration = Duration::from_secs(60);

fn lapidary(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lapidary"));
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let foreign = std::env::vars()
        .map(|(name, _)| name)
        .filter(|n| n.starts_with("LAPIDARY_") || n.starts_with("VLLM_") || n.starts_with("HF_"));
    for name in foreign {
        command.env_remove(name);
    }
    command
}

/// Runs a command that is expected to end by itself; gives its exit code and what it said.
fn finish(arguments: &[&str]) -> (i32, String) {
    let Output { status, stdout, stderr } = lapidary(arguments).output().unwrap();
    (
        status.code().unwrap(),
        String::from_utf8([stdout, stderr].concat()).unwrap(),
    )
}

/// A server on a free port. Killed when dropped.
struct Server {
    child: Child,
    port: u16,
    log: Receiver<String>,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        Self::start_with(lapidary(arguments))
    }

    fn start_with(mut command: Command) -> Self {
        let mut child = command
            .args(["--port", "0", "--log-format", "json", "--threads", "2"])
            .spawn()
            .unwrap();
        let (sender, log) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        let mut server = Self { child, port: 0, log };
        let line = server.log_line("\"listening\"");
        let url = line.split("://127.0.0.1:").nth(1).unwrap();
        server.port = url.split('"').next().unwrap().parse().unwrap();
        server
    }

    /// A server that is ready.
    fn ready(arguments: &[&str]) -> Self {
        let server = Self::start(arguments);
        server.log_line("\"ready\"");
        server
    }

    /// Waits for a line that contains `text`.
    fn log_line(&self, text: &str) -> String {
        self.log_line_with_any(&[text])
    }

    /// Waits for a line that contains one of these.
    fn log_line_with_any(&self, texts: &[&str]) -> String {
        let deadline = Instant::now() + DEADLINE;
        let mut seen = String::new();
        loop {
            match self
                .log
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) if texts.iter().any(|text| line.contains(text)) => return line,
                Ok(line) => seen += &(line + "\n"),
                Err(_) => panic!("none of {texts:?} in the log:\n{seen}"),
            }
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// Sends a request on a connection of its own and gives the connection.
    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = self.connect();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json");
        let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        // At once: a server that is short of patience shall not wait for the rest of a head.
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    /// Status and body of a GET.
    fn get(&self, path: &str) -> (u16, String) {
        read_response(self.send("GET", path, ""))
    }

    /// Starts a streamed answer of `max_tokens` tokens and waits for its first event.
    fn stream(&self, max_tokens: u32) -> BufReader<TcpStream> {
        let body =
            format!(r#"{{"model":"demo","prompt":"Hello","stream":true,"ignore_eos":true,"max_tokens":{max_tokens}}}"#);
        let mut lines = BufReader::new(self.send("POST", "/v1/completions", &body));
        let mut line = String::new();
        while !line.contains("data: ") {
            line.clear();
            assert!(
                lines.read_line(&mut line).unwrap() > 0,
                "the stream ended before its first event"
            );
        }
        lines
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn exit_status(&mut self) -> ExitStatus {
        poll("the process to exit", || self.child.try_wait().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already, most of the time.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_response(mut stream: TcpStream) -> (u16, String) {
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no response: {response:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Looks until there is something to see.
fn poll<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

fn rest_of(mut stream: BufReader<TcpStream>) -> String {
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    rest
}

/// A folder of its own for a test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("lapidary-process-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_checkpoint_is_examined_and_the_exit_code_tells_what_came_of_it() {
    let (code, text) = finish(&["check", "demo", "--memory", "1GiB"]);
    assert!(code == 0 && text.starts_with("demo: sound\n"), "{code}: {text}");
    let (code, text) = finish(&["check", "demo", "--json", "--max-model-len", "9999"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (code, &report["is_sound"], &report["faults"][0]["part"]),
        (1, &false.into(), &"memory".into())
    );
    let (code, text) = finish(&["check", "/no/such/checkpoint"]);
    assert!(code == 2 && text.contains("/no/such/checkpoint"), "{code}: {text}");
    assert_eq!(finish(&["check", "demo", "--gpu-memory-utilization", "1.5"]).0, 2);
}

#[test]
fn a_flag_that_does_not_exist_is_a_usage_error() {
    let (code, said) = finish(&["serve", "--max-modell-len", "10"]);
    assert_eq!(code, 2);
    assert!(
        said.contains("--max-modell-len") && said.contains("--max-model-len"),
        "{said}"
    );
}

#[test]
fn a_value_that_cannot_be_is_a_usage_error_that_names_the_setting() {
    let (code, said) = finish(&["serve", "--dtype", "float16"]);
    assert_eq!(code, 2);
    assert_eq!(
        said,
        "error: dtype: Gemma-2's activations overflow float16; use auto or bfloat16\n"
    );
}

#[test]
fn a_settings_file_with_a_mistake_is_shown_at_its_line() {
    let folder = Folder::new("settings");
    let path = folder.0.join("lapidary.toml");
    std::fs::write(&path, "port = 8000\nmax-num-seqs = \"many\"\n").unwrap();
    let (code, said) = finish(&["serve", "--config", path.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(said.contains("line 2") && said.contains("max-num-seqs"), "{said}");
}

#[test]
fn print_config_shows_the_settings_in_effect_and_exits() {
    let output = lapidary(&["serve", "--print-config", "--max-logprobs", "5"])
        .env("LAPIDARY_PORT", "9")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(
        text.contains("max-logprobs = 5\n") && text.contains("port = 9\n"),
        "{text}"
    );
}

#[test]
fn a_folder_without_a_checkpoint_fails_with_what_is_missing() {
    let folder = Folder::new("empty");
    let (code, said) = finish(&["serve", folder.path(), "--port", "0"]);
    assert_eq!(code, 1);
    assert!(said.contains("error: cannot serve the model"), "{said}");
    assert!(
        said.contains(&format!("caused by: no config.json in {}", folder.path())),
        "{said}"
    );
}

#[test]
fn a_truncated_checkpoint_fails_with_the_file_s_name() {
    let folder = Folder::new("truncated");
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/demo");
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(demo.join(name), folder.0.join(name)).unwrap();
    }
    let weights = std::fs::read(demo.join("model.safetensors")).unwrap();
    std::fs::write(folder.0.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    let (code, said) = finish(&["serve", folder.path(), "--port", "0"]);
    assert_eq!(code, 1);
    assert!(said.contains("model.safetensors"), "{said}");
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, said) = finish(&["serve", "--port", &port]);
    assert_eq!(code, 1);
    assert!(
        said.contains(&format!("error: cannot listen on 127.0.0.1:{port}")),
        "{said}"
    );
}

#[test]
fn probes_are_answered_while_the_model_is_still_being_fetched() {
    // A hub that takes connections and says nothing.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = Folder::new("fetching");
    let mut command = lapidary(&["serve", "org/gem"]);
    command
        .env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap()))
        .env("HF_HOME", folder.path());
    let mut server = Server::start_with(command);
    poll("the download to begin", || {
        server.get("/ready").1.contains("\"downloading\"").then_some(())
    });
    assert_eq!(server.get("/ready").0, 503);
    assert_eq!(server.get("/live").0, 200);
    assert_eq!(server.get("/health").0, 503);
    assert_eq!(
        read_response(server.send("POST", "/v1/completions", r#"{"model":"org/gem","prompt":"x"}"#)).0,
        503
    );
    server.signal("TERM");
    assert_eq!(server.exit_status().code(), Some(0), "nothing was in flight");
}

#[test]
fn a_hub_that_refuses_ends_the_process_with_advice() {
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = hub.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in hub.incoming() {
            let mut stream = stream.unwrap();
            // The request is read first: closing with unread bytes would reset the connection.
            let _ = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .find(|line| line.as_ref().is_ok_and(String::is_empty));
            let head = "HTTP/1.1 401 X\r\nX-Error-Code: GatedRepo\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.write_all(head.as_bytes());
        }
    });
    let folder = Folder::new("gated");
    let mut command = lapidary(&["serve", "org/gem", "--port", "0"]);
    command
        .env("HF_ENDPOINT", format!("http://{address}"))
        .env("HF_HOME", folder.path());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("org/gem is gated: accept its licence at") && said.contains("set HF_TOKEN"),
        "{said}"
    );
}

#[test]
fn the_demo_is_in_the_binary_and_answers() {
    let server = Server::ready(&["serve"]);
    assert_eq!(
        server.get("/ready"),
        (200, r#"{"status":"ready","progress":1.0}"#.to_owned())
    );
    let body = r#"{"model":"demo","messages":[{"role":"user","content":"Hello"}],"max_tokens":8}"#;
    let (status, answer) = read_response(server.send("POST", "/v1/chat/completions", body));
    assert_eq!(status, 200, "{answer}");
    assert!(answer.contains("\"system_fingerprint\":\"fp_"), "{answer}");
}

#[test]
fn a_terminated_server_finishes_its_streams_and_exits_0() {
    let mut server = Server::ready(&["serve", "demo", "--drain-grace", "0"]);
    let stream = server.stream(200);
    server.signal("TERM");
    server.log_line("\"draining\"");
    let rest = rest_of(stream);
    assert!(
        rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn requests_are_still_taken_while_load_balancers_notice_the_drain() {
    let mut server = Server::ready(&["serve", "demo", "--drain-grace", "1h"]);
    server.signal("TERM");
    server.log_line("\"draining\"");
    let (status, body) = server.get("/ready");
    assert!(status == 503 && body.contains("\"draining\""), "{status} {body}");
    assert_eq!(server.get("/live").0, 200);
    // Even a client that would keep its connection is told to take another.
    let mut kept = server.connect();
    write!(kept, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    kept.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("connection: close"), "{answer}");
    let request = r#"{"model":"demo","prompt":"Hello","max_tokens":4}"#;
    assert_eq!(read_response(server.send("POST", "/v1/completions", request)).0, 200);
    // A second signal ends the wait; nothing is in flight.
    server.signal("TERM");
    assert!(server.exit_status().code().is_some());
}

#[test]
fn a_second_signal_ends_streams_with_an_error_event() {
    let mut server = Server::ready(&["serve", "demo", "--drain-grace", "0", "--max-num-batched-tokens", "64"]);
    // Streams nobody reads: too many tokens to be over soon.
    let streams: Vec<_> = (0..NUM_STREAMS).map(|_| server.stream(LONG_ANSWER)).collect();
    server.signal("TERM");
    server.log_line("\"draining\"");
    server.signal("TERM");
    for stream in streams {
        let rest = rest_of(stream);
        assert!(
            rest.contains("data: {\"error\":{"),
            "the last words are an error: {rest:.200}"
        );
    }
    assert_eq!(server.exit_status().code(), Some(1));
}

#[test]
fn a_drain_that_takes_too_long_is_cut_short() {
    let arguments = ["serve", "demo", "--drain-grace", "0", "--shutdown-timeout", "1ms"];
    let mut server = Server::ready(&arguments);
    let streams: Vec<_> = (0..NUM_STREAMS).map(|_| server.stream(LONG_ANSWER)).collect();
    server.signal("TERM");
    for stream in streams {
        assert!(rest_of(stream).contains("data: {\"error\":{"));
    }
    assert_eq!(server.exit_status().code(), Some(1));
}

/// Whether the process was ready with this step timeout, which must then be too short for a step of 4,000 tokens.
fn ends_at_a_long_step(step_timeout: Duration) -> bool {
    let flag = format!("--step-timeout={}ms", step_timeout.as_millis());
    let mut server = Server::start(&["serve", "demo", "--max-num-batched-tokens=4096", &flag]);
    let line = server.log_line_with_any(&["\"ready\"", "\"failed\""]);
    if line.contains("\"failed\"") {
        assert!(line.contains("a step of the warm-up took longer"), "{line}");
        assert_eq!(server.exit_status().code(), Some(3));
        return false;
    }
    let prompt: Vec<u32> = (0..4000).map(|index| index % 300 + 5).collect();
    let body = format!(r#"{{"model":"demo","prompt":{prompt:?},"max_tokens":1}}"#);
    let (status, answer) = read_response(server.send("POST", "/v1/completions", &body));
    assert!(status == 503 && answer.contains("engine_dead"), "{status} {answer}");
    let line = server.log_line("the engine is dead");
    assert!(
        line.contains(&format!("the step timeout of {step_timeout:?}")),
        "{line}"
    );
    assert_eq!(server.exit_status().code(), Some(3));
    true
}

#[test]
fn a_step_that_takes_too_long_ends_the_process_with_an_exit_code_of_its_own() {
    // How long the two take depends on the machine; that the warm-up takes less than half as long does not.
    let mut step_timeouts = (0..12).map(|doublings| Duration::from_millis(5 << doublings));
    assert!(
        step_timeouts.any(ends_at_a_long_step),
        "the warm-up takes longer than any timeout"
    );
}

#[test]
fn an_idle_connection_does_not_hold_up_a_drain() {
    let mut server = Server::ready(&["serve", "demo", "--drain-grace", "0"]);
    let mut idle = server.connect();
    write!(idle, "GET /live HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut byte = [0];
    idle.read_exact(&mut byte).unwrap();
    server.signal("INT");
    assert_eq!(server.exit_status().code(), Some(0));
}

#[test]
fn a_client_that_never_finishes_its_headers_is_cut_off() {
    let server = Server::ready(&["serve", "demo", "--header-read-timeout", "200ms"]);
    let mut slow = server.connect();
    write!(slow, "GET /live HTTP/1.1\r\nHos").unwrap();
    let mut rest = Vec::new();
    // Closed or reset: either way the slot is free.
    let ended = slow.read_to_end(&mut rest);
    assert!(ended.is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    // Whoever sends its headers is answered; on a busy machine a client may not come to that in time.
    poll("an answer", || {
        let mut answer = String::new();
        let mut quick = server.connect();
        quick
            .write_all(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .ok()?;
        quick.read_to_string(&mut answer).ok()?;
        answer.starts_with("HTTP/1.1 200").then_some(())
    });
}

#[test]
fn probes_are_answered_when_all_connections_are_taken_and_other_requests_are_refused() {
    let server = Server::ready(&["serve", "demo", "--max-connections", "2"]);
    let stream = server.stream(LONGEST_ANSWER);
    let idle = server.connect();
    for path in ["/live", "/ready", "/health", "/metrics"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    let (status, body) = server.get("/v1/models");
    assert!(
        status == 503 && body.contains("too_many_connections"),
        "{status} {body}"
    );
    drop((stream, idle));
    poll("a free connection", || {
        (server.get("/v1/models").0 == 200).then_some(())
    });
}

/// Streams whose answers of [`LONG_ANSWER`] tokens have room in the demo's KV cache at the same time.
const NUM_STREAMS: usize = 8;

/// Tokens of an answer that is not over before a test has cut it short, on a busy machine either: what nobody reads waits
/// in the system's buffers, and holds up nothing.
const LONG_ANSWER: u32 = 2000;

/// The same for an answer that is alone; the model's context ends soon after.
const LONGEST_ANSWER: u32 = 4000;
