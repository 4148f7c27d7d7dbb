//! Checks what a client asked for and turns it into the engine's terms.

use std::hash::{BuildHasher, RandomState};
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock};

use lapidary_engine::{SamplingParams, TokenId};
use lapidary_text::{StopError, StopMatcher};

use super::Endpoint;
use super::prompt::Truncation;
use super::structured::{self, Form};
use super::tools::{self, Tools};
use super::types::{Extension, GenerationBody, LogitBias, Logprobs, Stop, StreamOptions};
use super::vocabulary::Vocabulary;
use crate::bounded::ShortText;
use crate::error::{ApiError, shorten};
use crate::lenient::{Flag, Int, Number, Object};
use crate::state::{Limits, ServedModel};

/// `max_tokens` of a completion that does not say: OpenAI's.
const DEFAULT_COMPLETION_TOKENS: u32 = 16;

/// A request's parameters, checked.
#[derive(Debug)]
pub(crate) struct Params {
    /// Answers for each prompt.
    pub(crate) n: u32,
    /// `None` leaves it to the context.
    pub(crate) max_tokens: Option<u32>,
    /// The client named `max_tokens`: it is refused, not shortened, if the context has no room for so many.
    pub(crate) max_tokens_was_given: bool,
    /// No stop token before so many.
    pub(crate) min_tokens: u32,
    /// The seed in it is not the request's: see [`Params::seed_of`].
    pub(crate) sampling: SamplingParams,
    /// The client's seed.
    seed: Option<i64>,
    /// What the seeds of a request without one start from.
    random_seed: u64,
    /// Stop tokens of model and request.
    pub(crate) stop_token_ids: Arc<[TokenId]>,
    /// Whether stopping at the model's end-of-sequence token goes without saying.
    pub(crate) eos_is_silent: bool,
    /// Fresh; each answer gets a copy.
    pub(crate) stop: StopMatcher,
    /// What `stop` looks for.
    pub(crate) stop_strings: Arc<[String]>,
    /// A stop token's text is part of the answer.
    pub(crate) include_stop: bool,
    /// Special tokens are no part of the answer.
    pub(crate) skip_special_tokens: bool,
    /// What is left of prompts.
    pub(crate) truncation: Option<Truncation>,
    /// The answer begins with the prompt.
    pub(crate) echo: bool,
    /// Alternatives to name for each prompt token, in a field of their own.
    pub(crate) prompt_logprobs: Option<u32>,
    /// Token ids are part of the answer.
    pub(crate) returns_token_ids: bool,
    /// Log-probabilities name tokens by id.
    pub(crate) names_tokens_by_id: bool,
    /// Lower first.
    pub(crate) priority: i32,
    /// Separates prefix caches.
    pub(crate) cache_salt: u128,
    /// What the answer must look like.
    pub(crate) form: Option<Form>,
    /// Which tokens it may use.
    pub(crate) vocabulary: Vocabulary,
    /// What it may call.
    pub(crate) tools: Option<Tools>,
    /// `None`: one body at the end.
    pub(crate) stream: Option<Streaming>,
}

/// How to stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streaming {
    /// A last chunk with usage.
    pub(crate) include_usage: bool,
    /// Usage in every chunk.
    pub(crate) continuous_usage: bool,
}

