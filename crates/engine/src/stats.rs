//! Counters the engine thread writes and anyone reads, without a lock or a message.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

/// Upper bounds of the tokens-a-step histogram; a last bucket takes the rest. vLLM's `iteration_tokens_total`.
pub const ITERATION_TOKENS_BUCKETS: [u64; 13] = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];

/// Rates forget what is older than about this much busy time: long enough to span a few long prefills, short enough that
/// a `Retry-After` follows a change of load.
const RATE_WINDOW_SECONDS: f64 = 10.0;

/// Ends of requests that a rate can be told from.
pub(crate) const ENOUGH_ENDS: f64 = 4.0;

/// The engine's numbers at one moment. Each is exact; they are not read at one instant.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StatsSnapshot {
    /// Sequences that take part in steps.
    pub num_running: u64,
    /// Sequences that can run at the same time: as many as did when somebody had to wait for one of them to end, be it for
    /// want of KV blocks; `max_num_seqs` while nobody has to.
    pub num_slots: u64,
    /// Sequences that wait: queued ones and preempted ones.
    pub num_waiting: u64,
    /// Requests submitted that no step was launched for; what `max_queued_requests` limits.
    pub num_queued: u64,
    /// Prompt tokens of those; what `max_queued_tokens` limits.
    pub queued_tokens: u64,
    /// KV blocks of the executor.
    pub blocks_total: u64,
    /// Blocks no sequence holds, cached ones included.
    pub blocks_free: u64,
    /// Blocks the prefix cache can match.
    pub blocks_cached: u64,
    /// Sequences that lost their blocks and start over.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_cache_queried_tokens: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hit_tokens: u64,
    /// Prompt tokens computed, recomputation after preemption included.
    pub prompt_tokens_computed: u64,
    /// Tokens handed to streams.
    pub generated_tokens: u64,
    /// Steps collected, failed ones included.
    pub steps: u64,
    /// Steps that failed at launch or collect.
    pub steps_failed: u64,
    /// Tokens a step: counts for each of [`ITERATION_TOKENS_BUCKETS`] (not cumulative), then those above.
    pub iteration_tokens: [u64; ITERATION_TOKENS_BUCKETS.len() + 1],
    /// Sum of tokens over all steps.
    pub iteration_tokens_sum: u64,
    /// Requests that ended by themselves.
    pub requests_finished: u64,
    /// Requests whose stream was dropped first, and those a shutdown cut off.
    pub requests_aborted: u64,
    /// Requests that ended with a failed step or with the engine.
    pub requests_failed: u64,
    /// Requests that reached their deadline.
    pub requests_expired: u64,
    /// Prompt tokens computed a second of recent busy time.
    pub prompt_tokens_per_second: f64,
    /// Tokens generated a second of recent busy time.
    pub generated_tokens_per_second: f64,
    /// Requests that left the queue for their first step, a second of recent busy time.
    pub starts_per_second: f64,
    /// Requests that ended, a second of the latest time in which somebody had to wait for that; 0 before enough have.
    pub ends_per_second_when_full: f64,
    /// Prompt tokens computed or found in the cache, a second of the latest time in which steps had as many tokens as they
    /// may; 0 before there was any.
    pub prompt_tokens_per_second_when_full: f64,
}

impl StatsSnapshot {
    /// Share of the KV blocks that sequences hold, 0 to 1.
    #[must_use]
    pub fn kv_cache_usage(&self) -> f64 {
        if self.blocks_total == 0 {
            return 0.0;
        }
        1.0 - self.blocks_free as f64 / self.blocks_total as f64
    }

    /// How long the present queue takes at the measured rate, or `None` while nothing was measured. For ever where nothing
    /// was seen to leave it for long.
    #[must_use]
    pub fn queue_drain_time(&self) -> Option<Duration> {
        if self.steps == 0 {
            return None;
        }
        let at = |amount: u64, rate: f64| match amount {
            0 => Duration::ZERO,
            amount => duration(amount as f64 / rate),
        };
        let by_tokens = at(self.queued_tokens, self.prompt_tokens_per_second);
        Some(by_tokens.max(at(self.num_queued, self.starts_per_second)))
    }

