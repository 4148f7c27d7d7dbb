//! The engine thread: owns scheduler and executor, and is the only place where time, callers and the device meet.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as sync_mpsc};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::constraint::MaskPool;
use crate::error::{EngineError, SpawnError};
use crate::handle::{EventResult, Mailbox, Shared, Submission};
use crate::scheduler::{Scheduler, SchedulerConfig, SequenceOutput};
use crate::stats::{ENOUGH_ENDS, FullMeter, Outcome, RateMeter, StepCounts};
use crate::watchdog::{self, Call, StepClock};
use crate::{EngineConfig, EngineHandle, Executor, ExecutorError, Request, RequestId, SampledToken, TokenEvent};

/// The most steps the scheduler can keep in flight, whatever an executor says.
const MAX_STEPS_IN_FLIGHT: usize = 2;

/// Runs an executor on a thread of its own; see [`Engine::spawn`].
#[derive(Debug)]
pub struct Engine<E> {
    executor: E,
    scheduler: Scheduler,
    shared: Arc<Shared>,
    /// Locked by the engine thread, but never while it is inside the executor; and by the watchdog that gives it up.
    callers: Arc<Mutex<Callers>>,
    clock: Arc<StepClock>,
    mailbox: Mailbox,
    masks: MaskPool,
    max_steps_in_flight: usize,
    /// Kept for their capacity.
    outputs: Vec<SequenceOutput>,
    failed: Vec<RequestId>,
}

/// What came of an attempt to launch a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Launched {
    Step,
    Failure,
    Nothing,
}

/// Nothing will run any more: the thread ends.
#[derive(Debug)]
enum Death {
    DeviceLost(String),
    /// The watchdog has told everyone already.
    GivenUp,
}

