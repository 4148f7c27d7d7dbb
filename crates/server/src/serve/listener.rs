//! Accepts connections, bounds how many there are and how long a client may take for its headers and its answer.
//!
//! `axum::serve` has none of these bounds, so this drives hyper itself.
//!
//! Connections beyond the bound are accepted too: whether the server is well must be known just when it is full. A few
//! of these spare connections are kept, for a moment each; all but probes is refused on them.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

use super::ServeError;
use super::stall::WriteDeadline;
use super::tls::Tls;
use crate::access::SpareConnection;
use crate::access_log;
use crate::config::HttpConfig;
use crate::state::AppState;

/// Wait after an accept that failed for want of descriptors or memory: the next one would fail too.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// How long a new connection may be silent before a drain closes it. hyper closes a connection of which it has read
/// nothing, even where a request waits in the system's buffer; and a client that has just connected is about to send.
/// Far above a round trip within a data centre, far below what a drain may take.
const FIRST_BYTE_GRACE: Duration = Duration::from_millis(500);

/// Connections beyond `max-connections` that are open at the same time. The oldest has to go for a new one.
const MAX_SPARE_CONNECTIONS: usize = 64;

/// Bytes of a request's line and headers, with the empty line that ends them; and of the trailers of a chunked body. hyper
/// answers 431 without a body to more, and to more than 100 headers.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Bytes that are read ahead of a body and gathered of an answer. A read begins below this and may end above it, so that it
/// is no limit of what fits.
const MAX_BUFFERED_BYTES: usize = MAX_HEAD_BYTES;

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
    pub(super) fn start(
        self,
        state: &AppState,
        router: Router,
        http: &HttpConfig,
        tls: Option<Arc<Tls>>,
    ) -> Connections {
        let (stop, stopped) = oneshot::channel();
        let acceptor = Acceptor::new(self.socket, state.clone(), router, http, tls);
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
    state: AppState,
    router: Router,
    /// The same for connections beyond the bound.
    spare_router: Router,
    tls: Option<Arc<Tls>>,
    /// [`FIRST_BYTE_GRACE`] but in tests.
    first_byte_grace: Duration,
    header_read_timeout: Duration,
    write_timeout: Duration,
    slots: Arc<Semaphore>,
    /// Oldest first; some may have ended.
    spare: VecDeque<AbortHandle>,
    /// Tells connections to end. Each holds a receiver until it has.
    stopping: watch::Sender<()>,
}

impl Acceptor {
    fn new(socket: TcpListener, state: AppState, router: Router, http: &HttpConfig, tls: Option<Arc<Tls>>) -> Self {
        Self {
            socket,
            state,
            spare_router: router.clone().layer(Extension(SpareConnection)),
            router,
            tls,
            first_byte_grace: FIRST_BYTE_GRACE,
            header_read_timeout: http.header_read_timeout,
            write_timeout: http.write_timeout,
            slots: Arc::new(Semaphore::new(http.max_connections as usize)),
            spare: VecDeque::new(),
            stopping: watch::Sender::new(()),
        }
    }

