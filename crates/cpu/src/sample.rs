//! Chooses tokens from logits. The order of the steps is the model crate's (`conformance`, "Sampling").
//!
//! Nothing sorts a vocabulary: the few largest logits are found in one pass, and a draw from everything needs no order.

use lapidary_engine::{SampleRow, SampledToken, TokenId, TokenLogprobs};

use crate::math;
use crate::simd::{Kernel, Simd};

/// Logits looked at together: the one to be found is searched in a single chunk.
const CHUNK: usize = 1024;

/// Candidates `top_p` starts with when `top_k` gives no bound; eight times as many when they do not reach it.
const FIRST_CANDIDATES: usize = 64;

/// Of one thread.
#[derive(Debug, Default)]
pub(crate) struct SampleScratch {
    /// Largest logits, largest first, of equals the lowest id first.
    candidates: Vec<(f32, TokenId)>,
    /// For each token of the vocabulary: 0, or one more than how often it was generated.
    counts: Vec<u32>,
    /// Tokens whose count is not 0.
    counted: Vec<TokenId>,
    /// Logits before they were adjusted, when log-probabilities are wanted.
    raw: Vec<f32>,
}

/// Chooses the token of one row, or scores the one it is given.
pub(crate) struct Choose<'a> {
    pub(crate) sample: &'a SampleRow,
    /// The row's input, if the previous step sampled it.
    pub(crate) fed: Option<TokenId>,
    /// Overwritten.
    pub(crate) logits: &'a mut [f32],
    pub(crate) scratch: &'a mut SampleScratch,
}

impl Kernel for Choose<'_> {
    type Output = SampledToken;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> SampledToken {
        let Self {
            sample,
            fed,
            logits,
            scratch,
        } = self;
        if let Some(token) = sample.given {
            let logprobs = |count| Box::new(logprobs(logits, token, count as usize, &mut scratch.candidates));
            return SampledToken {
                token,
                logprobs: sample.params.logprobs.map(logprobs),
            };
        }
        if sample.params.logprobs.is_some() {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
        adjust(sample, fed, logits, scratch);
        let params = &sample.params;
        let token = if params.temperature > 0.0 {
            let uniform = uniform(params.seed, sample.position);
            let limits = Limits {
                min_p: params.min_p,
                top_k: params.top_k as usize,
                top_p: params.top_p,
            };
            draw(logits, params.temperature, limits, uniform, &mut scratch.candidates)
        } else {
            arg_max(logits)
        };
        let logprobs = params.logprobs.map(|count| {
            let SampleScratch { raw, candidates, .. } = scratch;
            Box::new(logprobs(raw, token, count as usize, candidates))
        });
        SampledToken { token, logprobs }
    }
}

