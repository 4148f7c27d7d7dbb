//! The engine thread: owns scheduler and executor, and is the only place where time, callers and the device meet.

use std::marker::PhantomData;

use crate::error::SpawnError;
use crate::{EngineConfig, EngineHandle, Executor};

/// Runs an executor on a thread of its own; see [`Engine::spawn`].
#[derive(Debug)]
pub struct Engine<E>(PhantomData<E>);

impl<E: Executor> Engine<E> {
    /// Starts the engine thread, has it build its executor, and returns once that is ready.
    ///
    /// The executor is built on the thread that runs it since device state (CUDA graphs) may not move between threads.
    ///
    /// # Errors
    /// [`SpawnError::Build`] with the error of `build`, or the thread did not start.
    pub fn spawn<Err>(
        _config: EngineConfig,
        _build: impl FnOnce() -> Result<E, Err> + Send + 'static,
    ) -> Result<EngineHandle, SpawnError<Err>>
    where
        Err: std::error::Error + Send + 'static,
    {
        todo!()
    }
}
