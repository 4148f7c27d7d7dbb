//! Clients that mean harm: memory stays bounded, and others are served.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use lapidary_tests::hostile::{converse, drip, flood};
use lapidary_tests::process::ServerProcess;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::{chat, post};

const MIB: u64 = 1 << 20;
/// Far above what anything here takes, far below what a stuck test may cost.
const DEADLINE: Duration = Duration::from_secs(120);
/// How often memory is looked at while something goes on.
const WATCH_INTERVAL: Duration = Duration::from_millis(5);

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
        for answer in announced {
            assert!(answer.starts_with("HTTP/1.1 413"), "{answer:?}");
        }
        // On a busy machine some wait too long for room.
        for answer in chunked {
            let is_refused = ["HTTP/1.1 413", "HTTP/1.1 429"]
                .iter()
                .any(|status| answer.starts_with(status));
            assert!(is_refused, "{answer:?}");
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

fn post_head(framing: &str) -> String {
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{framing}\r\n\r\n")
}

#[tokio::test]
async fn json_without_sense_is_a_bad_request() -> io::Result<()> {
    const DEPTH: usize = 100_000;
    let server = started().await?;
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(DEPTH), close.repeat(DEPTH)).into_bytes();
    let bodies = [
        nested("[", "]"),
        nested("{\"a\":", "}"),
        [
            b"{\"prompt\":\"a\",\"structured_outputs\":{\"json\":".to_vec(),
            nested("{\"anyOf\":[", "]}"),
            b"}}".to_vec(),
        ]
        .concat(),
        [b"{\"prompt\":".to_vec(), b"[".repeat(DEPTH)].concat(),
        b"{\"prompt\":\"\xff\xfe\"}".to_vec(),
        b"{\"prompt\":\"\xed\xa0\x80\"}".to_vec(),
        b"{\"prompt\":\"\\ud800\"}".to_vec(),
        b"\x00\x01\x02".to_vec(),
    ];
    for body in bodies {
        let head = post_head(&format!("content-length: {}", body.len()));
        let answer = converse(server.address, &[head.as_bytes(), &body].concat()).await?;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert!(answer.contains("\"type\":\"invalid_request_error\""), "{answer}");
    }
    // Fields that are nobody's are passed over, however deep.
    let body = [
        b"{\"prompt\":\"a\",\"max_tokens\":1,\"nobody\":".to_vec(),
        nested("[", "]"),
        b"}".to_vec(),
    ]
    .concat();
    let head = post_head(&format!("content-length: {}", body.len()));
    let answer = converse(server.address, &[head.as_bytes(), &body].concat()).await?;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_serves(&server).await
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() -> io::Result<()> {
    const NUM_REQUESTS: usize = 200;
    let server = started().await?;
    let mut requests = String::new();
    for index in 0..NUM_REQUESTS {
        let close = if index + 1 == NUM_REQUESTS {
            "connection: close\r\n"
        } else {
            ""
        };
        requests += &format!("GET /nowhere/{index} HTTP/1.1\r\nhost: x\r\nx-request-id: id-{index}\r\n{close}\r\n");
    }
    let answer = converse(server.address, requests.as_bytes()).await?;
    let ids: Vec<&str> = answer
        .lines()
        .filter_map(|line| line.strip_prefix("x-request-id: "))
        .collect();
    let expected: Vec<String> = (0..NUM_REQUESTS).map(|index| format!("id-{index}")).collect();
    assert_eq!(ids, expected);
    assert_serves(&server).await
}

/// A body that one server takes for a body and another for a second request.
const SMUGGLED: &str = "0\r\n\r\nGET /version HTTP/1.1\r\nhost: x\r\nx-request-id: smuggled\r\n\r\n";

#[tokio::test]
async fn what_a_proxy_could_read_otherwise_is_not_a_second_request() -> io::Result<()> {
    let server = started().await?;
    let length = SMUGGLED.len();
    let framings = [
        format!("content-length: {length}\r\ntransfer-encoding: chunked"),
        format!("transfer-encoding: chunked\r\ncontent-length: {length}"),
        format!("content-length: {length}\r\ncontent-length: 5"),
        format!("content-length: 5\r\ncontent-length: {length}"),
        format!("content-length: 5, {length}"),
        format!("content-length: +{length}"),
        "content-length: -1".to_owned(),
        format!("content-length: {length}\r\ntransfer-encoding : chunked"),
        format!("content-length: {length}\r\ntransfer-encoding: xchunked"),
        format!("content-length: {length}\r\ntransfer-encoding: chunked, identity"),
        format!("content-length: {length}\r\ntransfer-encoding:\r\n chunked"),
        format!("content-length: {length}\r\ntransfer-encoding: identity, chunked"),
        "content-length: 99999999999999999999999".to_owned(),
    ];
    for framing in framings {
        let request = post_head(&framing) + SMUGGLED;
        let answer = converse(server.address, request.as_bytes()).await?;
        assert!(
            !answer.contains("smuggled"),
            "{framing:?} let a second request in: {answer}"
        );
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{framing:?}: {answer}"
        );
    }
    assert_serves(&server).await
}

#[tokio::test]
async fn broken_chunks_and_other_protocols_end_the_connection() -> io::Result<()> {
    let server = started().await?;
    let chunked = post_head("transfer-encoding: chunked");
    let sizes = [
        "zz",
        "-1",
        "+5",
        "0x5",
        "fffffffffffffffff",
        "10000000000000000",
        "",
        " 5",
        "5;",
    ];
    let mut messages: Vec<Vec<u8>> = sizes
        .iter()
        .map(|size| format!("{chunked}{size}\r\nhello\r\n0\r\n\r\n").into_bytes())
        .collect();
    messages.push(format!("{chunked}5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1 << 20)).into_bytes());
    messages.push(format!("{chunked}0\r\n{}\r\n", "t: x\r\n".repeat(100_000)).into_bytes());
    messages.push(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec());
    messages.push(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".repeat(50));
    messages.push(b"GET /live HTTP/9.9\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec());
    messages.push([b"GET /".to_vec(), b"a".repeat(1 << 20), b" HTTP/1.1\r\n\r\n".to_vec()].concat());
    for message in messages {
        let answer = converse(server.address, &message).await?;
        let start = String::from_utf8_lossy(&message[..message.len().min(120)]).into_owned();
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{start:?}: {answer}"
        );
    }
    assert_serves(&server).await
}

#[tokio::test]
async fn clients_that_send_their_head_by_the_byte_are_cut_off() -> io::Result<()> {
    const PACE: Duration = Duration::from_millis(50);
    let server = ServerProcess::demo(&["--header-read-timeout", "2s"]).await?;
    let mut clients = JoinSet::new();
    for _ in 0..100 {
        clients.spawn(drip(server.address, "GET /live HTTP/1.1\r\nx: ", PACE));
    }
    for answer in timeout(DEADLINE, clients.join_all()).await? {
        let answer = answer?;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
    assert_serves(&server).await
}
