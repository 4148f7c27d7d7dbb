//! What clients that mean harm do on their sockets.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A server that neither answers nor closes is stuck.
const DEADLINE: Duration = Duration::from_secs(60);
/// Of what is kept of an answer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Sends `head`, then `unit` again and again, and gives the start of the answer; empty where the server just closed.
pub async fn flood(address: SocketAddr, head: String, unit: Vec<u8>) -> String {
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

/// Sends `message` and gives all of the answer, up to the end of the connection; empty where the server just closed.
///
/// # Errors
/// It did neither in time.
pub async fn converse(address: SocketAddr, message: &[u8]) -> io::Result<String> {
    let (read, mut write) = TcpStream::connect(address).await?.into_split();
    let mut answer = Vec::new();
    let mut read = read.take(MAX_ANSWER_BYTES);
    let talk = async {
        // A server that has heard enough closes while the rest is sent: an error for whoever sends it.
        let (_sent, _read) = tokio::join!(write.write_all(message), read.read_to_end(&mut answer));
    };
    timeout(DEADLINE, talk).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Sends `head`, then a byte at a time as slowly as `pace`, and gives the start of the answer; empty where the server just
/// closed.
///
/// # Errors
/// As [`converse`].
pub async fn drip(address: SocketAddr, head: &str, pace: Duration) -> io::Result<String> {
    let (mut read, mut write) = TcpStream::connect(address).await?.into_split();
    let mut answer = vec![0; 4096];
    let dripping = async {
        write.write_all(head.as_bytes()).await?;
        loop {
            tokio::time::sleep(pace).await;
            write.write_all(b"x").await?;
        }
    };
    let ended: Result<usize, io::Error> = tokio::select! {
        num_bytes = timeout(DEADLINE, read.read(&mut answer)) => num_bytes?,
        failed = dripping => failed,
    };
    Ok(String::from_utf8_lossy(&answer[..ended.unwrap_or(0)]).into_owned())
}
