//! The engine thread, driven through its handle.

mod by_hand;

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::{
    FinishReason, KvCacheConfig, Script, ScriptedConfig, ScriptedConstraint, ScriptedExecutor, ScriptedFailure,
    StatsSnapshot, StopCriteria, SubmitError, TokenConstraint, TokenId, TokenStream,
};

fn spawn(config: EngineConfig, script: ScriptedConfig) -> EngineHandle {
    Engine::spawn(config, move || Ok::<_, ScriptedFailure>(ScriptedExecutor::new(script))).unwrap()
}

/// An engine whose steps each wait for a message.
fn spawn_gated(config: EngineConfig, script: ScriptedConfig) -> (EngineHandle, mpsc::Sender<()>) {
    let (sender, gate) = mpsc::channel();
    (
        spawn(
            config,
            ScriptedConfig {
                gate: Some(gate),
                ..script
            },
        ),
        sender,
    )
}

fn depth(max_steps_in_flight: usize) -> ScriptedConfig {
    ScriptedConfig {
        max_steps_in_flight,
        ..ScriptedConfig::default()
    }
}

/// All tokens, and how the stream ended.
fn read(mut stream: TokenStream) -> (Vec<TokenId>, Result<FinishReason, EngineError>) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_recv().expect("a last item comes before the end") {
            Ok(event) => {
                tokens.push(event.sampled.token);
                if let Some(finish) = event.finish {
                    assert!(stream.blocking_recv().is_none());
                    return (tokens, Ok(finish));
                }
            }
            Err(error) => {
                assert!(stream.blocking_recv().is_none());
                return (tokens, Err(error));
            }
        }
    }
}

/// Blocks until the numbers are as wanted; the engine thread publishes them once a step at least.
fn wait_for(handle: &EngineHandle, wanted: impl Fn(&StatsSnapshot) -> bool) {
    while !wanted(&handle.stats()) {
        std::thread::yield_now();
    }
}

#[test]
fn streams_carry_the_tokens_each_request_would_get_alone() {
    for max_steps_in_flight in [1, 2] {
        let handle = spawn(EngineConfig::default(), depth(max_steps_in_flight));
        let requests: Vec<_> = (1..20).map(|n| Request::for_test(vec![n; n as usize], n)).collect();
        let streams: Vec<_> = requests
            .iter()
            .map(|request| handle.submit(request.clone()).unwrap())
            .collect();
        for (request, stream) in requests.iter().zip(streams) {
            let (tokens, finish) = read(stream);
            assert_eq!(tokens, ScriptedExecutor::expected_tokens(1000, request));
            assert_eq!(finish.unwrap(), FinishReason::Length);
        }
        let stats = handle.stats();
        assert_eq!(
            (stats.requests_finished, stats.generated_tokens),
            (19, (1..20).sum::<u64>())
        );
        assert_eq!((stats.num_queued, stats.queued_tokens), (0, 0));
        wait_for(&handle, |stats| {
            stats.blocks_free == stats.blocks_total && stats.num_running == 0
        });
    }
}

#[test]
fn scores_come_before_the_answer_and_all_of_them_fit_the_stream() {
    for max_steps_in_flight in [1, 2] {
        let handle = spawn(EngineConfig::default(), depth(max_steps_in_flight));
        let prompt: Vec<_> = (0..150).collect();
        let request = Request {
            prompt_logprobs: Some(2),
            ..Request::for_test(prompt.clone(), 3)
        };
        let mut stream = handle.submit(request).unwrap();
        // Nobody reads before everything is sent.
        wait_for(&handle, |stats| stats.requests_finished == 1);
        let events: Vec<_> = std::iter::from_fn(|| stream.blocking_recv())
            .map(Result::unwrap)
            .collect();
        let (scores, answer) = events.split_at(149);
        assert!(scores.iter().all(|event| event.is_prompt && event.finish.is_none()));
        let tokens: Vec<_> = scores.iter().map(|event| event.sampled.token).collect();
        assert_eq!(tokens, prompt[1..]);
        let logprobs = scores.iter().map(|event| event.sampled.logprobs.as_ref().unwrap());
        let (logprobs, num_top): (Vec<_>, Vec<_>) = logprobs.map(|score| (score.logprob, score.top.len())).unzip();
        assert_eq!(logprobs, ScriptedExecutor::expected_scores(&prompt));
        assert_eq!(num_top, [2; 149]);
        assert!(answer.len() == 3 && answer.iter().all(|event| !event.is_prompt));
        assert_eq!(handle.stats().generated_tokens, 3);
    }
}

