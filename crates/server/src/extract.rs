//! Reads a request body and parses it as JSON: any content type, bounded in size, time and depth, and all bodies together
//! in memory.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use crate::bounded::code_of;
use crate::error::{ApiError, shorten};
use crate::state::{AppState, Limits, kib};

/// Bodies up to this size are parsed where they are: half a millisecond.
const MAX_INLINE_BYTES: usize = 128 << 10;

/// Bytes of a body that are read whatever else is: with `max-connections` of them memory is bounded too. Almost all bodies
/// are smaller.
const SMALL_BODY_BYTES: usize = 64 << 10;

/// A body that has room must bring so many bytes in each such time: others wait for its room.
const PACE_BYTES: usize = 16 << 10;
const PACE: Duration = Duration::from_secs(5);

/// How long a body waits for room before its request is sent away: longer than one that has stalled keeps it.
const ROOM_PATIENCE: Duration = Duration::from_secs(10);

/// Room in memory for a body. What was parsed from it takes a small multiple of its bytes: whoever keeps that keeps this.
pub(crate) type Room = Option<OwnedSemaphorePermit>;

/// Reads a request's body and parses it. It has its room until that is dropped.
///
/// # Errors
/// As [`read_body`] and [`parse_json`].
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    state: &AppState,
    headers: &HeaderMap,
    body: Body,
) -> Result<(T, Room), ApiError> {
    let (bytes, room) = read_body(state, headers, body).await?;
    let is_long = is_long(&bytes);
    let parse = move || {
        // The room goes along: if the client leaves, what is parsed here is still there.
        let value = parse_json(&bytes)?;
        Ok((value, room))
    };
    state.compute(is_long, parse).await?
}

/// Whether a body is too long to be looked at where other requests wait for it.
pub(crate) fn is_long(body: &Bytes) -> bool {
    body.len() > MAX_INLINE_BYTES
}

/// Reads the whole body. A large one waits for room among the other large ones, which is to be kept for as long as it.
///
/// # Errors
/// It is larger than `limits.max_body_bytes`, or broke off; its sender took longer than `limits.body_timeout`, or stalled while
/// it had room; there was no room for it in time.
pub(crate) async fn read_body(state: &AppState, headers: &HeaderMap, body: Body) -> Result<(Bytes, Room), ApiError> {
    let limits = &state.limits;
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limits.max_body_bytes) {
        return Err(too_large(limits));
    }
    // A body that does not say how long it is could become as long as any.
    let reader = BodyReader {
        state,
        max_bytes: announced.unwrap_or(limits.max_body_bytes),
        time_left: limits.body_timeout,
        room: None,
    };
    reader.read(body).await
}

fn too_large(limits: &Limits) -> ApiError {
    ApiError::BodyTooLarge {
        limit_bytes: limits.max_body_bytes,
    }
}

/// Gathers a body.
struct BodyReader<'a> {
    state: &'a AppState,
    /// The body will not be longer.
    max_bytes: usize,
    /// Of `limits.body_timeout`: only waits for the sender count.
    time_left: Duration,
    /// Taken all at once: bodies that each had a part of what they need could wait for each other.
    room: Option<Held>,
}

/// Room that a body has while it arrives.
struct Held {
    room: OwnedSemaphorePermit,
    /// Bytes that are still to come until then.
    num_due: usize,
    due: Instant,
}

impl Held {
    fn new(room: OwnedSemaphorePermit) -> Self {
        Self {
            room,
            num_due: PACE_BYTES,
            due: Instant::now() + PACE,
        }
    }

    fn arrived(&mut self, num_bytes: usize) {
        self.num_due = self.num_due.saturating_sub(num_bytes);
        if self.num_due == 0 {
            self.num_due = PACE_BYTES;
            self.due = Instant::now() + PACE;
        }
    }

    /// Gives back what a body of `num_bytes` does not need.
    fn shrink(mut self, num_bytes: usize) -> OwnedSemaphorePermit {
        let excess = self.room.num_permits().saturating_sub(kib(num_bytes) as usize);
        drop(self.room.split(excess));
        self.room
    }
}

