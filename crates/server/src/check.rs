//! `lapidary check`: everything that is known of a checkpoint without a device, and everything that is wrong with it.

mod print;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use lapidary_engine::TokenId;
use lapidary_model::{
    ActivationScheme, Checkpoint, CheckpointReport, KvCacheDtype, KvScales, MemoryPlan, ModelConfig, Problems,
    ProjectionScales, StepLimits,
};
use lapidary_text::Tokenizer;
use serde::Serialize;

use crate::cli::{CheckArgs, ServeArgs, Settings};
use crate::config::{Config, ConfigError, Environment};
use crate::lifecycle::Phase;
use crate::load::{self, LoadError};
use crate::logging::CauseChain;
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::state::AppState;
use crate::units::ByteSize;

/// Weights beyond this are no language model's: with the largest e4m3 value, a scale stands for weights 448 times as large.
const SUSPICIOUS_WEIGHT_SCALE: f32 = 1.0;
/// Gemma's activations reach some ten thousands.
const SUSPICIOUS_INPUT_SCALE: f32 = 1e3;
/// Scales of one stack that are this far apart were not made for one another.
const SUSPICIOUS_RATIO: f32 = 1e4;

/// Sequences and tokens of a step on a GPU where nothing else is said: what `serve` takes there.
const GPU_BATCH: (u32, u32) = (256, 4096);

/// What a checkpoint is, and what is wrong with it. Absent parts could not be found out.
#[derive(Debug, Serialize)]
pub struct Report {
    /// As it was typed.
    pub model: String,
    /// Whether it can be served.
    pub is_sound: bool,
    /// What stands in the way.
    pub faults: Vec<Fault>,
    /// What does not.
    pub warnings: Vec<String>,
    /// Shape and constants.
    pub architecture: Option<Architecture>,
    /// Of the weights.
    pub tensors: Option<Tensors>,
    /// Of the projections of every layer; empty without FP8.
    pub scales: Vec<Scales>,
    /// Of keys and values, layer by layer; empty unless they are to be kept as FP8.
    pub kv_scales: Vec<KeyValueScales>,
    /// Text to tokens.
    pub tokenizer: Option<TokenizerFacts>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<StopToken>,
    /// What it takes, and what a device has room for.
    pub memory: Option<Memory>,
}

/// One thing that is wrong.
#[derive(Debug, Serialize)]
pub struct Fault {
    /// `checkpoint`, `weights`, `tokenizer`, `chat template` or `memory`.
    pub part: &'static str,
    /// Names the file, tensor or token.
    pub message: String,
}

/// Shape and constants of a model.
#[derive(Debug, Serialize)]
pub struct Architecture {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Positions it was trained for.
    pub max_position_embeddings: usize,
    /// Of the layers that have one.
    pub sliding_window: Option<usize>,
    /// Attention scores are multiplied by this to the power -0.5.
    pub query_pre_attn_scalar: f32,
    /// Parameters, the embedding counted once.
    pub parameters: u64,
    /// Whether linear layers are stored in FP8.
    pub is_quantized: bool,
}

/// Of the weight files.
#[derive(Debug, Serialize)]
pub struct Tensors {
    /// Those that the model uses.
    pub count: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Scales of projections that run as one.
#[derive(Debug, Serialize)]
pub struct Scales {
    /// Decoder layer.
    pub layer: usize,
    /// `q_proj, k_proj, v_proj`, say.
    pub projections: String,
    /// Smallest scale of the weights.
    pub weight_min: f32,
    /// Largest scale of the weights.
    pub weight_max: f32,
    /// `none`, `token` or `static`.
    pub input: &'static str,
    /// Where it is static.
    pub input_scale: Option<f32>,
}

/// What a layer's keys and values are divided by before they become FP8.
#[derive(Debug, Serialize)]
pub struct KeyValueScales {
    /// Decoder layer.
    pub layer: usize,
    /// Of keys.
    pub key: f32,
    /// Of values.
    pub value: f32,
}

/// What the tokenizer is.
#[derive(Debug, Serialize)]
pub struct TokenizerFacts {
    /// One more than the largest id.
    pub tokens: usize,
    /// Rows of the embedding table; at least as many.
    pub embedding_rows: usize,
    /// Whether a prompt begins with `<bos>`.
    pub adds_bos: bool,
    /// Whether chats can be served.
    pub has_chat_template: bool,
}

/// A token that ends an answer.
#[derive(Debug, Serialize)]
pub struct StopToken {
    /// Its id.
    pub id: TokenId,
    /// Its text, if the tokenizer knows it.
    pub text: Option<String>,
    /// Files that name it. Every one may forget one, so all are believed.
    pub named_by: Vec<&'static str>,
}

/// What a model takes on a device that computes in bf16.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// As stored.
    pub weight_bytes: u64,
    /// Activations of the largest step.
    pub scratch_bytes: u64,
    /// How keys and values are kept: `bf16` or `fp8_e4m3`.
    pub kv_cache_dtype: &'static str,
    /// Keys and values of all layers.
    pub kv_bytes_per_token: u64,
    /// For a device of the size that was named.
    pub device: Option<Capacity>,
}