impl Params {
    /// Checks all of `body` that does not depend on the prompt.
    pub(crate) fn new(
        endpoint: Endpoint,
        body: &GenerationBody,
        model: &ServedModel,
        limits: &Limits,
    ) -> Result<Self, ApiError> {
        refuse_unsupported(body)?;
        let n = integer("n", body.n, 1..=i64::from(u32::MAX), "n must be at least 1")?.unwrap_or(1);
        if i64::from(limits.max_sequences_per_request) < n {
            let limit = limits.max_sequences_per_request;
            return Err(above("n", format!("n must be at most {limit}, got {n}.")));
        }
        let (max_tokens, min_tokens) = token_limits(endpoint, body)?;
        let form = structured::form(body)?;
        let tools = match endpoint {
            Endpoint::Chat | Endpoint::Responses => tools::tools(body, form.as_ref())?,
            Endpoint::Completions => None,
        };
        let is_held = form.is_some() || tools.is_some();
        let ignore_eos = is_set(body.ignore_eos);
        // A form that is complete has to end; until then it goes on for as long as it can.
        let (ignore_eos, min_tokens) = match is_held && ignore_eos {
            true => (false, u32::MAX),
            false => (ignore_eos, min_tokens),
        };
        let (stop_token_ids, eos_is_silent) = stop_tokens(body, model, ignore_eos)?;
        let stop_strings = match &body.stop {
            Some(Stop(strings)) => strings.clone(),
            None => Vec::new(),
        };
        let include_stop = is_set(body.include_stop_str_in_output);
        let seed = body.seed.map(|Int(seed)| seed);
        Ok(Self {
            n: u32::try_from(n).expect("n is bounded by a u32"),
            max_tokens,
            max_tokens_was_given: body.max_completion_tokens.or(body.max_tokens).is_some(),
            min_tokens,
            sampling: sampling(endpoint, body, model, limits)?,
            seed,
            random_seed: crate::request_id::random_u64(),
            stop_token_ids,
            eos_is_silent,
            stop: stop_matcher(&stop_strings, include_stop, limits)?,
            stop_strings: stop_strings.into(),
            include_stop,
            skip_special_tokens: body.skip_special_tokens.is_none_or(|Flag(skip)| skip),
            truncation: truncation(body, max_tokens, model.max_model_len)?,
            echo: endpoint == Endpoint::Completions && is_set(body.echo),
            prompt_logprobs: prompt_logprobs(body, limits)?,
            returns_token_ids: is_set(body.return_token_ids),
            names_tokens_by_id: is_set(body.return_tokens_as_token_ids),
            priority: priority(body.priority, limits)?,
            cache_salt: cache_salt(body.cache_salt.as_ref().map(|ShortText(salt)| salt.as_str()))?,
            form,
            vocabulary: Vocabulary::new(body, model.vocab_size)?,
            tools,
            stream: streaming(body, limits)?,
        })
    }

    /// Alternatives of each token of an echoed prompt, if they are part of its log-probabilities.
    pub(crate) fn echoed_logprobs(&self) -> Option<u32> {
        self.sampling.logprobs.filter(|_| self.echo)
    }

    /// Alternatives the engine finds for each prompt token, if anybody wants to know the prompt's log-probabilities.
    pub(crate) fn scores(&self) -> Option<u32> {
        self.prompt_logprobs.max(self.echoed_logprobs())
    }

    /// The seed of one answer.
    ///
    /// A client's seed counts from itself for each prompt, so that a prompt's answers do not depend on the prompts sent
    /// along with it. Without one, equal prompts of a batch must still differ.
    pub(crate) fn seed_of(&self, prompt_index: u32, choice: u32) -> u64 {
        match self.seed {
            Some(seed) => seed.cast_unsigned().wrapping_add(u64::from(choice)),
            None => self
                .random_seed
                .wrapping_add(u64::from(prompt_index) << 32 | u64::from(choice)),
        }
    }
}

fn is_set(flag: Option<Flag>) -> bool {
    flag.is_some_and(|Flag(is_set)| is_set)
}

fn above(param: &'static str, message: String) -> ApiError {
    ApiError::InvalidRequest {
        message,
        param: Some(param.into()),
        code: Some("integer_above_max_value"),
    }
}

/// An integer in range; `complaint` is the start of the message otherwise.
fn integer(
    param: &'static str,
    value: Option<Int>,
    range: RangeInclusive<i64>,
    complaint: &str,
) -> Result<Option<i64>, ApiError> {
    match value {
        Some(Int(value)) if !range.contains(&value) => Err(ApiError::InvalidRequest {
            message: format!("{complaint}, got {value}."),
            param: Some(param.into()),
            code: Some(if value < *range.start() {
                "integer_below_min_value"
            } else {
                "integer_above_max_value"
            }),
        }),
        Some(Int(value)) => Ok(Some(value)),
        None => Ok(None),
    }
}

