//! From a client's grammar to what an answer is held to: compiled off the async threads, within limits.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lapidary_engine::TokenId;
use lapidary_text::{Grammar, GrammarCompiler, GrammarError, GrammarState, Tokenizer};
use tokio::sync::Semaphore;

use crate::error::ApiError;

/// A grammar that takes longer is refused. Its compilation goes on to its own limits and holds its place until then. A
/// request waits as long for a place before it is sent away.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(5);

/// Grammars compiled at the same time; more wait. Whoever sends hostile ones slows other grammars down, not other requests:
/// two at a time would take twice as much of a busy machine.
const MAX_COMPILING: usize = 1;

/// The grammars of one model.
#[derive(Debug)]
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab_size: u32,
    stop_token_ids: Arc<[TokenId]>,
    /// Made by whoever needs it first: it takes a second for a large vocabulary.
    compiler: OnceLock<Result<GrammarCompiler, GrammarError>>,
    places: Arc<Semaphore>,
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

    /// Compiles a grammar that came as `param`; `what` begins the message if it cannot be used.
    pub(crate) async fn compile(
        self: &Arc<Self>,
        grammar: Grammar,
        param: &str,
        what: &str,
    ) -> Result<GrammarState, ApiError> {
        let internal = |error: &(dyn std::error::Error + 'static)| {
            tracing::error!(error, "grammars cannot be compiled");
            ApiError::Internal { is_deterministic: true }
        };
        let place = Arc::clone(&self.places).acquire_owned();
        let place = tokio::time::timeout(COMPILE_TIMEOUT, place)
            .await
            .map_err(|_elapsed| ApiError::QueueFull {
                message: "The server is overloaded: too many grammars wait to be compiled.".to_owned(),
                retry_after: COMPILE_TIMEOUT,
            })?;
        let this = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let compiled = this.compiler().and_then(|compiler| compiler.compile(&grammar));
            drop(place);
            compiled
        });
        match tokio::time::timeout(COMPILE_TIMEOUT, work).await {
            Ok(Ok(Ok(state))) => Ok(state),
            Ok(Ok(Err(error @ GrammarError::Vocabulary { .. }))) => Err(internal(&error)),
            Ok(Ok(Err(error))) => Err(ApiError::invalid(param.to_owned(), format!("{what}: {error}."))),
            Ok(Err(panicked)) => Err(internal(&panicked)),
            Err(_elapsed) => {
                let seconds = COMPILE_TIMEOUT.as_secs();
                let message = format!("{what}: it takes more than {seconds} seconds to compile.");
                Err(ApiError::invalid(param.to_owned(), message))
            }
        }
    }

    fn compiler(&self) -> Result<&GrammarCompiler, GrammarError> {
        let make = || GrammarCompiler::new(&self.tokenizer, self.vocab_size as usize, &self.stop_token_ids);
        self.compiler.get_or_init(make).as_ref().map_err(Clone::clone)
    }
}