/// What a device has room for.
#[derive(Debug, Serialize)]
pub struct Capacity {
    /// In all.
    pub device_bytes: u64,
    /// Left for keys and values.
    pub kv_cache_bytes: u64,
    /// Tokens whose keys and values fit.
    pub kv_cache_tokens: u64,
    /// Prompt and answer together.
    pub max_model_len: u32,
    /// Sequences of that length at the same time.
    pub full_sequences: u64,
}

/// Examines the checkpoint that `args` name. Reads all of it.
///
/// # Errors
/// Settings that make no sense. What is wrong with the checkpoint is in the report.
pub fn check(args: &CheckArgs, environment: &Environment) -> Result<Report, ConfigError> {
    let config = Config::resolve(&serve_args(args), environment)?;
    let state = AppState::new(config.limits.clone(), Metrics::new(&args.model));
    let mut report = Report::new(&args.model);
    match load::open(&config, &state) {
        Ok(checkpoint) => report.examine(args, &config, &state, &checkpoint),
        Err(error) => report.fault("checkpoint", &error),
    }
    report.is_sound = report.faults.is_empty();
    Ok(report)
}

fn serve_args(args: &CheckArgs) -> ServeArgs {
    ServeArgs {
        model_positional: Some(args.model.clone()),
        config: None,
        print_config: false,
        no_enable_prefix_caching: false,
        no_ui: false,
        settings: Settings {
            max_model_len: args.max_model_len,
            max_num_seqs: args.max_num_seqs,
            max_num_batched_tokens: args.max_num_batched_tokens,
            kv_cache_dtype: args.kv_cache_dtype,
            query_pre_attn_scalar: args.query_pre_attn_scalar,
            ..Settings::default()
        },
    }
}

impl Report {
    fn new(model: &str) -> Self {
        Self {
            model: model.to_owned(),
            is_sound: false,
            faults: Vec::new(),
            warnings: Vec::new(),
            architecture: None,
            tensors: None,
            scales: Vec::new(),
            kv_scales: Vec::new(),
            tokenizer: None,
            stop_tokens: Vec::new(),
            memory: None,
        }
    }

    fn fault(&mut self, part: &'static str, error: &dyn std::error::Error) {
        let message = format!("{:#}", CauseChain(error));
        self.faults.push(Fault { part, message });
    }

    fn examine(&mut self, args: &CheckArgs, config: &Config, state: &AppState, checkpoint: &Checkpoint) {
        self.architecture = Some(Architecture::of(checkpoint.config()));
        self.examine_tokenizer(config, checkpoint);
        let kv_cache_dtype = config.scheduling.kv_cache_dtype.dtype();
        let progress = Progress::start(state, Phase::LoadingWeights);
        let verified = checkpoint.verify(kv_cache_dtype, &mut |step| {
            progress.set(step.done_bytes, step.total_bytes)
        });
        drop(progress);
        match verified {
            Ok(found) => {
                self.warnings.extend(found.warnings.iter().map(ToString::to_string));
                self.tensors = Some(Tensors {
                    count: found.num_tensors,
                    bytes: found.weight_bytes,
                });
                self.examine_scales(&found);
                self.examine_memory(args, config, checkpoint.config(), &found);
            }
            Err(problems) => {
                let warnings = checkpoint.warnings_for(kv_cache_dtype);
                self.warnings.extend(warnings.map(|warning| warning.to_string()));
                self.take_problems(&problems);
            }
        }
    }

