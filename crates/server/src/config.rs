//! From what was typed to what it means: layers [`Settings`] from file, environment and flags, checks them once, and
//! hands out immutable structs. The only file that reads the environment.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use serde::{Deserialize, Serialize};

use crate::access::KeyFileError;
use crate::cli::{
    Cli, Command, DeviceSetting, GenerationConfigSource, KvCacheDtypeSetting, LogFormat, SchedulingPolicy, ServeArgs,
    Settings, SystemRoleSetting,
};
use crate::state::Limits;
use crate::units::Span;

/// Of our variables.
const PREFIX: &str = "LAPIDARY_";

/// What `lapidary serve` was told, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The settings all else was made of, for `--print-config`.
    pub settings: Settings,
    /// What to load and how.
    pub load: LoadConfig,
    /// Where it comes from when it is not on this machine.
    pub hub: HubConfig,
    /// Queue, batch and cache.
    pub scheduling: SchedulingConfig,
    /// The listener.
    pub http: HttpConfig,
    /// Who may come in.
    pub access: AccessConfig,
    /// What one request may ask for.
    pub limits: Limits,
    /// Log lines.
    pub log: LogConfig,
    /// Where traces go, if anywhere.
    pub traces: Option<TraceConfig>,
    /// Variables that begin like ours and are none of ours: probably misspelt.
    pub unknown_variables: Vec<String>,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The model inside the binary.
    Demo,
    /// A checkpoint directory.
    Directory(PathBuf),
    /// `org/name` on the hub.
    Hub(String),
}

/// What to load and how.
#[derive(Debug, Clone)]
pub struct LoadConfig {
    /// The model.
    pub source: ModelSource,
    /// Names clients may call it by, at least one.
    pub names: Vec<String>,
    /// Asked-for context; the model's own when absent.
    pub max_model_len: Option<u32>,
    /// Where sampling defaults come from.
    pub generation_config: GenerationConfigSource,
    /// A Jinja file in place of the checkpoint's template.
    pub chat_template: Option<PathBuf>,
    /// What happens to system messages.
    pub system_role: SystemRoleSetting,
    /// In place of the checkpoint's value.
    pub query_pre_attn_scalar: Option<f32>,
    /// Where the model runs.
    pub device: DeviceSetting,
    /// Threads that compute; absent: one for each core the process may use.
    pub threads: Option<usize>,
}

/// Queue, batch and cache.
#[derive(Debug, Clone, Copy)]
pub struct SchedulingConfig {
    /// Sequences that run at the same time; absent: the device decides.
    pub max_num_seqs: Option<u32>,
    /// Tokens of a step; absent: the device decides.
    pub max_num_batched_tokens: Option<u32>,
    /// Waiting requests.
    pub max_num_queued_reqs: u32,
    /// Waiting prompt tokens.
    pub max_num_queued_tokens: u64,
    /// Whether prompts that begin alike share blocks.
    pub enable_prefix_caching: bool,
    /// Tokens of a block.
    pub block_size: u32,
    /// How keys and values are kept.
    pub kv_cache_dtype: KvCacheDtypeSetting,
    /// Memory of the cache; absent: decided from what is free.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Share of a GPU's memory to use in all.
    pub gpu_memory_utilization: f64,
    /// Whether a GPU launches every kernel anew.
    pub enforce_eager: bool,
    /// A step that takes longer is given up, and with it the process; zero waits for ever, absent: the device decides.
    pub step_timeout: Option<Duration>,
}

/// The listener and its end.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Addresses to try to bind, in order.
    pub addresses: Vec<SocketAddr>,
    /// Connections open at the same time.
    pub max_connections: u32,
    /// Time for a request's headers; idle connections close after it too.
    pub header_read_timeout: Duration,
    /// Certificate and key; absent: plain HTTP.
    pub tls: Option<TlsConfig>,
    /// Time that a client may leave its answer unread.
    pub write_timeout: Duration,
    /// Time for requests in flight once the listener is closed.
    pub shutdown_timeout: Duration,
    /// Time between `/ready` saying 503 and the listener closing.
    pub drain_grace: Duration,
}

/// Log lines.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// Text or JSON.
    pub format: LogFormat,
    /// A filter `tracing_subscriber::EnvFilter` accepts.
    pub filter: String,
}

