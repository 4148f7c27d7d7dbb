//! The callers' side of the engine: handles, streams, and the mailbox through which both reach the engine thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use crate::error::{EngineError, SubmitError};
use crate::stats::{Heartbeat, Stats, StatsSnapshot};
use crate::{KvCacheConfig, Request, RequestId, TokenEvent};

pub(crate) type EventResult = Result<TokenEvent, EngineError>;

/// Limits of admission and scheduling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens a step computes at most. Long prompts are cut into pieces of this size.
    pub max_num_batched_tokens: u32,
    /// Sequences that take part in steps at most; bounded by `max_num_batched_tokens`.
    pub max_num_seqs: u32,
    /// Prompt and answer together.
    pub max_model_len: u32,
    /// Requests that wait for their first step at most. One always may.
    pub max_queued_requests: u32,
    /// Prompt tokens of waiting requests at most. A longer prompt is admitted to an empty queue.
    pub max_queued_tokens: u64,
    /// Reuse the KV of equal prefixes.
    pub enable_prefix_caching: bool,
    /// An executor that takes longer over one call is given up, and with it the engine. `None` waits for ever.
    pub step_timeout: Option<Duration>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_batched_tokens: 2048,
            max_num_seqs: 256,
            max_model_len: 8192,
            max_queued_requests: 1024,
            max_queued_tokens: 1 << 20,
            enable_prefix_caching: true,
            step_timeout: None,
        }
    }
}

/// A request on its way to the engine thread, with the sending end of its stream.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    pub(crate) events: mpsc::Sender<EventResult>,
    pub(crate) submitted_at: Instant,
}

/// What callers want of the engine. Bounded by admission: at most one submission a queued request, one abort a stream.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    pub(crate) submissions: Vec<Submission>,
    pub(crate) aborts: Vec<RequestId>,
    pub(crate) shutdown: bool,
    /// Every handle is gone: nobody can submit, so the thread ends once idle.
    pub(crate) abandoned: bool,
    draining: bool,
    /// The engine has ended, or is about to: nobody will read the mailbox.
    pub(crate) closed: bool,
    /// The engine thread waits on the condition variable.
    asleep: bool,
}

/// What handles, streams and the engine thread share.
#[derive(Debug)]
pub(crate) struct Shared {
    mailbox: Mutex<Mailbox>,
    wake: Condvar,
    /// The mailbox was closed.
    closed: Condvar,
    idle: Notify,
    /// Why nothing will run any more.
    death: OnceLock<Arc<str>>,
    next_id: AtomicU64,
    pub(crate) config: EngineConfig,
    kv_cache: KvCacheConfig,
    pub(crate) stats: Stats,
}

impl Shared {
    pub(crate) fn new(config: EngineConfig, kv_cache: KvCacheConfig) -> Self {
        Self {
            mailbox: Mutex::default(),
            wake: Condvar::new(),
            closed: Condvar::new(),
            idle: Notify::new(),
            death: OnceLock::new(),
            next_id: AtomicU64::new(0),
            config,
            kv_cache,
            stats: Stats::new(),
        }
    }

    /// Nothing panics while it holds the lock, and the data are plain: a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the mailbox and wakes the engine thread if it sleeps.
    fn post(&self, change: impl FnOnce(&mut Mailbox)) {
        let mut mailbox = self.lock();
        change(&mut mailbox);
        if mailbox.asleep {
            mailbox.asleep = false;
            self.wake.notify_one();
        }
    }

    /// Moves everything in the mailbox to `into`; with `wait`, sleeps until there is anything or it is closed.
    pub(crate) fn receive(&self, into: &mut Mailbox, wait: bool) {
        let mut mailbox = self.lock();
        while wait && mailbox.is_empty() && !mailbox.closed {
            mailbox.asleep = true;
            mailbox = self.wake.wait(mailbox).unwrap_or_else(PoisonError::into_inner);
        }
        mailbox.asleep = false;
        into.submissions.append(&mut mailbox.submissions);
        into.aborts.append(&mut mailbox.aborts);
        into.shutdown = mailbox.shutdown;
        into.abandoned = mailbox.abandoned;
        into.closed = mailbox.closed;
    }

    /// The engine ends, by a death if not because it was asked to; the first death counts. Returns what nobody will read
    /// any more.
    pub(crate) fn close(&self, death: Option<String>) -> Vec<Submission> {
        let mut mailbox = self.lock();
        mailbox.closed = true;
        if let Some(reason) = death {
            tracing::error!(reason, "the engine is dead");
            // Nobody else sets it: who ends the engine holds the lock, and comes once but for a panic in the last moment.
            let _ = self.death.set(reason.into());
        }
        mailbox.asleep = false;
        self.wake.notify_one();
        self.closed.notify_all();
        self.idle.notify_waiters();
        std::mem::take(&mut mailbox.submissions)
    }