    /// How long a request that came now would wait for its first step: not at all where nobody is queued; else until the
    /// prompts before it are computed and, if there is no slot for it, until enough others have ended. `None` while nobody
    /// knows how fast others end.
    #[must_use]
    pub fn queue_wait(&self) -> Option<Duration> {
        let num_others = self.num_running + self.num_waiting;
        let by_ends = match num_others.checked_sub(self.num_slots).filter(|_| self.num_queued > 0) {
            None => Duration::ZERO,
            Some(_) if self.ends_per_second_when_full == 0.0 => return None,
            Some(num_ahead) => duration((num_ahead + 1) as f64 / self.ends_per_second_when_full),
        };
        Some(by_ends.max(self.prompts_wait()))
    }

    /// How long it takes to compute the prompts of the queue. Where steps were never full, nothing has to wait for one.
    #[must_use]
    pub fn prompts_wait(&self) -> Duration {
        match self.prompt_tokens_per_second_when_full {
            0.0 => Duration::ZERO,
            rate => duration(self.queued_tokens as f64 / rate),
        }
    }
}

/// Longer than a [`Duration`] can be is as long as one can be.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// Whether the engine makes progress, for a watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Steps collected.
    pub steps: u64,
    /// Whether any request is in the engine: an idle engine makes no progress and is well.
    pub busy: bool,
    /// Since the engine thread last launched or collected a step or woke up for work.
    pub since_progress: Duration,
}

/// What one step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Tokens computed.
    pub tokens: u64,
    /// Those of prompts.
    pub prompt_tokens: u64,
    /// Tokens that sequences got.
    pub generated_tokens: u64,
    /// Requests it was the first step of.
    pub starts: u64,
    /// Prompt tokens that those found in the cache.
    pub cached_tokens: u64,
    /// It failed, and nobody got anything.
    pub failed: bool,
}

/// What the scheduler looks like between two steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Gauges {
    pub(crate) num_running: u64,
    /// Somebody waits until another ends.
    pub(crate) lacks_slots: bool,
    pub(crate) num_slots: u64,
    pub(crate) num_preempted: u64,
    pub(crate) blocks_total: u64,
    pub(crate) blocks_free: u64,
    pub(crate) blocks_cached: u64,
    pub(crate) preemptions: u64,
    pub(crate) prefix_cache_queried_tokens: u64,
    pub(crate) prefix_cache_hit_tokens: u64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished,
    Aborted,
    Failed,
    Expired,
}

/// Written by the engine thread alone (but for the queue's two), so relaxed loads and stores suffice.
#[derive(Debug)]
pub(crate) struct Stats {
    epoch: Instant,
    last_progress_micros: AtomicU64,
    pub(crate) num_queued: AtomicU64,
    pub(crate) queued_tokens: AtomicU64,
    pub(crate) num_live: AtomicU64,
    num_running: AtomicU64,
    num_slots: AtomicU64,
    num_preempted: AtomicU64,
    blocks_total: AtomicU64,
    blocks_free: AtomicU64,
    blocks_cached: AtomicU64,
    preemptions: AtomicU64,
    prefix_cache_queried_tokens: AtomicU64,
    prefix_cache_hit_tokens: AtomicU64,
    prompt_tokens_computed: AtomicU64,
    generated_tokens: AtomicU64,
    steps: AtomicU64,
    steps_failed: AtomicU64,
    iteration_tokens: [AtomicU64; ITERATION_TOKENS_BUCKETS.len() + 1],
    iteration_tokens_sum: AtomicU64,
    requests: [AtomicU64; 4],
    /// `f64` bits: prompt tokens, generated tokens, starts a second.
    rates: [AtomicU64; 3],
    /// `f64` bits: ends a second with all slots taken, prompt tokens a second of full steps.
    full_rates: [AtomicU64; 2],
}

