//! From a model's name to a running engine: fetch, open, check, upload, warm up.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lapidary_engine::{EngineConfig, EngineHandle, SpawnError, TokenId};
use lapidary_model::{
    Backend, Checkpoint, CheckpointError, ConfigOverrides, KvCacheSize, LoadPhase, ModelRunner, RunnerConfig,
    RunnerError,
};
use lapidary_text::{ChatTemplate, SystemRole, TemplateError, Tokenizer, TokenizerError};

use crate::cli::{GenerationConfigSource, SystemRoleSetting};
use crate::config::{Config, LoadConfig, ModelSource, SchedulingConfig};
use crate::demo;
use crate::device::{Device, DeviceChoice, DeviceError};
use crate::fingerprint::fingerprint;
use crate::grammar::Grammars;
use crate::hub::{self, HubError};
use crate::lifecycle::Phase;
use crate::memory_plan::{self, Shortage};
use crate::progress::Progress;
use crate::state::{AppState, SamplingDefaults, ServedModel};

/// Length of an answer with its prompt that the KV cache is sized for when nothing else is said: chats are rarely longer.
const TYPICAL_SEQUENCE_TOKENS: u64 = 2048;
/// The same of the demo model, which answers short questions.
const DEMO_SEQUENCE_TOKENS: u64 = 256;
/// Run once before the first request; any text would do.
const WARM_UP_TEXT: &str = "The lapidary cut the stone, and the light came through.";

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be downloaded.
    #[error("cannot get the model from the hub")]
    Hub(#[from] HubError),
    /// Its files cannot be used.
    #[error("cannot open the checkpoint")]
    Checkpoint(#[from] CheckpointError),
    /// It has no tokenizer.
    #[error("the checkpoint has no tokenizer.json")]
    NoTokenizer,
    /// Its tokenizer cannot be used.
    #[error("cannot use the checkpoint's tokenizer")]
    Tokenizer(#[from] TokenizerError),
    /// The tokenizer belongs to another model.
    #[error(
        "the tokenizer has {tokenizer} tokens and the embedding table only {embedding} rows: they belong to different \
         models"
    )]
    VocabularyMismatch {
        /// Tokens.
        tokenizer: usize,
        /// Rows.
        embedding: usize,
    },
    /// The checkpoint's chat template cannot be used.
    #[error("cannot use the checkpoint's chat template (--chat-template gives another)")]
    ChatTemplate(#[source] TemplateError),
    /// The file of `--chat-template` cannot be used.
    #[error("cannot use the chat template {}", path.display())]
    OwnChatTemplate {
        /// Of the flag.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing says when an answer ends.
    #[error("neither config.json, generation_config.json nor the tokenizer names an end-of-sequence token")]
    NoEndOfSequence,
    /// The device that was asked for is not there.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// More alternatives than the device reports.
    #[error("--max-logprobs {asked}: this device reports {most} at most")]
    MaxLogprobs {
        /// Configured.
        asked: u32,
        /// What there is.
        most: u32,
    },
    /// The engine's executor cannot be built.
    #[error(transparent)]
    Start(StartError),
    /// The engine did not start.
    #[error("cannot start the engine")]
    Engine(#[source] SpawnError<StartError>),
}

/// Why the engine's executor cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Too little memory.
    #[error("{0}")]
    Memory(Box<Shortage>),
    /// Weights or the device.
    #[error(transparent)]
    Runner(#[from] RunnerError),
    /// The model is loaded and computes nonsense.
    #[error(
        "a first forward pass gave {count} values that are no numbers: weights or scales of this checkpoint are damaged"
    )]
    NotFinite {
        /// NaN or infinite logits.
        count: usize,
    },
}

/// Loads the model that `config` names and starts its engine. Blocks for as long as that takes.
///
/// # Errors
/// See [`LoadError`].
pub fn load(config: &Config, state: &AppState) -> Result<ServedModel, LoadError> {
    let device = Device::choose(DeviceChoice {
        setting: config.load.device,
        threads: config.load.threads,
        record_steps: !config.scheduling.enforce_eager,
    })?;
    check_logprobs(config.limits.max_logprobs, device.max_logprobs())?;
    let checkpoint = open(config, state)?;
    let tokenizer = Arc::new(load_tokenizer(&checkpoint)?);
    let chat_template = load_chat_template(&config.load, &checkpoint, &tokenizer)?;
    let stop_token_ids: Arc<[TokenId]> = stop_token_ids(&checkpoint, &tokenizer).into();
    let eos_token_id = primary_eos(&checkpoint, &tokenizer).ok_or(LoadError::NoEndOfSequence)?;
    let defaults = match config.load.generation_config {
        GenerationConfigSource::Auto => sampling_defaults(&checkpoint),
        GenerationConfigSource::Vllm => SamplingDefaults::default(),
    };
    let vocab_size = checkpoint.config().vocab_size as u32;
    let kv_cache_dtype = config.scheduling.kv_cache_dtype;
    let system_fingerprint = fingerprint(
        &checkpoint,
        config.load.query_pre_attn_scalar,
        kv_cache_dtype.dtype(),
        device.name(),
    )?;
    let (device_name, stall_limit) = (device.full_name(), device.stall_limit());
    let grammars = Grammars::new(Arc::clone(&tokenizer), vocab_size, Arc::clone(&stop_token_ids));
    // While the weights are read.
    grammars.warm_up();
    let warm_up = tokenizer.encode(WARM_UP_TEXT, true)?;
    let engine = start_engine(config, state, device, checkpoint, warm_up)?;
    Ok(ServedModel {
        names: config.load.names.clone(),
        root: config.settings.model.clone().unwrap_or_default(),
        created: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        max_model_len: engine.max_model_len(),
        vocab_size,
        tokenizer,
        chat_template: chat_template.map(Arc::new),
        system_role: system_role(&config.load),
        eos_token_id,
        stop_token_ids,
        grammars,
        device: device_name,
        kv_cache_dtype: kv_cache_dtype.as_str(),
        defaults,
        system_fingerprint,
        stall_limit,
        engine,
    })
}

/// What clients may ask for must be what they get.
fn check_logprobs(asked: u32, most: Option<u32>) -> Result<(), LoadError> {
    match most {
        Some(most) if asked > most => Err(LoadError::MaxLogprobs { asked, most }),
        _ => Ok(()),
    }
}

pub(crate) fn open(config: &Config, state: &AppState) -> Result<Checkpoint, LoadError> {
    let overrides = ConfigOverrides {
        query_pre_attn_scalar: config.load.query_pre_attn_scalar,
    };
    let folder = match &config.load.source {
        ModelSource::Demo => return Ok(Checkpoint::from_embedded(demo::FILES, overrides)?),
        ModelSource::Directory(folder) => folder.clone(),
        ModelSource::Hub(repo) => {
            let progress = Progress::start(state, Phase::Downloading);
            let folder = hub::fetch(repo, &config.hub, &|done, total| progress.set(done, total))?;
            tracing::info!(folder = %folder.display(), "model files are complete");
            folder
        }
    };
    Ok(Checkpoint::open_dir(&folder, overrides)?)
}

pub(crate) fn load_tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer, LoadError> {
    let json = checkpoint.file("tokenizer.json")?.ok_or(LoadError::NoTokenizer)?;
    let tokenizer = Tokenizer::from_bytes(&json, checkpoint.file("tokenizer_config.json")?.as_deref())?;
    let (tokens, rows) = (tokenizer.vocab_size(), checkpoint.config().vocab_size);
    if tokens > rows {
        return Err(LoadError::VocabularyMismatch {
            tokenizer: tokens,
            embedding: rows,
        });
    }
    Ok(tokenizer)
}

fn system_role(config: &LoadConfig) -> SystemRole {
    match config.system_role {
        SystemRoleSetting::Merge => SystemRole::Merge,
        SystemRoleSetting::Error => SystemRole::Error,
    }
}

pub(crate) fn load_chat_template(
    config: &LoadConfig,
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
) -> Result<Option<ChatTemplate>, LoadError> {
    let role = system_role(config);
    if let Some(path) = &config.chat_template {
        let unusable = |source| LoadError::OwnChatTemplate {
            path: path.clone(),
            source,
        };
        let source = std::fs::read_to_string(path).map_err(|error| unusable(error.into()))?;
        let template = ChatTemplate::new(&source, tokenizer, role).map_err(|error| unusable(error.into()))?;
        return Ok(Some(template));
    }
    let template = if let Some(source) = checkpoint.file("chat_template.jinja")? {
        ChatTemplate::new(&String::from_utf8_lossy(&source), tokenizer, role).map(Some)
    } else if let Some(config) = checkpoint.file("tokenizer_config.json")? {
        ChatTemplate::from_config(&config, tokenizer, role)
    } else {
        Ok(None)
    };
    let template = template.map_err(LoadError::ChatTemplate)?;
    if template.is_none() {
        tracing::warn!("the checkpoint has no chat template: chat completions are refused, completions work");
    }
    Ok(template)
}

/// Every file may forget one: Gemma-2's config.json knows no `<end_of_turn>`, and answers would never end.
fn stop_token_ids(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Vec<TokenId> {
    let mut ids = checkpoint.stop_token_ids();
    ids.extend(tokenizer.eos_id());
    ids.extend(tokenizer.end_of_turn_id());
    ids.into_iter().collect()
}

pub(crate) fn primary_eos(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Option<TokenId> {
    tokenizer
        .eos_id()
        .or_else(|| checkpoint.config().eos_token_ids.first().copied())
}

fn sampling_defaults(checkpoint: &Checkpoint) -> SamplingDefaults {
    let (file, neutral) = (checkpoint.generation_defaults(), SamplingDefaults::default());
    SamplingDefaults {
        temperature: file.temperature.unwrap_or(neutral.temperature),
        top_p: file.top_p.unwrap_or(neutral.top_p),
        top_k: file.top_k.unwrap_or(neutral.top_k),
        min_p: file.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: file.repetition_penalty.unwrap_or(neutral.repetition_penalty),
    }
}

fn start_engine(
    config: &Config,
    state: &AppState,
    device: Device,
    checkpoint: Checkpoint,
    warm_up: Vec<TokenId>,
) -> Result<EngineHandle, LoadError> {
    let scheduling = config.scheduling;
    let model_len = checkpoint.config().max_position_embeddings as u32;
    let max_model_len = config.load.max_model_len.unwrap_or(model_len);
    let (max_num_seqs, max_num_batched_tokens) = scheduling.batch_limits(device.default_batch());
    let step_timeout = scheduling.step_timeout.or(device.default_step_timeout());
    let step_timeout = step_timeout.filter(|limit| !limit.is_zero());
    let engine_config = EngineConfig {
        max_num_batched_tokens,
        max_num_seqs,
        max_model_len,
        max_queued_requests: scheduling.max_num_queued_reqs,
        max_queued_tokens: scheduling.max_num_queued_tokens,
        enable_prefix_caching: scheduling.enable_prefix_caching,
        step_timeout,
    };
    let runner = RunnerConfig {
        max_num_batched_tokens: max_num_batched_tokens as usize,
        max_num_seqs: max_num_seqs as usize,
        max_model_len: Some(max_model_len as usize),
        block_size: scheduling.block_size,
        kv_cache: if device.owns_its_memory() && scheduling.kv_cache_memory_bytes.is_none() {
            KvCacheSize::DeviceShare(scheduling.gpu_memory_utilization)
        } else {
            shared_kv_cache_size(&config.load.source, scheduling, max_num_seqs, max_model_len)
        },
        kv_cache_dtype: scheduling.kv_cache_dtype.dtype(),
    };
    let state = state.clone();
    let start = StartRunner {
        checkpoint,
        runner,
        warm_up,
        step_timeout,
        state,
    };
    device.spawn(engine_config, start).map_err(|error| match error {
        SpawnError::Build(error) => LoadError::Start(error),
        error => LoadError::Engine(error),
    })
}

/// All that a runner is made of but the backend.
pub(crate) struct StartRunner {
    checkpoint: Checkpoint,
    runner: RunnerConfig,
    warm_up: Vec<TokenId>,
    step_timeout: Option<Duration>,
    state: AppState,
}

impl StartRunner {
    /// Loads the weights and proves that the model computes.
    pub(crate) fn run<B: Backend>(self, backend: B) -> Result<ModelRunner<B>, StartError> {
        let lifecycle = &self.state.lifecycle;
        let mut progress = Some(Progress::start(&self.state, Phase::LoadingWeights));
        let loaded = ModelRunner::load(backend, &self.checkpoint, self.runner, &mut |step| match step.phase {
            LoadPhase::Weights => {
                if let Some(progress) = &progress {
                    progress.set(step.done_bytes, step.total_bytes);
                }
            }
            LoadPhase::KvCache => {}
            LoadPhase::WarmUp => {
                if progress.take().is_some() {
                    lifecycle.enter(Phase::WarmingUp);
                }
                lifecycle.set_progress(step.done_bytes, step.total_bytes);
                lifecycle.expect_progress_within(self.step_timeout);
            }
        });
        drop(progress);
        let mut runner = loaded.map_err(|error| match Shortage::of(&error, self.runner) {
            Some(shortage) => StartError::Memory(Box::new(shortage)),
            None => StartError::Runner(error),
        })?;
        for warning in runner.warnings() {
            tracing::warn!("{warning}");
        }
        memory_plan::log(runner.memory_plan(), self.runner.kv_cache_dtype);
        lifecycle.enter(Phase::WarmingUp);
        lifecycle.expect_progress_within(self.step_timeout);
        check_logits(&mut runner, &self.warm_up)?;
        lifecycle.expect_progress_within(None);
        Ok(runner)
    }
}

/// Where memory is shared with others: what `max_num_seqs` typical sequences need and one of full length at least, but no
/// more than half of what is free.
fn shared_kv_cache_size(
    source: &ModelSource,
    scheduling: SchedulingConfig,
    max_num_seqs: u32,
    max_model_len: u32,
) -> KvCacheSize {
    if let Some(bytes) = scheduling.kv_cache_memory_bytes {
        return KvCacheSize::Bytes(bytes);
    }
    let longest = u64::from(max_model_len);
    let typical = match source {
        ModelSource::Demo => DEMO_SEQUENCE_TOKENS,
        ModelSource::Directory(_) | ModelSource::Hub(_) => TYPICAL_SEQUENCE_TOKENS,
    };
    let typical = typical.min(longest).next_multiple_of(u64::from(scheduling.block_size));
    KvCacheSize::Tokens {
        wanted: longest.max(u64::from(max_num_seqs) * typical),
        free_share: 0.5,
    }
}

/// A checkpoint with wrong scales loads without complaint and answers garbage: better found before the first client.
fn check_logits<B: Backend>(runner: &mut ModelRunner<B>, tokens: &[TokenId]) -> Result<(), StartError> {
    let room = runner
        .memory_plan()
        .capacity_tokens()
        .min(runner.limits().max_model_len as u64) as usize;
    let logits = runner.forward_logits(&tokens[..tokens.len().min(room)])?;
    let count = logits.iter().filter(|logit| !logit.is_finite()).count();
    if count > 0 {
        return Err(StartError::NotFinite { count });
    }
    if let Some(cap) = runner.config().final_logit_softcapping {
        let saturated = logits.iter().filter(|logit| logit.abs() > 0.99 * cap).count();
        if saturated > logits.len() / 10 {
            let share = saturated as f64 / logits.len() as f64;
            tracing::warn!(
                share,
                "logits sit at the soft-cap: the checkpoint's scales are probably wrong"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use lapidary_model::{EmbeddedFiles, KvCacheDtype};

    use crate::cli::{Cli, Command, KvCacheDtypeSetting};
    use crate::config::Environment;

    use super::*;

    fn demo_with(name: &'static str, edit: impl Fn(&str) -> String) -> Checkpoint {
        let edited = demo::FILES.iter().map(|(file, bytes)| {
            if *file != name {
                return (*file, *bytes);
            }
            let text = edit(std::str::from_utf8(bytes).unwrap());
            (*file, &*text.into_bytes().leak())
        });
        let files: EmbeddedFiles = edited.collect::<Vec<_>>().leak();
        Checkpoint::from_embedded(files, ConfigOverrides::default()).unwrap()
    }

    fn demo() -> Checkpoint {
        demo_with("", str::to_owned)
    }

    fn set(json: &str, key: &str, value: serde_json::Value) -> String {
        let mut object: serde_json::Map<_, _> = serde_json::from_str(json).unwrap();
        object.insert(key.to_owned(), value);
        serde_json::to_string(&object).unwrap()
    }

    #[test]
    fn answers_end_even_if_config_json_forgets_the_end_of_turn() {
        let checkpoint = demo_with("config.json", |json| set(json, "eos_token_id", 1.into()));
        let tokenizer = load_tokenizer(&checkpoint).unwrap();
        let ids = stop_token_ids(&checkpoint, &tokenizer);
        assert!(
            ids.contains(&1) && ids.contains(&tokenizer.end_of_turn_id().unwrap()),
            "{ids:?}"
        );
        assert_eq!(primary_eos(&checkpoint, &tokenizer), tokenizer.eos_id());
    }

    #[test]
    fn a_tokenizer_of_a_larger_model_is_refused() {
        let checkpoint = demo_with("config.json", |json| set(json, "vocab_size", 1000.into()));
        assert!(matches!(
            load_tokenizer(&checkpoint),
            Err(LoadError::VocabularyMismatch { embedding: 1000, .. })
        ));
    }

    #[test]
    fn the_checkpoint_s_sampling_values_are_the_defaults() {
        let checkpoint = demo_with("generation_config.json", |json| set(json, "temperature", 0.25.into()));
        assert_eq!(sampling_defaults(&checkpoint).temperature, 0.25);
        let checkpoint = demo_with("generation_config.json", |_| "{}".to_owned());
        assert_eq!(sampling_defaults(&checkpoint), SamplingDefaults::default());
    }

    #[test]
    fn a_fingerprint_names_the_configuration_and_its_overrides() {
        let native = KvCacheDtype::Native;
        let of = |checkpoint: &Checkpoint, scalar| fingerprint(checkpoint, scalar, native, "cpu").unwrap();
        assert_eq!(of(&demo(), None), of(&demo(), None));
        assert_ne!(of(&demo(), None), of(&demo(), Some(1.0)));
        let other = demo_with("config.json", |json| set(json, "rms_norm_eps", 1e-5.into()));
        assert_ne!(of(&demo(), None), of(&other, None));
        let fp8 = fingerprint(&demo(), None, KvCacheDtype::Fp8E4m3, "cpu").unwrap();
        assert_ne!(of(&demo(), None), fp8);
    }

    #[test]
    fn the_kv_cache_holds_a_sequence_of_full_length_however_few_may_run() {
        let config = |kv_cache_memory_bytes| SchedulingConfig {
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_num_queued_reqs: 1,
            max_num_queued_tokens: 1,
            enable_prefix_caching: true,
            block_size: 16,
            kv_cache_dtype: KvCacheDtypeSetting::Auto,
            kv_cache_memory_bytes,
            gpu_memory_utilization: 0.9,
            enforce_eager: false,
            step_timeout: None,
        };
        let wanted = |wanted| KvCacheSize::Tokens {
            wanted,
            free_share: 0.5,
        };
        let hub = ModelSource::Hub("org/gem".to_owned());
        assert_eq!(shared_kv_cache_size(&hub, config(None), 1, 8192), wanted(8192));
        assert_eq!(shared_kv_cache_size(&hub, config(None), 64, 8192), wanted(64 * 2048));
        assert_eq!(shared_kv_cache_size(&hub, config(None), 64, 100), wanted(64 * 112));
        assert_eq!(
            shared_kv_cache_size(&hub, config(Some(7)), 64, 8192),
            KvCacheSize::Bytes(7)
        );
        assert_eq!(
            shared_kv_cache_size(&ModelSource::Demo, config(None), 64, 4096),
            wanted(64 * 256)
        );
    }

    #[test]
    fn more_logprobs_than_the_device_reports_are_refused_at_start() {
        assert!(check_logprobs(20, Some(20)).is_ok() && check_logprobs(1000, None).is_ok());
        let error = check_logprobs(21, Some(20)).unwrap_err().to_string();
        assert!(error.contains("21") && error.contains("20"), "{error}");
    }

    #[test]
    fn the_limit_that_was_not_set_gives_way_to_the_one_that_was() {
        let limits = |max_num_seqs, max_num_batched_tokens| {
            let flags = [
                ("--max-num-seqs", max_num_seqs),
                ("--max-num-batched-tokens", max_num_batched_tokens),
            ];
            let typed = flags
                .iter()
                .filter_map(|(flag, value): &(&str, Option<u32>)| Some(format!("{flag}={}", (*value)?)));
            let command = ["lapidary", "serve"].map(str::to_owned).into_iter().chain(typed);
            let Command::Serve(args) = Cli::try_parse_from(command).unwrap().command else {
                panic!("the command is serve");
            };
            let config = Config::resolve(&args, &Environment::from([])).unwrap();
            config.scheduling.batch_limits((64, 512))
        };
        assert_eq!(limits(None, None), (64, 512));
        assert_eq!(limits(Some(1000), None), (1000, 1000));
        assert_eq!(limits(None, Some(32)), (32, 32));
        assert_eq!(limits(Some(8), Some(16)), (8, 16));
    }
}