impl BodyReader<'_> {
    /// What comes next, in time.
    async fn frame(&mut self, body: &mut Body) -> Result<Option<Frame<Bytes>>, ApiError> {
        let started = Instant::now();
        let end = started + self.time_left;
        let due = self.room.as_ref().map(|held| held.due).filter(|due| *due < end);
        let Ok(frame) = timeout_at(due.unwrap_or(end), body.frame()).await else {
            return Err(match due {
                Some(_) => ApiError::BodyStalled {
                    num_bytes: PACE_BYTES,
                    limit: PACE,
                },
                None => ApiError::BodyTimeout {
                    limit: self.state.limits.body_timeout,
                },
            });
        };
        self.time_left = self.time_left.saturating_sub(started.elapsed());
        frame.transpose().map_err(|_| bad_json("the body broke off"))
    }

    /// Waits for room among the other large bodies.
    async fn take_room(&mut self) -> Result<(), ApiError> {
        let room = timeout(ROOM_PATIENCE, self.state.body_room(self.max_bytes)).await;
        let room = room.map_err(|_elapsed| ApiError::QueueFull {
            message: "The server is overloaded: other large request bodies take all the room that there is for them."
                .to_owned(),
            retry_after: PACE,
        })?;
        self.room = Some(Held::new(room));
        Ok(())
    }

    async fn read(mut self, mut body: Body) -> Result<(Bytes, Room), ApiError> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        while let Some(frame) = self.frame(&mut body).await? {
            let Ok(data) = frame.into_data() else { continue };
            let num_bytes = first.len().max(rest.len()) + data.len();
            if num_bytes > self.max_bytes {
                return Err(too_large(&self.state.limits));
            }
            // One that is there as a whole was read before, and has its room.
            let is_whole = first.is_empty() && body.is_end_stream();
            if num_bytes > SMALL_BODY_BYTES && !is_whole && self.room.is_none() {
                self.take_room().await?;
                // Now, or growth would take up to twice as much. Pages are made as they are written.
                rest.reserve(self.max_bytes - rest.len());
            }
            if let Some(held) = &mut self.room {
                held.arrived(data.len());
            }
            if first.is_empty() {
                first = data;
            } else {
                if rest.is_empty() {
                    rest.extend_from_slice(&first);
                }
                rest.extend_from_slice(&data);
            }
        }
        // Most bodies arrive in one frame: they are never copied.
        let bytes = if rest.is_empty() { first } else { rest.freeze() };
        let room = self.room.map(|held| held.shrink(bytes.len()));
        Ok((bytes, room))
    }
}

/// Parses a JSON object. Nesting is bounded by `serde_json`'s limit of 128.
///
/// # Errors
/// Not UTF-8, not JSON, not an object, or a field that `T` refuses; then the error's `param` is that field's path.
fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|_| bad_json("it is not valid UTF-8"))?;
    let text = text.trim_start_matches(['\u{feff}', ' ', '\t', '\r', '\n']);
    if text.is_empty() {
        return Err(bad_json("it is empty"));
    }
    match serde_json::from_str(text) {
        Ok(value) if text.starts_with('{') => Ok(value),
        Ok(_) => Err(bad_json("it is not a JSON object")),
        Err(error) if error.is_data() && text.starts_with('{') => Err(field_error::<T>(text)),
        Err(error) => Err(bad_json(&error.to_string())),
    }
}

/// Parses once more, for the path of the fault: good requests don't pay for tracking it.
fn field_error<T: DeserializeOwned>(text: &str) -> ApiError {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let Err(error) = serde_path_to_error::deserialize::<_, T>(&mut deserializer) else {
        return bad_json("it has an invalid field");
    };
    let path = error.path().to_string();
    let cause = error.into_inner().to_string();
    let reason = cause.split(" at line ").next().unwrap_or(&cause);
    // A fault of the object itself: a field that appears twice.
    if path == "." {
        return bad_json(reason);
    }
    ApiError::InvalidRequest {
        message: format!("Invalid value for '{}': {}.", shorten(&path), shorten(reason)),
        param: Some(shorten(&path).into_owned().into()),
        code: Some(code_of(reason)),
    }
}

fn bad_json(reason: &str) -> ApiError {
    ApiError::InvalidRequest {
        message: format!("We could not parse the JSON body of your request: {}.", shorten(reason)),
        param: None,
        code: Some("invalid_json"),
    }
}

