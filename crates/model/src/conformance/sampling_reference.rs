//! The distribution a sampled token must follow, step by step as the page above has it.

use std::collections::BTreeMap;
use std::sync::Arc;

use lapidary_engine::{SampleRow, TokenId};

/// Probability of every token; a greedy choice has all of it.
pub(super) fn distribution(raw: &[f64], sample: &SampleRow, fed: Option<TokenId>) -> Vec<f64> {
    let params = &sample.params;
    let mut logits = adjusted(raw, sample, fed);
    if params.temperature == 0.0 {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let chosen = logits
            .iter()
            .position(|logit| *logit == largest)
            .expect("the largest is one of them");
        return (0..logits.len())
            .map(|token| if token == chosen { 1.0 } else { 0.0 })
            .collect();
    }
    logits
        .iter_mut()
        .for_each(|logit| *logit /= f64::from(params.temperature));
    let probabilities = softmax(&logits);
    let likeliest = probabilities.iter().copied().fold(0.0, f64::max);
    for (logit, probability) in logits.iter_mut().zip(&probabilities) {
        if *probability < f64::from(params.min_p) * likeliest {
            *logit = f64::NEG_INFINITY;
        }
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    if params.top_k > 0 {
        order
            .iter()
            .skip(params.top_k as usize)
            .for_each(|token| logits[*token] = f64::NEG_INFINITY);
    }
    let probabilities = softmax(&logits);
    let mut reached = 0.0;
    for token in order {
        if reached >= f64::from(params.top_p) {
            logits[token] = f64::NEG_INFINITY;
        }
        reached += probabilities[token];
    }
    softmax(&logits)
}

/// Log-probabilities of the raw logits.
pub(super) fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    logits.iter().map(|logit| logit - largest - total.ln()).collect()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    log_softmax(logits).into_iter().map(f64::exp).collect()
}

fn adjusted(raw: &[f64], sample: &SampleRow, fed: Option<TokenId>) -> Vec<f64> {
    let params = &sample.params;
    let mut logits = raw.to_vec();
    for (token, bias) in &params.logit_bias {
        logits[*token as usize] += f64::from(*bias);
    }
    for token in sample.banned.iter().flat_map(|banned| banned.iter()) {
        logits[*token as usize] = f64::NEG_INFINITY;
    }
    for (token, logit) in logits.iter_mut().enumerate() {
        let is_forbidden = |mask: &Arc<[u32]>| mask[token / 32] >> (token % 32) & 1 == 0;
        if sample.mask.as_ref().is_some_and(is_forbidden) {
            *logit = f64::NEG_INFINITY;
        }
    }
    let Some(history) = &sample.history else { return logits };
    // How often each token was generated; 0 for those of the prompt alone.
    let mut counts: BTreeMap<TokenId, u32> = history.prompt.iter().map(|token| (*token, 0)).collect();
    for token in history.output.iter().copied().chain(fed) {
        *counts.entry(token).or_default() += 1;
    }
    for (token, count) in counts {
        let logit = &mut logits[token as usize];
        let repetition = f64::from(params.repetition_penalty);
        *logit = if *logit > 0.0 {
            *logit / repetition
        } else {
            *logit * repetition
        };
        if count > 0 {
            *logit -= f64::from(params.frequency_penalty) * f64::from(count) + f64::from(params.presence_penalty);
        }
    }
    logits
}
