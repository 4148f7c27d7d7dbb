//! From prompts to text: one [`Generation`] behind every answer, whatever endpoint and form it takes.
//!
//! It submits `n` sequences for each prompt, turns their tokens into text, finds stop strings and keeps count. Dropping
//! it drops the engine's streams, which aborts what is still running.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use lapidary_engine::{
    EngineError, FinishReason, Request, SampledToken, SamplingParams, StopCriteria, TokenEvent, TokenId, TokenLogprobs,
    TokenStream,
};
use lapidary_text::{CallEvent, CallReader, Detokenizer, StopMatcher, Tokenizer};

use crate::constraint::AnswerConstraint;
use crate::error::ApiError;
use crate::metrics::{FinishedSequence, SequenceEnd};
use crate::openai::{Deadlines, Params};
use crate::record::RequestRecord;
use crate::state::{AppState, ServedModel};

/// All answers to one request, in progress.
#[derive(Debug)]
pub(crate) struct Generation {
    choices: Vec<Choice>,
    prompts: Vec<PromptUsage>,
    state: AppState,
    record: Option<Arc<RequestRecord>>,
    arrival: Instant,
    /// Where the next poll begins: each choice gets its turn.
    next: usize,
    num_unfinished: usize,
    has_failed: bool,
}

/// What a request comes with beside prompts and parameters.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) deadlines: Deadlines,
    pub(crate) arrival: Instant,
    /// What each answer is held to, from its first token on; none where they are free.
    pub(crate) constraints: Vec<AnswerConstraint>,
}

/// A prompt, and what is known of it once its first token came.
#[derive(Debug)]
struct PromptUsage {
    tokens: Arc<[TokenId]>,
    /// Of its first answer: siblings always find the prompt in the cache.
    num_cached_tokens: Option<u32>,
}

impl PromptUsage {
    fn num_tokens(&self) -> u32 {
        u32::try_from(self.tokens.len()).expect("the length was checked against the context")
    }
}

/// Tokens used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Each prompt counts once, however many answers it gets.
    pub(crate) prompt_tokens: u32,
    /// Generated tokens, the stop token included.
    pub(crate) completion_tokens: u32,
    /// Of the prompt tokens, those that were not computed.
    pub(crate) cached_tokens: u32,
}

/// How long a request took; all absent while there is no token.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timings {
    /// From its arrival.
    pub(crate) to_first_token: Option<Duration>,
    /// From the first step that computed for it to its last token.
    pub(crate) generation: Option<Duration>,
    /// From its arrival to that step.
    pub(crate) queue: Option<Duration>,
    /// Between two tokens of an answer.
    pub(crate) mean_inter_token: Option<Duration>,
    /// Of all answers together, in the time of `generation`.
    pub(crate) tokens_per_second: Option<f64>,
}

impl Timings {
    /// From the first step that computed for it to its first token.
    pub(crate) fn prefill(&self) -> Option<Duration> {
        Some(self.to_first_token?.saturating_sub(self.queue?))
    }

    /// From its first token to its last.
    pub(crate) fn decode(&self) -> Option<Duration> {
        Some(self.generation?.saturating_sub(self.prefill()?))
    }
}

/// One answer.
#[derive(Debug)]
pub(crate) struct Choice {
    prompt_index: usize,
    /// `None` once it is finished.
    stream: Option<TokenStream>,
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    include_stop: bool,
    eos_token_id: Option<TokenId>,
    /// Text of the newest tokens, before stop strings were looked for.
    fresh: String,
    /// Characters of text of settled tokens.
    num_chars: usize,
    /// Tokens whose text is not certain yet.
    held: VecDeque<LogprobEntry>,
    num_tokens: u32,
    max_tokens: u32,
    submitted: Instant,
    first_token: Option<Instant>,
    last_token: Instant,
    queue_time: Duration,
    /// Reads calls of functions, where there are any to call.
    calls: Option<CallReader>,
    /// Scores of the prompt from its second token on, if they were asked for; complete before the first delta.
    pub(crate) prompt_scores: Vec<SampledToken>,
    /// What the latest event added.
    pub(crate) delta: Delta,
}