    /// Accepts until told to stop, then closes the socket and gives up the connections to whoever waits for their end.
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) -> watch::Sender<()> {
        loop {
            let stream = tokio::select! {
                biased;
                _ = &mut stopped => break,
                accepted = self.accept() => accepted,
            };
            self.serve(stream);
        }
        // Clients in the system's queue believe they are connected: closing the socket would reset them.
        while let Ok(stream) = timeout(Duration::ZERO, self.accept()).await {
            self.serve(stream);
        }
        self.stopping
    }

    async fn accept(&self) -> TcpStream {
        let mut is_told = false;
        loop {
            match self.socket.accept().await {
                Ok((stream, _)) => return stream,
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

    fn serve(&mut self, stream: TcpStream) {
        // Tokens are small packets: Nagle's algorithm would hold each back for the last one's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(slot) => {
                tokio::spawn(self.connection(stream, self.router.clone(), Some(slot)));
            }
            Err(_) => {
                self.spare.retain(|connection| !connection.is_finished());
                if self.spare.len() == MAX_SPARE_CONNECTIONS
                    && let Some(oldest) = self.spare.pop_front()
                {
                    oldest.abort();
                }
                let connection = tokio::spawn(self.connection(stream, self.spare_router.clone(), None));
                self.spare.push_back(connection.abort_handle());
            }
        }
    }

    /// The life of a connection. It holds its slot to the end.
    fn connection(
        &self,
        stream: TcpStream,
        router: Router,
        slot: Option<OwnedSemaphorePermit>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_read_timeout)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_BUFFERED_BYTES);
        let (tls, handshake_timeout) = (self.tls.clone(), self.header_read_timeout);
        let (first_byte_grace, write_timeout) = (self.first_byte_grace, self.write_timeout);
        let stopping = self.stopping.subscribe();
        let state = self.state.clone();
        async move {
            // Not `readable`: tokio takes an accepted socket to be that from the start. An error is hyper's to handle.
            let _ = timeout(first_byte_grace, stream.peek(&mut [0])).await;
            let stream = WriteDeadline::new(stream, write_timeout);
            let ended = match tls {
                None => converse(builder, stream, router, stopping).await,
                Some(tls) => match timeout(handshake_timeout, tls.accept(stream)).await {
                    Ok(Ok(stream)) => converse(builder, stream, router, stopping).await,
                    Ok(Err(error)) => return tracing::debug!(%error, "no TLS handshake"),
                    Err(_) => return tracing::debug!("no TLS handshake in time"),
                },
            };
            match ended {
                Ok(()) => {}
                // hyper has answered it.
                Err(error) if error.is_parse() => access_log::malformed(&state, &error),
                Err(error) => tracing::debug!(%error, "connection ended early"),
            }
            drop(slot);
        }
    }
}