/// A number that `is_valid`, or the default; `complaint` is the start of the message otherwise.
#[expect(clippy::cast_possible_truncation, reason = "sampling computes in f32")]
fn number(
    param: &'static str,
    value: Option<Number>,
    default: f32,
    is_valid: impl Fn(f64) -> bool,
    complaint: &str,
) -> Result<f32, ApiError> {
    match value {
        Some(Number(value)) if !is_valid(value) => Err(ApiError::InvalidRequest {
            message: format!("{complaint}, got {value:?}."),
            param: Some(param.into()),
            code: Some("decimal_out_of_range"),
        }),
        Some(Number(value)) => Ok(value as f32),
        None => Ok(default),
    }
}

fn sampling(
    endpoint: Endpoint,
    body: &GenerationBody,
    model: &ServedModel,
    limits: &Limits,
) -> Result<SamplingParams, ApiError> {
    let defaults = &model.defaults;
    let penalty = |value: f64| (-2.0..=2.0).contains(&value);
    let temperature = match body.temperature {
        Some(Number(value)) if value < 0.0 => number(
            "temperature",
            body.temperature,
            1.0,
            |_| false,
            "temperature must be non-negative",
        )?,
        given => {
            let is_valid = |value: f64| (0.0..=2.0).contains(&value);
            number(
                "temperature",
                given,
                defaults.temperature,
                is_valid,
                "temperature must be in [0, 2]",
            )?
        }
    };
    let top_k = match body.top_k {
        // vLLM's older spelling of "off".
        Some(Int(-1)) => 0,
        given => {
            let range = 0..=i64::from(u32::MAX);
            let top_k = integer("top_k", given, range, "top_k must be 0 (disable), or at least 1")?;
            top_k.map_or(defaults.top_k, |top_k| u32::try_from(top_k).expect("checked"))
        }
    };
    let is_share = |value: f64| (0.0..=1.0).contains(&value);
    let repetition = "repetition_penalty must be greater than zero";
    Ok(SamplingParams {
        temperature,
        top_p: number(
            "top_p",
            body.top_p,
            defaults.top_p,
            |p| p > 0.0 && p <= 1.0,
            "top_p must be in (0, 1]",
        )?,
        top_k,
        min_p: number("min_p", body.min_p, defaults.min_p, is_share, "min_p must be in [0, 1]")?,
        presence_penalty: number(
            "presence_penalty",
            body.presence_penalty,
            0.0,
            penalty,
            "presence_penalty must be in [-2, 2]",
        )?,
        frequency_penalty: number(
            "frequency_penalty",
            body.frequency_penalty,
            0.0,
            penalty,
            "frequency_penalty must be in [-2, 2]",
        )?,
        repetition_penalty: number(
            "repetition_penalty",
            body.repetition_penalty,
            defaults.repetition_penalty,
            // What f32 rounds to zero or infinity would make logits NaN.
            |penalty| penalty >= f64::from(f32::MIN_POSITIVE) && penalty <= f64::from(f32::MAX),
            repetition,
        )?,
        logit_bias: logit_bias(body.logit_bias.as_ref(), model.vocab_size)?,
        seed: 0,
        logprobs: logprobs(endpoint, body, limits)?,
    })
}

