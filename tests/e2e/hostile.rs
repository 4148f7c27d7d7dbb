//! Clients that mean harm: memory stays bounded, and others are served.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use lapidary_tests::process::ServerProcess;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::{chat, post};

const MIB: u64 = 1 << 20;
/// Far above what anything here takes, far below what a stuck test may cost.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often memory is looked at while something goes on.
const WATCH_INTERVAL: Duration = Duration::from_millis(5);

/// Sends `head`, then `unit` again and again, and gives the start of the answer; empty where the server just closed.
async fn flood(address: SocketAddr, head: String, unit: Vec<u8>) -> String {
    let Ok(stream) = TcpStream::connect(address).await else {
        return String::new();
    };
    let (mut read, mut write) = stream.into_split();
    let writing = async {
        write.write_all(head.as_bytes()).await?;
        loop {
            write.write_all(&unit).await?;
        }
    };
    let mut answer = vec![0; 4096];
    let ended: Result<usize, io::Error> = tokio::select! {
        num_bytes = read.read(&mut answer) => num_bytes,
        failed = writing => failed,
    };
    let num_bytes = match ended {
        Ok(num_bytes) => num_bytes,
        // The server has closed the connection; it may have said why.
        Err(_) => read.read(&mut answer).await.unwrap_or(0),
    };
    String::from_utf8_lossy(&answer[..num_bytes]).into_owned()
}

/// [`flood`] by several clients at the same time.
async fn floods(address: SocketAddr, num_clients: usize, head: &str, unit: &[u8]) -> io::Result<Vec<String>> {
    let mut clients = JoinSet::new();
    for _ in 0..num_clients {
        clients.spawn(flood(address, head.to_owned(), unit.to_owned()));
    }
    Ok(timeout(DEADLINE, clients.join_all()).await?)
}

/// The most memory the server has while `work` goes on, beyond what it has now.
async fn growth_during(server: &ServerProcess, work: impl Future<Output = io::Result<()>>) -> io::Result<u64> {
    let before = server.resident_bytes()?;
    let mut most = before;
    let watching = async {
        loop {
            most = most.max(server.resident_bytes()?);
            sleep(WATCH_INTERVAL).await;
        }
    };
    let ended: io::Result<()> = tokio::select! {
        ended = work => ended,
        failed = watching => failed,
    };
    ended?;
    Ok(most.max(server.resident_bytes()?) - before)
}

/// A server that has answered once, and so has all that it makes once.
async fn started() -> io::Result<ServerProcess> {
    let server = ServerProcess::demo(&[]).await?;
    assert_serves(&server).await?;
    Ok(server)
}

async fn assert_serves(server: &ServerProcess) -> io::Result<()> {
    let answer = timeout(DEADLINE, post(server, "/v1/chat/completions", &chat("What is 1 + 1?"))).await??;
    assert_eq!(answer.head.status, 200);
    Ok(())
}

#[tokio::test]
async fn floods_of_headers_are_cut_off() -> io::Result<()> {
    let server = started().await?;
    let grown = growth_during(&server, async {
        for unit in ["x-flood: 1\r\n", "x"] {
            let unit = unit.repeat(1000);
            for answer in floods(
                server.address,
                64,
                "GET /live HTTP/1.1\r\nhost: x\r\nx: ",
                unit.as_bytes(),
            )
            .await?
            {
                assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
            }
        }
        assert_serves(&server).await
    })
    .await?;
    assert!(grown < 32 * MIB, "{grown} bytes");
    Ok(())
}

#[tokio::test]
async fn bodies_without_end_are_refused_and_take_bounded_memory() -> io::Result<()> {
    let server = started().await?;
    let head = |framing: &str| format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n");
    let mut chunk = b"10000\r\n".to_vec();
    chunk.resize(chunk.len() + 0x10000, b' ');
    chunk.extend(b"\r\n");
    let grown = growth_during(&server, async {
        let announced = floods(server.address, 16, &head("content-length: 1000000000"), &[b' '; 1024]).await?;
        // Half a gigabyte together, if each was read up to its limit of 32 MiB.
        let chunked = floods(server.address, 16, &head("transfer-encoding: chunked"), &chunk).await?;
        for answer in [announced, chunked].concat() {
            assert!(answer.starts_with("HTTP/1.1 413"), "{answer:?}");
        }
        assert_serves(&server).await
    })
    .await?;
    assert!(grown < 320 * MIB, "{grown} bytes");
    Ok(())
}

#[tokio::test]
async fn idle_and_half_sent_requests_are_cheap_and_hold_up_nobody() -> io::Result<()> {
    const NUM_EACH: usize = 200;
    let server = started().await?;
    let beginnings = [
        "",
        "POST /v1/completions HTTP/1.1\r\nhos",
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{",
    ];
    let mut clients = Vec::new();
    let grown = growth_during(&server, async {
        for beginning in beginnings.repeat(NUM_EACH) {
            let mut client = TcpStream::connect(server.address).await?;
            client.write_all(beginning.as_bytes()).await?;
            clients.push(client);
        }
        assert_serves(&server).await
    })
    .await?;
    assert!(grown < 32 * MIB, "{grown} bytes for {} connections", clients.len());
    Ok(())
}

#[tokio::test]
async fn clients_that_never_read_hold_up_nobody() -> io::Result<()> {
    let server = started().await?;
    let body = r#"{"model":"demo","prompt":"Hello","stream":true,"ignore_eos":true,"max_tokens":1000}"#;
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut clients = Vec::new();
    for _ in 0..16 {
        let mut client = TcpStream::connect(server.address).await?;
        client.write_all(request.as_bytes()).await?;
        clients.push(client);
    }
    assert_serves(&server).await?;
    drop(clients);
    Ok(())
}
