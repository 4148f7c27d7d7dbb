//! The families of `/metrics`, in the order they appear.

use std::sync::atomic::Ordering::Relaxed;

use lapidary_engine::{EngineHandle, ITERATION_TOKENS_BUCKETS, StatsSnapshot};

use super::exposition::{Exposition, Labels, histogram, number};
use super::histogram::DurationHistogram;
use super::{ENDPOINTS, Metrics, Outcome, SequenceEnd, process};
use crate::lifecycle::{Lifecycle, Phase};
use crate::state::ServedModel;
use crate::traces::Tracer;

/// vLLM numbers the engines of a process; there is one here.
const ENGINE: &str = "0";

/// About the size of a scrape.
const CAPACITY: usize = 48 << 10;

/// The commit this was built from, as `build.rs` knows it.
const COMMIT: &str = match option_env!("BUILD_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

impl Metrics {
    /// One scrape.
    pub(crate) fn render(
        &self,
        lifecycle: &Lifecycle,
        model: Option<&ServedModel>,
        traces: Option<&Tracer>,
    ) -> prometheus::Result<String> {
        let mut out = Exposition::default();
        let labels = Labels::default()
            .with("model_name", &*self.model_name)
            .with("engine", ENGINE);
        if let Some(model) = model {
            write_engine(&mut out, &labels, model);
        }
        self.write_tokens(&mut out, &labels);
        // The buckets are complete while no model says where they end.
        let max_model_len = model.map_or(u64::MAX, |model| model.max_model_len.into());
        self.write_lengths(&mut out, &labels, max_model_len);
        self.write_latencies(&mut out, &labels);
        self.write_requests(&mut out, &labels);
        self.http.write(&mut out);
        if let Some(traces) = traces {
            write_traces(&mut out, traces);
        }
        write_server(&mut out, lifecycle, model);
        process::write(&mut out, self.started_seconds);
        out.into_text(CAPACITY)
    }

    fn write_tokens(&self, out: &mut Exposition, labels: &Labels) {
        let counters = [
            (
                "vllm:prompt_tokens_total",
                "Prompt tokens of answered requests.",
                &self.prompt_tokens,
            ),
            (
                "vllm:prompt_tokens_cached_total",
                "Prompt tokens that came from the prefix cache.",
                &self.prompt_tokens_cached,
            ),
            (
                "vllm:generation_tokens_total",
                "Generated tokens.",
                &self.generation_tokens,
            ),
        ];
        for (name, help, counter) in counters {
            out.counter(name, help, labels, number(counter.load(Relaxed)));
        }
        let (prompt, cached) = (
            self.prompt_tokens.load(Relaxed),
            self.prompt_tokens_cached.load(Relaxed),
        );
        out.counters(
            "vllm:prompt_tokens_by_source_total",
            "Prompt tokens of answered requests by where their keys and values came from.",
            [
                // The two are not read at one instant.
                ("local_compute", prompt.saturating_sub(cached)),
                ("local_cache_hit", cached),
                ("external_kv_transfer", 0),
            ]
            .map(|(source, count)| (labels.with("source", source), number(count))),
        );
    }

    fn write_lengths(&self, out: &mut Exposition, labels: &Labels, max_model_len: u64) {
        let histograms = [
            (
                "vllm:request_prompt_tokens",
                "Prompt tokens of an answer.",
                &self.sequence_prompt_tokens,
            ),
            (
                "vllm:request_generation_tokens",
                "Generated tokens of an answer.",
                &self.sequence_generation_tokens,
            ),
            (
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of the longest answer to a prompt.",
                &self.longest_generation_tokens,
            ),
            (
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of an answer that were computed, not found in the cache.",
                &self.prompt_computed_tokens,
            ),
            (
                "vllm:request_params_max_tokens",
                "max_tokens of an answer.",
                &self.params_max_tokens,
            ),
        ];
        for (name, help, histogram) in histograms {
            out.histogram(name, help, labels, histogram.snapshot(max_model_len));
        }
        let help = "Answers asked for by a request.";
        out.histogram("vllm:request_params_n", help, labels, self.params_n.snapshot(u64::MAX));
    }

    fn write_latencies(&self, out: &mut Exposition, labels: &Labels) {
        let histograms: [(&str, &str, &DurationHistogram); 12] = [
            (
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &self.time_to_first_token,
            ),
            (
                "vllm:inter_token_latency_seconds",
                "Between two tokens of an answer.",
                &self.inter_token_latency,
            ),
            (
                "vllm:time_per_output_token_seconds",
                "Old name of vllm:inter_token_latency_seconds.",
                &self.inter_token_latency,
            ),
            (
                "lapidary_inter_token_latency_seconds",
                "Between two tokens of an answer, in finer buckets.",
                &self.inter_token_latency_fine,
            ),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time between the tokens of an answer.",
                &self.time_per_output_token,
            ),
            (
                "vllm:e2e_request_latency_seconds",
                "From arrival to the last token.",
                &self.e2e_latency,
            ),
            (
                "lapidary_e2e_request_latency_seconds",
                "From arrival to the last token, in finer buckets.",
                &self.e2e_latency_fine,
            ),
            (
                "vllm:request_queue_time_seconds",
                "From submission to the first step.",
                &self.queue_time,
            ),
            (
                "vllm:request_inference_time_seconds",
                "From the first step to the last token.",
                &self.inference_time,
            ),
            (
                "vllm:request_prefill_time_seconds",
                "From the first step to the first token.",
                &self.prefill_time,
            ),
            (
                "vllm:request_decode_time_seconds",
                "From the first token to the last.",
                &self.decode_time,
            ),
            (
                "lapidary_queue_time_seconds",
                "From submission to the first step, in finer buckets.",
                &self.queue_fine,
            ),
        ];
        for (name, help, histogram) in histograms {
            out.histogram(name, help, labels, histogram.snapshot());
        }
    }

    fn write_requests(&self, out: &mut Exposition, labels: &Labels) {
        out.counters(
            "vllm:request_success_total",
            "Answers by how they ended.",
            SequenceEnd::ALL.map(|end| {
                let count = self.sequences[end as usize].load(Relaxed);
                (labels.with("finished_reason", end.as_str()), number(count))
            }),
        );
        let endpoint_labels = |endpoint: usize| Labels::default().with("endpoint", ENDPOINTS[endpoint]);
        out.counters(
            "lapidary_requests_received_total",
            "Requests on a generation endpoint, refused ones included; unknown: what was no HTTP.",
            self.received
                .iter()
                .enumerate()
                .map(|(endpoint, count)| (endpoint_labels(endpoint), number(count.load(Relaxed)))),
        );
        out.counters(
            "lapidary_requests_finished_total",
            "Requests by how they ended: each exactly once.",
            self.outcomes.iter().enumerate().flat_map(|(endpoint, counts)| {
                Outcome::ALL.map(|outcome| {
                    let count = counts[outcome as usize].load(Relaxed);
                    (
                        endpoint_labels(endpoint).with("outcome", outcome.as_str()),
                        number(count),
                    )
                })
            }),
        );
    }
}

