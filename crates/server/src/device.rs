//! Which device the model runs on. The only place that knows which backends this program was built with.

use std::time::Duration;

use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_engine::{Engine, EngineConfig, EngineHandle, SpawnError};
use lapidary_model::RunnerError;

use crate::cli::DeviceSetting;
use crate::load::{StartError, StartRunner};

/// Where the model runs, found out before anything is loaded.
#[derive(Debug)]
pub(crate) enum Device {
    /// This machine's cores.
    Cpu(CpuConfig),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(lapidary_cuda::DeviceInfo, lapidary_cuda::CudaConfig),
}

/// What is asked of [`Device::choose`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceChoice {
    pub(crate) setting: DeviceSetting,
    /// Threads of a CPU; `None` takes all.
    pub(crate) threads: Option<usize>,
    /// Whether a GPU records its steps once and replays them.
    pub(crate) record_steps: bool,
}

/// A device that was asked for by name and is not there.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No GPU to run on.
    #[cfg(feature = "cuda")]
    #[error("--device cuda: {0}")]
    Unavailable(#[from] lapidary_cuda::Unavailable),
    /// A program without the CUDA backend.
    #[cfg(not(feature = "cuda"))]
    #[error("--device cuda: this program was built without CUDA support")]
    NotBuilt,
}

impl Device {
    /// `auto` takes the first GPU that the kernels run on, else the CPU, and says why in one line.
    pub(crate) fn choose(choice: DeviceChoice) -> Result<Self, DeviceError> {
        match choice.setting {
            DeviceSetting::Cpu => Ok(Self::cpu(choice)),
            DeviceSetting::Cuda => Self::gpu(choice),
            DeviceSetting::Auto => Ok(Self::gpu(choice).unwrap_or_else(|error| {
                let why = error.to_string();
                tracing::info!("running on the CPU: {}", why.trim_start_matches("--device cuda: "));
                Self::cpu(choice)
            })),
        }
    }

    fn cpu(choice: DeviceChoice) -> Self {
        let mut config = CpuConfig::default();
        config.threads = choice.threads.unwrap_or(config.threads);
        Self::Cpu(config)
    }

    #[cfg(feature = "cuda")]
    fn gpu(choice: DeviceChoice) -> Result<Self, DeviceError> {
        let device = lapidary_cuda::devices()?.swap_remove(0);
        tracing::info!(device = device.name, "running on a GPU");
        let config = lapidary_cuda::CudaConfig {
            graphs: choice.record_steps,
        };
        Ok(Self::Cuda(device, config))
    }

    #[cfg(not(feature = "cuda"))]
    fn gpu(_: DeviceChoice) -> Result<Self, DeviceError> {
        Err(DeviceError::NotBuilt)
    }

    /// Alternatives that a token can be reported with; `None`: as many as asked for.
    pub(crate) fn max_logprobs(&self) -> Option<u32> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => Some(lapidary_cuda::MAX_LOGPROBS),
        }
    }

    /// For fingerprints and logs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Cpu(_) => "cpu",
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => "cuda",
        }
    }

    /// As its maker calls it.
    pub(crate) fn full_name(&self) -> String {
        match self {
            Self::Cpu(_) => self.name().to_owned(),
            #[cfg(feature = "cuda")]
            Self::Cuda(info, _) => info.name.clone(),
        }
    }

    /// Whether the device's memory is there for the model alone.
    pub(crate) fn owns_its_memory(&self) -> bool {
        match self {
            Self::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => true,
        }
    }

    /// Sequences and tokens of a step where nothing else is said: a GPU's steps cost the same up to hundreds of tokens, a
    /// CPU's grow with every one.
    pub(crate) fn default_batch(&self) -> (u32, u32) {
        match self {
            Self::Cpu(_) => (64, 512),
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => (256, 4096),
        }
    }

    /// After which a step is taken for one that hangs, where nothing else is said. The largest step of a GPU takes a few
    /// seconds; nobody knows what that of a CPU takes.
    pub(crate) fn default_step_timeout(&self) -> Option<Duration> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => Some(Duration::from_secs(60)),
        }
    }

    /// After which probes say that a step is stuck. That of a large model on a few CPU cores takes minutes without being so.
    pub(crate) fn stall_limit(&self) -> Option<Duration> {
        match self {
            Self::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Self::Cuda(..) => Some(Duration::from_secs(120)),
        }
    }

    /// Starts the engine on this device: the runner is built on the engine's thread, where it stays.
    pub(crate) fn spawn(
        self,
        config: EngineConfig,
        start: StartRunner,
    ) -> Result<EngineHandle, SpawnError<StartError>> {
        match self {
            Self::Cpu(cpu) => Engine::spawn(config, move || start.run(Cpu::new(cpu).map_err(RunnerError::from)?)),
            #[cfg(feature = "cuda")]
            Self::Cuda(info, cuda) => Engine::spawn(config, move || {
                let backend = lapidary_cuda::Cuda::open(info, cuda).map_err(RunnerError::from)?;
                start.run(backend)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_a_cpu_may_take_as_long_as_it_takes() {
        let device = Device::cpu(DeviceChoice {
            setting: DeviceSetting::Cpu,
            threads: Some(1),
            record_steps: false,
        });
        assert_eq!((device.stall_limit(), device.default_step_timeout()), (None, None));
    }
}