#[test]
fn nothing_to_generate_needs_something_to_score() {
    let handle = spawn(EngineConfig::default(), depth(1));
    let scored = |prompt: Vec<TokenId>| Request {
        prompt_logprobs: Some(0),
        ..Request::for_test(prompt, 0)
    };
    let (tokens, finish) = read(handle.submit(scored(vec![1, 2])).unwrap());
    assert_eq!((tokens, finish.unwrap()), (vec![2], FinishReason::Length));
    for request in [scored(vec![1]), Request::for_test([1, 2], 0)] {
        assert_eq!(handle.submit(request).unwrap_err(), SubmitError::NoTokensWanted);
    }
    wait_for(&handle, |stats| stats.blocks_free == stats.blocks_total);
}

#[test]
fn a_stop_token_ends_the_stream_and_is_reported() {
    let script = Script::new(|row| (row.position == 7).then_some(42));
    let handle = spawn(
        EngineConfig::default(),
        ScriptedConfig {
            script: Some(script),
            ..depth(2)
        },
    );
    let stop = StopCriteria {
        max_tokens: 30,
        min_tokens: 0,
        stop_token_ids: [42].into(),
    };
    let (tokens, finish) = read(
        handle
            .submit(Request {
                stop,
                ..Request::for_test([1, 2, 3], 30)
            })
            .unwrap(),
    );
    assert_eq!((tokens.len(), finish.unwrap()), (5, FinishReason::Stop(42)));
}

#[test]
fn dropping_a_stream_gives_its_blocks_back_within_one_step() {
    for max_steps_in_flight in [1, 2] {
        let (handle, gate) = spawn_gated(EngineConfig::default(), depth(max_steps_in_flight));
        let mut stream = handle.submit(Request::for_test([1, 2, 3], 100)).unwrap();
        for _ in 0..2 {
            gate.send(()).unwrap();
        }
        stream.blocking_recv().unwrap().unwrap();
        drop(stream);
        // Steps that were launched or about to be when the stream was dropped.
        let num_steps_before = 1 + max_steps_in_flight as u64;
        for _ in 0..num_steps_before {
            gate.send(()).unwrap();
        }
        wait_for(&handle, |stats| {
            stats.requests_aborted == 1 && stats.blocks_free == stats.blocks_total
        });
        assert!(handle.stats().steps <= 1 + num_steps_before);
        wait_for(&handle, |_| !handle.heartbeat().busy);
    }
}

#[test]
fn a_queued_request_whose_stream_is_dropped_never_runs() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    let (handle, gate) = spawn_gated(config, depth(1));
    let running = handle.submit(Request::for_test([1], 4)).unwrap();
    wait_for(&handle, |stats| stats.num_queued == 0 || stats.steps == 0);
    let queued = handle.submit(Request::for_test([7, 8, 9], 4)).unwrap();
    drop(queued);
    drop(gate);
    assert!(read(running).1.is_ok());
    wait_for(&handle, |stats| stats.requests_aborted == 1);
    assert_eq!(handle.stats().prompt_tokens_computed, 1);
}