/// Requests and answers, until either side has had enough.
async fn converse<S>(
    builder: http1::Builder,
    stream: S,
    router: Router,
    mut stopping: watch::Receiver<()>,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    tokio::select! {
        // What has come is read before the connection is told to end.
        biased;
        ended = &mut connection => ended,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
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
    let needed = u64::from(max_connections) + MAX_SPARE_CONNECTIONS as u64 + DESCRIPTORS_FOR_THE_REST;
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
    use crate::metrics::Metrics;
    use crate::state::Limits;

    const DEADLINE: Duration = Duration::from_secs(60);

    fn http() -> HttpConfig {
        HttpConfig {
            addresses: vec!["127.0.0.1:0".parse().unwrap()],
            max_connections: 1,
            header_read_timeout: DEADLINE,
            tls: None,
            write_timeout: DEADLINE,
            shutdown_timeout: DEADLINE,
            drain_grace: Duration::ZERO,
        }
    }

    /// A client and the acceptor that has just accepted it.
    async fn accepted(router: Router, http: &HttpConfig) -> (TcpStream, Acceptor) {
        let socket = TcpListener::bind(&*http.addresses).await.unwrap();
        let client = TcpStream::connect(socket.local_addr().unwrap()).await.unwrap();
        let state = AppState::new(Limits::default(), Metrics::new("test"));
        let mut acceptor = Acceptor::new(socket, state, router, http, None);
        // On a busy machine a client may be silent for longer.
        acceptor.first_byte_grace = DEADLINE;
        let stream = acceptor.accept().await;
        acceptor.serve(stream);
        assert_eq!(acceptor.slots.available_permits(), 0, "the connection is open");
        (client, acceptor)
    }

    fn answering() -> Router {
        Router::new().route("/", get(|| async { "answered" }))
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
        let (mut client, acceptor) = accepted(answering(), &http()).await;
        send_request(&mut client).await;
        let closed = timeout(DEADLINE, end_all(acceptor.stopping)).await;
        assert!(closed.is_ok(), "the drain waits for a connection that is over");
        expect_answer(client).await;
    }

    #[tokio::test]
    async fn a_client_that_had_just_connected_when_the_drain_began_is_answered() {
        let (mut client, acceptor) = accepted(answering(), &http()).await;
        let closing = tokio::spawn(end_all(acceptor.stopping));
        // The connection's task runs and finds nothing, and is told to end.
        tokio::task::yield_now().await;
        send_request(&mut client).await;
        let closed = timeout(DEADLINE, closing).await;
        assert!(closed.is_ok(), "the drain waits for a connection that is over");
        expect_answer(client).await;
    }

    /// A request whose line and headers are `num_bytes` together; all but a few of them spread over `num_headers`.
    fn head(num_bytes: usize, num_headers: usize) -> Vec<u8> {
        let mut head = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n".to_owned();
        let mut num_left = num_bytes - head.len() - "\r\n".len();
        for index in 0..num_headers {
            let num_here = num_left / (num_headers - index);
            let name = format!("x{index}: ");
            let value = "x".repeat(num_here - name.len() - "\r\n".len());
            head += &format!("{name}{value}\r\n");
            num_left -= num_here;
        }
        head += "\r\n";
        assert_eq!(head.len(), num_bytes);
        head.into_bytes()
    }

    /// All that the server says to `parts`, which are sent one after the other.
    async fn answer_to(parts: &[&[u8]]) -> String {
        let (mut client, _acceptor) = accepted(answering(), &http()).await;
        let mut answer = String::new();
        let talk = async {
            for part in parts {
                client.write_all(part).await.unwrap();
                // The connection's task is the only other one of this thread, and reads what has come.
                tokio::task::yield_now().await;
            }
            client.read_to_string(&mut answer).await.unwrap();
        };
        timeout(DEADLINE, talk).await.expect("the server answers or closes");
        answer
    }

    #[tokio::test]
    async fn a_head_may_be_as_long_as_the_limit_and_not_a_byte_longer() {
        for num_headers in [1, 98] {
            for num_bytes in [MAX_HEAD_BYTES - 1, MAX_HEAD_BYTES] {
                let answer = answer_to(&[&head(num_bytes, num_headers)]).await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{num_bytes} bytes: {answer:?}");
            }
            for num_bytes in [MAX_HEAD_BYTES + 1, MAX_HEAD_BYTES * 3 / 2, 2 * MAX_HEAD_BYTES] {
                let answer = answer_to(&[&head(num_bytes, num_headers)]).await;
                assert!(answer.starts_with("HTTP/1.1 431"), "{num_bytes} bytes: {answer:?}");
            }
        }
    }

    #[tokio::test]
    async fn the_limit_of_a_head_holds_however_it_arrives() {
        let longest = head(MAX_HEAD_BYTES, 1);
        let (most, last) = longest.split_at(MAX_HEAD_BYTES - 1);
        let answer = answer_to(&[most, last]).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        // What is as long as a head may be and no head yet will be too long.
        let answer = answer_to(&[&head(MAX_HEAD_BYTES + 1, 1)[..MAX_HEAD_BYTES]]).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer:?}");
        // The end of one request does not count towards the next.
        let first = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
        let answer = answer_to(&[&[&first[..], &longest].concat()]).await;
        assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "{answer:?}");
    }

    #[tokio::test]
    async fn a_request_has_100_headers_at_most() {
        // Two more are in each.
        let answer = answer_to(&[&head(8 << 10, 98)]).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        let answer = answer_to(&[&head(8 << 10, 99)]).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer:?}");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_is_cut_off() {
        let endless = || async { axum::body::Body::new(Endless) };
        let http = HttpConfig {
            write_timeout: Duration::from_millis(100),
            ..http()
        };
        let (mut client, acceptor) = accepted(Router::new().route("/", get(endless)), &http).await;
        send_request(&mut client).await;
        let freed = timeout(DEADLINE, acceptor.slots.acquire()).await;
        assert!(freed.is_ok(), "the connection is still open");
    }

    /// An answer without end.
    struct Endless;

    impl http_body::Body for Endless {
        type Data = bytes::Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<bytes::Bytes>, Self::Error>>> {
            let data = bytes::Bytes::from_static(&[b'x'; 1024]);
            std::task::Poll::Ready(Some(Ok(http_body::Frame::data(data))))
        }
    }

    #[tokio::test]
    async fn spare_connections_are_few_and_the_newest_win() {
        let (first, mut acceptor) = accepted(answering(), &http()).await;
        let address = acceptor.socket.local_addr().unwrap();
        let mut clients = Vec::new();
        for _ in 0..=MAX_SPARE_CONNECTIONS {
            clients.push(TcpStream::connect(address).await.unwrap());
            let stream = acceptor.accept().await;
            acceptor.serve(stream);
        }
        assert_eq!(acceptor.spare.len(), MAX_SPARE_CONNECTIONS);
        assert_eq!(clients[0].read(&mut [0]).await.unwrap(), 0, "the oldest is closed");
        let mut newest = clients.pop().unwrap();
        send_request(&mut newest).await;
        newest.read_exact(&mut [0]).await.unwrap();
        drop(first);
    }
}