    fn wait_until_closed(&self) {
        let mut mailbox = self.lock();
        while !mailbox.closed {
            mailbox = self.closed.wait(mailbox).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A request left the queue: its first step is launched, or it ended before.
    pub(crate) fn dequeued(&self, prompt_tokens: u64) {
        self.stats.num_queued.fetch_sub(1, Ordering::AcqRel);
        self.stats.queued_tokens.fetch_sub(prompt_tokens, Ordering::AcqRel);
    }

    /// A request left the engine.
    pub(crate) fn forgotten(&self) {
        if self.stats.num_live.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.idle.notify_waiters();
        }
    }

    pub(crate) fn death(&self) -> Option<&Arc<str>> {
        self.death.get()
    }

    /// What a stream reports whose sender is gone without a last word.
    fn parting_error(&self) -> EngineError {
        match self.death() {
            Some(reason) => EngineError::EngineDead {
                reason: Arc::clone(reason),
            },
            None => EngineError::ShutDown,
        }
    }

    fn check(&self, request: &Request) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.stop.max_tokens == 0 && request.num_scores() == 0 {
            return Err(SubmitError::NoTokensWanted);
        }
        let prompt_tokens = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let max_tokens = request.stop.max_tokens;
        let max_model_len = self.config.max_model_len;
        let kv_cache_tokens = kv_cache_tokens(self.kv_cache);
        if u64::from(prompt_tokens) + u64::from(max_tokens) > u64::from(max_model_len.min(kv_cache_tokens)) {
            return Err(SubmitError::TooLong {
                prompt_tokens,
                max_tokens,
                max_model_len,
                kv_cache_tokens,
            });
        }
        Ok(())
    }

    /// Reserves a place in the queue. The caller holds the mailbox lock, so the limits are exact.
    fn admit(&self, prompt_tokens: u64) -> Result<(), SubmitError> {
        let queued_requests = self.stats.num_queued.load(Ordering::Acquire);
        let queued_tokens = self.stats.queued_tokens.load(Ordering::Acquire);
        let full = queued_requests >= u64::from(self.config.max_queued_requests)
            || queued_tokens + prompt_tokens > self.config.max_queued_tokens;
        if queued_requests > 0 && full {
            return Err(SubmitError::QueueFull {
                queued_requests: u32::try_from(queued_requests).unwrap_or(u32::MAX),
                max_queued_requests: self.config.max_queued_requests,
                queued_tokens,
                max_queued_tokens: self.config.max_queued_tokens,
            });
        }
        self.stats.num_queued.fetch_add(1, Ordering::AcqRel);
        self.stats.queued_tokens.fetch_add(prompt_tokens, Ordering::AcqRel);
        self.stats.num_live.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

impl Mailbox {
    fn is_empty(&self) -> bool {
        self.submissions.is_empty() && self.aborts.is_empty() && !self.shutdown && !self.abandoned
    }
}

/// Tokens all blocks hold together.
fn kv_cache_tokens(kv_cache: KvCacheConfig) -> u32 {
    kv_cache.num_blocks.saturating_mul(kv_cache.block_size)
}

/// Reaches a running engine from any thread. When the last clone is dropped, the engine finishes what it has and ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

/// The one owner of the engine thread behind all clones of a handle.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.post(|mailbox| mailbox.abandoned = true);
    }
}

impl EngineHandle {
    pub(crate) fn new(shared: Arc<Shared>, thread: JoinHandle<()>) -> Self {
        Self {
            owner: Arc::new(Owner {
                shared,
                thread: Mutex::new(Some(thread)),
            }),
        }
    }

    /// Queues a request and returns at once; its tokens come through the stream.
    ///
    /// # Errors
    /// [`SubmitError`]: the request cannot be served at all, or not now.
    pub fn submit(&self, request: Request) -> Result<TokenStream, SubmitError> {
        let shared = &self.owner.shared;
        shared.check(&request)?;
        // All tokens and a last error fit, so the engine never waits for a client. The channel allocates as it fills.
        let (sender, events) = mpsc::channel(request.num_scores() + request.stop.max_tokens as usize + 2);
        let mut mailbox = shared.lock();
        if mailbox.closed || mailbox.draining {
            return Err(match shared.death() {
                Some(_) => SubmitError::Dead,
                None => SubmitError::ShuttingDown,
            });
        }
        let submitted_at = Instant::now();
        if mailbox.asleep {
            // Or a watchdog would take the pause before this request for a step that hangs.
            shared.stats.progressed(submitted_at);
        }
        shared.admit(request.prompt.len() as u64)?;
        let id = RequestId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        mailbox.submissions.push(Submission {
            id,
            request,
            events: sender,
            submitted_at,
        });
        if mailbox.asleep {
            mailbox.asleep = false;
            shared.wake.notify_one();
        }
        drop(mailbox);
        Ok(TokenStream {
            id,
            events,
            shared: Arc::clone(shared),
            ended: false,
        })
    }