#[test]
fn queue_limits_are_exact_and_refusals_name_the_numbers() {
    let config = EngineConfig {
        max_queued_requests: 3,
        max_queued_tokens: 10,
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    let (handle, gate) = spawn_gated(config, depth(1));
    let running = handle.submit(Request::for_test([1; 40], 2)).unwrap();
    // The prompt alone is above the limit, but the queue was empty. The gate lets its first step begin.
    gate.send(()).unwrap();
    wait_for(&handle, |stats| stats.num_queued == 0);
    let queued: Vec<_> = (0..2)
        .map(|_| handle.submit(Request::for_test([1; 4], 2)).unwrap())
        .collect();
    let refusal = SubmitError::QueueFull {
        queued_requests: 2,
        max_queued_requests: 3,
        queued_tokens: 8,
        max_queued_tokens: 10,
    };
    assert_eq!(handle.submit(Request::for_test([1; 4], 2)).unwrap_err(), refusal);
    let last = handle.submit(Request::for_test([1; 2], 2)).unwrap();
    let refusal = handle.submit(Request::for_test([1], 2)).unwrap_err();
    assert!(
        matches!(
            refusal,
            SubmitError::QueueFull {
                queued_requests: 3,
                queued_tokens: 10,
                ..
            }
        ),
        "{refusal}"
    );
    drop(gate);
    for stream in queued.into_iter().chain([running, last]) {
        assert!(read(stream).1.is_ok());
    }
    assert!(handle.stats().queue_drain_time().is_some());
}

#[test]
fn a_request_that_can_never_fit_is_refused_with_the_numbers() {
    let handle = spawn(
        EngineConfig {
            max_model_len: 100,
            ..EngineConfig::default()
        },
        depth(1),
    );
    let refusal = SubmitError::TooLong {
        prompt_tokens: 91,
        max_tokens: 10,
        max_model_len: 100,
        kv_cache_tokens: 256,
    };
    assert_eq!(handle.submit(Request::for_test([1; 91], 10)).unwrap_err(), refusal);
    assert!(handle.submit(Request::for_test([1; 90], 10)).is_ok());
    assert_eq!(
        handle.submit(Request::for_test([], 10)).unwrap_err(),
        SubmitError::EmptyPrompt
    );
    assert_eq!(
        handle.submit(Request::for_test([1], 0)).unwrap_err(),
        SubmitError::NoTokensWanted
    );
    let handle = spawn(EngineConfig::default(), depth(1));
    assert_eq!(
        handle.max_model_len(),
        256,
        "the KV cache is smaller than the configured limit"
    );
    assert!(handle.submit(Request::for_test([1; 200], 57)).is_err());
    assert!(read(handle.submit(Request::for_test([1; 200], 56)).unwrap()).1.is_ok());
}

#[test]
fn a_failed_step_fails_its_requests_and_the_engine_goes_on() {
    for (max_steps_in_flight, at_launch) in [(1, false), (2, false), (1, true), (2, true)] {
        let failing = BTreeSet::from([2]);
        let mut script = depth(max_steps_in_flight);
        *(if at_launch {
            &mut script.failing_launches
        } else {
            &mut script.failing_collects
        }) = failing;
        let handle = spawn(EngineConfig::default(), script);
        let (tokens, end) = read(handle.submit(Request::for_test([1, 2, 3], 20)).unwrap());
        assert!(matches!(end, Err(EngineError::StepFailed { step: 2, .. })), "{end:?}");
        assert!(tokens.len() <= 2);
        let request = Request::for_test([1, 2, 3], 20);
        let (tokens, end) = read(handle.submit(request.clone()).unwrap());
        assert_eq!(tokens, ScriptedExecutor::expected_tokens(1000, &request));
        assert!(end.is_ok() && handle.is_alive());
        let stats = handle.stats();
        assert_eq!(
            (stats.requests_failed, stats.requests_finished, stats.steps_failed),
            (1, 1, 1)
        );
    }
}

#[test]
fn a_lost_device_and_a_panic_end_every_stream_and_show() {
    let deaths = [
        (
            ScriptedConfig {
                device_lost_at: Some(3),
                ..depth(2)
            },
            "device lost: ",
        ),
        (
            ScriptedConfig {
                panic_at: Some(3),
                ..depth(1)
            },
            "the engine thread panicked: ",
        ),
    ];
    for (script, expected) in deaths {
        let config = EngineConfig {
            max_num_seqs: 2,
            ..EngineConfig::default()
        };
        let (handle, gate) = spawn_gated(config, script);
        let streams: Vec<_> = (0..5)
            .map(|n| handle.submit(Request::for_test([n], 50)).unwrap())
            .collect();
        drop(gate);
        for stream in streams {
            let Err(EngineError::EngineDead { reason }) = read(stream).1 else {
                panic!("the stream ends with the engine");
            };
            assert!(reason.contains(expected), "{reason}");
            assert_eq!(handle.death(), Some(&*reason));
        }
        assert_eq!(handle.submit(Request::for_test([1], 1)).unwrap_err(), SubmitError::Dead);
        handle.shutdown();
        let stats = handle.stats();
        assert_eq!(
            (stats.requests_failed, stats.num_queued, stats.queued_tokens),
            (5, 0, 0)
        );
    }
}

#[test]
fn a_step_that_does_not_end_ends_every_stream_in_time() {
    for max_steps_in_flight in [1, 2] {
        let ends = |limit| a_step_that_does_not_end_ends_five_streams(max_steps_in_flight, limit);
        assert!(PATIENCES.into_iter().any(ends));
    }
}

/// Whether all five were submitted before the first one's step had taken too long.
fn a_step_that_does_not_end_ends_five_streams(max_steps_in_flight: usize, limit: Duration) -> bool {
    let config = EngineConfig {
        max_num_seqs: 2,
        step_timeout: Some(limit),
        ..EngineConfig::default()
    };
    let (handle, gate) = spawn_gated(config, depth(max_steps_in_flight));
    let submitted: Result<Vec<_>, _> = (0..5).map(|n| handle.submit(Request::for_test([n], 50))).collect();
    let streams = match submitted {
        Ok(streams) => streams,
        Err(error) => {
            assert_eq!(error, SubmitError::Dead);
            return false;
        }
    };
    for _ in 0..3 {
        gate.send(()).unwrap();
    }
    for stream in streams {
        let Err(EngineError::EngineDead { reason }) = read(stream).1 else {
            panic!("the stream ends with the engine");
        };
        let expected = format!("launching a step took longer than the step timeout of {limit:?}");
        assert!(reason.contains(&expected), "{reason}");
    }
    assert_eq!(handle.submit(Request::for_test([1], 1)).unwrap_err(), SubmitError::Dead);
    let stats = handle.stats();
    assert_eq!(
        (stats.requests_failed, stats.num_queued, stats.queued_tokens),
        (5, 0, 0)
    );
    // The thread still waits, and nobody waits for it; nor does it do harm when it comes back.
    handle.shutdown();
    let thread = handle.take_thread().unwrap();
    drop(gate);
    thread.join().unwrap();
    assert_eq!(handle.stats().requests_failed, 5);
    true
}

/// A machine with other things to do may hold a thread up for any while: what takes time is tried with more of it.
const PATIENCES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_millis(1250),
    Duration::from_millis(6250),
];

