//! What can be typed: commands, and the settings of `serve`, every one of which is a flag, a variable and a file key.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use lapidary_model::KvCacheDtype;
use serde::{Deserialize, Serialize};

use crate::bench::BenchArgs;
use crate::config::Token;
use crate::units::{ByteSize, NameList, Span};

/// Serves Gemma-2 models behind the OpenAI HTTP API.
#[derive(Debug, Parser)]
#[command(name = "lapidary", version, max_term_width = 120)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands of the binary.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model behind the OpenAI HTTP API.
    #[command(after_help = SERVE_AFTER_HELP)]
    Serve(Box<ServeArgs>),
    /// Examine a checkpoint without serving it: every fault by name, scales, stop tokens, memory.
    #[command(after_help = CHECK_AFTER_HELP)]
    Check(CheckArgs),
    /// Measure a server: send it requests, report latencies and throughput.
    Bench(Box<BenchArgs>),
}

const CHECK_AFTER_HELP: &str = "\
Reads every value of every tensor. Exits with 0 if the checkpoint can be served, with 1 if not.";

const SERVE_AFTER_HELP: &str = "\
Every setting can be given in three places; the later one wins:
  a key of the file named by --config   max-model-len = 4096
  an environment variable               LAPIDARY_MAX_MODEL_LEN=4096
  a flag                                --max-model-len 4096
Downloads also follow HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE.
SIGTERM drains: /ready turns 503, requests in flight finish, the process exits 0. A second signal cuts them off.";

/// Arguments of `lapidary serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// `demo` (built in, the default), a checkpoint directory, or `org/name` on the Hugging Face hub.
    #[arg(value_name = "MODEL")]
    pub model_positional: Option<String>,

    /// TOML file with settings; its keys are the flags' names [env: LAPIDARY_CONFIG].
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Print the settings in effect, as TOML, and exit.
    #[arg(long)]
    pub print_config: bool,

    /// Opposite of --enable-prefix-caching.
    #[arg(long, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,

    /// Opposite of --ui.
    #[arg(long, overrides_with = "ui")]
    pub no_ui: bool,

    /// The settings given as flags.
    #[command(flatten)]
    pub settings: Settings,
}

/// Arguments of `lapidary check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// `demo`, a checkpoint directory, or `org/name` on the Hugging Face hub.
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,

    /// Memory of a device to plan for, e.g. 80GiB.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,

    /// Share of that memory that may be used.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub gpu_memory_utilization: f64,

    /// Prompt and answer together, in tokens [default: the model's].
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,

    /// Sequences that run at the same time [default: 256].
    #[arg(long, value_name = "N")]
    pub max_num_seqs: Option<u32>,

    /// Tokens computed in one step [default: 4096].
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<u32>,

    /// How keys and values are kept [default: auto].
    #[arg(long, value_name = "TYPE")]
    pub kv_cache_dtype: Option<KvCacheDtypeSetting>,

    /// Attention scale, in place of the checkpoint's.
    #[arg(long, value_name = "X")]
    pub query_pre_attn_scalar: Option<f32>,
}

fn share(typed: &str) -> Result<f64, String> {
    match typed.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("must be more than 0 and at most 1".to_owned()),
    }
}

/// What was typed, in one of the three places. Absent means: not typed there.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[command(next_help_heading = "Settings")]
pub struct Settings {
    /// Same as MODEL.
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,

    /// Address to listen on; 0.0.0.0 or :: for all [default: 127.0.0.1].
    #[arg(long)]
    pub host: Option<String>,

    /// Port to listen on; 0 takes a free one and logs it [default: 8000].
    #[arg(long)]
    pub port: Option<u16>,

    /// Names clients may call the model by; answers carry the first [default: MODEL].
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub served_model_name: Option<Vec<String>>,

    /// Prompt and answer together, in tokens [default: the model's].
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,

    /// Sequences that run at the same time [default: 64 on a CPU, 256 on a GPU].
    #[arg(long, value_name = "N")]
    pub max_num_seqs: Option<u32>,

    /// Tokens computed in one step; smaller steps delay running answers less, larger ones read prompts faster
    /// [default: 512 on a CPU, 4096 on a GPU].
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<u32>,

    /// Requests that may wait; more are answered 429 [default: 512].
    #[arg(long, value_name = "N")]
    pub max_num_queued_reqs: Option<u32>,

