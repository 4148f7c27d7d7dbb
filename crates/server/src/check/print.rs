//! A report for people.

use std::fmt;

use super::{Architecture, Capacity, KeyValueScales, Memory, Report, Scales};
use crate::units::ByteSize;

/// Where values begin.
const INDENT: usize = 14;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.is_sound { "sound" } else { "cannot be served" };
        writeln!(f, "{}: {verdict}", self.model)?;
        if let Some(architecture) = &self.architecture {
            line(f, "model", &describe(architecture))?;
        }
        if let Some(tensors) = &self.tensors {
            let bytes = ByteSize(tensors.bytes);
            line(
                f,
                "weights",
                &format!("{} tensors, {bytes}, every value looked at", tensors.count),
            )?;
        }
        if let Some(tokenizer) = &self.tokenizer {
            let bos = if tokenizer.adds_bos {
                "adds <bos>"
            } else {
                "adds no <bos>"
            };
            let template = if tokenizer.has_chat_template { "a" } else { "no" };
            let (tokens, rows) = (tokenizer.tokens, tokenizer.embedding_rows);
            let text = format!("{tokens} tokens for {rows} rows of the embedding; {bos}; {template} chat template");
            line(f, "tokenizer", &text)?;
        }
        for (index, token) in self.stop_tokens.iter().enumerate() {
            let label = if index == 0 { "stop tokens" } else { "" };
            let text = token.text.as_deref().unwrap_or("unknown to the tokenizer");
            line(
                f,
                label,
                &format!("{} {text} ({})", token.id, token.named_by.join(", ")),
            )?;
        }
        if let Some(memory) = &self.memory {
            write_memory(f, memory)?;
        }
        write_scales(f, &self.scales)?;
        write_kv_scales(f, &self.kv_scales)?;
        for (index, warning) in self.warnings.iter().enumerate() {
            line(f, if index == 0 { "warnings" } else { "" }, warning)?;
        }
        for (index, fault) in self.faults.iter().enumerate() {
            let label = if index == 0 { "faults" } else { "" };
            line(f, label, &format!("{}: {}", fault.part, fault.message))?;
        }
        Ok(())
    }
}

/// A label and a text, whose further lines stand below its first.
fn line(f: &mut fmt::Formatter<'_>, label: &str, text: &str) -> fmt::Result {
    let text = text.replace('\n', &format!("\n{:INDENT$}", ""));
    writeln!(f, "{label:INDENT$}{text}")
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn describe(model: &Architecture) -> String {
    let parameters = match model.parameters {
        count if count >= 1_000_000_000 => format!("{:.2} billion", count as f64 / 1e9),
        count => format!("{:.2} million", count as f64 / 1e6),
    };
    let storage = if model.is_quantized { "FP8" } else { "not quantised" };
    let window = match model.sliding_window {
        Some(window) => format!("window {window}"),
        None => "no window".to_owned(),
    };
    format!(
        "{parameters} parameters, {storage}; {} layers, hidden {}, inner {}; {} heads, {} for keys and values, \
         of {}; {window}, {} positions; query_pre_attn_scalar {}",
        model.layers,
        model.hidden_size,
        model.intermediate_size,
        model.heads,
        model.kv_heads,
        model.head_dim,
        model.max_position_embeddings,
        model.query_pre_attn_scalar,
    )
}

fn write_memory(f: &mut fmt::Formatter<'_>, memory: &Memory) -> fmt::Result {
    let (weights, scratch) = (ByteSize(memory.weight_bytes), ByteSize(memory.scratch_bytes));
    let (per_token, dtype) = (ByteSize(memory.kv_bytes_per_token), memory.kv_cache_dtype);
    line(
        f,
        "memory",
        &format!("weights {weights}, scratch {scratch}, keys and values {per_token} a token (in {dtype})"),
    )?;
    let Some(capacity) = &memory.device else { return Ok(()) };
    let Capacity {
        device_bytes,
        kv_cache_bytes,
        kv_cache_tokens,
        max_model_len,
        full_sequences,
    } = capacity;
    let (device, cache) = (ByteSize(*device_bytes), ByteSize(*kv_cache_bytes));
    line(
        f,
        "",
        &format!(
            "of {device}: {cache} for keys and values, {kv_cache_tokens} tokens, {full_sequences} sequences of \
             {max_model_len}"
        ),
    )
}

fn write_kv_scales(f: &mut fmt::Formatter<'_>, scales: &[KeyValueScales]) -> fmt::Result {
    for (index, KeyValueScales { layer, key, value }) in scales.iter().enumerate() {
        let label = if index == 0 { "KV scales" } else { "" };
        line(
            f,
            label,
            &format!("layer {layer:2}  keys {key:.3e}  values {value:.3e}"),
        )?;
    }
    Ok(())
}

fn write_scales(f: &mut fmt::Formatter<'_>, scales: &[Scales]) -> fmt::Result {
    for (index, scales) in scales.iter().enumerate() {
        let label = if index == 0 { "scales" } else { "" };
        let weights = match scales.weight_min == scales.weight_max {
            true => format!("{:.3e}", scales.weight_min),
            false => format!("{:.3e} to {:.3e}", scales.weight_min, scales.weight_max),
        };
        let input = match scales.input_scale {
            Some(scale) => format!("static {scale:.3e}"),
            None => scales.input.to_owned(),
        };
        let (layer, projections) = (scales.layer, &scales.projections);
        line(
            f,
            label,
            &format!("layer {layer:2}  {projections:24}  weights {weights:24}  inputs {input}"),
        )?;
    }
    Ok(())
}