impl Stats {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            epoch: Instant::now(),
            last_progress_micros: zero(),
            num_queued: zero(),
            queued_tokens: zero(),
            num_live: zero(),
            num_running: zero(),
            num_slots: zero(),
            num_preempted: zero(),
            blocks_total: zero(),
            blocks_free: zero(),
            blocks_cached: zero(),
            preemptions: zero(),
            prefix_cache_queried_tokens: zero(),
            prefix_cache_hit_tokens: zero(),
            prompt_tokens_computed: zero(),
            generated_tokens: zero(),
            steps: zero(),
            steps_failed: zero(),
            iteration_tokens: [const { AtomicU64::new(0) }; _],
            iteration_tokens_sum: zero(),
            requests: [const { AtomicU64::new(0) }; _],
            rates: [const { AtomicU64::new(0) }; _],
            full_rates: [const { AtomicU64::new(0) }; _],
        }
    }

    pub(crate) fn progressed(&self, now: Instant) {
        let micros = u64::try_from((now - self.epoch).as_micros()).unwrap_or(u64::MAX);
        self.last_progress_micros.store(micros, Relaxed);
    }

    pub(crate) fn set_gauges(&self, gauges: &Gauges) {
        self.num_running.store(gauges.num_running, Relaxed);
        self.num_slots.store(gauges.num_slots, Relaxed);
        self.num_preempted.store(gauges.num_preempted, Relaxed);
        self.blocks_total.store(gauges.blocks_total, Relaxed);
        self.blocks_free.store(gauges.blocks_free, Relaxed);
        self.blocks_cached.store(gauges.blocks_cached, Relaxed);
        self.preemptions.store(gauges.preemptions, Relaxed);
        self.prefix_cache_queried_tokens
            .store(gauges.prefix_cache_queried_tokens, Relaxed);
        self.prefix_cache_hit_tokens
            .store(gauges.prefix_cache_hit_tokens, Relaxed);
    }

    pub(crate) fn count_step(&self, step: &StepCounts) {
        let bucket = ITERATION_TOKENS_BUCKETS.partition_point(|&bound| bound < step.tokens);
        add(&self.iteration_tokens[bucket], 1);
        add(&self.iteration_tokens_sum, step.tokens);
        add(&self.prompt_tokens_computed, step.prompt_tokens);
        add(&self.generated_tokens, step.generated_tokens);
        add(&self.steps_failed, u64::from(step.failed));
        add(&self.steps, 1);
    }

    pub(crate) fn count_outcome(&self, outcome: Outcome) {
        add(&self.requests[outcome as usize], 1);
    }

    pub(crate) fn set_rates(&self, rates: [f64; 3]) {
        for (slot, rate) in self.rates.iter().zip(rates) {
            slot.store(rate.to_bits(), Relaxed);
        }
    }

    pub(crate) fn set_full_rates(&self, ends_per_second: f64, prompt_tokens_per_second: f64) {
        for (slot, rate) in self.full_rates.iter().zip([ends_per_second, prompt_tokens_per_second]) {
            slot.store(rate.to_bits(), Relaxed);
        }
    }

    pub(crate) fn heartbeat(&self) -> Heartbeat {
        // Read first: whoever makes an idle engine busy has marked the time before.
        let busy = self.num_live.load(Acquire) > 0;
        let last = Duration::from_micros(self.last_progress_micros.load(Relaxed));
        let since_progress = self.epoch.elapsed().saturating_sub(last);
        Heartbeat {
            steps: self.steps.load(Relaxed),
            busy,
            since_progress,
        }
    }

    pub(crate) fn snapshot(&self) -> StatsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let rate = |index: usize| f64::from_bits(get(&self.rates[index]));
        let requests = |outcome: Outcome| get(&self.requests[outcome as usize]);
        // Read first: whoever leaves the queue for a step is seen to run.
        let num_queued = self.num_queued.load(Acquire);
        StatsSnapshot {
            num_running: get(&self.num_running),
            num_slots: get(&self.num_slots),
            num_waiting: num_queued + get(&self.num_preempted),
            num_queued,
            queued_tokens: get(&self.queued_tokens),
            blocks_total: get(&self.blocks_total),
            blocks_free: get(&self.blocks_free),
            blocks_cached: get(&self.blocks_cached),
            preemptions: get(&self.preemptions),
            prefix_cache_queried_tokens: get(&self.prefix_cache_queried_tokens),
            prefix_cache_hit_tokens: get(&self.prefix_cache_hit_tokens),
            prompt_tokens_computed: get(&self.prompt_tokens_computed),
            generated_tokens: get(&self.generated_tokens),
            steps: get(&self.steps),
            steps_failed: get(&self.steps_failed),
            iteration_tokens: self.iteration_tokens.each_ref().map(get),
            iteration_tokens_sum: get(&self.iteration_tokens_sum),
            requests_finished: requests(Outcome::Finished),
            requests_aborted: requests(Outcome::Aborted),
            requests_failed: requests(Outcome::Failed),
            requests_expired: requests(Outcome::Expired),
            prompt_tokens_per_second: rate(0),
            generated_tokens_per_second: rate(1),
            starts_per_second: rate(2),
            ends_per_second_when_full: f64::from_bits(get(&self.full_rates[0])),
            prompt_tokens_per_second_when_full: f64::from_bits(get(&self.full_rates[1])),
        }
    }
}