    /// Prompt tokens that may wait; more are answered 429 [default: 1000000].
    #[arg(long, value_name = "TOKENS")]
    pub max_num_queued_tokens: Option<u64>,

    /// Wait in the queue, foreseen from how fast it moves, above which a request is answered 429 at once, so that those
    /// that are taken are answered soon; 0 sets no limit. Only while others wait already, and not with `--scheduling-policy
    /// priority` [default: 10s].
    #[arg(long, value_name = "TIME")]
    pub max_queue_wait: Option<Span>,

    /// `fcfs` serves requests in order of arrival and refuses `priority`; `priority` serves lower ones first, for clients
    /// that are trusted with it [default: fcfs].
    #[arg(long, value_name = "POLICY")]
    pub scheduling_policy: Option<SchedulingPolicy>,

    /// Reuse the keys and values of prompts that begin alike [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: Option<bool>,

    /// Tokens in a block of the KV cache [default: 16].
    #[arg(long, value_name = "TOKENS")]
    pub block_size: Option<u32>,

    /// How keys and values are kept. `fp8` takes half the memory on a GPU and a quarter on a CPU, so that many more tokens
    /// fit, and costs a little accuracy; scales come from the checkpoint if it has them [default: auto].
    #[arg(long, value_name = "TYPE")]
    pub kv_cache_dtype: Option<KvCacheDtypeSetting>,

    /// Memory for keys and values, e.g. 4GiB [default: on a GPU what `gpu-memory-utilization` leaves, on a CPU what
    /// max-num-seqs answers need, within free memory].
    #[arg(long, value_name = "SIZE")]
    pub kv_cache_memory_bytes: Option<ByteSize>,

    /// Share of a GPU's memory to use in all [default: 0.9].
    #[arg(long, value_name = "SHARE")]
    pub gpu_memory_utilization: Option<f64>,

    /// On a GPU, launch every kernel anew instead of replaying recorded steps: slower, for looking into problems
    /// [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enforce_eager: Option<bool>,

    /// A step that takes longer, in the warm-up too, ends the process with exit code 3; 0 waits for ever
    /// [default: 60s on a GPU, 0 on a CPU].
    #[arg(long, value_name = "TIME")]
    pub step_timeout: Option<Span>,

    /// Alternatives a request may ask for at each token [default: 20].
    #[arg(long, value_name = "N")]
    pub max_logprobs: Option<u32>,

    /// Take chat templates that come with requests: programs of clients, which decide what the model takes for a turn
    /// [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub trust_request_chat_template: Option<bool>,

    /// Show how many prompt tokens came from the cache in `usage.prompt_tokens_details` [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_prompt_tokens_details: Option<bool>,

    /// End every stream with usage, asked for or not [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_force_include_usage: Option<bool>,

    /// Put the times of each request into its answer, as `metrics` [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub enable_per_request_metrics: Option<bool>,

    /// Sampling defaults: `auto` takes the checkpoint's generation_config.json, `vllm` none [default: auto].
    #[arg(long, value_name = "WHICH")]
    pub generation_config: Option<GenerationConfigSource>,

    /// Jinja file to use in place of the checkpoint's chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,

    /// System messages: `merge` puts them in front of the first user turn, `error` refuses them [default: merge].
    #[arg(long, value_name = "WHAT")]
    pub system_role: Option<SystemRoleSetting>,

    /// Attention scale: queries are multiplied by this to the power -0.5 [default: the checkpoint's].
    #[arg(long, value_name = "X")]
    pub query_pre_attn_scalar: Option<f32>,

    /// Branch, tag or commit on the hub [default: main].
    #[arg(long)]
    pub revision: Option<String>,

    /// Cache for downloads [default: the Hugging Face cache].
    #[arg(long, value_name = "DIR")]
    pub download_dir: Option<PathBuf>,

    /// Where the model runs [default: auto].
    #[arg(long)]
    pub device: Option<DeviceSetting>,

    /// Threads that compute on a CPU [default: one for each core the process may use].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,

    /// Taken for vllm's sake: `auto` and `bfloat16` mean what is done anyway [default: auto].
    #[arg(long)]
    pub dtype: Option<String>,

    /// Taken for vllm's sake: only 1 is possible [default: 1].
    #[arg(long, value_name = "N")]
    pub tensor_parallel_size: Option<u32>,