fn write_engine(out: &mut Exposition, labels: &Labels, model: &ServedModel) {
    let engine = &model.engine;
    let stats = engine.stats();
    write_engine_gauges(out, labels, &stats);
    write_cache_config(out, model.kv_cache_dtype, engine);
    write_engine_counters(out, labels, &stats);
    write_iterations(out, labels, &stats);
    let heartbeat = engine.heartbeat();
    let stalled_seconds = if heartbeat.busy {
        heartbeat.since_progress.as_secs_f64()
    } else {
        0.0
    };
    let help = "How long the engine has had work without progress.";
    out.gauge("lapidary_engine_stalled_seconds", help, labels, stalled_seconds);
}

fn write_engine_gauges(out: &mut Exposition, labels: &Labels, stats: &StatsSnapshot) {
    let gauges = [
        (
            "vllm:num_requests_running",
            "Sequences that take part in steps.",
            stats.num_running,
        ),
        (
            "vllm:num_requests_waiting",
            "Sequences that wait, preempted ones included.",
            stats.num_waiting,
        ),
        (
            "lapidary_queued_requests",
            "Requests that wait for their first step.",
            stats.num_queued,
        ),
        (
            "lapidary_queued_tokens",
            "Prompt tokens of requests that wait for their first step.",
            stats.queued_tokens,
        ),
        (
            "lapidary_kv_blocks_free",
            "KV blocks that no sequence holds, cached ones included.",
            stats.blocks_free,
        ),
        (
            "lapidary_kv_blocks_cached",
            "KV blocks that the prefix cache can match.",
            stats.blocks_cached,
        ),
    ];
    for (name, help, value) in gauges {
        out.gauge(name, help, labels, number(value));
    }
    write_waiting(out, labels, stats.num_waiting);
    let usage = stats.kv_cache_usage();
    out.gauge(
        "vllm:kv_cache_usage_perc",
        "Share of the KV blocks in use, 0 to 1.",
        labels,
        usage,
    );
    out.gauge(
        "vllm:gpu_cache_usage_perc",
        "Old name of vllm:kv_cache_usage_perc.",
        labels,
        usage,
    );
}