/// What one engine event added to an answer.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    /// May be empty: half a character, or the beginning of a stop string, is held back.
    pub(crate) text: String,
    /// The token that was generated; none when there was nothing to generate.
    pub(crate) token: Option<TokenId>,
    /// In order; each token exactly once.
    pub(crate) logprobs: Vec<LogprobEntry>,
    /// Calls of functions, piece by piece; never text.
    pub(crate) calls: Vec<CallEvent>,
    /// The answer is complete.
    pub(crate) finish: Option<Finish>,
}

/// A token of which log-probabilities were asked for.
#[derive(Debug)]
pub(crate) struct LogprobEntry {
    /// The sampled token.
    pub(crate) token: TokenId,
    /// Its own and the best ones.
    pub(crate) logprobs: Box<TokenLogprobs>,
    /// Characters of the answer before it.
    pub(crate) text_offset: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// At the model's end-of-sequence token.
    Eos,
    /// At another stop token.
    StopToken(TokenId),
    /// At this stop string.
    StopString(usize),
    /// At `max_tokens`.
    Length,
    /// After calls of functions.
    ToolCalls,
}

impl Generation {
    /// Refuses for good what [`submit`](Self::submit) could never do, before anything is made for each answer.
    pub(crate) fn check(
        state: &AppState,
        model: &ServedModel,
        prompts: &[Arc<[TokenId]>],
        params: &Params,
    ) -> Result<(), ApiError> {
        check_fits_queue(model, prompts, params.n)?;
        check_scores(prompts, params, state.limits.max_scored_logprobs)
    }

    /// Submits everything to the engine. If one sequence is refused, those before it are aborted with it.
    pub(crate) fn submit(
        state: &AppState,
        model: &ServedModel,
        prompts: Vec<Arc<[TokenId]>>,
        params: &Params,
        admission: Admission,
    ) -> Result<Self, ApiError> {
        let Admission {
            deadlines,
            arrival,
            constraints,
        } = admission;
        let mut constraints = constraints.into_iter();
        let mut choices = Vec::with_capacity(prompts.len() * params.n as usize);
        let mut usages = Vec::with_capacity(prompts.len());
        for (prompt_index, tokens) in prompts.into_iter().enumerate() {
            let prompt = PromptUsage {
                tokens,
                num_cached_tokens: None,
            };
            let room = model.max_model_len - prompt.num_tokens();
            // Only a default can exceed the room here: what a client names was checked.
            let max_tokens = params.max_tokens.map_or(room, |max_tokens| max_tokens.min(room));
            for choice in 0..params.n {
                let seed = params.seed_of(u32::try_from(prompt_index).unwrap_or(u32::MAX), choice);
                let request = Request {
                    constraint: constraints.next().map(|constraint| Box::new(constraint) as _),
                    deadline: deadlines.answer,
                    queue_deadline: deadlines.queue,
                    ..request_of(&prompt.tokens, params, seed, max_tokens)
                };
                let submitted = Instant::now();
                // With `echo`, nothing at all may be asked for.
                let stream = match max_tokens == 0 && request.num_scores() == 0 {
                    true => None,
                    false => Some(
                        model
                            .engine
                            .submit(request)
                            .map_err(|error| ApiError::refused(&error, &model.engine.stats()))?,
                    ),
                };
                choices.push(Choice::new(prompt_index, stream, model, params, max_tokens, submitted));
            }
            usages.push(prompt);
        }
        let num_unfinished = choices.len();
        Ok(Self {
            choices,
            prompts: usages,
            state: state.clone(),
            record: None,
            arrival,
            next: 0,
            num_unfinished,
            has_failed: false,
        })
    }

    /// Counts what is used for a request too.
    pub(crate) fn count_for(&mut self, record: &Arc<RequestRecord>) {
        self.record = Some(Arc::clone(record));
    }