    /// Silence on a stream after which a comment line keeps it open; 0 sends none [default: 15s].
    #[arg(long, value_name = "TIME")]
    pub sse_keep_alive_interval: Option<Span>,

    /// Longest life of a request; 0 sets no limit [default: 0].
    #[arg(long, value_name = "TIME")]
    pub request_timeout: Option<Span>,

    /// Longest wait of a request in the queue, after which it is answered 429; 0 sets no limit [default: 0].
    #[arg(long, value_name = "TIME")]
    pub queue_timeout: Option<Span>,

    /// Time that requests in flight get to finish once the process drains [default: 30s].
    #[arg(long, value_name = "TIME")]
    pub shutdown_timeout: Option<Span>,

    /// Time that /ready says 503 and new requests are still taken, for load balancers to notice [default: 2s].
    #[arg(long, value_name = "TIME")]
    pub drain_grace: Option<Span>,

    /// Connections open at the same time; on further ones only probes are answered, anything else with 503
    /// [default: 4096].
    #[arg(long, value_name = "N")]
    pub max_connections: Option<u32>,

    /// Time a client has for a request's headers, and may keep an idle connection open [default: 75s].
    #[arg(long, value_name = "TIME")]
    pub header_read_timeout: Option<Span>,

    /// Time that a client may leave its answer unread before it is cut off [default: 60s].
    #[arg(long, value_name = "TIME")]
    pub write_timeout: Option<Span>,

    /// Key that clients must send as `Authorization: Bearer KEY`; can be given several times [default: no key is
    /// needed; env also: VLLM_API_KEY].
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<Vec<Token>>,

    /// File with more keys, one a line; read again when it changes and on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,

    /// Answer /metrics without a key, as /live, /ready and /health are [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub unauthenticated_metrics: Option<bool>,

    /// Serve a page at / to try the model from a browser; it is open, its requests need a key where others do
    /// [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          overrides_with = "no_ui")]
    pub ui: Option<bool>,

    /// Requests of one key at the same time; more are answered 429 [default: no limit].
    #[arg(long, value_name = "N")]
    pub max_concurrency_per_key: Option<u32>,

    /// Prompt and generated tokens of one key; beyond it requests are answered 429 [default: no limit].
    #[arg(long, value_name = "TOKENS")]
    pub tokens_per_minute_per_key: Option<u64>,

    /// Web pages that may call: `*`, or origins as a JSON list or separated by commas [default: *].
    #[arg(long, value_name = "LIST")]
    pub allowed_origins: Option<NameList>,

    /// Methods that web pages may use [default: *].
    #[arg(long, value_name = "LIST")]
    pub allowed_methods: Option<NameList>,

    /// Headers that web pages may send [default: *].
    #[arg(long, value_name = "LIST")]
    pub allowed_headers: Option<NameList>,

    /// Let web pages send cookies along [default: false].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub allow_credentials: Option<bool>,

    /// Prefix of paths that a proxy may leave on, `/gem` for one [default: none].
    #[arg(long, value_name = "PATH")]
    pub root_path: Option<String>,

    /// Certificate chain (PEM) to serve HTTPS with; read again when it changes and on SIGHUP [default: plain HTTP].
    #[arg(long, value_name = "FILE")]
    pub ssl_certfile: Option<PathBuf>,

    /// Private key (PEM) of the certificate [default: plain HTTP].
    #[arg(long, value_name = "FILE")]
    pub ssl_keyfile: Option<PathBuf>,

    /// Certificates (PEM) that clients' certificates must come from; read again like the others [default: no client is
    /// asked].
    #[arg(long, value_name = "FILE")]
    pub ssl_ca_certs: Option<PathBuf>,

    /// Whether clients need a certificate; 0, 1 and 2 are Python's names [default: required with `--ssl-ca-certs`].
    #[arg(long, value_name = "WHETHER")]
    pub ssl_cert_reqs: Option<CertificateRequirement>,

    /// `text` for people, `json` for machines [default: text].
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// error, warn, info, debug, or filters such as `info,lapidary_engine=debug` [default: info].
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,

    /// Collector that gets a trace of each request, by OTLP over HTTP (http://localhost:4318) [default: none].
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<String>,
}

