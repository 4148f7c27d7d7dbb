//! From a client's grammar to what an answer is held to: compiled off the async threads, within limits.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lapidary_engine::TokenId;
use lapidary_text::{Grammar, GrammarCompiler, GrammarError, GrammarState, ThreadClock, Tokenizer};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::error::ApiError;

/// A grammar whose compiler has computed for longer is refused, and that is the grammar's fault: time in which the machine
/// did something else does not count. Its compilation goes on to its own limits and holds its place until then.
const COMPILE_LIMIT: Duration = Duration::from_secs(5);

/// How long a request waits for its grammar on a machine that is too busy to compile it, before it is sent away.
const COMPILE_PATIENCE: Duration = Duration::from_secs(30);

/// How long a request waits until its grammar is the next to be compiled, before it is sent away.
const PLACE_PATIENCE: Duration = Duration::from_secs(5);

/// How often a compiler's clock is looked at that should be about to reach the limit.
const CLOCK_RESOLUTION: Duration = Duration::from_millis(10);

/// Grammars compiled at the same time; more wait. Whoever sends hostile ones slows other grammars down, not other requests:
/// two at a time would take twice as much of a busy machine.
const MAX_COMPILING: usize = 1;

/// What compiling a grammar may take.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// CPU time.
    compile: Duration,
    patience: Duration,
    place: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            compile: COMPILE_LIMIT,
            patience: COMPILE_PATIENCE,
            place: PLACE_PATIENCE,
        }
    }
}

impl Limits {
    fn overloaded(&self, why: &str) -> ApiError {
        ApiError::QueueFull {
            message: format!("The server is overloaded: {why}."),
            retry_after: self.place,
        }
    }
}

/// The grammars of one model.
#[derive(Debug)]
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab_size: u32,
    stop_token_ids: Arc<[TokenId]>,
    /// Made by whoever needs it first: it takes a second for a large vocabulary.
    compiler: OnceLock<Result<GrammarCompiler, GrammarError>>,
    places: Arc<Semaphore>,
    limits: Limits,
}

impl Grammars {
    /// Grammars whose texts end with one of `stop_token_ids`.
    #[must_use]
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: u32, stop_token_ids: Arc<[TokenId]>) -> Arc<Self> {
        Arc::new(Self {
            tokenizer,
            vocab_size,
            stop_token_ids,
            compiler: OnceLock::new(),
            places: Arc::new(Semaphore::new(MAX_COMPILING)),
            limits: Limits::default(),
        })
    }

    /// Indexes the vocabulary in the background, so that no request has to wait for it.
    pub fn warm_up(self: &Arc<Self>) {
        let this = Arc::clone(self);
        let thread = std::thread::Builder::new().name("grammars".to_owned());
        if let Err(error) = thread.spawn(move || this.compiler().is_ok()) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "no thread to index the vocabulary"
            );
        }
    }

    /// Makes a grammar from what came as `param`, and whatever else comes of that, once it is the next to be compiled:
    /// until then there is only its text. `what` begins the message if it cannot be used.
    pub(crate) async fn compile<T: Send + 'static>(
        self: &Arc<Self>,
        make: impl FnOnce() -> Result<(Grammar, T), GrammarError> + Send + 'static,
        param: &str,
        what: &str,
    ) -> Result<(GrammarState, T), ApiError> {
        let place = Arc::clone(&self.places).acquire_owned();
        let Ok(place) = timeout(self.limits.place, place).await else {
            return Err(self.limits.overloaded("too many grammars wait to be compiled"));
        };
        let clock = Arc::new(ThreadClock::default());
        let (this, timed) = (Arc::clone(self), Arc::clone(&clock));
        let work = tokio::task::spawn_blocking(move || {
            let compile = || {
                let (grammar, made) = make()?;
                let compiled = this.compiler()?.compile_timed(&grammar, &timed)?;
                Ok((compiled, made))
            };
            let compiled = compile();
            drop(place);
            compiled
        });
        let invalid = |reason: fmt::Arguments<'_>| ApiError::invalid(param.to_owned(), format!("{what}: {reason}."));
        tokio::select! {
            biased;
            compiled = work => match compiled {
                Ok(Ok(compiled)) => Ok(compiled),
                Ok(Err(error @ GrammarError::Vocabulary { .. })) => Err(internal(&error)),
                Ok(Err(error)) => Err(invalid(format_args!("{error}"))),
                Err(panicked) => Err(internal(&panicked)),
            },
            () = reaches(&clock, self.limits.compile) => {
                let seconds = self.limits.compile.as_secs();
                Err(invalid(format_args!("it takes more than {seconds} seconds to compile")))
            }
            () = sleep(self.limits.patience) => Err(self.limits.overloaded("its CPUs have no time to compile the grammar")),
        }
    }

    fn compiler(&self) -> Result<&GrammarCompiler, GrammarError> {
        let make = || GrammarCompiler::new(&self.tokenizer, self.vocab_size as usize, &self.stop_token_ids);
        self.compiler.get_or_init(make).as_ref().map_err(Clone::clone)
    }
}