/// Here a sequence waits for room and for nothing else; and the engine never sleeps.
fn write_waiting(out: &mut Exposition, labels: &Labels, num_waiting: u64) {
    out.gauges(
        "vllm:num_requests_waiting_by_reason",
        "Sequences that wait, by what for.",
        [("capacity", num_waiting), ("deferred", 0)]
            .map(|(reason, count)| (labels.with("reason", reason), number(count))),
    );
    out.gauges(
        "vllm:engine_sleep_state",
        "1 for the state the engine is in.",
        [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)]
            .map(|(state, value)| (labels.with("sleep_state", state), value)),
    );
}

fn write_engine_counters(out: &mut Exposition, labels: &Labels, stats: &StatsSnapshot) {
    let counters = [
        (
            "vllm:num_preemptions_total",
            "Sequences that lost their blocks and start over.",
            stats.preemptions,
        ),
        (
            "vllm:prefix_cache_queries_total",
            "Prompt tokens looked up.",
            stats.prefix_cache_queried_tokens,
        ),
        (
            "vllm:prefix_cache_hits_total",
            "Prompt tokens found.",
            stats.prefix_cache_hit_tokens,
        ),
        (
            "vllm:gpu_prefix_cache_queries_total",
            "Old name of vllm:prefix_cache_queries_total.",
            stats.prefix_cache_queried_tokens,
        ),
        (
            "vllm:gpu_prefix_cache_hits_total",
            "Old name of vllm:prefix_cache_hits_total.",
            stats.prefix_cache_hit_tokens,
        ),
        (
            "lapidary_steps_total",
            "Steps of the engine, failed ones included.",
            stats.steps,
        ),
        ("lapidary_steps_failed_total", "Steps that failed.", stats.steps_failed),
        (
            "lapidary_prompt_tokens_computed_total",
            "Prompt tokens computed, again ones too.",
            stats.prompt_tokens_computed,
        ),
    ];
    for (name, help, value) in counters {
        out.counter(name, help, labels, number(value));
    }
    let hit_rate = match stats.prefix_cache_queried_tokens {
        0 => 0.0,
        queried => number(stats.prefix_cache_hit_tokens) / number(queried),
    };
    let help = "Share of the prompt tokens looked up that were found; the two counters say more.";
    out.gauge("vllm:gpu_prefix_cache_hit_rate", help, labels, hit_rate);
}

fn write_iterations(out: &mut Exposition, labels: &Labels, stats: &StatsSnapshot) {
    // vLLM's own name: a histogram with the suffix of a counter.
    let name = "vllm:iteration_tokens_total";
    let tokens = histogram(
        ITERATION_TOKENS_BUCKETS.map(number),
        &stats.iteration_tokens,
        number(stats.iteration_tokens_sum),
    );
    out.histogram(name, "Tokens of a step.", labels, tokens);
}

fn write_cache_config(out: &mut Exposition, kv_cache_dtype: &str, engine: &EngineHandle) {
    let (kv_cache, config) = (engine.kv_cache_config(), engine.config());
    let is_caching = if config.enable_prefix_caching { "True" } else { "False" };
    let labels = Labels::default()
        .with("engine", ENGINE)
        .with("block_size", kv_cache.block_size.to_string())
        .with("num_gpu_blocks", kv_cache.num_blocks.to_string())
        .with("cache_dtype", kv_cache_dtype)
        .with("enable_prefix_caching", is_caching);
    out.gauge("vllm:cache_config_info", "The KV cache, in labels.", &labels, 1.0);
}

fn write_traces(out: &mut Exposition, traces: &Tracer) {
    let counts = traces.counts();
    out.counters(
        "lapidary_trace_spans_total",
        "Spans of requests by what became of them.",
        [("exported", &counts.exported), ("dropped", &counts.dropped)]
            .map(|(fate, count)| (Labels::default().with("fate", fate), number(count.load(Relaxed)))),
    );
}

fn write_server(out: &mut Exposition, lifecycle: &Lifecycle, model: Option<&ServedModel>) {
    let none = Labels::default();
    let build = none
        .with("version", env!("CARGO_PKG_VERSION"))
        .with("commit", COMMIT)
        .with("device", model.map_or("", |model| &model.device));
    let help = "The build and, once it is known, the device it runs on, in labels.";
    out.gauge("lapidary_build_info", help, &build, 1.0);
    let current = lifecycle.phase();
    let is_ready = f64::from(current == Phase::Ready);
    out.gauge("lapidary_ready", "Whether requests are served.", &none, is_ready);
    out.gauges(
        "lapidary_phase",
        "1 for the phase the process is in.",
        Phase::ALL.map(|phase| (none.with("phase", phase.as_str()), f64::from(phase == current))),
    );
}