fn logprobs(endpoint: Endpoint, body: &GenerationBody, limits: &Limits) -> Result<Option<u32>, ApiError> {
    let (param, count) = match endpoint {
        Endpoint::Chat | Endpoint::Responses => {
            let wanted = matches!(body.logprobs, Some(Logprobs::Flag(true) | Logprobs::Count(1..)));
            match body.top_logprobs {
                Some(Int(count)) if count != 0 && !wanted => {
                    let message = "when using `top_logprobs`, `logprobs` must be set to true.";
                    return Err(ApiError::invalid("top_logprobs", message));
                }
                Some(Int(count)) if count < -1 => {
                    return Err(ApiError::invalid(
                        "top_logprobs",
                        "`top_logprobs` must be a positive value or -1.",
                    ));
                }
                _ if !wanted => return Ok(None),
                count => ("top_logprobs", count.map_or(0, |Int(count)| count)),
            }
        }
        Endpoint::Completions => match body.logprobs {
            None | Some(Logprobs::Flag(false)) => return Ok(None),
            Some(Logprobs::Flag(true)) => {
                return Err(ApiError::invalid("logprobs", "logprobs must be an integer, got true."));
            }
            Some(Logprobs::Count(count)) if count < -1 => {
                return Err(ApiError::invalid(
                    "logprobs",
                    format!("logprobs must be non-negative or -1, got {count}."),
                ));
            }
            Some(Logprobs::Count(count)) => ("logprobs", count),
        },
    };
    match u32::try_from(count) {
        Ok(count) if count <= limits.max_logprobs => Ok(Some(count)),
        // -1 asks for the whole vocabulary.
        _ => Err(above(
            param,
            format!(
                "Requested {param} of {count}, which is greater than max allowed: {}.",
                limits.max_logprobs
            ),
        )),
    }
}

fn prompt_logprobs(body: &GenerationBody, limits: &Limits) -> Result<Option<u32>, ApiError> {
    let Some(Int(count)) = body.prompt_logprobs else {
        return Ok(None);
    };
    if is_set(body.stream) {
        let message = "`prompt_logprobs` are not available when `stream=True`.";
        return match count {
            // There is no place for them, and nobody misses none.
            0 => Ok(None),
            _ => Err(ApiError::invalid("prompt_logprobs", message)),
        };
    }
    match u32::try_from(count) {
        Ok(count) if count <= limits.max_logprobs => Ok(Some(count)),
        Err(_) if count < -1 => Err(ApiError::invalid(
            "prompt_logprobs",
            "`prompt_logprobs` must be a positive value or -1.",
        )),
        _ => Err(above(
            "prompt_logprobs",
            format!(
                "Requested prompt logprobs of {count}, which is greater than max allowed: {}.",
                limits.max_logprobs
            ),
        )),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "clamped first; logits are f32")]
fn logit_bias(bias: Option<&LogitBias>, vocab_size: u32) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(LogitBias(entries)) = bias else {
        return Ok(Vec::new());
    };
    let (mut biases, mut bad_keys) = (Vec::with_capacity(entries.len()), Vec::new());
    for (key, Number(value)) in entries {
        match key.trim().parse::<i64>() {
            Ok(id) => match TokenId::try_from(id).ok().filter(|id| *id < vocab_size) {
                Some(id) => biases.push((id, value.clamp(-100.0, 100.0) as f32)),
                None => {
                    let message = format!("logit_bias names token {id}, but the vocabulary has {vocab_size} tokens.");
                    return Err(ApiError::invalid("logit_bias", message));
                }
            },
            Err(_) => bad_keys.push(shorten(key)),
        }
    }
    if !bad_keys.is_empty() {
        let keys = format!("{bad_keys:?}");
        let message = format!(
            "logit_bias contains key(s) that cannot be converted to integer token IDs: {}.",
            shorten(&keys)
        );
        return Err(ApiError::invalid("logit_bias", message));
    }
    // A token named twice (as "1" and "01") gets the last of its values, as in a Python dict.
    biases.reverse();
    biases.sort_by_key(|(id, _)| *id);
    biases.dedup_by_key(|(id, _)| *id);
    Ok(biases)
}