/// Biases, bans, masks and penalties.
#[inline(always)]
fn adjust(sample: &SampleRow, fed: Option<TokenId>, logits: &mut [f32], scratch: &mut SampleScratch) {
    let params = &sample.params;
    for (token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    for token in sample.banned.iter().flat_map(|banned| banned.iter()) {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(mask) = &sample.mask {
        forbid(mask, logits);
    }
    let Some(history) = &sample.history else { return };
    let SampleScratch { counts, counted, .. } = scratch;
    counts.resize(logits.len(), 0);
    let mut count = |token: TokenId, generated: u32| {
        if let Some(entry) = counts.get_mut(token as usize) {
            if *entry == 0 {
                *entry = 1;
                counted.push(token);
            }
            *entry += generated;
        }
    };
    history.prompt.iter().for_each(|token| count(*token, 0));
    history.output.iter().chain(&fed).for_each(|token| count(*token, 1));
    for token in counted.drain(..) {
        let logit = &mut logits[token as usize];
        let repetition = params.repetition_penalty;
        *logit = if *logit > 0.0 {
            *logit / repetition
        } else {
            *logit * repetition
        };
        let generated = std::mem::take(&mut counts[token as usize]) - 1;
        if generated > 0 {
            *logit -= params.frequency_penalty * generated as f32;
            *logit -= params.presence_penalty;
        }
    }
}

/// Leaves only what the mask allows. A mask of JSON allows nearly all tokens or nearly none: whole words go at once.
#[inline(always)]
fn forbid(mask: &[u32], logits: &mut [f32]) {
    for (&word, chunk) in mask.iter().zip(logits.chunks_mut(32)) {
        match word {
            u32::MAX => {}
            0 => chunk.fill(f32::NEG_INFINITY),
            _ => {
                for (bit, logit) in chunk.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Of equals the lowest id; token 0 when nothing is a number.
#[inline(always)]
fn arg_max(logits: &[f32]) -> TokenId {
    let (mut best_chunk, mut best) = (0, f32::NEG_INFINITY);
    for (index, chunk) in logits.chunks(CHUNK).enumerate() {
        let max = math::max_of(chunk);
        if max > best {
            (best_chunk, best) = (index, max);
        }
    }
    let start = best_chunk * CHUNK;
    let found = logits[start..].iter().position(|logit| *logit == best);
    found.map_or(0, |offset| (start + offset) as TokenId)
}

/// What is cut off the distribution's tail.
#[derive(Debug, Clone, Copy)]
struct Limits {
    min_p: f32,
    top_k: usize,
    top_p: f32,
}

/// Turns logits into unnormalised probabilities, the likeliest token's being 1, cuts the tail, and draws.
#[inline(always)]
fn draw(
    logits: &mut [f32],
    temperature: f32,
    limits: Limits,
    uniform: f64,
    candidates: &mut Vec<(f32, TokenId)>,
) -> TokenId {
    let max = math::max_of(logits);
    if max == f32::NEG_INFINITY {
        return arg_max(logits);
    }
    for logit in logits.iter_mut() {
        let weight = math::exp((*logit - max) / temperature);
        // False for NaN too.
        let keep = weight >= limits.min_p;
        *logit = if keep { weight } else { 0.0 };
    }
    let weights = logits;
    let chunk_sum = |chunk: &[f32]| f64::from(math::sum_of(chunk, |weight| weight));
    if limits.top_k == 0 && limits.top_p >= 1.0 {
        let total: f64 = weights.chunks(CHUNK).map(chunk_sum).sum();
        let chunks = weights.chunks(CHUNK).map(chunk_sum).enumerate();
        let (chunk, rest) = pick(chunks, uniform * total);
        let tokens = weights[chunk * CHUNK..]
            .iter()
            .take(CHUNK)
            .map(|weight| f64::from(*weight))
            .enumerate();
        return (chunk * CHUNK + pick(tokens, rest).0) as TokenId;
    }
    let mut count = if limits.top_k > 0 {
        limits.top_k.min(weights.len())
    } else {
        FIRST_CANDIDATES.min(weights.len())
    };
    loop {
        largest(weights, count, candidates);
        let probable = candidates.iter().map(|(weight, _)| f64::from(*weight));
        let total = if limits.top_k > 0 {
            probable.clone().sum()
        } else {
            weights.chunks(CHUNK).map(chunk_sum).sum::<f64>()
        };
        let wanted = f64::from(limits.top_p) * total;
        let mut reached = 0.0;
        let needed = probable.take_while(|weight| {
            let below = reached < wanted;
            reached += weight;
            below
        });
        let needed = needed.count().max(1);
        if reached >= wanted || limits.top_k > 0 || count == weights.len() {
            candidates.truncate(needed);
            break;
        }
        count = (count * 8).min(weights.len());
    }
    let kept = candidates.iter().map(|(weight, _)| f64::from(*weight));
    let target = uniform * kept.clone().sum::<f64>();
    candidates[pick(kept.enumerate(), target).0].1
}

/// The entry in which the running sum exceeds `target`, and how far into it; the last that is not 0 if rounding leaves
/// the sum short.
#[inline(always)]
fn pick(weights: impl Iterator<Item = (usize, f64)>, mut target: f64) -> (usize, f64) {
    let mut last = (0, 0.0);
    for (index, weight) in weights {
        if weight > 0.0 {
            if target < weight {
                return (index, target);
            }
            last = (index, weight);
        }
        target -= weight;
    }
    last
}

/// Finds the `count` largest values, largest first, of equals the lowest id first.
#[inline(always)]
fn largest(values: &[f32], count: usize, found: &mut Vec<(f32, TokenId)>) {
    found.clear();
    if count == 0 {
        return;
    }
    let order = |a: &(f32, TokenId), b: &(f32, TokenId)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    // Between two prunings the buffer doubles, so that pruning costs a constant a candidate.
    let capacity = 2 * count + CHUNK;
    let mut threshold = f32::NEG_INFINITY;
    let mut is_full = false;
    for (index, chunk) in values.chunks(CHUNK).enumerate() {
        if is_full && math::max_of(chunk) <= threshold {
            continue;
        }
        for (offset, value) in chunk.iter().enumerate() {
            // Of equals, the one found earlier has the lower id.
            if !is_full || *value > threshold {
                found.push((*value, (index * CHUNK + offset) as TokenId));
            }
        }
        if found.len() > count && (!is_full || found.len() + CHUNK > capacity) {
            found.select_nth_unstable_by(count - 1, order);
            found.truncate(count);
            (threshold, is_full) = (found[count - 1].0, true);
        }
    }
    found.sort_unstable_by(order);
    found.truncate(count);
}

#[inline(always)]
fn logprobs(raw: &[f32], token: TokenId, count: usize, found: &mut Vec<(f32, TokenId)>) -> TokenLogprobs {
    let max = math::max_of(raw);
    let sum = |chunk: &[f32]| f64::from(math::sum_of(chunk, |logit| math::exp(logit - max)));
    let total: f64 = raw.chunks(CHUNK).map(sum).sum();
    let log_total = f64::from(max) + total.ln();
    let logprob = |logit: f32| (f64::from(logit) - log_total) as f32;
    let chosen = raw[token as usize];
    let above = raw.iter().map(|logit| u32::from(*logit > chosen)).sum::<u32>();
    let equal_before = raw[..token as usize]
        .iter()
        .map(|logit| u32::from(*logit == chosen))
        .sum::<u32>();
    largest(raw, count.min(raw.len()), found);
    TokenLogprobs {
        logprob: logprob(chosen),
        rank: 1 + above + equal_before,
        top: found.iter().map(|(logit, token)| (*token, logprob(*logit))).collect(),
    }
}

/// In `0..1`, from the seed and the position alone (two rounds of splitmix64).
fn uniform(seed: u64, position: u32) -> f64 {
    let bits = mix(mix(seed).wrapping_add(u64::from(position)));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, distinct: u64) -> Vec<f32> {
        (0..len).map(|i| (mix(i as u64) % distinct) as f32).collect()
    }

    #[test]
    fn the_largest_are_those_a_sort_puts_first() {
        for len in [1, 2, 1023, 1024, 1025, 5000] {
            for distinct in [1, 3, 100, 1 << 40] {
                let values = noise(len, distinct);
                let mut sorted: Vec<_> = values.iter().copied().zip(0..).collect();
                sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
                for count in [0, 1, 2, 20, 700, 1500, len] {
                    let count = count.min(len);
                    let mut found = Vec::new();
                    largest(&values, count, &mut found);
                    assert_eq!(found, sorted[..count], "{count} of {len}");
                }
            }
        }
    }

    #[test]
    fn the_lowest_of_equal_maxima_is_taken() {
        let mut logits = noise(5000, 1000);
        logits[4999] = 1e4;
        logits[1024] = 1e4;
        assert_eq!(arg_max(&logits), 1024);
        assert_eq!(arg_max(&[f32::NAN; 3]), 0);
        assert_eq!(arg_max(&[f32::NAN, 1.0, f32::NAN]), 1);
    }

    #[test]
    fn a_nucleus_larger_than_the_first_candidates_is_found() {
        let mut counts = [0u32; 2000];
        let limits = Limits {
            min_p: 0.0,
            top_k: 0,
            top_p: 0.5,
        };
        for position in 0..20_000 {
            // Equal logits: the nucleus is the first half of the ids.
            let mut logits = [1.0; 2000];
            let token = draw(&mut logits, 1.0, limits, uniform(1, position), &mut Vec::new());
            counts[token as usize] += 1;
        }
        assert!(counts[..1000].iter().all(|count| *count > 0) && counts[1000..].iter().all(|count| *count == 0));
    }

    #[test]
    fn draws_are_uniform_over_seeds_and_positions() {
        let count = 10_000;
        for sample in [|i: u32| uniform(7, i), |i: u32| uniform(u64::from(i), 7)] {
            let mut bins = [0u32; 16];
            (0..count).for_each(|i| bins[(sample(i) * 16.0) as usize] += 1);
            assert!(bins.iter().all(|bin| bin.abs_diff(count / 16) < 120), "{bins:?}");
        }
    }
}