    /// The next choice that has something new in its [`Choice::delta`]; `None` when all are finished. Not to be called
    /// again after an error: one lost answer fails the request.
    ///
    /// A delta stays until its choice comes up again.
    pub(crate) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<usize, EngineError>>> {
        if self.num_unfinished == 0 {
            return Poll::Ready(None);
        }
        for _ in 0..self.choices.len() {
            let index = self.next;
            self.next = (index + 1) % self.choices.len();
            let choice = &mut self.choices[index];
            if choice.is_finished() {
                continue;
            }
            match choice.poll(context) {
                Poll::Pending => {}
                Poll::Ready(Ok(event)) => {
                    self.count(index, event);
                    return Poll::Ready(Some(Ok(index)));
                }
                Poll::Ready(Err(error)) => {
                    self.has_failed = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Pending
    }

    /// One of the answers.
    pub(crate) fn choice(&self, index: usize) -> &Choice {
        &self.choices[index]
    }

    /// The prompt that an answer continues.
    pub(crate) fn prompt_of(&self, index: usize) -> &[TokenId] {
        &self.prompts[self.choices[index].prompt_index].tokens
    }

    /// How many answers there will be.
    pub(crate) fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// What was used so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompts.iter().map(PromptUsage::num_tokens).sum(),
            completion_tokens: self.choices.iter().map(|choice| choice.num_tokens).sum(),
            cached_tokens: self.prompts.iter().filter_map(|prompt| prompt.num_cached_tokens).sum(),
        }
    }

    /// How long it took so far.
    pub(crate) fn timings(&self) -> Timings {
        let first_token = self.choices.iter().filter_map(|choice| choice.first_token).min();
        let Some(first_token) = first_token else {
            return Timings::default();
        };
        let scheduled = self
            .choices
            .iter()
            .map(|choice| choice.submitted + choice.queue_time)
            .min();
        let scheduled = scheduled.unwrap_or(self.arrival);
        let last_token = self
            .choices
            .iter()
            .map(|choice| choice.last_token)
            .max()
            .unwrap_or(first_token);
        let generation = last_token.saturating_duration_since(scheduled);
        let later = |choice: &Choice| {
            choice
                .first_token
                .map(|first| (choice.last_token - first, choice.num_tokens - 1))
        };
        let (spans, num_spans) = self
            .choices
            .iter()
            .filter_map(later)
            .fold((Duration::ZERO, 0), |(spans, num_spans), (span, count)| {
                (spans + span, num_spans + count)
            });
        let num_tokens = f64::from(self.usage().completion_tokens);
        Timings {
            to_first_token: Some(first_token - self.arrival),
            generation: Some(generation),
            queue: Some(scheduled - self.arrival),
            mean_inter_token: (num_spans > 0).then(|| spans / num_spans),
            tokens_per_second: (!generation.is_zero()).then(|| num_tokens / generation.as_secs_f64()),
        }
    }

    /// Whether some answer was cut off at `max_tokens`.
    pub(crate) fn was_cut_off(&self) -> bool {
        self.choices
            .iter()
            .any(|choice| choice.delta.finish == Some(Finish::Length))
    }

    /// Keeps the metrics: every generated token passes here.
    fn count(&mut self, index: usize, event: Arrived) {
        let metrics = &self.state.metrics;
        let choice = &self.choices[index];
        let prompt = &mut self.prompts[choice.prompt_index];
        if prompt.num_cached_tokens.is_none() {
            prompt.num_cached_tokens = Some(event.num_cached_tokens);
            metrics.prompt_tokens(prompt.num_tokens(), event.num_cached_tokens);
            if let Some(record) = &self.record {
                record.prompt(prompt.num_tokens(), event.num_cached_tokens);
            }
        }
        if let Some(record) = self.record.as_ref().filter(|_| choice.num_tokens > 0) {
            record.token();
        }
        match event.since_last {
            _ if choice.num_tokens == 0 => {}
            None => metrics.first_token(choice.last_token - self.arrival),
            Some(since_last) => metrics.next_token(since_last),
        }
        let Some(finish) = choice.delta.finish else { return };
        self.num_unfinished -= 1;
        metrics.sequence_finished(&FinishedSequence {
            end: if finish == Finish::Length {
                SequenceEnd::Length
            } else {
                SequenceEnd::Stop
            },
            prompt_tokens: prompt.num_tokens(),
            cached_tokens: event.num_cached_tokens,
            generated_tokens: choice.num_tokens,
            max_tokens: choice.max_tokens,
            arrival: self.arrival,
            scheduled: choice.submitted + choice.queue_time,
            queue_time: choice.queue_time,
            first_token: choice.first_token,
            last_token: choice.last_token,
        });
        let mut siblings = self
            .choices
            .iter()
            .filter(|other| other.prompt_index == choice.prompt_index);
        let longest = siblings.try_fold(0, |longest, other| {
            other.is_finished().then_some(longest.max(other.num_tokens))
        });
        if let Some(longest) = longest {
            metrics.prompt_finished(longest);
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            record.time(self.timings());
            for prompt in self.prompts.iter().filter(|prompt| prompt.num_cached_tokens.is_none()) {
                record.unanswered_prompt(prompt.num_tokens());
            }
        }
        let end = if self.has_failed {
            SequenceEnd::Error
        } else {
            SequenceEnd::Abort
        };
        self.state.metrics.sequences_lost(end, self.num_unfinished);
    }
}

/// What [`Generation::count`] needs to know of an event.
#[derive(Debug, Clone, Copy)]
struct Arrived {
    num_cached_tokens: u32,
    since_last: Option<Duration>,
}

impl Choice {
    fn new(
        prompt_index: usize,
        stream: Option<TokenStream>,
        model: &ServedModel,
        params: &Params,
        max_tokens: u32,
        submitted: Instant,
    ) -> Self {
        let tokenizer = &model.tokenizer;
        Self {
            prompt_index,
            stream,
            tokenizer: Arc::clone(tokenizer),
            detokenizer: Detokenizer::new(tokenizer, params.skip_special_tokens),
            stop: params.stop.clone(),
            include_stop: params.include_stop,
            eos_token_id: params.eos_is_silent.then_some(model.eos_token_id),
            fresh: String::new(),
            num_chars: 0,
            held: VecDeque::new(),
            num_tokens: 0,
            max_tokens,
            submitted,
            first_token: None,
            last_token: submitted,
            queue_time: Duration::ZERO,
            calls: params.tools.is_some().then(CallReader::default),
            prompt_scores: Vec::new(),
            delta: Delta::default(),
        }
    }