#[test]
fn many_short_steps_are_no_long_one() {
    let is_spared = |limit: Duration| {
        let config = EngineConfig {
            step_timeout: Some(limit),
            ..EngineConfig::default()
        };
        let script = ScriptedConfig {
            step_time: limit / 20,
            ..depth(1)
        };
        let handle = spawn(config, script);
        let started = Instant::now();
        let (_, end) = read(handle.submit(Request::for_test([1], 60)).unwrap());
        assert!(started.elapsed() > 2 * limit || end.is_err());
        // Nor is a pause.
        std::thread::sleep(2 * limit);
        let after = handle.submit(Request::for_test([1], 1));
        end.is_ok() && after.is_ok_and(|stream| read(stream).1.is_ok())
    };
    assert!(PATIENCES.into_iter().any(is_spared));
}

#[test]
fn an_executor_that_answers_with_too_few_tokens_fails_the_step() {
    struct Mute(KvCacheConfig);
    impl Executor for Mute {
        fn kv_cache_config(&self) -> KvCacheConfig {
            self.0
        }
        fn launch(&mut self, _batch: &crate::Batch) -> Result<(), ExecutorError> {
            Ok(())
        }
        fn collect(&mut self) -> Result<Vec<SampledToken>, ExecutorError> {
            Ok(Vec::new())
        }
    }
    let kv_cache = KvCacheConfig {
        num_blocks: 8,
        block_size: 16,
    };
    let handle = Engine::spawn(EngineConfig::default(), move || {
        Ok::<_, ScriptedFailure>(Mute(kv_cache))
    })
    .unwrap();
    let (_, end) = read(handle.submit(Request::for_test([1], 5)).unwrap());
    assert!(matches!(end, Err(EngineError::StepFailed { step: 0, .. })));
}