/// One writer: a plain load and store is cheaper than a locked add.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Relaxed) + amount, Relaxed);
}

/// Rates over recent busy time: amounts and time decay together, so the first seconds are unbiased too.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    seconds: f64,
    amounts: [f64; 3],
}

impl RateMeter {
    /// Adds what happened in `elapsed` and gives the rates a second.
    pub(crate) fn record(&mut self, elapsed: Duration, amounts: [u64; 3]) -> [f64; 3] {
        let seconds = elapsed.as_secs_f64();
        let keep = (-seconds / RATE_WINDOW_SECONDS).exp();
        self.seconds = self.seconds * keep + seconds;
        for (sum, amount) in self.amounts.iter_mut().zip(amounts) {
            *sum = *sum * keep + amount as f64;
        }
        self.rates()
    }

    fn rates(&self) -> [f64; 3] {
        let seconds = self.seconds.max(1e-9);
        self.amounts.map(|sum| sum / seconds)
    }
}

/// How much of something happens when it is all there is room for: how fast a queue for it moves.
///
/// Other times do not count, however long they are: what happens then depends on how much is asked for, and what is known
/// is wanted when a queue begins. It looks back as far as it takes to have seen enough: a slow engine may end fewer requests
/// than that in all of [`RATE_WINDOW_SECONDS`].
#[derive(Debug)]
pub(crate) struct FullMeter {
    /// What a rate can be told from.
    enough: f64,
    seconds: f64,
    amount: f64,
}

impl FullMeter {
    /// Has seen nothing; says nothing before it has seen `enough`.
    pub(crate) fn new(enough: f64) -> Self {
        Self {
            enough,
            seconds: 0.0,
            amount: 0.0,
        }
    }

