//! A serving process whose engine can be made to die, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use lapidary_engine::ScriptedConfig;
use lapidary_server::config::HttpConfig;
use lapidary_server::load::LoadError;
use lapidary_server::serve::{Listener, ServeError, serve_on};
use lapidary_server::{AppState, Phase};
use rustix::process::{Signal, getpid, kill_process};
use support::{Server, Setup, served, tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(60);
/// For steps that do not end.
const PATIENCE: Duration = Duration::from_millis(50);
/// A streamed answer.
const REQUEST: &str = r#"{"model":"tiny","prompt":"hello","stream":true,"ignore_eos":true,"max_tokens":100}"#;

/// A signal reaches every server of the process: each test has the process to itself.
static PROCESS: Mutex<()> = Mutex::const_new(());

fn http() -> HttpConfig {
    HttpConfig {
        addresses: vec!["127.0.0.1:0".parse().unwrap()],
        max_connections: 16,
        header_read_timeout: DEADLINE,
        tls: None,
        write_timeout: DEADLINE,
        shutdown_timeout: DEADLINE,
        drain_grace: Duration::ZERO,
    }
}

/// Loads the server's model and serves it: where, and how that ends.
async fn serve(server: &Server) -> (SocketAddr, JoinHandle<Result<(), ServeError>>) {
    let listener = Listener::bind(&http()).await.unwrap();
    let address = listener.local_address();
    let model = served(tokenizer().into(), server.engine.clone());
    let (state, http) = (server.state.clone(), http());
    let serving = tokio::spawn(async move { serve_on(listener, &http, state, |_| Ok(model)).await });
    (address, serving)
}

#[tokio::test]
async fn a_dead_engine_ends_the_process_after_its_clients_were_told() {
    let _alone = PROCESS.lock().await;
    let scripted = ScriptedConfig {
        device_lost_at: Some(3),
        ..Setup::default().scripted
    };
    let server = Setup {
        scripted,
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let (address, serving) = serve(&server).await;

    let mut client = TcpStream::connect(address).await.unwrap();
    // Whoever comes before the model is loaded is told to come again.
    let answer = loop {
        send_request(&mut client).await;
        let answer = read_answer(&mut client).await;
        if !answer.starts_with("HTTP/1.1 503") {
            break answer;
        }
    };
    assert!(answer.contains("data: {\"error\":{"), "{answer}");
    let ended = timeout(DEADLINE, serving).await.unwrap().unwrap();
    let error = ended.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("the engine died: step 3 of 1 requests: device lost"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 3);
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn an_engine_that_dies_during_a_drain_is_no_clean_end() {
    let _alone = PROCESS.lock().await;
    let (mut setup, gate) = Setup::default().gated();
    setup.scripted.device_lost_at = Some(3);
    setup.is_loaded = false;
    let server = setup.start();
    let (address, serving) = serve(&server).await;
    wait_for(&server.state, Phase::Ready).await;

    let mut client = TcpStream::connect(address).await.unwrap();
    send_request(&mut client).await;
    gate.send(()).unwrap();
    client.readable().await.unwrap();
    kill_process(getpid(), Signal::TERM).unwrap();
    wait_for(&server.state, Phase::Draining).await;
    drop(gate);
    let answer = read_answer(&mut client).await;
    assert!(answer.contains("data: {\"error\":{"), "{answer}");
    let ended = timeout(DEADLINE, serving).await.unwrap().unwrap();
    assert!(matches!(ended, Err(ServeError::EngineDied { .. })), "{ended:?}");
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_process() {
    let _alone = PROCESS.lock().await;
    let server = Setup {
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let listener = Listener::bind(&http()).await.unwrap();
    let http = http();
    let serving = serve_on(listener, &http, server.state.clone(), |_| Err(LoadError::NoTokenizer));
    let ended = timeout(DEADLINE, serving).await.unwrap();
    assert!(matches!(ended, Err(ServeError::Load(_))), "{ended:?}");
    assert_eq!(ended.unwrap_err().exit_code(), 1);
}

#[tokio::test]
async fn a_step_that_does_not_end_ends_the_process_after_its_clients_were_told() {
    let _alone = PROCESS.lock().await;
    let (mut setup, gate) = Setup::default().gated();
    setup.engine.step_timeout = Some(PATIENCE);
    setup.is_loaded = false;
    let server = setup.start();
    let (address, serving) = serve(&server).await;
    wait_for(&server.state, Phase::Ready).await;

    let mut client = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        gate.send(()).unwrap();
    }
    send_request(&mut client).await;
    let answer = read_answer(&mut client).await;
    assert!(answer.contains("\"code\":\"engine_dead\""), "{answer}");
    let error = timeout(DEADLINE, serving).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().contains("step timeout"), "{error}");
    assert_eq!(error.exit_code(), 3);
}

#[tokio::test]
async fn a_warm_up_that_does_not_end_ends_the_process() {
    let _alone = PROCESS.lock().await;
    let server = Setup {
        is_loaded: false,
        ..Setup::default()
    }
    .start();
    let listener = Listener::bind(&http()).await.unwrap();
    let http = http();
    let (started, hangs) = std::sync::mpsc::channel::<()>();
    let serving = serve_on(listener, &http, server.state.clone(), move |state| {
        state.lifecycle.enter(Phase::WarmingUp);
        state.lifecycle.expect_progress_within(Some(PATIENCE));
        assert!(hangs.recv().is_err(), "nothing comes");
        Err(LoadError::NoTokenizer)
    });
    let ended = timeout(DEADLINE, serving).await.unwrap();
    drop(started);
    let error = ended.unwrap_err();
    assert!(matches!(error, ServeError::WarmUpHangs), "{error:?}");
    assert_eq!(error.exit_code(), 3);
    assert_eq!(server.state.lifecycle.phase(), Phase::Failed);
}

async fn wait_for(state: &AppState, phase: Phase) {
    let reached = async {
        while state.lifecycle.phase() != phase {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, reached).await.unwrap();
}

async fn send_request(client: &mut TcpStream) {
    let length = REQUEST.len();
    let head = format!("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
    client.write_all(format!("{head}{REQUEST}").as_bytes()).await.unwrap();
}

/// One answer: to the end of a stream, or to the end of a body of known length.
async fn read_answer(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        let is_over = match text.split_once("\r\n\r\n") {
            Some((head, body)) => match head.to_ascii_lowercase().split_once("content-length: ") {
                Some((_, rest)) => body.len() >= rest.lines().next().unwrap().parse::<usize>().unwrap(),
                None => body.contains("\r\n0\r\n\r\n"),
            },
            None => false,
        };
        if is_over {
            return text.into_owned();
        }
        assert!(
            client.read_buf(&mut bytes).await.unwrap() > 0,
            "cut off: {}",
            String::from_utf8_lossy(&bytes)
        );
    }
}