/// Returns when `clock` shows `limit`.
async fn reaches(clock: &ThreadClock, limit: Duration) {
    loop {
        // It can't be there any sooner.
        let left = limit.saturating_sub(clock.used());
        if left.is_zero() {
            return;
        }
        sleep(left.max(CLOCK_RESOLUTION)).await;
    }
}

fn internal(error: &(dyn std::error::Error + 'static)) -> ApiError {
    tracing::error!(error, "grammars cannot be compiled");
    ApiError::Internal { is_deterministic: true }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::{Sender, channel};
    use std::thread;

    use super::*;

    /// Nothing here takes as long, unless it is broken.
    const LONG: Duration = Duration::from_secs(60);

    fn grammars(limits: Limits) -> Arc<Grammars> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/tests/tiny");
        let tokenizer = Arc::new(Tokenizer::load(&folder).unwrap());
        let vocab_size = u32::try_from(tokenizer.vocab_size()).unwrap();
        let grammars = Grammars::new(tokenizer, vocab_size, Arc::from([1]));
        Arc::new(Grammars {
            limits,
            ..Arc::into_inner(grammars).unwrap()
        })
    }

    /// Nothing is compiled until what is returned is dropped.
    fn stop_compiling(grammars: &Arc<Grammars>) -> Sender<()> {
        let (go_on, goes_on) = channel();
        let (stopped, has_stopped) = channel();
        let this = Arc::clone(grammars);
        thread::spawn(move || {
            this.compiler.get_or_init(|| {
                stopped.send(()).unwrap();
                let _ = goes_on.recv();
                GrammarCompiler::new(&this.tokenizer, this.vocab_size as usize, &this.stop_token_ids)
            });
        });
        has_stopped.recv().unwrap();
        go_on
    }

    async fn compile(grammars: &Arc<Grammars>) -> Result<GrammarState, ApiError> {
        let make = || Ok((Grammar::Regex("ab".to_owned()), ()));
        let compiled = grammars.compile(make, "guided_regex", "Invalid expression").await;
        compiled.map(|(state, ())| state)
    }

    #[tokio::test]
    async fn a_busy_machine_is_not_the_grammars_fault() {
        let grammars = grammars(Limits {
            compile: LONG,
            patience: Duration::from_millis(1),
            place: LONG,
        });
        let stopped = stop_compiling(&grammars);
        let refused = compile(&grammars).await.unwrap_err();
        assert_eq!(refused.status().as_u16(), 429, "{refused}");
        drop(stopped);
    }

    #[tokio::test]
    async fn a_grammar_that_takes_long_to_compile_is_refused_by_its_name() {
        let grammars = grammars(Limits {
            compile: Duration::ZERO,
            patience: LONG,
            place: LONG,
        });
        let stopped = stop_compiling(&grammars);
        let refused = compile(&grammars).await.unwrap_err();
        assert_eq!(refused.status().as_u16(), 400);
        let message = refused.to_string();
        assert_eq!(message, "Invalid expression: it takes more than 0 seconds to compile.");
        drop(stopped);
    }

    #[tokio::test]
    async fn who_finds_no_place_is_sent_away() {
        let grammars = grammars(Limits {
            compile: LONG,
            patience: LONG,
            place: Duration::from_millis(1),
        });
        let place = grammars.places.acquire().await.unwrap();
        assert_eq!(compile(&grammars).await.unwrap_err().status().as_u16(), 429);
        drop(place);
        compile(&grammars).await.unwrap();
    }
}