impl<E: Executor> Engine<E> {
    /// Starts the engine thread, has it build its executor, and returns once that is ready.
    ///
    /// The executor is built on the thread that runs it since device state (CUDA graphs) may not move between threads.
    ///
    /// # Errors
    /// [`SpawnError::Build`] with the error of `build`, or the thread did not start.
    ///
    /// # Panics
    /// When a limit of `config` is 0.
    pub fn spawn<Err>(
        config: EngineConfig,
        build: impl FnOnce() -> Result<E, Err> + Send + 'static,
    ) -> Result<EngineHandle, SpawnError<Err>>
    where
        Err: std::error::Error + Send + 'static,
    {
        assert!(
            config.max_num_batched_tokens > 0 && config.max_num_seqs > 0,
            "limits are at least 1"
        );
        let (ready, built) = sync_mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || match build() {
                Ok(executor) => {
                    let shared = Arc::new(Shared::new(config, executor.kv_cache_config()));
                    // A caller that is gone drops the handle it never got, which ends the engine.
                    if ready.send(Ok(Arc::clone(&shared))).is_ok() {
                        run_to_the_end(Self::new(executor, shared, &config), config.step_timeout);
                    }
                }
                Err(error) => {
                    if ready.send(Err(error)).is_err() {
                        tracing::error!("executor could not be built, and nobody waits to hear why");
                    }
                }
            })
            .map_err(SpawnError::Thread)?;
        match built.recv() {
            Ok(Ok(shared)) => Ok(EngineHandle::new(shared, thread)),
            Ok(Err(error)) => Err(SpawnError::Build(error)),
            Err(sync_mpsc::RecvError) => Err(SpawnError::Panicked),
        }
    }

    fn new(executor: E, shared: Arc<Shared>, config: &EngineConfig) -> Self {
        let max_steps_in_flight = executor.max_steps_in_flight().clamp(1, MAX_STEPS_IN_FLIGHT);
        let scheduler_config = SchedulerConfig {
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_num_seqs: config.max_num_seqs,
            enable_prefix_caching: config.enable_prefix_caching,
            max_steps_in_flight,
        };
        let scheduler = Scheduler::new(scheduler_config, executor.kv_cache_config());
        shared.stats.set_gauges(&scheduler.gauges());
        Self {
            executor,
            scheduler,
            callers: Arc::new(Mutex::new(Callers::new(Arc::clone(&shared)))),
            shared,
            clock: Arc::new(StepClock::new()),
            mailbox: Mailbox::default(),
            masks: MaskPool::new(),
            max_steps_in_flight,
            outputs: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Works until told to stop, or until nobody is left to work for.
    fn run(&mut self) -> Result<(), Death> {
        loop {
            let is_idle = self.scheduler.is_empty() && self.scheduler.num_steps_in_flight() == 0;
            lock(&self.callers).publish(&self.scheduler);
            if is_idle && self.mailbox.abandoned {
                return Ok(());
            }
            self.shared.receive(&mut self.mailbox, is_idle);
            if self.mailbox.closed {
                return Err(Death::GivenUp);
            }
            if is_idle {
                lock(&self.callers).wake_up();
            }
            if self.mailbox.shutdown {
                return Ok(());
            }
            self.take_in_mail();
            self.step()?;
        }
    }

    fn take_in_mail(&mut self) {
        let mut callers = lock(&self.callers);
        for Submission {
            id,
            request,
            events,
            submitted_at,
        } in self.mailbox.submissions.drain(..)
        {
            callers.insert(id, &request, events, submitted_at);
            self.scheduler.add(id, request);
        }
        for id in self.mailbox.aborts.drain(..) {
            if self.scheduler.abort(id) {
                callers.publish(&self.scheduler);
                callers.end(id, Outcome::Aborted);
            }
        }
    }

    /// Launches a step if one can be, and collects the oldest unless another could be launched on top.
    fn step(&mut self) -> Result<(), Death> {
        self.take_in_masks();
        let launched = self.launch()?;
        let num_in_flight = self.scheduler.num_steps_in_flight();
        if num_in_flight == self.max_steps_in_flight || (num_in_flight > 0 && launched != Launched::Step) {
            return self.collect();
        }
        let is_stuck = launched == Launched::Nothing && !self.scheduler.is_empty() && self.masks.num_outstanding() == 0;
        assert!(!is_stuck, "sequences wait, and nothing that runs could end their wait");
        Ok(())
    }

    /// Has masks computed and takes in those that are.
    fn take_in_masks(&mut self) {
        for job in self.scheduler.take_mask_jobs() {
            self.masks.submit(job);
        }
        let (scheduler, callers) = (&mut self.scheduler, &self.callers);
        self.masks.take(|id, outcome| match outcome {
            Ok((constraint, allowed)) => scheduler.set_mask(id, constraint, allowed),
            Err(error) => {
                tracing::warn!(
                    request = id.0,
                    error = &error as &dyn std::error::Error,
                    "constraint failed"
                );
                if scheduler.abort(id) {
                    let source = Arc::new(error);
                    let mut callers = lock(callers);
                    callers.publish(scheduler);
                    callers.end_with(id, Err(EngineError::ConstraintFailed { source }), Outcome::Failed);
                }
            }
        });
    }

    fn launch(&mut self) -> Result<Launched, Death> {
        // As late as can be: who waits for masks, or for a slot, may have waited too long by now.
        lock(&self.callers).expire(&mut self.scheduler);
        let Some(batch) = self.scheduler.schedule() else {
            return Ok(Launched::Nothing);
        };
        tracing::debug!(
            step = batch.step,
            num_seqs = batch.num_seqs(),
            num_tokens = batch.num_tokens(),
            "launch"
        );
        let step = batch.step;
        // Where nothing runs beside this thread, launching a step is computing it: nobody waits in the queue meanwhile.
        let mut callers = lock(&self.callers);
        callers.publish(&self.scheduler);
        callers.started(self.scheduler.newly_started());
        drop(callers);
        let batch = self.scheduler.batch();
        let launched = self.clock.time(Call::Launch, || self.executor.launch(batch));
        let Err(error) = launched else {
            return Ok(Launched::Step);
        };
        let counts = self.scheduler.launch_failed(&mut self.failed);
        self.fail(step, error, counts)?;
        Ok(Launched::Failure)
    }

    fn collect(&mut self) -> Result<(), Death> {
        let step = self.scheduler.oldest_step();
        let collected = self.clock.time(Call::Collect, || self.executor.collect());
        let collected = collected.and_then(|sampled| self.check_length(sampled));
        match collected {
            Ok(sampled) => {
                let lacks_slots = self.scheduler.gauges().lacks_slots;
                let counts = self.scheduler.update(sampled, &mut self.outputs);
                let mut callers = lock(&self.callers);
                callers.count(counts, lacks_slots);
                callers.publish(&self.scheduler);
                for output in self.outputs.drain(..) {
                    let id = output.id;
                    if !callers.emit(output) {
                        self.scheduler.abort(id);
                        callers.publish(&self.scheduler);
                        callers.end(id, Outcome::Aborted);
                    }
                }
                Ok(())
            }
            Err(error) => {
                let counts = self.scheduler.step_failed(&mut self.failed);
                self.fail(step, error, counts)
            }
        }
    }

    fn check_length(&self, sampled: Vec<SampledToken>) -> Result<Vec<SampledToken>, ExecutorError> {
        let expected = self.scheduler.num_samples();
        if sampled.len() == expected {
            return Ok(sampled);
        }
        let message = format!(
            "executor sampled {} tokens where {expected} were asked for",
            sampled.len()
        );
        Err(ExecutorError::Step(message.into()))
    }

    /// Tells the callers of a failed step, whose sequences are in `failed` and out of the scheduler.
    fn fail(&mut self, step: u64, error: ExecutorError, counts: StepCounts) -> Result<(), Death> {
        let mut callers = lock(&self.callers);
        callers.count(counts, self.scheduler.gauges().lacks_slots);
        if matches!(error, ExecutorError::DeviceLost(_)) {
            // Streams end with the reason when their senders are dropped.
            let num_requests = self.failed.len();
            let reason = format!("step {step} of {num_requests} requests: {}", chain(&error));
            return Err(Death::DeviceLost(reason));
        }
        let source = Arc::new(error);
        tracing::error!(
            step,
            error = &*source as &dyn std::error::Error,
            requests = self.failed.len(),
            "step failed"
        );
        callers.publish(&self.scheduler);
        for id in self.failed.drain(..) {
            let error = EngineError::StepFailed {
                step,
                source: Arc::clone(&source),
            };
            callers.end_with(id, Err(error), Outcome::Failed);
        }
        Ok(())
    }
}

/// Runs an engine and, however it ends, tells everyone that it did.
fn run_to_the_end<E: Executor>(mut engine: Engine<E>, step_timeout: Option<Duration>) {
    let watchdog = step_timeout.map(|limit| {
        let (shared, callers) = (Arc::clone(&engine.shared), Arc::clone(&engine.callers));
        watchdog::start(Arc::clone(&engine.clock), limit, move |overdue| {
            end(&shared, &mut lock(&callers), Some(overdue.to_string()));
        })
    });
    let death = match watchdog {
        // Better none than one that may wait for ever.
        Some(Err(error)) => Some(format!("no thread for the watchdog: {error}")),
        Some(Ok(_)) | None => match catch_unwind(AssertUnwindSafe(|| engine.run())) {
            Ok(Ok(())) => None,
            Ok(Err(Death::DeviceLost(reason))) => Some(reason),
            Ok(Err(Death::GivenUp)) => {
                tracing::warn!("the executor returned after it was given up");
                return;
            }
            Err(panic) => Some(format!("the engine thread panicked: {}", panic_message(&*panic))),
        },
    };
    let mut callers = lock(&engine.callers);
    for Submission {
        id,
        request,
        events,
        submitted_at,
    } in engine.mailbox.submissions.drain(..)
    {
        callers.insert(id, &request, events, submitted_at);
    }
    end(&engine.shared, &mut callers, death);
}

/// Ends every stream. Marked dead before that, so that whoever sees one end sees the mark too.
fn end(shared: &Shared, callers: &mut Callers, death: Option<String>) {
    let outcome = match death {
        Some(_) => Outcome::Failed,
        None => Outcome::Aborted,
    };
    for Submission {
        id,
        request,
        events,
        submitted_at,
    } in shared.close(death)
    {
        callers.insert(id, &request, events, submitted_at);
    }
    callers.end_all(outcome);
}

/// The engine thread may have panicked anywhere; what it left is still right to end streams by.
fn lock(callers: &Mutex<Callers>) -> MutexGuard<'_, Callers> {
    callers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Everyone who waits for tokens, and the clock they are served by.
#[derive(Debug)]
struct Callers {
    shared: Arc<Shared>,
    by_id: HashMap<RequestId, Caller>,
    deadlines: BTreeSet<(Instant, RequestId)>,
    /// When the last step was collected, or work came in after a pause.
    last_step_at: Instant,
    rates: RateMeter,
    /// Of ends of requests, when somebody waits for one.
    ends: FullMeter,
    /// Since the last step.
    num_ended: u64,
    /// Of prompt tokens, when steps are full.
    prompts: FullMeter,
}

#[derive(Debug)]
struct Caller {
    events: mpsc::Sender<EventResult>,
    submitted_at: Instant,
    /// Known once a step is launched for it.
    queue_time: Option<Duration>,
    num_prompt_tokens: u64,
    deadline: Option<Instant>,
    /// Until it left the queue; before `deadline`.
    queue_deadline: Option<Instant>,
}

impl Caller {
    /// When [`Callers::expire`] has to look at it.
    fn deadlines(&self) -> impl Iterator<Item = Instant> + use<> {
        self.deadline.into_iter().chain(self.queue_deadline)
    }
}

impl Callers {
    fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            by_id: HashMap::new(),
            deadlines: BTreeSet::new(),
            last_step_at: Instant::now(),
            rates: RateMeter::default(),
            ends: FullMeter::new(ENOUGH_ENDS),
            num_ended: 0,
            prompts: FullMeter::new(1.0),
        }
    }

    fn insert(&mut self, id: RequestId, request: &Request, events: mpsc::Sender<EventResult>, submitted_at: Instant) {
        let is_later = |at: &Instant| request.deadline.is_some_and(|deadline| deadline <= *at);
        let num_prompt_tokens = request.prompt.len() as u64;
        let caller = Caller {
            events,
            submitted_at,
            queue_time: None,
            num_prompt_tokens,
            deadline: request.deadline,
            queue_deadline: request.queue_deadline.filter(|at| !is_later(at)),
        };
        self.deadlines.extend(caller.deadlines().map(|deadline| (deadline, id)));
        self.by_id.insert(id, caller);
    }

    /// Fails requests whose deadline has passed.
    fn expire(&mut self, scheduler: &mut Scheduler) {
        if self.deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            scheduler.abort(id);
            self.publish(scheduler);
            let is_queued = self
                .by_id
                .get(&id)
                .is_some_and(|caller| caller.queue_deadline == Some(deadline));
            let error = match is_queued {
                true => EngineError::QueueDeadlineExceeded,
                false => EngineError::DeadlineExceeded,
            };
            self.end_with(id, Err(error), Outcome::Expired);
        }
    }

    /// Notes that requests leave the queue, and when.
    fn started(&mut self, ids: &[RequestId]) {
        for id in ids {
            if let Some(caller) = self.by_id.get_mut(id) {
                caller.queue_time = Some(caller.submitted_at.elapsed());
                self.shared.dequeued(caller.num_prompt_tokens);
                if let Some(deadline) = caller.queue_deadline.take() {
                    self.deadlines.remove(&(deadline, *id));
                }
            }
        }
    }

    /// Sends a token. False when its stream is gone: the caller must be ended.
    fn emit(&mut self, output: SequenceOutput) -> bool {
        let SequenceOutput {
            id,
            sampled,
            is_prompt,
            finish,
            num_cached_tokens,
        } = output;
        let Some(caller) = self.by_id.get(&id) else { return true };
        let queue_time = caller.queue_time.unwrap_or_default();
        let event = TokenEvent {
            sampled,
            is_prompt,
            finish,
            num_cached_tokens,
            queue_time,
            sampled_at: self.last_step_at,
        };
        if finish.is_some() {
            let outcome = if caller.events.is_closed() {
                Outcome::Aborted
            } else {
                Outcome::Finished
            };
            self.end_with(id, Ok(event), outcome);
            return true;
        }
        // Room for every token was made at submission, so only a dropped stream can refuse one.
        caller.events.try_send(Ok(event)).is_ok()
    }

    /// Forgets a caller and sends the last item of its stream: counted first, so that who has it finds it counted.
    fn end_with(&mut self, id: RequestId, last: EventResult, outcome: Outcome) {
        let Some(caller) = self.forget(id, outcome) else { return };
        if caller.events.try_send(last).is_err() {
            tracing::debug!(request = id.0, "stream was dropped before its last item");
        }
        self.shared.forgotten();
    }

    /// Forgets a caller; its stream ends without a last item.
    fn end(&mut self, id: RequestId, outcome: Outcome) {
        let Some(caller) = self.forget(id, outcome) else { return };
        drop(caller);
        self.shared.forgotten();
    }

    fn forget(&mut self, id: RequestId, outcome: Outcome) -> Option<Caller> {
        let caller = self.by_id.remove(&id)?;
        for deadline in caller.deadlines() {
            self.deadlines.remove(&(deadline, id));
        }
        match caller.queue_time {
            None => self.shared.dequeued(caller.num_prompt_tokens),
            Some(_) => self.num_ended += 1,
        }
        self.shared.stats.count_outcome(outcome);
        Some(caller)
    }

    fn end_all(&mut self, outcome: Outcome) {
        let ids: Vec<_> = self.by_id.keys().copied().collect();
        for id in ids {
            self.end(id, outcome);
        }
    }

    /// The thread slept: the time until now was nobody's.
    fn wake_up(&mut self) {
        self.last_step_at = Instant::now();
        self.shared.stats.progressed(self.last_step_at);
    }

    /// Counts a step; `lacks_slots` if its plan left somebody waiting until another ends.
    fn count(&mut self, counts: StepCounts, lacks_slots: bool) {
        let now = Instant::now();
        let elapsed = now - self.last_step_at;
        self.last_step_at = now;
        self.shared.stats.progressed(now);
        let amounts = [counts.prompt_tokens, counts.generated_tokens, counts.starts];
        // Before the step counts: whoever sees that there was one sees its rates.
        self.shared.stats.set_rates(self.rates.record(elapsed, amounts));
        self.shared.stats.count_step(&counts);
        let num_ended = std::mem::take(&mut self.num_ended);
        let ends = self.ends.step(elapsed, num_ended, lacks_slots);
        // A step full of sequences that generate says nothing of prompts: those wait for an end.
        let is_full = counts.tokens >= u64::from(self.shared.config.max_num_batched_tokens) && counts.prompt_tokens > 0;
        let num_prompt_tokens = counts.prompt_tokens + counts.cached_tokens;
        let prompts = self.prompts.step(elapsed, num_prompt_tokens, is_full);
        self.shared.stats.set_full_rates(ends, prompts);
    }

    /// To be done before a caller is ended: whoever then finds the engine idle finds its numbers so too.
    fn publish(&self, scheduler: &Scheduler) {
        self.shared.stats.set_gauges(&scheduler.gauges());
    }
}
