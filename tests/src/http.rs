//! A plain HTTP/1.1 client over one socket: no pool, no retries, nothing between the test and the wire.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const READ_BYTES: usize = 16 << 10;
/// A response head larger than this is a fault.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// One connection, reusable while the server keeps it open.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Bytes read from the socket and not yet used.
    unread: Vec<u8>,
}

/// Status line and headers; the body is still on the [`Connection`].
#[derive(Debug)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// The first header of this (lower-case) name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// A whole response.
#[derive(Debug)]
pub struct Response {
    /// Status and headers.
    pub head: Head,
    /// Body with any chunked coding removed.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// As the socket's.
    pub async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            unread: Vec::new(),
        })
    }

    /// Sends a request with a JSON body (none for an empty one) and reads the response's head.
    ///
    /// # Errors
    /// As the socket's, or a malformed response.
    pub async fn send(&mut self, method: &str, path: &str, body: &str) -> io::Result<Head> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await?;
        self.read_head().await
    }

    /// Sends a request and reads the whole response.
    ///
    /// # Errors
    /// As the socket's, or a malformed response.
    pub async fn request(&mut self, method: &str, path: &str, body: &str) -> io::Result<Response> {
        let head = self.send(method, path, body).await?;
        let body = self.read_body(&head).await?;
        Ok(Response { head, body })
    }

    /// Reads a whole body.
    ///
    /// # Errors
    /// As the socket's, or a malformed response.
    pub async fn read_body(&mut self, head: &Head) -> io::Result<String> {
        let bytes = if is_chunked(head) {
            let mut chunks = Chunks::default();
            let mut body = Vec::new();
            while let Some(chunk) = chunks.next(self).await? {
                body.extend_from_slice(&chunk);
            }
            body
        } else {
            let length = head
                .header("content-length")
                .and_then(|value| value.parse().ok())
                .unwrap_or(0);
            while self.unread.len() < length {
                self.fill().await?;
            }
            self.unread.drain(..length).collect()
        };
        String::from_utf8(bytes).map_err(|_| malformed("body is not UTF-8"))
    }

    /// Turns the rest of a response into its server-sent events.
    ///
    /// # Errors
    /// The response is not chunked.
    pub fn events(self, head: &Head) -> io::Result<Events> {
        if !is_chunked(head) {
            return Err(malformed("a stream must be chunked"));
        }
        Ok(Events {
            connection: self,
            chunks: Chunks::default(),
            text: Vec::new(),
            used: 0,
        })
    }

    async fn read_head(&mut self) -> io::Result<Head> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                break end;
            }
            if self.unread.len() > MAX_HEAD_BYTES {
                return Err(malformed("head too long"));
            }
            self.fill().await?;
        };
        let text: Vec<u8> = self.unread.drain(..end + 4).collect();
        parse_head(std::str::from_utf8(&text).map_err(|_| malformed("head is not UTF-8"))?)
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.unread.reserve(READ_BYTES);
        match self.stream.read_buf(&mut self.unread).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

fn is_chunked(head: &Head) -> bool {
    head.header("transfer-encoding") == Some("chunked")
}

fn parse_head(text: &str) -> io::Result<Head> {
    let mut lines = text.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .and_then(|code| code.parse().ok());
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    Ok(Head {
        status: status.ok_or_else(|| malformed("no status"))?,
        headers,
    })
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Undoes the chunked coding.
#[derive(Debug, Default)]
struct Chunks {
    ended: bool,
}

impl Chunks {
    async fn next(&mut self, connection: &mut Connection) -> io::Result<Option<Vec<u8>>> {
        if self.ended {
            return Ok(None);
        }
        let line_end = loop {
            match find(&connection.unread, b"\r\n") {
                Some(end) => break end,
                None => connection.fill().await?,
            }
        };
        let size = std::str::from_utf8(&connection.unread[..line_end])
            .ok()
            .and_then(|line| usize::from_str_radix(line, 16).ok())
            .ok_or_else(|| malformed("chunk size"))?;
        let (start, end) = (line_end + 2, line_end + 2 + size);
        while connection.unread.len() < end + 2 {
            connection.fill().await?;
        }
        let chunk = connection.unread[start..end].to_vec();
        connection.unread.drain(..end + 2);
        self.ended = size == 0;
        Ok((size > 0).then_some(chunk))
    }
}

/// Server-sent events of one response.
#[derive(Debug)]
pub struct Events {
    connection: Connection,
    chunks: Chunks,
    text: Vec<u8>,
    used: usize,
}

impl Events {
    /// The next event's data; comments are passed over. `None` at the end of the response.
    ///
    /// # Errors
    /// As the socket's, or a malformed stream.
    pub async fn next(&mut self) -> io::Result<Option<String>> {
        loop {
            while let Some(length) = find(&self.text[self.used..], b"\n\n") {
                let event = &self.text[self.used..self.used + length];
                let data = event
                    .strip_prefix(b"data: ")
                    .map(|data| String::from_utf8_lossy(data).into_owned());
                let is_comment = event.starts_with(b":");
                self.used += length + 2;
                match data {
                    Some(data) => return Ok(Some(data)),
                    None if is_comment => {}
                    None => return Err(malformed("neither data nor comment")),
                }
            }
            self.text.drain(..std::mem::take(&mut self.used));
            match self.chunks.next(&mut self.connection).await? {
                Some(chunk) => self.text.extend_from_slice(&chunk),
                None if self.text.is_empty() => return Ok(None),
                None => return Err(malformed("stream ended inside an event")),
            }
        }
    }

    /// Gives the connection back after the last event.
    #[must_use]
    pub fn into_connection(self) -> Connection {
        self.connection
    }
}