    /// A step took `elapsed`. Gives the rate a second, 0 as long as less than enough was seen.
    pub(crate) fn step(&mut self, elapsed: Duration, amount: u64, is_full: bool) -> f64 {
        if is_full {
            let (seconds, amount) = (elapsed.as_secs_f64(), amount as f64);
            let keep = (-seconds / RATE_WINDOW_SECONDS).exp();
            // All of it, as long as it was not enough.
            let least = ((self.enough - amount) / self.amount).min(1.0);
            let keep = keep.max(least);
            self.seconds = self.seconds * keep + seconds;
            self.amount = self.amount * keep + amount;
        }
        // What was kept down to the limit may be a rounding error below it.
        if self.amount < self.enough * (1.0 - 1e-9) {
            0.0
        } else {
            self.amount / self.seconds.max(1e-9)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_right_from_the_first_step_and_follow_a_change() {
        let mut meter = RateMeter::default();
        let step = Duration::from_millis(100);
        assert!((meter.record(step, [100, 0, 0])[0] - 1000.0).abs() < 1e-6);
        let rates = (0..1000).map(|_| meter.record(step, [10, 0, 0])).last().unwrap();
        assert!((rates[0] - 100.0).abs() < 1.0, "{rates:?}");
    }

    #[test]
    fn a_step_on_a_bucket_bound_counts_below_it() {
        let stats = Stats::new();
        for tokens in [1, 8, 9, 16384, 16385] {
            stats.count_step(&StepCounts {
                tokens,
                ..StepCounts::default()
            });
        }
        let counts = stats.snapshot().iteration_tokens;
        assert_eq!(
            (counts[0], counts[1], counts[2], counts[12], counts[13]),
            (1, 1, 1, 1, 1)
        );
    }

    #[test]
    fn a_queue_moves_as_fast_as_a_full_engine() {
        let mut meter = FullMeter::new(ENOUGH_ENDS);
        let step = Duration::from_millis(100);
        let mut run = |num_steps: u32, amount: u64, is_full: bool| {
            let rates = (0..num_steps).map(|_| meter.step(step, amount, is_full));
            rates.last().unwrap_or_default()
        };
        assert_eq!(run(50, 1, false), 0.0, "there was room");
        assert_eq!(run(3, 1, true), 0.0, "too few to tell");
        assert!((run(50, 1, true) - 10.0).abs() < 1e-6);
        assert!(
            (run(5000, 7, false) - 10.0).abs() < 1e-6,
            "with room to spare nothing is measured or forgotten"
        );
        assert!((run(1000, 2, true) - 20.0).abs() < 0.01, "what it does now counts more");
    }

    #[test]
    fn a_slow_engine_has_a_rate_too() {
        let mut meter = FullMeter::new(ENOUGH_ENDS);
        // One end in five seconds, one in sixty, and none for long.
        let mut run = |seconds: u64, num_steps: u32, num_ended: u64| {
            let step = Duration::from_secs(seconds);
            let rates: Vec<f64> = (0..num_steps).map(|_| meter.step(step, num_ended, true)).collect();
            rates
        };
        let rates = run(5, 100, 1);
        assert_eq!(rates[..3], [0.0; 3], "too few to tell");
        assert!(rates[3..].iter().all(|rate| (rate - 0.2).abs() < 1e-6), "{rates:?}");
        let rates = run(60, 100, 1);
        assert!((rates[99] - 1.0 / 60.0).abs() < 1e-6, "{rates:?}");
        let rates = run(60, 60, 0);
        assert!((rates[59] - 4.0 / 3840.0).abs() < 1e-6, "{rates:?}");
    }

    #[test]
    fn who_comes_waits_for_slots_and_for_the_prompts_before_it() {
        let (zero, seconds) = (Some(Duration::ZERO), |seconds| Some(Duration::from_secs(seconds)));
        let with_slots = |num_slots, snapshot| StatsSnapshot { num_slots, ..snapshot }.queue_wait();
        let snapshot = StatsSnapshot {
            num_running: 4,
            num_queued: 3,
            num_waiting: 3,
            queued_tokens: 300,
            ..StatsSnapshot::default()
        };
        assert_eq!(with_slots(8, snapshot), zero, "there is a slot for it");
        assert_eq!(with_slots(4, snapshot), None, "nobody knows when there is");
        let snapshot = StatsSnapshot {
            ends_per_second_when_full: 2.0,
            ..snapshot
        };
        assert_eq!(with_slots(4, snapshot), seconds(2), "four must end");
        let preempted = StatsSnapshot {
            num_waiting: 5,
            ..snapshot
        };
        assert_eq!(with_slots(4, preempted), seconds(3), "who was preempted goes before it");
        let snapshot = StatsSnapshot {
            prompt_tokens_per_second_when_full: 100.0,
            ..snapshot
        };
        assert_eq!(with_slots(4, snapshot), seconds(3));
        assert_eq!(with_slots(8, snapshot), seconds(3), "a slot computes no prompts");
        let hardly = StatsSnapshot {
            ends_per_second_when_full: 1e-300,
            ..snapshot
        };
        assert_eq!(with_slots(4, hardly), Some(Duration::MAX));
        assert_eq!(StatsSnapshot::default().queue_wait(), zero);
    }

    #[test]
    fn nothing_measured_means_no_promise_about_the_queue() {
        let snapshot = StatsSnapshot {
            num_queued: 3,
            queued_tokens: 30,
            ..StatsSnapshot::default()
        };
        assert_eq!(snapshot.queue_drain_time(), None);
        let snapshot = StatsSnapshot {
            steps: 1,
            prompt_tokens_per_second: 10.0,
            starts_per_second: 3.0,
            ..snapshot
        };
        assert_eq!(snapshot.queue_drain_time(), Some(Duration::from_secs(3)));
        let snapshot = StatsSnapshot {
            num_queued: 0,
            queued_tokens: 0,
            ..snapshot
        };
        assert_eq!(snapshot.queue_drain_time(), Some(Duration::ZERO));
    }

    #[test]
    fn a_queue_that_nothing_leaves_for_long_takes_for_ever() {
        let mut meter = RateMeter::default();
        meter.record(Duration::from_secs(1), [10, 10, 1]);
        // First the wait is too long for a duration, then the rate is nothing.
        for hours in [1, 100] {
            let rates = meter.record(Duration::from_secs(3600 * hours), [0, 5, 0]);
            let snapshot = StatsSnapshot {
                steps: 2,
                num_queued: 3,
                queued_tokens: 30,
                prompt_tokens_per_second: rates[0],
                starts_per_second: rates[2],
                ..StatsSnapshot::default()
            };
            assert_eq!(snapshot.queue_drain_time(), Some(Duration::MAX), "{rates:?}");
        }
    }
}