/// Which waiting request runs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SchedulingPolicy {
    /// First come, first served.
    Fcfs,
    /// Lower `priority` first.
    Priority,
}

/// Where sampling defaults come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GenerationConfigSource {
    /// The checkpoint's `generation_config.json`.
    Auto,
    /// OpenAI's and vLLM's neutral values.
    Vllm,
}

/// What happens to system messages, which Gemma-2's own template refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SystemRoleSetting {
    /// Put in front of the first user turn.
    Merge,
    /// Answered 400.
    Error,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceSetting {
    /// The first NVIDIA GPU, or the CPU where there is none.
    Auto,
    /// The first NVIDIA GPU.
    Cuda,
    /// The CPU.
    Cpu,
}

/// How keys and values are kept, by vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum KvCacheDtypeSetting {
    /// As the device computes, whatever the checkpoint has scales for: bf16 on a GPU, f32 on a CPU.
    Auto,
    /// FP8 with 4 bits of exponent and 3 of mantissa.
    Fp8,
    /// The same.
    #[serde(rename = "fp8_e4m3")]
    #[value(name = "fp8_e4m3")]
    Fp8E4m3,
}

impl KvCacheDtypeSetting {
    /// As it was typed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fp8 => "fp8",
            Self::Fp8E4m3 => "fp8_e4m3",
        }
    }

    /// What it means.
    #[must_use]
    pub fn dtype(self) -> KvCacheDtype {
        match self {
            Self::Auto => KvCacheDtype::Native,
            Self::Fp8 | Self::Fp8E4m3 => KvCacheDtype::Fp8E4m3,
        }
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Whether clients need a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CertificateRequirement {
    /// None is asked for.
    #[value(alias = "0")]
    None,
    /// One that is shown must be good.
    #[value(alias = "1")]
    Optional,
    /// Without a good one there is no connection.
    #[value(alias = "2")]
    Required,
}

impl Settings {
    /// The values in effect where nothing is typed. Settings absent here depend on the model or the machine.
    #[must_use]
    pub fn defaults() -> Self {
        let seconds = |seconds| Some(Span(std::time::Duration::from_secs(seconds)));
        Self {
            model: Some("demo".to_owned()),
            host: Some("127.0.0.1".to_owned()),
            port: Some(8000),
            served_model_name: None,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_num_queued_reqs: Some(512),
            max_num_queued_tokens: Some(1_000_000),
            max_queue_wait: Some(Span(std::time::Duration::from_secs(10))),
            scheduling_policy: Some(SchedulingPolicy::Fcfs),
            enable_prefix_caching: Some(true),
            block_size: Some(16),
            kv_cache_dtype: Some(KvCacheDtypeSetting::Auto),
            kv_cache_memory_bytes: None,
            gpu_memory_utilization: Some(0.9),
            enforce_eager: Some(false),
            step_timeout: None,
            max_logprobs: Some(20),
            trust_request_chat_template: Some(false),
            enable_prompt_tokens_details: Some(true),
            enable_force_include_usage: Some(false),
            enable_per_request_metrics: Some(false),
            generation_config: Some(GenerationConfigSource::Auto),
            chat_template: None,
            system_role: Some(SystemRoleSetting::Merge),
            query_pre_attn_scalar: None,
            revision: Some("main".to_owned()),
            download_dir: None,
            device: Some(DeviceSetting::Auto),
            threads: None,
            dtype: Some("auto".to_owned()),
            tensor_parallel_size: Some(1),
            sse_keep_alive_interval: seconds(15),
            request_timeout: seconds(0),
            queue_timeout: seconds(0),
            shutdown_timeout: seconds(30),
            drain_grace: seconds(2),
            max_connections: Some(4096),
            header_read_timeout: seconds(75),
            write_timeout: seconds(60),
            api_key: None,
            api_key_file: None,
            unauthenticated_metrics: Some(false),
            ui: Some(true),
            max_concurrency_per_key: None,
            tokens_per_minute_per_key: None,
            allowed_origins: None,
            allowed_methods: None,
            allowed_headers: None,
            allow_credentials: Some(false),
            root_path: None,
            ssl_certfile: None,
            ssl_keyfile: None,
            ssl_ca_certs: None,
            ssl_cert_reqs: None,
            log_format: Some(LogFormat::Text),
            log_level: Some("info".to_owned()),
            otlp_traces_endpoint: None,
        }
    }
}