    /// Whether the engine runs, or ended because it was asked to.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.death().is_none()
    }

    /// Why nothing will run any more.
    #[must_use]
    pub fn death(&self) -> Option<&str> {
        self.owner.shared.death().map(|reason| &**reason)
    }

    /// Whether new requests are refused because of [`drain`](Self::drain) or [`shutdown`](Self::shutdown).
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.owner.shared.lock().draining
    }

    /// Refuses new requests from now on. What was submitted is finished.
    pub fn drain(&self) {
        self.owner.shared.post(|mailbox| mailbox.draining = true);
    }

    /// Waits until no request is in the engine, or the engine is dead.
    pub async fn idle(&self) {
        let shared = &self.owner.shared;
        loop {
            let mut notified = std::pin::pin!(shared.idle.notified());
            // Registered before the check, so that no notification falls between the two.
            notified.as_mut().enable();
            if shared.stats.num_live.load(Ordering::Acquire) == 0 || shared.death().is_some() {
                return;
            }
            notified.await;
        }
    }

    /// Cuts every request off with [`EngineError::ShutDown`] and waits for the engine thread to end. Blocks: for the
    /// step in flight, and for the executor to be dropped. Does not wait for the thread of a dead engine, which may never
    /// end.
    pub fn shutdown(&self) {
        let shared = &self.owner.shared;
        shared.post(|mailbox| {
            mailbox.draining = true;
            mailbox.shutdown = true;
        });
        shared.wait_until_closed();
        if shared.death().is_some() {
            return;
        }
        let thread = self.owner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("engine thread panicked while it ended");
        }
    }

    #[cfg(test)]
    pub(crate) fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.owner.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Present numbers, read without a message to the engine thread.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        self.owner.shared.stats.snapshot()
    }

    /// Whether the engine makes progress, read without a message to the engine thread.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        self.owner.shared.stats.heartbeat()
    }

    /// The limits the engine was spawned with.
    #[must_use]
    pub fn config(&self) -> &EngineConfig {
        &self.owner.shared.config
    }

    /// The executor's KV cache.
    #[must_use]
    pub fn kv_cache_config(&self) -> KvCacheConfig {
        self.owner.shared.kv_cache
    }

    /// Tokens a prompt and its answer may have together: the configured limit, or all the KV cache holds.
    #[must_use]
    pub fn max_model_len(&self) -> u32 {
        self.config().max_model_len.min(kv_cache_tokens(self.kv_cache_config()))
    }
}

/// The tokens of one request, as they are generated. Dropping it aborts the request wherever it is.
///
/// The last item is an event with a finish reason, or an error.
#[derive(Debug)]
pub struct TokenStream {
    id: RequestId,
    events: mpsc::Receiver<EventResult>,
    shared: Arc<Shared>,
    ended: bool,
}

impl TokenStream {
    /// The request's name.
    #[must_use]
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Whether the last item was received.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Waits for the next token; `None` after the last item. Cancel safe.
    pub async fn recv(&mut self) -> Option<Result<TokenEvent, EngineError>> {
        if self.ended {
            return None;
        }
        let received = self.events.recv().await;
        self.settle(received)
    }

    /// [`recv`](Self::recv) for hand-written futures.
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<TokenEvent, EngineError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|received| self.settle(received))
    }

    /// [`recv`](Self::recv) for threads outside of any async runtime.
    ///
    /// # Panics
    /// When called from within an async context.
    pub fn blocking_recv(&mut self) -> Option<Result<TokenEvent, EngineError>> {
        if self.ended {
            return None;
        }
        let received = self.events.blocking_recv();
        self.settle(received)
    }

    /// The next token if there is one now; [`is_ended`](Self::is_ended) tells "not yet" from "no more".
    pub fn try_recv(&mut self) -> Option<Result<TokenEvent, EngineError>> {
        if self.ended {
            return None;
        }
        match self.events.try_recv() {
            Ok(event) => self.settle(Some(event)),
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => self.settle(None),
        }
    }

    fn settle(&mut self, received: Option<EventResult>) -> Option<EventResult> {
        let item = received.unwrap_or_else(|| Err(self.shared.parting_error()));
        self.ended = item.as_ref().map_or(true, |event| event.finish.is_some());
        Some(item)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // The engine can have ended the sequence already; the name is unknown to it then.
        self.shared.post(|mailbox| {
            if !mailbox.closed {
                mailbox.aborts.push(self.id);
            }
        });
    }
}