/// How to reach the hub and where its files lie, as `huggingface_hub` decides it.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// Without a slash at its end.
    pub endpoint: String,
    /// Sent to the endpoint and to no other host.
    pub token: Option<Token>,
    /// Holds `models--org--name` folders.
    pub cache_dir: PathBuf,
    /// Use what is in the cache, ask nobody.
    pub offline: bool,
    /// Branch, tag or commit.
    pub revision: String,
    /// PEM file of the authorities to trust in place of the built-in ones.
    pub ca_bundle: Option<PathBuf>,
}

/// A secret: never printed. It serialises as it is, since settings are layered that way.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

impl FromStr for Token {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self::new(text))
    }
}

impl Token {
    /// Wraps a token.
    #[must_use]
    pub fn new(token: impl Into<String>) -> Self {
        Self(token.into())
    }

    /// The secret itself, for the one header it belongs in.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The settings file cannot be read.
    #[error("cannot read the settings file {}", path.display())]
    Unreadable {
        /// Of `--config`.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The settings file is no TOML, or has a key or value that is not ours.
    #[error("cannot use the settings file {}", path.display())]
    Malformed {
        /// Of `--config`.
        path: PathBuf,
        /// Names line and column.
        #[source]
        source: toml::de::Error,
    },
    /// An environment variable holds no value of its kind.
    #[error("{name}: {reason}")]
    Variable {
        /// Of the variable.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that cannot be.
    #[error("{key}: {reason}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The file of `api-key-file` cannot be used.
    #[error(transparent)]
    KeyFile(KeyFileError),
    /// A number no settings file could hold.
    #[error("a setting is too large")]
    TooLarge(#[source] toml::ser::Error),
}

fn invalid(key: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        key,
        reason: reason.into(),
    }
}

/// The environment at one moment. A value, so that tests need not change the process's own.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// The process's environment; what is not Unicode is left out.
    #[must_use]
    pub fn of_process() -> Self {
        Self(
            std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// The value of a variable; empty counts as absent, since compose files pass `X=${X:-}` on.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// What clients of OpenAI's API authenticate with.
    #[must_use]
    pub fn openai_api_key(&self) -> Option<&str> {
        self.get("OPENAI_API_KEY")
    }

    fn is_true(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Self {
        Self(
            variables
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect(),
        )
    }
}

impl Config {
    /// Layers and checks the settings.
    ///
    /// # Errors
    /// Names the file, variable or setting at fault.
    pub fn resolve(args: &ServeArgs, environment: &Environment) -> Result<Self, ConfigError> {
        let file = match args
            .config
            .clone()
            .or_else(|| environment.get("LAPIDARY_CONFIG").map(PathBuf::from))
        {
            Some(path) => read_file(&path)?,
            None => Settings::default(),
        };
        let (variables, unknown_variables) = read_environment(environment)?;
        let mut settings = Settings::defaults();
        for layer in [file, variables, typed_settings(args)?] {
            settings = merge(&settings, &layer)?;
        }
        Self::validate(settings, environment, unknown_variables)
    }

    fn validate(
        settings: Settings,
        environment: &Environment,
        unknown_variables: Vec<String>,
    ) -> Result<Self, ConfigError> {
        check_vllm_settings(&settings)?;
        Ok(Self {
            load: LoadConfig::new(&settings)?,
            hub: HubConfig::new(&settings, environment)?,
            scheduling: SchedulingConfig::new(&settings)?,
            http: HttpConfig::new(&settings)?,
            access: AccessConfig::new(&settings, environment)?,
            limits: Limits {
                max_logprobs: given(settings.max_logprobs),
                allows_priority: given(settings.scheduling_policy) == SchedulingPolicy::Priority,
                trust_request_chat_template: given(settings.trust_request_chat_template),
                prompt_tokens_details: given(settings.enable_prompt_tokens_details),
                force_include_usage: given(settings.enable_force_include_usage),
                per_request_metrics: given(settings.enable_per_request_metrics),
                sse_keep_alive: given(settings.sse_keep_alive_interval).0,
                max_queue_wait: unless_zero(settings.max_queue_wait),
                request_timeout: unless_zero(settings.request_timeout),
                queue_timeout: unless_zero(settings.queue_timeout),
                ..Limits::default()
            },
            log: LogConfig::new(&settings)?,
            traces: TraceConfig::new(&settings, environment)?,
            settings,
            unknown_variables,
        })
    }

    /// The settings in effect as TOML that `--config` accepts; those the model or the machine decides are comments.
    ///
    /// # Errors
    /// A number that TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let table = toml::Table::try_from(&self.settings).map_err(ConfigError::TooLarge)?;
        let line = |key: String| match table.get(&key) {
            Some(_) if key == "api-key" => format!("# {key}: not shown\n"),
            Some(value) => format!("{key} = {value}\n"),
            None => format!("# {key}: decided by the model or the machine\n"),
        };
        Ok(setting_names().map(line).collect())
    }
}

/// A time of 0 is no limit.
fn unless_zero(span: Option<Span>) -> Option<Duration> {
    span.map(|span| span.0).filter(|time| !time.is_zero())
}

/// A setting that [`Settings::defaults`] gives a value.
fn given<T>(setting: Option<T>) -> T {
    setting.expect("this setting has a default")
}

/// Names of all settings, in the order of the struct.
fn setting_names() -> impl Iterator<Item = String> {
    let command = <Settings as clap::Args>::augment_args(clap::Command::new("settings"));
    command
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect::<Vec<_>>()
        .into_iter()
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Malformed {
        path: path.to_owned(),
        source,
    })
}

/// Settings from `LAPIDARY_*`, and the variables that are none. Each value goes through the parser of its flag, so that
/// both understand the same.
fn read_environment(environment: &Environment) -> Result<(Settings, Vec<String>), ConfigError> {
    let names: Vec<String> = setting_names().collect();
    let mut settings = Settings::default();
    let mut unknown = Vec::new();
    for (name, value) in &environment.0 {
        let Some(key) = name.strip_prefix(PREFIX) else { continue };
        if value.is_empty() || key == "CONFIG" || is_service_link(key, value) {
            continue;
        }
        let flag = key.to_ascii_lowercase().replace('_', "-");
        if !names.contains(&flag) {
            unknown.push(name.clone());
            continue;
        }
        let parsed = Cli::try_parse_from(["lapidary", "serve", &format!("--{flag}={value}")]);
        let cli = parsed.map_err(|error| ConfigError::Variable {
            name: name.clone(),
            reason: first_line(&error),
        })?;
        if let Command::Serve(args) = cli.command {
            settings = merge(&settings, &args.settings)?;
        }
    }
    Ok((settings, unknown))
}

/// Kubernetes describes every service to every pod by variables, `LAPIDARY_PORT=tcp://10.0.0.1:8000` among them when
/// a service is called `lapidary`.
fn is_service_link(key: &str, value: &str) -> bool {
    value.starts_with("tcp://") || key.starts_with("SERVICE_") || key.starts_with("PORT_")
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

fn typed_settings(args: &ServeArgs) -> Result<Settings, ConfigError> {
    let mut settings = args.settings.clone();
    if args.no_enable_prefix_caching {
        settings.enable_prefix_caching = Some(false);
    }
    if args.no_ui {
        settings.ui = Some(false);
    }
    match (&args.model_positional, &settings.model) {
        (Some(one), Some(other)) if one != other => {
            return Err(invalid("model", format!("given twice, as {one:?} and as {other:?}")));
        }
        (Some(model), _) => settings.model = Some(model.clone()),
        (None, _) => {}
    }
    Ok(settings)
}

/// `upper` where it says something, else `lower`.
fn merge(lower: &Settings, upper: &Settings) -> Result<Settings, ConfigError> {
    let mut table = toml::Table::try_from(lower).map_err(ConfigError::TooLarge)?;
    table.extend(toml::Table::try_from(upper).map_err(ConfigError::TooLarge)?);
    Ok(table.try_into().expect("what Settings wrote, Settings reads"))
}

/// Settings that exist so that command lines written for vLLM work, and that say so when they cannot.
fn check_vllm_settings(settings: &Settings) -> Result<(), ConfigError> {
    match settings.dtype.as_deref() {
        Some("auto" | "bfloat16") | None => {}
        Some("float16" | "half") => {
            return Err(invalid(
                "dtype",
                "Gemma-2's activations overflow float16; use auto or bfloat16",
            ));
        }
        Some(other) => return Err(invalid("dtype", format!("{other:?} is neither auto nor bfloat16"))),
    }
    match settings.tensor_parallel_size {
        Some(1) | None => Ok(()),
        Some(n) => Err(invalid(
            "tensor-parallel-size",
            format!("{n} is not possible: a model runs on one device; run replicas behind a load balancer instead"),
        )),
    }
}

impl ModelSource {
    /// # Errors
    /// `model` is none of the three.
    pub fn parse(model: &str) -> Result<Self, ConfigError> {
        let path = Path::new(model);
        if model == "demo" {
            return Ok(Self::Demo);
        }
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if path.is_file() {
            return Err(invalid(
                "model",
                format!("{model:?} is a file; give the directory that holds the checkpoint"),
            ));
        }
        if crate::hub::is_repository_name(model) {
            return Ok(Self::Hub(model.to_owned()));
        }
        Err(invalid(
            "model",
            format!("{model:?} is neither `demo`, nor a directory here, nor an `org/name` on the hub"),
        ))
    }
}

impl LoadConfig {
    fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let model = given(settings.model.clone());
        let names = settings
            .served_model_name
            .clone()
            .unwrap_or_else(|| vec![model.clone()]);
        if names.is_empty() || names.iter().any(|name| name.trim().is_empty()) {
            return Err(invalid("served-model-name", "a name is empty"));
        }
        if settings
            .query_pre_attn_scalar
            .is_some_and(|scalar| !(scalar.is_finite() && scalar > 0.0))
        {
            return Err(invalid("query-pre-attn-scalar", "must be a positive number"));
        }
        if let Some(path) = settings.chat_template.as_ref().filter(|path| !path.is_file()) {
            return Err(invalid("chat-template", format!("there is no file {}", path.display())));
        }
        require(settings.threads != Some(0), "threads", "must be at least 1")?;
        require(settings.max_model_len != Some(0), "max-model-len", "must be at least 1")?;
        Ok(Self {
            source: ModelSource::parse(&model)?,
            names,
            max_model_len: settings.max_model_len,
            generation_config: given(settings.generation_config),
            chat_template: settings.chat_template.clone(),
            system_role: given(settings.system_role),
            query_pre_attn_scalar: settings.query_pre_attn_scalar,
            device: given(settings.device),
            threads: settings.threads,
        })
    }
}

fn require(holds: bool, key: &'static str, reason: &str) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(invalid(key, reason)) }
}

impl SchedulingConfig {
    fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let config = Self {
            max_num_seqs: settings.max_num_seqs,
            max_num_batched_tokens: settings.max_num_batched_tokens,
            max_num_queued_reqs: given(settings.max_num_queued_reqs),
            max_num_queued_tokens: given(settings.max_num_queued_tokens),
            enable_prefix_caching: given(settings.enable_prefix_caching),
            block_size: given(settings.block_size),
            kv_cache_dtype: given(settings.kv_cache_dtype),
            kv_cache_memory_bytes: settings.kv_cache_memory_bytes.map(|size| size.0),
            gpu_memory_utilization: given(settings.gpu_memory_utilization),
            enforce_eager: given(settings.enforce_eager),
            step_timeout: settings.step_timeout.map(|span| span.0),
        };
        require(config.max_num_seqs != Some(0), "max-num-seqs", "must be at least 1")?;
        require(
            config.max_num_batched_tokens.unwrap_or(u32::MAX) >= config.max_num_seqs.unwrap_or(1),
            "max-num-batched-tokens",
            "must be at least max-num-seqs, since each running sequence takes a token of every step",
        )?;
        require(
            config.block_size.is_power_of_two() && config.block_size <= 256,
            "block-size",
            "must be a power of two, 256 at most",
        )?;
        require(
            config.kv_cache_memory_bytes != Some(0),
            "kv-cache-memory-bytes",
            "must be more than 0",
        )?;
        require(
            config.gpu_memory_utilization > 0.0 && config.gpu_memory_utilization <= 1.0,
            "gpu-memory-utilization",
            "must be more than 0 and at most 1",
        )?;
        Ok(config)
    }

    /// Sequences and tokens of a step, by what was set and else by the device. Each running sequence takes a token of
    /// every step, so the one that was not set gives way.
    #[must_use]
    pub fn batch_limits(&self, (default_seqs, default_tokens): (u32, u32)) -> (u32, u32) {
        match (self.max_num_seqs, self.max_num_batched_tokens) {
            (Some(seqs), Some(tokens)) => (seqs, tokens),
            (Some(seqs), None) => (seqs, default_tokens.max(seqs)),
            (None, Some(tokens)) => (default_seqs.min(tokens), tokens),
            (None, None) => (default_seqs, default_tokens),
        }
    }
}

impl HttpConfig {
    fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let (host, port) = (given(settings.host.clone()), given(settings.port));
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let addresses: Vec<SocketAddr> = (bare, port)
            .to_socket_addrs()
            .map_err(|error| invalid("host", format!("{host:?} is no address of this machine: {error}")))?
            .collect();
        let time = |setting: Option<Span>| given(setting).0;
        let config = Self {
            addresses,
            max_connections: given(settings.max_connections),
            header_read_timeout: time(settings.header_read_timeout),
            tls: TlsConfig::new(settings)?,
            write_timeout: time(settings.write_timeout),
            shutdown_timeout: time(settings.shutdown_timeout),
            drain_grace: time(settings.drain_grace),
        };
        require(config.max_connections > 0, "max-connections", "must be at least 1")?;
        require(
            !config.header_read_timeout.is_zero(),
            "header-read-timeout",
            "must be more than 0",
        )?;
        require(!config.write_timeout.is_zero(), "write-timeout", "must be more than 0")?;
        Ok(config)
    }
}