    /// The prompt it answers.
    pub(crate) fn prompt_index(&self) -> usize {
        self.prompt_index
    }

    fn is_finished(&self) -> bool {
        self.delta.finish.is_some()
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Arrived, EngineError>> {
        self.delta.text.clear();
        self.delta.logprobs.clear();
        self.delta.calls.clear();
        self.delta.token = None;
        let Some(stream) = &mut self.stream else {
            self.delta.finish = Some(Finish::Length);
            return Poll::Ready(Ok(Arrived {
                num_cached_tokens: 0,
                since_last: None,
            }));
        };
        loop {
            let arrived = match ready!(stream.poll_recv(context)) {
                Some(Ok(event)) if event.is_prompt => {
                    self.prompt_scores.push(event.sampled);
                    if event.finish.is_none() {
                        continue;
                    }
                    // There is nothing to generate.
                    self.queue_time = event.queue_time;
                    self.delta.finish = Some(Finish::Length);
                    Arrived {
                        num_cached_tokens: event.num_cached_tokens,
                        since_last: None,
                    }
                }
                Some(Ok(event)) => self.take(event),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => unreachable!("a stream's last item finishes the choice, which is not polled again"),
            };
            if self.is_finished() {
                self.stream = None;
            }
            return Poll::Ready(Ok(arrived));
        }
    }

    fn take(&mut self, event: TokenEvent) -> Arrived {
        // Not when it was fetched: a client that does not read is no slow engine.
        let sampled_at = event.sampled_at;
        let since_last = self
            .first_token
            .map(|_| sampled_at.saturating_duration_since(self.last_token));
        self.first_token.get_or_insert(sampled_at);
        self.last_token = sampled_at;
        self.queue_time = event.queue_time;
        self.num_tokens += 1;
        let token = event.sampled.token;
        self.delta.token = Some(token);
        if let Some(logprobs) = event.sampled.logprobs {
            self.held.push_back(LogprobEntry {
                token,
                logprobs,
                text_offset: 0,
            });
        }
        self.fresh.clear();
        // A stop token is no part of the answer unless the client wants it to be.
        let is_stop = matches!(event.finish, Some(FinishReason::Stop(_)));
        let mut num_settled = match is_stop && !self.include_stop {
            true => 0,
            false => self.detokenizer.push(token, &mut self.fresh),
        };
        if event.finish.is_some() {
            self.detokenizer.finish(&mut self.fresh);
            num_settled = self.held.len();
        }
        self.settle(num_settled);
        self.delta.finish = match self.stop.push(&self.fresh, &mut self.delta.text) {
            Some(index) => Some(Finish::StopString(index)),
            None => event.finish.map(|finish| match finish {
                FinishReason::Length => Finish::Length,
                FinishReason::Stop(token) if Some(token) == self.eos_token_id => Finish::Eos,
                FinishReason::Stop(token) => Finish::StopToken(token),
            }),
        };
        match self.delta.finish {
            Some(Finish::StopString(_)) => self.settle_rest(),
            Some(_) => self.stop.finish(&mut self.delta.text),
            None => {}
        }
        self.read_calls();
        Arrived {
            num_cached_tokens: event.num_cached_tokens,
            since_last,
        }
    }

    /// Tells calls of functions from text.
    fn read_calls(&mut self) {
        let Some(reader) = &mut self.calls else { return };
        let Delta {
            text, calls, finish, ..
        } = &mut self.delta;
        reader.push(&std::mem::take(text), calls);
        if finish.is_some() {
            reader.finish(calls);
        }
        calls.retain(|event| match event {
            CallEvent::Text(more) => {
                text.push_str(more);
                false
            }
            CallEvent::Call(_) | CallEvent::Arguments(_) => true,
        });
        if reader.num_calls() > 0 && matches!(finish, Some(Finish::Eos | Finish::StopToken(_))) {
            *finish = Some(Finish::ToolCalls);
        }
    }

    /// Moves the oldest held tokens, whose text is `fresh`, to the delta.
    fn settle(&mut self, num_settled: usize) {
        if !self.held.is_empty() {
            let mut num_bytes = 0;
            for mut entry in self.held.drain(..num_settled.min(self.held.len())) {
                let before = self.fresh.floor_char_boundary(num_bytes.min(self.fresh.len()));
                entry.text_offset = self.num_chars + self.fresh[..before].chars().count();
                num_bytes += self.tokenizer.token_bytes(entry.token).map_or(0, |bytes| bytes.len());
                self.delta.logprobs.push(entry);
            }
            self.num_chars += self.fresh.chars().count();
        }
    }

    /// A stop string ended the answer: tokens whose text would have come later still were generated.
    fn settle_rest(&mut self) {
        for mut entry in self.held.drain(..) {
            entry.text_offset = self.num_chars;
            self.delta.logprobs.push(entry);
        }
    }
}

/// One sequence; the caller knows its deadlines.
fn request_of(prompt: &Arc<[TokenId]>, params: &Params, seed: u64, max_tokens: u32) -> Request {
    let sampling = SamplingParams {
        seed,
        ..params.sampling.clone()
    };
    Request {
        constraint: None,
        prompt: Arc::clone(prompt),
        sampling: Arc::new(sampling),
        stop: StopCriteria {
            max_tokens,
            min_tokens: params.min_tokens.min(max_tokens),
            stop_token_ids: Arc::clone(&params.stop_token_ids),
        },
        prompt_logprobs: params.scores(),
        priority: params.priority,
        cache_salt: params.cache_salt,
        deadline: None,
        queue_deadline: None,
    }
}

/// Refuses to keep more log-probabilities of prompts than an answer can hold.
fn check_scores(prompts: &[Arc<[TokenId]>], params: &Params, limit: u64) -> Result<(), ApiError> {
    let Some(num_alternatives) = params.scores() else {
        return Ok(());
    };
    let num_tokens: u64 = prompts.iter().map(|prompt| prompt.len() as u64).sum();
    let num_logprobs = num_tokens * u64::from(params.n) * (1 + u64::from(num_alternatives));
    if num_logprobs <= limit {
        return Ok(());
    }
    let message = format!(
        "The prompts would have {num_logprobs} log-probabilities in all; the limit is {limit}. Please send \
         fewer prompts in a request, or ask for fewer alternatives."
    );
    Err(ApiError::invalid("prompt_logprobs", message))
}

/// Refuses for good what could never wait in the queue all at once: a 429 would be retried forever.
fn check_fits_queue(model: &ServedModel, prompts: &[Arc<[TokenId]>], n: u32) -> Result<(), ApiError> {
    let config = model.engine.config();
    let num_sequences = prompts.len() as u64 * u64::from(n);
    let num_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum::<u64>() * u64::from(n);
    if num_sequences <= 1
        || (num_sequences <= u64::from(config.max_queued_requests) && num_tokens <= config.max_queued_tokens)
    {
        return Ok(());
    }
    let message = format!(
        "{num_sequences} answers to {num_tokens} prompt tokens in all can never be queued at once: this server queues at \
         most {} requests and {} prompt tokens. Please send fewer in a request.",
        config.max_queued_requests, config.max_queued_tokens
    );
    Err(ApiError::invalid("n", message))
}