#[test]
fn an_executor_that_cannot_be_built_is_reported() {
    let failure = ScriptedFailure { attempt: 9 };
    let error = Engine::<ScriptedExecutor>::spawn(EngineConfig::default(), move || Err(failure)).unwrap_err();
    assert!(matches!(error, SpawnError::Build(error) if error == failure));
    let build = || -> Result<ScriptedExecutor, ScriptedFailure> { panic!("panic was asked for") };
    assert!(matches!(
        Engine::spawn(EngineConfig::default(), build).unwrap_err(),
        SpawnError::Panicked
    ));
}

#[test]
fn draining_finishes_what_was_submitted_and_refuses_the_rest() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (handle, gate) = spawn_gated(
        EngineConfig {
            max_num_seqs: 1,
            ..EngineConfig::default()
        },
        depth(2),
    );
    let streams: Vec<_> = (0..3)
        .map(|n| handle.submit(Request::for_test([n], 5)).unwrap())
        .collect();
    handle.drain();
    assert_eq!(
        handle.submit(Request::for_test([1], 1)).unwrap_err(),
        SubmitError::ShuttingDown
    );
    assert!(handle.is_draining() && handle.is_alive());
    drop(gate);
    runtime.block_on(handle.idle());
    for stream in streams {
        assert_eq!(read(stream).0.len(), 5);
    }
    handle.shutdown();
    assert!(handle.is_alive(), "an engine that was asked to end is not dead");
}

#[test]
fn shutdown_cuts_streams_off_and_ends_the_thread() {
    let (handle, gate) = spawn_gated(EngineConfig::default(), depth(2));
    let mut stream = handle.submit(Request::for_test([1], 200)).unwrap();
    for _ in 0..2 {
        gate.send(()).unwrap();
    }
    stream.blocking_recv().unwrap().unwrap();
    let ending = std::thread::spawn({
        let handle = handle.clone();
        move || handle.shutdown()
    });
    while !handle.is_draining() {
        std::thread::yield_now();
    }
    drop(gate);
    ending.join().unwrap();
    assert!(matches!(read(stream).1, Err(EngineError::ShutDown)));
    assert_eq!(
        handle.submit(Request::for_test([1], 1)).unwrap_err(),
        SubmitError::ShuttingDown
    );
    assert_eq!(handle.stats().requests_aborted, 1);
}

#[test]
fn streams_outlive_the_last_handle() {
    let (handle, gate) = spawn_gated(EngineConfig::default(), depth(2));
    let streams: Vec<_> = (0..3)
        .map(|n| handle.submit(Request::for_test([n], 9)).unwrap())
        .collect();
    drop(handle);
    drop(gate);
    for stream in streams {
        assert!(read(stream).1.is_ok());
    }
}

fn wait_until(time: Instant) {
    while Instant::now() <= time {
        std::thread::yield_now();
    }
}

#[test]
fn a_deadline_is_kept_while_queued_and_while_running() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    // Whether the one that runs got a token before its deadline; it has no end before that.
    let runs = |patience: Duration| {
        let (handle, gate) = spawn_gated(config, depth(1));
        let deadline = Instant::now() + patience;
        let until = |deadline| Request {
            deadline: Some(deadline),
            ..Request::for_test([1], 200)
        };
        let running = handle.submit(until(deadline)).unwrap();
        gate.send(()).unwrap();
        let queued = handle.submit(until(deadline)).unwrap();
        wait_until(deadline);
        drop(gate);
        let (tokens, end) = read(queued);
        assert!(tokens.is_empty() && matches!(end, Err(EngineError::DeadlineExceeded)));
        let (tokens, end) = read(running);
        assert!(matches!(end, Err(EngineError::DeadlineExceeded)));
        let last = handle.submit(until(Instant::now())).unwrap();
        assert!(matches!(read(last).1, Err(EngineError::DeadlineExceeded)));
        assert_eq!(handle.stats().requests_expired, 3);
        assert_eq!(handle.stats().num_queued, 0);
        !tokens.is_empty()
    };
    assert!(PATIENCES.into_iter().any(runs));
}