impl LogConfig {
    fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let filter = given(settings.log_level.clone());
        tracing_subscriber::EnvFilter::try_new(&filter).map_err(|error| invalid("log-level", error.to_string()))?;
        Ok(Self {
            format: given(settings.log_format),
            filter,
        })
    }
}

impl HubConfig {
    fn new(settings: &Settings, environment: &Environment) -> Result<Self, ConfigError> {
        let home = environment.get("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = environment.get("XDG_CACHE_HOME").map(PathBuf::from);
            let user = || PathBuf::from(environment.get("HOME").unwrap_or(".")).join(".cache");
            cache.unwrap_or_else(user).join("huggingface")
        });
        let cache_dir = settings
            .download_dir
            .clone()
            .or_else(|| environment.get("HF_HUB_CACHE").map(PathBuf::from))
            .or_else(|| environment.get("HUGGINGFACE_HUB_CACHE").map(PathBuf::from))
            .unwrap_or_else(|| home.join("hub"));
        let revision = given(settings.revision.clone());
        require(
            crate::hub::is_revision_name(&revision),
            "revision",
            "is no name of a branch, tag or commit",
        )?;
        let endpoint = environment
            .get("HF_ENDPOINT")
            .unwrap_or("https://huggingface.co")
            .trim_end_matches('/');
        Ok(Self {
            endpoint: endpoint.to_owned(),
            token: find_token(environment, &home),
            cache_dir,
            offline: environment.is_true("HF_HUB_OFFLINE") || environment.is_true("TRANSFORMERS_OFFLINE"),
            revision,
            ca_bundle: ca_bundle(environment),
        })
    }
}

fn ca_bundle(environment: &Environment) -> Option<PathBuf> {
    ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]
        .iter()
        .find_map(|name| environment.get(name).map(PathBuf::from))
}

/// `HF_TOKEN`, or the file `huggingface-cli login` writes.
fn find_token(environment: &Environment, home: &Path) -> Option<Token> {
    let variable = environment
        .get("HF_TOKEN")
        .or_else(|| environment.get("HUGGING_FACE_HUB_TOKEN"));
    let typed = variable.map(str::to_owned).or_else(|| {
        let path = environment
            .get("HF_TOKEN_PATH")
            .map(PathBuf::from)
            .unwrap_or_else(|| home.join("token"));
        std::fs::read_to_string(path).ok()
    })?;
    let token = typed.trim();
    (!token.is_empty()).then(|| Token::new(token))
}

mod access;
#[cfg(test)]
mod tests;
mod traces;

pub use self::access::{AccessConfig, ClientCertificates, TlsConfig};
pub use self::traces::{Sampler, TraceConfig};
