//! The engine, run step by step on the thread of the test: what holds at one moment between two steps, or inside one.

use std::sync::mpsc;
use std::time::Duration;

use super::*;

/// An engine whose thread is the caller's.
fn by_hand(config: EngineConfig, script: ScriptedConfig) -> (Engine<ScriptedExecutor>, EngineHandle) {
    let executor = ScriptedExecutor::new(script);
    let shared = Arc::new(Shared::new(config, executor.kv_cache_config()));
    let engine = Engine::new(executor, Arc::clone(&shared), &config);
    (engine, EngineHandle::new(shared, std::thread::spawn(|| {})))
}

impl Engine<ScriptedExecutor> {
    /// Reads what was posted and does one step.
    fn turn(&mut self) {
        self.shared.receive(&mut self.mailbox, false);
        self.take_in_mail();
        self.step().unwrap();
    }
}

#[test]
fn a_deadline_of_the_queue_that_passes_just_before_a_step_is_scheduled_is_kept() {
    let (mut engine, handle) = by_hand(EngineConfig::default(), depth(1));
    let stream = handle.submit(Request {
        queue_deadline: Some(Instant::now()),
        ..Request::for_test([1], 1)
    });
    engine.turn();
    let (tokens, end) = read(stream.unwrap());
    assert!(tokens.is_empty() && matches!(end, Err(EngineError::QueueDeadlineExceeded)));
    assert_eq!(handle.stats().num_queued, 0);
}

#[test]
fn a_request_waits_in_the_queue_until_its_first_step_is_launched_however_long_that_takes() {
    // On a CPU launching a step is computing it. This one takes longer than the request's submission did, so that a time
    // taken after it is seen to be.
    let (launched, at) = mpsc::channel();
    let submission = Arc::new(Mutex::new(Duration::MAX));
    let took = Arc::clone(&submission);
    let script = Script::new(move |_| {
        let now = Instant::now();
        launched.send(now).unwrap();
        let took = *took.lock().unwrap();
        while now.elapsed() <= took {}
        None
    });
    let (mut engine, handle) = by_hand(
        EngineConfig::default(),
        ScriptedConfig {
            script: Some(script),
            ..depth(1)
        },
    );
    let before = Instant::now();
    let mut stream = handle.submit(Request::for_test([1], 1)).unwrap();
    *submission.lock().unwrap() = before.elapsed();
    engine.turn();
    let event = stream.blocking_recv().unwrap().unwrap();
    assert!(event.queue_time <= at.recv().unwrap() - before);
}

/// The engine's numbers at the moment it tells that it is idle.
#[derive(Clone)]
struct WhenIdle {
    handle: EngineHandle,
    seen: Arc<Mutex<Option<StatsSnapshot>>>,
}

impl std::task::Wake for WhenIdle {
    fn wake(self: Arc<Self>) {
        *self.seen.lock().unwrap() = Some(self.handle.stats());
    }
}

/// Has `end` end all that is in the engine, and gives its numbers as whoever waits for that sees them.
fn when_idle(handle: &EngineHandle, end: impl FnOnce()) -> StatsSnapshot {
    let waker = Arc::new(WhenIdle {
        handle: handle.clone(),
        seen: Arc::default(),
    });
    let mut idle = std::pin::pin!(handle.idle());
    let task = std::task::Waker::from(Arc::clone(&waker));
    assert!(
        idle.as_mut()
            .poll(&mut std::task::Context::from_waker(&task))
            .is_pending()
    );
    end();
    waker.seen.lock().unwrap().expect("the engine is idle")
}