#[test]
fn a_deadline_of_the_queue_is_over_once_a_request_runs() {
    let config = EngineConfig {
        max_num_seqs: 1,
        ..EngineConfig::default()
    };
    // Whether the first one began before its deadline; then it runs for longer than it would have waited.
    let is_over = |patience: Duration| {
        let (handle, gate) = spawn_gated(config, depth(1));
        let deadline = Instant::now() + patience;
        let patient = |num_tokens| Request {
            queue_deadline: Some(deadline),
            ..Request::for_test([1], num_tokens)
        };
        let running = handle.submit(patient(100)).unwrap();
        gate.send(()).unwrap();
        let queued = handle.submit(patient(5)).unwrap();
        let both = handle
            .submit(Request {
                deadline: Some(Instant::now()),
                ..patient(5)
            })
            .unwrap();
        wait_until(deadline);
        drop(gate);
        assert!(
            matches!(read(both).1, Err(EngineError::DeadlineExceeded)),
            "the earlier one"
        );
        let (tokens, end) = read(queued);
        assert!(tokens.is_empty() && matches!(end, Err(EngineError::QueueDeadlineExceeded)));
        let (tokens, end) = read(running);
        assert_eq!(end.is_ok(), tokens.len() == 100, "{end:?}");
        assert_eq!(handle.stats().requests_expired, 2 + u64::from(end.is_err()));
        assert_eq!(handle.stats().num_queued, 0);
        end.is_ok()
    };
    assert!(PATIENCES.into_iter().any(is_over));
}

#[test]
fn a_client_that_never_reads_holds_nobody_up() {
    let handle = spawn(EngineConfig::default(), depth(2));
    let lazy = handle.submit(Request::for_test([1], 100)).unwrap();
    assert_eq!(read(handle.submit(Request::for_test([2], 150)).unwrap()).0.len(), 150);
    assert_eq!(read(lazy).0.len(), 100);
}

#[test]
fn cached_tokens_and_queue_time_are_reported() {
    let handle = spawn(EngineConfig::default(), depth(1));
    let prompt: Vec<_> = (0..13).collect();
    assert!(
        read(handle.submit(Request::for_test(prompt.clone(), 2)).unwrap())
            .1
            .is_ok()
    );
    let mut stream = handle.submit(Request::for_test(prompt, 2)).unwrap();
    let event = stream.blocking_recv().unwrap().unwrap();
    assert_eq!(event.num_cached_tokens, 12);
    assert!(event.queue_time < Duration::from_secs(60));
    let stats = handle.stats();
    assert_eq!(
        (stats.prefix_cache_queried_tokens, stats.prefix_cache_hit_tokens),
        (26, 12)
    );
}

#[test]
fn who_is_in_a_step_that_is_being_launched_is_not_queued() {
    let (handle, gate) = spawn_gated(EngineConfig::default(), depth(1));
    let stream = handle.submit(Request::for_test([1; 5], 1)).unwrap();
    // The gate is closed: it stays in its first launch.
    wait_for(&handle, |stats| (stats.num_queued, stats.queued_tokens) == (0, 0));
    assert_eq!((handle.stats().num_running, handle.stats().num_waiting), (1, 0));
    drop(gate);
    assert!(read(stream).1.is_ok());
}

#[test]
fn try_recv_tells_not_yet_from_no_more() {
    let (handle, gate) = spawn_gated(EngineConfig::default(), depth(1));
    let mut stream = handle.submit(Request::for_test([1], 1)).unwrap();
    assert!(stream.try_recv().is_none() && !stream.is_ended());
    drop(gate);
    let item = loop {
        if let Some(item) = stream.try_recv() {
            break item;
        }
        std::thread::yield_now();
    };
    assert!(item.unwrap().finish.is_some() && stream.is_ended() && stream.try_recv().is_none());
}

const STOP: TokenId = 9;