#[cfg(test)]
#[path = "../tests/support/sent_body.rs"]
mod sent_body;

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use super::sent_body::sent_body;
    use super::*;
    use crate::metrics::Metrics;

    const LARGE: usize = 600 << 10;

    /// Room for one large body.
    fn state() -> AppState {
        let limits = Limits {
            max_bodies_bytes: LARGE,
            max_body_bytes: LARGE,
            ..Limits::default()
        };
        AppState::new(limits, Metrics::new("tiny"))
    }

    fn bytes(num_bytes: usize) -> Bytes {
        vec![b' '; num_bytes].into()
    }

    async fn read(state: &AppState, body: Body) -> Result<(Bytes, Room), ApiError> {
        read_body(state, &HeaderMap::new(), body).await
    }

    /// A large body that is there as a whole.
    fn whole() -> Body {
        let (sender, body) = sent_body();
        sender.send(bytes(LARGE)).unwrap();
        body
    }

    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[tokio::test]
    async fn a_large_body_waits_for_room_and_keeps_what_it_needs() {
        let state = state();
        let (sender, half) = sent_body();
        let mut first = pin!(read(&state, half));
        sender.send(bytes(LARGE / 2)).unwrap();
        assert!(poll(first.as_mut()).is_pending());
        // All of it is there: what it waits for is room.
        let mut second = pin!(read(&state, whole()));
        assert!(poll(second.as_mut()).is_pending());
        // A small one does not wait.
        let (small_sender, small) = sent_body();
        small_sender.send(bytes(1000)).unwrap();
        drop(small_sender);
        assert!(matches!(poll(pin!(read(&state, small))), Poll::Ready(Ok((_, None)))));
        drop(sender);
        let (_, room) = first.await.unwrap();
        assert_eq!(room.as_ref().unwrap().num_permits(), LARGE / 2 / 1024);
        assert!(poll(second.as_mut()).is_pending(), "both are in memory");
        drop(room);
        let (read, room) = second.await.unwrap();
        assert_eq!((read.len(), room.unwrap().num_permits()), (LARGE, LARGE / 1024));
    }

    #[tokio::test]
    async fn what_is_parsed_keeps_the_room_of_its_text() {
        let state = state();
        let (sender, body) = sent_body();
        sender.send(Bytes::from_static(b"{}")).unwrap();
        sender.send(bytes(LARGE - 2)).unwrap();
        drop(sender);
        let read = read_json::<serde_json::Value>(&state, &HeaderMap::new(), body).await;
        let (_, room) = read.unwrap();
        assert_eq!(room.unwrap().num_permits(), LARGE / 1024);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_gives_its_room_to_the_next() {
        let state = state();
        let (_sender, stalled) = sent_body();
        _sender.send(bytes(SMALL_BODY_BYTES + 1)).unwrap();
        let (stalled, other) = tokio::join!(read(&state, stalled), read(&state, whole()));
        let error = stalled.unwrap_err();
        assert_eq!((error.status().as_u16(), error.code()), (408, Some("request_timeout")));
        assert!(error.to_string().contains("16384 bytes in 5 seconds"), "{error}");
        assert_eq!(other.unwrap().0.len(), LARGE);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_now_and_then_are_no_progress() {
        let state = state();
        let (sender, dripping) = sent_body();
        sender.send(bytes(SMALL_BODY_BYTES + 1)).unwrap();
        let drip = async {
            while sender.send(bytes(1)).is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let started = Instant::now();
        let (dripping, ()) = tokio::join!(read(&state, dripping), drip);
        assert!(matches!(dripping.unwrap_err(), ApiError::BodyStalled { .. }));
        assert!(started.elapsed() < 2 * PACE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sender_that_keeps_the_pace_has_all_its_time() {
        let state = state();
        let (sender, steady) = sent_body();
        let send = async {
            for _ in 0..LARGE / PACE_BYTES {
                sender.send(bytes(PACE_BYTES)).unwrap();
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            drop(sender);
        };
        let (read, ()) = tokio::join!(read(&state, steady), send);
        assert_eq!(read.unwrap().0.len(), LARGE / PACE_BYTES * PACE_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_body_may_be_slow_until_its_time_is_over() {
        let state = state();
        let (sender, slow) = sent_body();
        sender.send(bytes(10)).unwrap();
        let started = Instant::now();
        let error = read(&state, slow).await.unwrap_err();
        assert!(matches!(error, ApiError::BodyTimeout { .. }), "{error}");
        assert_eq!(started.elapsed().as_secs(), state.limits.body_timeout.as_secs());
        drop(sender);
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_room_is_sent_away_and_was_not_slow() {
        let state = state();
        let room = state.body_room(LARGE).await;
        let error = read(&state, whole()).await.unwrap_err();
        assert_eq!((error.status().as_u16(), error.code()), (429, Some("queue_full")));
        // Waiting took longer than the sender has: that is not the sender's fault.
        let limits = Limits {
            body_timeout: Duration::from_secs(1),
            ..state.limits.clone()
        };
        let state = AppState::new(limits, Metrics::new("tiny"));
        let held = state.body_room(LARGE).await;
        let release = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            drop(held);
        };
        let (read, ()) = tokio::join!(read(&state, whole()), release);
        assert_eq!(read.unwrap().0.len(), LARGE);
        drop(room);
    }
}