    fn take_problems(&mut self, problems: &Problems) {
        let part = "weights";
        for problem in problems.listed() {
            self.fault(part, problem);
        }
        if problems.omitted() > 0 {
            let message = format!("and {} more", problems.omitted());
            self.faults.push(Fault { part, message });
        }
    }

    fn examine_tokenizer(&mut self, config: &Config, checkpoint: &Checkpoint) {
        let tokenizer = match load::load_tokenizer(checkpoint) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                self.fault("tokenizer", &error);
                self.stop_tokens = stop_tokens(checkpoint, None);
                return;
            }
        };
        if load::primary_eos(checkpoint, &tokenizer).is_none() {
            self.fault("tokenizer", &LoadError::NoEndOfSequence);
        }
        self.stop_tokens = stop_tokens(checkpoint, Some(&tokenizer));
        let rows = checkpoint.config().vocab_size;
        if let Some(token) = self.stop_tokens.iter().find(|token| token.id as usize >= rows) {
            let message = format!(
                "stop token {} of {} is beyond the {rows} rows of the embedding table",
                token.id,
                token.named_by.join(", ")
            );
            self.faults.push(Fault {
                part: "tokenizer",
                message,
            });
        }
        let template = load::load_chat_template(&config.load, checkpoint, &tokenizer);
        let has_chat_template = match template {
            Ok(template) => {
                if template.is_none() {
                    let warning = "there is no chat template: chat completions are refused, completions work";
                    self.warnings.push(warning.to_owned());
                }
                template.is_some()
            }
            Err(error) => {
                self.fault("chat template", &error);
                false
            }
        };
        self.tokenizer = Some(TokenizerFacts {
            tokens: tokenizer.vocab_size(),
            embedding_rows: rows,
            adds_bos: tokenizer.adds_bos(),
            has_chat_template,
        });
    }

    fn examine_scales(&mut self, found: &CheckpointReport) {
        self.scales = found.scales.iter().filter_map(Scales::of).collect();
        let of_layer = |(layer, scales): (usize, &KvScales)| KeyValueScales {
            layer,
            key: scales.key,
            value: scales.value,
        };
        self.kv_scales = found.kv_scales.iter().enumerate().map(of_layer).collect();
        for scales in &self.scales {
            self.warnings.extend(scales.suspicions());
        }
    }

    fn examine_memory(&mut self, args: &CheckArgs, config: &Config, model: &ModelConfig, found: &CheckpointReport) {
        let longest = model.max_position_embeddings as u32;
        let max_model_len = config.load.max_model_len.unwrap_or(longest);
        if max_model_len > longest {
            let message = format!("max-model-len is {max_model_len}, the model was made for {longest} positions");
            self.faults.push(Fault {
                part: "memory",
                message,
            });
        }
        let kv_cache_dtype = config.scheduling.kv_cache_dtype.dtype();
        let (max_seqs, max_tokens) = config.scheduling.batch_limits(GPU_BATCH);
        let limits = StepLimits {
            max_tokens: max_tokens as usize,
            max_seqs: max_seqs as usize,
            max_model_len: max_model_len as usize,
        };
        let device_bytes = args.memory.map_or(0, |size| size.0);
        let plan = MemoryPlan::estimate(
            model,
            found.weight_bytes,
            limits,
            config.scheduling.block_size,
            kv_cache_dtype,
            device_bytes,
            args.gpu_memory_utilization,
        );
        let usable = (device_bytes as f64 * args.gpu_memory_utilization) as u64;
        let device = args.memory.map(|_| Capacity {
            device_bytes,
            kv_cache_bytes: plan.kv_cache_bytes,
            kv_cache_tokens: plan.capacity_tokens(),
            max_model_len,
            full_sequences: plan.capacity_tokens() / u64::from(max_model_len),
        });
        if device.as_ref().is_some_and(|capacity| capacity.full_sequences == 0) {
            let (usable, weights) = (ByteSize(usable), ByteSize(plan.weight_bytes));
            let (scratch, longest) = (ByteSize(plan.scratch_bytes), u64::from(max_model_len));
            let sequence = ByteSize(longest * plan.kv_bytes_per_token);
            let message = format!(
                "not one sequence of {max_model_len} tokens fits into {usable}: weights {weights}, scratch {scratch}, its \
                 keys and values {sequence}"
            );
            self.faults.push(Fault {
                part: "memory",
                message,
            });
        }
        self.memory = Some(Memory {
            weight_bytes: plan.weight_bytes,
            scratch_bytes: plan.scratch_bytes,
            kv_cache_dtype: match kv_cache_dtype {
                KvCacheDtype::Native => "bf16",
                KvCacheDtype::Fp8E4m3 => "fp8_e4m3",
            },
            kv_bytes_per_token: plan.kv_bytes_per_token,
            device,
        });
    }
}