/// A request that must follow `constraint` and ends with its stop token.
fn constrained(prompt: &[TokenId], max_tokens: u32, constraint: &ScriptedConstraint) -> Request {
    let stop = StopCriteria {
        max_tokens,
        min_tokens: 0,
        stop_token_ids: [STOP].into(),
    };
    Request {
        stop,
        constraint: Some(constraint.fork()),
        ..Request::for_test(prompt, max_tokens)
    }
}

#[test]
fn constrained_and_free_streams_share_steps_and_keep_their_tokens() {
    for max_steps_in_flight in [1, 2] {
        let handle = spawn(EngineConfig::default(), depth(max_steps_in_flight));
        let form = ScriptedConstraint::new(1000, 12, STOP);
        let mut requests = Vec::new();
        for n in 1..8 {
            requests.push(Request::for_test([n, 2, 3], 25));
            requests.push(constrained(&[n, 2, 3], 25, &form));
            // The same form and prompt, cut off early, with a mind of its own.
            requests.push(constrained(&[n, 2, 3], 5, &form));
        }
        let streams: Vec<_> = requests
            .iter()
            .map(|request| handle.submit(request.clone()).unwrap())
            .collect();
        for (request, stream) in requests.iter().zip(streams) {
            let (tokens, _) = read(stream);
            assert_eq!(tokens, ScriptedExecutor::expected_tokens(1000, request));
        }
        wait_for(&handle, |stats| stats.blocks_free == stats.blocks_total);
    }
}

#[test]
fn a_form_that_is_complete_ends_before_min_tokens() {
    let handle = spawn(EngineConfig::default(), depth(2));
    let mut request = constrained(&[1, 2], 50, &ScriptedConstraint::new(1000, 4, STOP));
    request.stop.min_tokens = 20;
    let (tokens, finish) = read(handle.submit(request).unwrap());
    assert_eq!((tokens.len(), finish.unwrap()), (5, FinishReason::Stop(STOP)));
}

#[test]
fn a_constraint_that_fails_takes_nobody_else_along() {
    for max_steps_in_flight in [1, 2] {
        let handle = spawn(EngineConfig::default(), depth(max_steps_in_flight));
        let free = Request::for_test([1, 2, 3], 30);
        let other = handle.submit(free.clone()).unwrap();
        let form = ScriptedConstraint::new(1000, 20, STOP).failing_after(3);
        let (tokens, finish) = read(handle.submit(constrained(&[4], 30, &form)).unwrap());
        assert_eq!(tokens.len(), 3);
        assert!(
            matches!(finish, Err(EngineError::ConstraintFailed { .. })),
            "{finish:?}"
        );
        let (tokens, _) = read(other);
        assert_eq!(tokens, ScriptedExecutor::expected_tokens(1000, &free));
        wait_for(&handle, |stats| stats.requests_failed == 1 && stats.num_running == 0);
    }
}

#[test]
fn masks_that_take_long_slow_nobody_else_down() {
    for max_steps_in_flight in [1, 2] {
        let handle = spawn(EngineConfig::default(), depth(max_steps_in_flight));
        let (slow, gate) = ScriptedConstraint::new(1000, 40, STOP).gated();
        let mut slow = handle.submit(constrained(&[4], 41, &slow)).unwrap();
        // The mask for its first token.
        gate.send(()).unwrap();
        slow.blocking_recv().unwrap().unwrap();
        // The next one does not come: who waits for it never ends.
        let (tokens, _) = read(handle.submit(Request::for_test([1, 2, 3], 40)).unwrap());
        assert_eq!(tokens.len(), 40);
        assert!(slow.try_recv().is_none() && !slow.is_ended());
        drop(gate);
        assert_eq!(read(slow).0.len(), 40);
    }
}

#[test]
fn a_constrained_stream_that_is_dropped_gives_everything_back() {
    let handle = spawn(EngineConfig::default(), depth(2));
    let form = ScriptedConstraint::new(1000, 500, STOP).with_delay(Duration::from_millis(1));
    let mut stream = handle.submit(constrained(&[1, 2, 3], 200, &form)).unwrap();
    stream.blocking_recv().unwrap().unwrap();
    drop(stream);
    wait_for(&handle, |stats| {
        stats.requests_aborted == 1 && stats.blocks_free == stats.blocks_total
    });
}