#[test]
fn an_engine_that_says_it_is_idle_shows_it() {
    let endless = || Request::for_test([1, 2, 3], 100);
    let running = |request: Request| {
        let (mut engine, handle) = by_hand(EngineConfig::default(), depth(1));
        let stream = handle.submit(request).unwrap();
        engine.turn();
        assert_eq!(handle.stats().num_running, 1);
        (engine, handle, stream)
    };
    let assert_idle = |stats: StatsSnapshot| {
        assert_eq!((stats.num_running, stats.num_waiting), (0, 0), "{stats:?}");
        assert_eq!(stats.blocks_free, stats.blocks_total, "{stats:?}");
    };

    let (mut engine, handle, stream) = running(endless());
    drop(stream);
    assert_idle(when_idle(&handle, || engine.turn()));

    // Between the mail and the end of a step.
    let (mut engine, handle, stream) = running(endless());
    drop(stream);
    assert_idle(when_idle(&handle, || engine.step().unwrap()));

    let (mut engine, handle, _stream) = running(endless());
    let (now, id) = (Instant::now(), RequestId(0));
    let mut callers = lock(&engine.callers);
    callers.by_id.get_mut(&id).unwrap().deadline = Some(now);
    callers.deadlines.insert((now, id));
    drop(callers);
    assert_idle(when_idle(&handle, || engine.step().unwrap()));

    let form = ScriptedConstraint::new(1000, 20, STOP).failing_after(1);
    let (mut engine, handle) = by_hand(EngineConfig::default(), depth(1));
    let _stream = handle.submit(constrained(&[4], 30, &form)).unwrap();
    assert_idle(when_idle(&handle, || {
        while handle.stats().requests_failed == 0 {
            engine.turn();
        }
    }));
}

/// Ten prompts of so many tokens that have nothing in common, with an answer of one token each.
fn ten_prompts(num_tokens: u32) -> impl Iterator<Item = Request> {
    (0..10).map(move |n| Request::for_test(vec![n; num_tokens as usize], 1))
}

#[test]
fn a_queue_that_waits_for_blocks_is_foreseen() {
    // 64 blocks of 4 tokens: room for two of 100, though 256 may run.
    let (mut engine, handle) = by_hand(EngineConfig::default(), depth(1));
    let _streams: Vec<_> = ten_prompts(100)
        .map(|request| handle.submit(request).unwrap())
        .collect();
    assert_eq!(handle.stats().num_slots, 256);
    engine.turn();
    assert_eq!(handle.stats().num_slots, 2);
    assert_eq!(handle.stats().queue_wait(), None, "none has ended");
    for _ in 0..2 {
        engine.turn();
    }
    let stats = handle.stats();
    assert_eq!((stats.num_running, stats.num_queued), (0, 4));
    // Three more must end before a fifth begins.
    let expected = Duration::from_secs_f64(3.0 / stats.ends_per_second_when_full);
    assert_eq!(stats.queue_wait(), Some(expected));
    for _ in 0..2 {
        engine.turn();
    }
    let stats = handle.stats();
    assert_eq!((stats.num_slots, stats.queue_wait()), (256, Some(Duration::ZERO)));
}

#[test]
fn a_queue_that_waits_for_tokens_of_a_step_is_foreseen() {
    let config = EngineConfig {
        max_num_batched_tokens: 8,
        max_num_seqs: 8,
        ..EngineConfig::default()
    };
    let (mut engine, handle) = by_hand(config, depth(1));
    let five = ten_prompts(20).take(5);
    let _streams: Vec<_> = five.map(|request| handle.submit(request).unwrap()).collect();
    engine.turn();
    let stats = handle.stats();
    assert_eq!((stats.num_running, stats.num_slots, stats.queued_tokens), (2, 8, 60));
    let expected = Duration::from_secs_f64(60.0 / stats.prompt_tokens_per_second_when_full);
    assert!(!expected.is_zero());
    // Three slots are free.
    assert_eq!(stats.queue_wait(), Some(expected));
}

#[test]
fn what_the_cache_has_of_prompts_makes_the_queue_shorter() {
    let config = EngineConfig {
        max_num_batched_tokens: 8,
        max_num_seqs: 8,
        ..EngineConfig::default()
    };
    let (mut engine, handle) = by_hand(config, depth(1));
    let same = || Request::for_test([7; 16], 1);
    let first = handle.submit(same()).unwrap();
    for _ in 0..2 {
        engine.turn();
    }
    assert!(read(first).1.is_ok());
    let _streams: Vec<_> = (0..4).map(|_| handle.submit(same()).unwrap()).collect();
    // Two compute four tokens each and find twelve: 32 leave the queue with a step of eight.
    engine.turn();
    let stats = handle.stats();
    assert_eq!((stats.num_queued, stats.prompt_tokens_computed), (2, 24));
    // All steps were full: without the cache both rates would be the same.
    let ratio = stats.prompt_tokens_per_second_when_full / stats.prompt_tokens_per_second;
    assert!(ratio > 1.9, "{ratio}");
}