fn token_limits(endpoint: Endpoint, body: &GenerationBody) -> Result<(Option<u32>, u32), ApiError> {
    let (param, given) = match body.max_completion_tokens {
        Some(_) => ("max_completion_tokens", body.max_completion_tokens),
        None => ("max_tokens", body.max_tokens),
    };
    // The prompt alone may be what is asked for.
    let may_be_none = endpoint == Endpoint::Completions && is_set(body.echo) || body.prompt_logprobs.is_some();
    let range = i64::from(!may_be_none)..=i64::MAX;
    let max_tokens = integer(param, given, range, "max_tokens must be at least 1")?;
    // More than a u32 is more than any context: the length check refuses it with the numbers.
    let max_tokens = max_tokens.map(|max_tokens| u32::try_from(max_tokens).unwrap_or(u32::MAX));
    let max_tokens = match endpoint {
        Endpoint::Completions => max_tokens.or(Some(DEFAULT_COMPLETION_TOKENS)),
        Endpoint::Chat | Endpoint::Responses => max_tokens,
    };
    let complaint = "min_tokens must be greater than or equal to 0";
    let min_tokens = integer("min_tokens", body.min_tokens, 0..=i64::MAX, complaint)?.unwrap_or(0);
    match max_tokens {
        Some(max_tokens) if min_tokens > i64::from(max_tokens) => Err(above(
            "min_tokens",
            format!("min_tokens must be less than or equal to max_tokens={max_tokens}, got {min_tokens}."),
        )),
        _ => Ok((max_tokens, u32::try_from(min_tokens).unwrap_or(u32::MAX))),
    }
}