impl Architecture {
    fn of(config: &ModelConfig) -> Self {
        Self {
            layers: config.num_layers,
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_position_embeddings: config.max_position_embeddings,
            sliding_window: config.windows.iter().flatten().copied().next(),
            query_pre_attn_scalar: config.query_pre_attn_scalar,
            parameters: config.num_parameters(),
            is_quantized: config.quantization.is_quantized(),
        }
    }
}

impl Scales {
    /// `None` where nothing is quantised.
    fn of(found: &ProjectionScales) -> Option<Self> {
        let (weight_min, weight_max) = found.weights?;
        let short = |name: &String| {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            module.rsplit('.').next().unwrap_or(module).to_owned()
        };
        let (input, input_scale) = match found.input {
            ActivationScheme::None => ("none", None),
            ActivationScheme::Fp8Token => ("token", None),
            ActivationScheme::Fp8Static { scale } => ("static", Some(scale)),
        };
        Some(Self {
            layer: found.layer,
            projections: found.names.iter().map(short).collect::<Vec<_>>().join(", "),
            weight_min,
            weight_max,
            input,
            input_scale,
        })
    }

    /// What no quantiser that works writes, and what loads all the same.
    fn suspicions(&self) -> Vec<String> {
        let place = format!("layer {}, {}", self.layer, self.projections);
        let mut found = Vec::new();
        if self.weight_max > SUSPICIOUS_WEIGHT_SCALE {
            let largest = 448.0 * self.weight_max;
            found.push(format!(
                "{place}: a weight scale of {} stands for weights up to {largest}",
                self.weight_max
            ));
        }
        if self.weight_max / self.weight_min > SUSPICIOUS_RATIO {
            found.push(format!(
                "{place}: weight scales reach from {} to {}",
                self.weight_min, self.weight_max
            ));
        }
        if let Some(scale) = self.input_scale.filter(|scale| *scale > SUSPICIOUS_INPUT_SCALE) {
            found.push(format!("{place}: an input scale of {scale} makes small inputs vanish"));
        }
        found
    }
}

/// All tokens that end an answer, and who says so.
fn stop_tokens(checkpoint: &Checkpoint, tokenizer: Option<&Tokenizer>) -> Vec<StopToken> {
    let mut named_by: BTreeMap<TokenId, Vec<&'static str>> = BTreeMap::new();
    let mut name = |ids: &mut dyn Iterator<Item = TokenId>, file| {
        for id in ids {
            named_by.entry(id).or_default().push(file);
        }
    };
    name(&mut checkpoint.config().eos_token_ids.iter().copied(), "config.json");
    let generation = &checkpoint.generation_defaults().eos_token_ids;
    name(&mut generation.iter().copied(), "generation_config.json");
    if let Some(tokenizer) = tokenizer {
        name(&mut tokenizer.eos_id().into_iter(), "tokenizer_config.json");
        name(&mut tokenizer.end_of_turn_id().into_iter(), "<end_of_turn>");
    }
    let text = |id| {
        tokenizer
            .and_then(|tokenizer| tokenizer.token_str(id))
            .map(str::to_owned)
    };
    named_by
        .into_iter()
        .map(|(id, named_by)| StopToken {
            id,
            text: text(id),
            named_by,
        })
        .collect()
}
