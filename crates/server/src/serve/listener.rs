//! Accepts connections, bounds how many there are and how long a client may take for its headers.
//!
//! `axum::serve` has neither bound, so this drives hyper itself.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::ServeError;
use crate::config::HttpConfig;

/// Wait after an accept that failed for want of descriptors or memory: the next one would fail too.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// How long a new connection may be silent before a drain closes it. hyper closes a connection of which it has read
/// nothing, even where a request waits in the system's buffer; and a client that has just connected is about to send.
/// Far above a round trip within a data centre, far below what a drain may take.
const FIRST_BYTE_GRACE: Duration = Duration::from_millis(500);

/// Files, the listener, the runtime's own.
const DESCRIPTORS_FOR_THE_REST: u64 = 64;

/// A bound socket that does not accept yet.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds the first of the addresses that can be.
    ///
    /// # Errors
    /// [`ServeError::Listen`]: none can.
    pub async fn bind(http: &HttpConfig) -> Result<Self, ServeError> {
        let failed = |source| {
            let addresses: Vec<_> = http.addresses.iter().map(SocketAddr::to_string).collect();
            ServeError::Listen {
                address: addresses.join(" or "),
                source,
            }
        };
        raise_descriptor_limit(http.max_connections);
        let socket = TcpListener::bind(&*http.addresses).await.map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        Ok(Self { socket, address })
    }

    /// With the port that was chosen where 0 was asked for.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Starts to accept.
    pub(super) fn start(self, router: Router, http: &HttpConfig) -> Connections {
        let (stop, stopped) = oneshot::channel();
        let acceptor = Acceptor {
            socket: self.socket,
            router,
            header_read_timeout: http.header_read_timeout,
            slots: Arc::new(Semaphore::new(http.max_connections as usize)),
            stopping: watch::Sender::new(()),
        };
        let accepting = tokio::spawn(acceptor.run(stopped));
        Connections { stop, accepting }
    }
}

/// The open connections and the task that accepts more.
pub(super) struct Connections {
    stop: oneshot::Sender<()>,
    accepting: JoinHandle<watch::Sender<()>>,
}

impl Connections {
    /// Closes the listener and idle connections, and waits for the others to finish their requests.
    pub(super) async fn close(self) {
        // Where the task is gone already, nothing is accepted either.
        let _ = self.stop.send(());
        if let Ok(stopping) = self.accepting.await {
            end_all(stopping).await;
        }
    }
}

/// Tells the connections to end and waits until all have.
async fn end_all(stopping: watch::Sender<()>) {
    // Fails where there is no connection to tell.
    let _ = stopping.send(());
    stopping.closed().await;
}

struct Acceptor {
    socket: TcpListener,
    router: Router,
    header_read_timeout: Duration,
    slots: Arc<Semaphore>,
    /// Tells connections to end. Each holds a receiver until it has.
    stopping: watch::Sender<()>,
}

impl Acceptor {
    /// Accepts until told to stop, then closes the socket and gives up the connections to whoever waits for their end.
    async fn run(self, mut stopped: oneshot::Receiver<()>) -> watch::Sender<()> {
        loop {
            let (stream, slot) = tokio::select! {
                biased;
                _ = &mut stopped => break,
                accepted = self.accept() => accepted,
            };
            self.serve(stream, slot);
        }
        // Clients in the system's queue believe they are connected: closing the socket would reset them.
        while let Ok((stream, slot)) = timeout(Duration::ZERO, self.accept()).await {
            self.serve(stream, slot);
        }
        self.stopping
    }

    /// A slot first: connections beyond the bound wait in the system's queue, where they cost us nothing.
    async fn accept(&self) -> (TcpStream, OwnedSemaphorePermit) {
        let slot = Arc::clone(&self.slots)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let mut is_told = false;
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) => return (stream, slot),
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::error!(%error, "cannot accept connections; trying on");
                    }
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    fn serve(&self, stream: TcpStream, slot: OwnedSemaphorePermit) {
        // Tokens are small packets: Nagle's algorithm would hold each back for the last one's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_read_timeout);
        let service = TowerToHyperService::new(self.router.clone());
        let mut stopping = self.stopping.subscribe();
        tokio::spawn(async move {
            // Not `readable`: tokio takes an accepted socket to be that from the start. An error is hyper's to handle.
            let _ = timeout(FIRST_BYTE_GRACE, stream.peek(&mut [0])).await;
            let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
            let ended = tokio::select! {
                // What has come is read before the connection is told to end.
                biased;
                ended = &mut connection => ended,
                _ = stopping.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended early");
            }
            drop(slot);
        });
    }
}

/// Shells start processes with 1024 descriptors and let them ask for many more. A connection takes one.
fn raise_descriptor_limit(max_connections: u32) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
    let needed = u64::from(max_connections) + DESCRIPTORS_FOR_THE_REST;
    if let Some(allowed) = getrlimit(Resource::Nofile).current.filter(|allowed| *allowed < needed) {
        tracing::warn!(
            allowed,
            max_connections,
            "the limit of open files (ulimit -n) is below max-connections"
        );
    }
}

/// The client gave up before it was accepted: nothing is wrong here.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// A client and the acceptor that has just accepted it.
    async fn accepted() -> (TcpStream, Acceptor) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(socket.local_addr().unwrap()).await.unwrap();
        let acceptor = Acceptor {
            socket,
            router: Router::new().route("/", get(|| async { "answered" })),
            header_read_timeout: DEADLINE,
            slots: Arc::new(Semaphore::new(1)),
            stopping: watch::Sender::new(()),
        };
        let (stream, slot) = acceptor.accept().await;
        acceptor.serve(stream, slot);
        assert_eq!(acceptor.slots.available_permits(), 0, "the connection is open");
        (client, acceptor)
    }

    async fn send_request(client: &mut TcpStream) {
        client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    }

    async fn expect_answer(mut client: TcpStream) {
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("answered"),
            "{answer:?}"
        );
    }

    /// On one thread: the connection's task runs for the first time when it has been told to end already.
    #[tokio::test]
    async fn a_request_that_was_not_read_when_the_drain_began_is_answered() {
        let (mut client, acceptor) = accepted().await;
        send_request(&mut client).await;
        let closed = timeout(DEADLINE, end_all(acceptor.stopping)).await;
        assert!(closed.is_ok(), "the drain waits for a connection that is over");
        expect_answer(client).await;
    }

    #[tokio::test]
    async fn a_client_that_had_just_connected_when_the_drain_began_is_answered() {
        let (mut client, acceptor) = accepted().await;
        let closing = tokio::spawn(end_all(acceptor.stopping));
        // The connection's task runs and finds nothing, and is told to end.
        tokio::task::yield_now().await;
        send_request(&mut client).await;
        let closed = timeout(DEADLINE, closing).await;
        assert!(closed.is_ok(), "the drain waits for a connection that is over");
        expect_answer(client).await;
    }
}