fn stop_tokens(
    body: &GenerationBody,
    model: &ServedModel,
    ignore_eos: bool,
) -> Result<(Arc<[TokenId]>, bool), ApiError> {
    let given = body.stop_token_ids.as_deref().unwrap_or_default();
    let asked = given.iter().enumerate().map(|(index, &Int(id))| {
        TokenId::try_from(id)
            .ok()
            .filter(|id| *id < model.vocab_size)
            .ok_or_else(|| {
                let message = format!(
                    "stop_token_ids names token {id}, but the vocabulary has {} tokens.",
                    model.vocab_size
                );
                ApiError::invalid(format!("stop_token_ids[{index}]"), message)
            })
    });
    let mut ids = asked.collect::<Result<Vec<_>, _>>()?;
    let eos_is_silent = !ids.contains(&model.eos_token_id);
    if !ignore_eos {
        ids.extend_from_slice(&model.stop_token_ids);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok((ids.into(), eos_is_silent))
}

fn stop_matcher(strings: &[String], include_stop: bool, limits: &Limits) -> Result<StopMatcher, ApiError> {
    if strings.len() > limits.max_stop_strings {
        return Err(ApiError::InvalidRequest {
            message: format!(
                "stop has {} strings, the limit is {}.",
                strings.len(),
                limits.max_stop_strings
            ),
            param: Some("stop".into()),
            code: Some("array_above_max_length"),
        });
    }
    StopMatcher::new(strings, include_stop).map_err(|error| match error {
        StopError::Empty { .. } => ApiError::invalid("stop", "stop cannot contain an empty string."),
        error => ApiError::invalid("stop", format!("{error}.")),
    })
}

fn truncation(
    body: &GenerationBody,
    max_tokens: Option<u32>,
    max_model_len: u32,
) -> Result<Option<Truncation>, ApiError> {
    let keeps_end = match body.truncation_side.as_deref() {
        None | Some("left") => true,
        Some("right") => false,
        Some(other) => {
            let message = format!("truncation_side must be 'left' or 'right', got '{}'.", shorten(other));
            return Err(ApiError::invalid("truncation_side", message));
        }
    };
    let num_tokens = match body.truncate_prompt_tokens {
        None => return Ok(None),
        // As many as leave room for the answer.
        Some(Int(-1)) => max_model_len.saturating_sub(max_tokens.unwrap_or(1)).max(1),
        Some(Int(count)) if count > i64::from(max_model_len) => {
            let message = format!(
                "truncate_prompt_tokens value ({count}) is greater than max_model_len ({max_model_len}). Please request a \
                 smaller truncation size."
            );
            return Err(above("truncate_prompt_tokens", message));
        }
        given => {
            let complaint = "truncate_prompt_tokens must be -1 or at least 1";
            let count = integer("truncate_prompt_tokens", given, 1..=i64::MAX, complaint)?.unwrap_or(1);
            u32::try_from(count).expect("bounded by the context")
        }
    };
    Ok(Some(Truncation { num_tokens, keeps_end }))
}

/// Any client could name itself the most important one: the operator has to want that.
fn priority(priority: Option<Int>, limits: &Limits) -> Result<i32, ApiError> {
    let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
    let priority = integer("priority", priority, range, "priority must fit in 32 bits")?.unwrap_or(0);
    if priority != 0 && !limits.allows_priority {
        let message = format!(
            "Got priority {priority} but priority scheduling is not enabled (--scheduling-policy priority enables it)."
        );
        return Err(ApiError::unsupported("priority", message));
    }
    Ok(i32::try_from(priority).expect("checked"))
}

/// Hashed with keys of this process, so that no client can compute another tenant's salt.
fn cache_salt(salt: Option<&str>) -> Result<u128, ApiError> {
    static KEYS: OnceLock<[RandomState; 2]> = OnceLock::new();
    match salt {
        None => Ok(0),
        Some("") => Err(ApiError::invalid(
            "cache_salt",
            "cache_salt must be a non-empty string if provided.",
        )),
        Some(salt) => {
            let [low, high] = KEYS.get_or_init(|| [RandomState::new(), RandomState::new()]);
            Ok(u128::from(low.hash_one(salt)) | u128::from(high.hash_one(salt)) << 64)
        }
    }
}

fn streaming(body: &GenerationBody, limits: &Limits) -> Result<Option<Streaming>, ApiError> {
    match (is_set(body.stream), &body.stream_options) {
        (false, Some(_)) => Err(ApiError::invalid(
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        )),
        (false, None) => Ok(None),
        (true, None) => Ok(Some(Streaming {
            include_usage: limits.force_include_usage,
            continuous_usage: false,
        })),
        (
            true,
            Some(Object(StreamOptions {
                include_usage,
                continuous_usage_stats,
            })),
        ) => {
            let include_usage = limits.force_include_usage || is_set(*include_usage);
            Ok(Some(Streaming {
                include_usage,
                continuous_usage: include_usage && is_set(*continuous_usage_stats),
            }))
        }
    }
}

fn refuse_unsupported(body: &GenerationBody) -> Result<(), ApiError> {
    let used: [(&'static str, Extension); 6] = [
        ("audio", body.audio),
        ("prediction", body.prediction),
        ("suffix", body.suffix),
        ("use_beam_search", body.use_beam_search),
        ("prompt_embeds", body.prompt_embeds),
        ("logprob_token_ids", body.logprob_token_ids),
    ];
    if let Some(message) = best_of(body) {
        return Err(ApiError::unsupported("best_of", message));
    }
    if let Some((param, _)) = used.iter().find(|(_, extension)| extension.is_used) {
        return Err(ApiError::unsupported(*param, format!("{param} is not supported.")));
    }
    if body.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::unsupported(
            "modalities",
            "Only the modality 'text' is supported.",
        ));
    }
    Ok(())
}

/// What is wrong with `best_of`. Asking for the best of as many as are returned is no use of it.
fn best_of(body: &GenerationBody) -> Option<String> {
    let n = body.n.map_or(1, |Int(n)| n);
    let Int(best_of) = body.best_of.filter(|Int(best_of)| *best_of != n)?;
    Some(format!(
        "best_of of {best_of} with n of {n} is not supported: answers are not ranked, all that are generated are returned. \
         Leave best_of out or make it equal to n."
    ))
}
