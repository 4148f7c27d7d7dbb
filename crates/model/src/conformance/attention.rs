//! Rotary embedding and attention over a shuffled, poisoned cache.

use super::Bounds;
use super::rig::{
    BLOCK_SIZE, Error, Numbers, Rig, SCHEMES, SequenceStep, assert_close, assert_quantized, batch_of, exact, round_e4m3,
};
use crate::backend::{ActivationScheme, AttentionConfig, Backend, KvCacheDtype, KvScales};

const ROPE_THETA: f32 = 10_000.0;
/// A position `p` turns by `p` times a frequency: one rounding of that frequency, or of the product, turns the result by
/// this much for each position.
const ERROR_PER_POSITION: f64 = 2.4e-7;

/// Query heads, key/value heads.
pub(super) const HEADS: [(usize, usize); 5] = [(1, 1), (2, 1), (4, 2), (4, 1), (8, 1)];

pub(super) struct Case<'a> {
    pub(super) attention: AttentionConfig,
    pub(super) scales: KvScales,
    pub(super) window: Option<usize>,
    pub(super) scheme: ActivationScheme,
    /// For each sequence: positions already in the cache, new ones.
    pub(super) sequences: &'a [(usize, usize)],
}

/// q turns by its position, near and far.
pub fn rope_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(6);
    let positions = [0, 1, 2, 15, 16, 63, 1000, 4095, 4096, 8000];
    for head_dim in bounds.head_dims {
        let attention = attention_config((4, 2), *head_dim, None);
        let mut rig = Rig::with_attention(make, positions.len(), 8192, attention);
        let sequences: Vec<_> = positions
            .iter()
            .map(|position| SequenceStep::new(vec![0], *position, 0))
            .collect();
        let mut batch = batch_of(&sequences);
        // Every position is of another sequence; that they share blocks does not matter while nobody attends.
        batch.token_ids = (0..positions.len() as u32).collect();
        let plan = rig.backend.begin(&batch).expect("the batch keeps the limits");
        let cols = 8 * head_dim;
        let values = numbers.values(positions.len() * cols, 1.0);
        let mut qkv = rig.tensor(&plan, &values, positions.len());
        let mut kv = rig
            .backend
            .alloc_kv_layer(8192 / BLOCK_SIZE, BLOCK_SIZE, KvScales::default())
            .expect("the cache is small");
        rig.backend.rope_append(&plan, &mut qkv, &mut kv).expect("rope runs");
        let got = rig.read(&qkv, positions.len());
        for (row, position) in positions.iter().enumerate() {
            let q = row * cols..row * cols + 4 * head_dim;
            let mut want = exact(&values[q.clone()]);
            rotate(&mut want, *position, *head_dim);
            let bound = bounds.element + *position as f64 * ERROR_PER_POSITION;
            // A pair's length is at most sqrt(2).
            let magnitude = vec![1.5; want.len()];
            assert_close(
                &format!("rope {head_dim} at {position}"),
                &got[q],
                &want,
                &magnitude,
                bound,
            );
        }
    }
}

/// Softmax attention with soft-cap, window and grouped heads: prefill, decode, chunks, and all of them in one step.
pub fn attention_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(7);
    let mut run = |attention, window, scheme, sequences: &[(usize, usize)]| {
        check(
            make,
            &mut numbers,
            &Case {
                attention,
                scales: KvScales::default(),
                window,
                scheme,
                sequences,
            },
            bounds,
        );
    };
    let none = ActivationScheme::None;
    for head_dim in bounds.head_dims {
        for heads in HEADS {
            run(
                attention_config(heads, *head_dim, Some(50.0)),
                Some(20),
                none,
                &[(0, 17), (40, 1), (13, 5)],
            );
        }
    }
    let head_dim = bounds.head_dims[0];
    let grouped = |softcap| attention_config((4, 2), head_dim, softcap);
    for context in [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513] {
        run(grouped(Some(5.0)), None, none, &[(context - 1, 1)]);
        run(
            grouped(Some(5.0)),
            Some(64),
            none,
            &[(context - 1, 1), (0, 1), (context / 2, 3)],
        );
    }
    for context in [4095, 4096, 4097, 5000] {
        run(
            grouped(Some(50.0)),
            Some(4096),
            none,
            &[(context - 1, 1), (context - 3, 3)],
        );
        run(grouped(None), None, none, &[(context - 1, 1)]);
    }
    for softcap in [None, Some(1.0), Some(50.0)] {
        for window in [None, Some(1), Some(16), Some(129)] {
            run(grouped(softcap), window, none, &[(0, 129), (64, 63)]);
        }
    }
    for scheme in SCHEMES {
        run(grouped(Some(50.0)), Some(32), scheme, &[(0, 33), (100, 1), (7, 1)]);
    }
}

/// A page's unused slots and pages of nobody may hold anything, NaN included, as fresh device memory does.
///
/// [`attention_matches_f64`] runs on such a cache too; here it is said once, for every fill of the last page.
pub fn unused_cache_is_never_read<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(8);
    let attention = attention_config((2, 1), bounds.head_dims[0], Some(50.0));
    let scheme = ActivationScheme::None;
    for length in 1..=2 * BLOCK_SIZE {
        let sequences = [(length - 1, 1), (0, length)];
        check(
            make,
            &mut numbers,
            &Case {
                attention,
                scales: KvScales::default(),
                window: None,
                scheme,
                sequences: &sequences,
            },
            bounds,
        );
    }
}

pub(super) fn attention_config(
    (num_heads, num_kv_heads): (usize, usize),
    head_dim: usize,
    softcap: Option<f32>,
) -> AttentionConfig {
    // Twice the usual scale: scores reach into the bend of the soft-cap.
    let scale = 2.0 / (head_dim as f32).sqrt();
    AttentionConfig {
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        softcap,
        rope_theta: ROPE_THETA,
        kv_cache_dtype: KvCacheDtype::Native,
    }
}

pub(super) fn check<B: Backend>(make: &dyn Fn() -> B, numbers: &mut Numbers, case: &Case<'_>, bounds: &Bounds) {
    let longest = case
        .sequences
        .iter()
        .map(|(cached, new)| cached + new)
        .max()
        .expect("a case has sequences");
    let (got, histories) = compute(make, numbers, case);
    let what = format!(
        "attention {:?} {:?} window {:?} sequences {:?}",
        case.attention, case.scales, case.window, case.sequences
    );
    let width = case.attention.num_heads * case.attention.head_dim;
    let want = case
        .sequences
        .iter()
        .zip(&histories)
        .flat_map(|((cached, _), values)| attend(case, values, *cached));
    for (index, (got, want)) in got.chunks(width).zip(want).enumerate() {
        // Values reach 1, so this is relative to the largest.
        let error = Error {
            relative: 0.0,
            absolute: bounds.attention + longest as f64 * ERROR_PER_POSITION + want.leeway,
        };
        let what = format!("{what}, new row {index}");
        assert_quantized(&what, got, &want.values, width, case.scheme, error);
    }
}

/// Rope and attention with soft-cap of several query tokens to the bit, as another backend whose arithmetic is the same has
/// them: within a block of keys and over many, near scores and such as the soft-cap bends, windows that begin anywhere.
pub fn attention_equals<O: Backend, B: Backend>(oracle: &dyn Fn() -> O, make: &dyn Fn() -> B, bounds: &Bounds) {
    let run = |heads, head_dim, softcap, window, scheme, sequences: &[(usize, usize)]| {
        let case = Case {
            attention: attention_config(heads, head_dim, Some(softcap)),
            scales: KvScales::default(),
            window,
            scheme,
            sequences,
        };
        let want = compute(oracle, &mut Numbers::new(9), &case).0;
        let got = compute(make, &mut Numbers::new(9), &case).0;
        let differ = got.iter().zip(&want).filter(|(got, want)| got != want).count();
        let what = format!(
            "{:?} window {window:?} sequences {sequences:?} {scheme:?}",
            case.attention
        );
        assert_eq!(differ, 0, "attention {what}: elements of {} that differ", want.len());
    };
    let none = ActivationScheme::None;
    for head_dim in bounds.head_dims {
        for heads in HEADS {
            run(heads, *head_dim, 50.0, Some(20), none, &[(0, 17), (40, 2), (13, 5)]);
        }
        for scheme in SCHEMES {
            run((4, 2), *head_dim, 50.0, None, scheme, &[(0, 33), (100, 3)]);
        }
    }
    for softcap in [1.0, 5.0, 50.0] {
        for window in [None, Some(16), Some(129)] {
            run((4, 2), 64, softcap, window, none, &[(0, 129), (64, 63), (300, 40)]);
        }
    }
    run((2, 1), 64, 50.0, Some(4096), none, &[(4094, 3), (4996, 4)]);
}

/// What a backend makes of a case, and every sequence's q, k and v before rotation.
fn compute<B: Backend>(make: &dyn Fn() -> B, numbers: &mut Numbers, case: &Case<'_>) -> (Vec<f64>, Vec<Vec<f32>>) {
    let AttentionConfig {
        num_heads, head_dim, ..
    } = case.attention;
    let num_new: usize = case.sequences.iter().map(|(_, new)| new).sum();
    let mut cache = Cache::poisoned(make, case, num_new);
    let mut pool = numbers.shuffled(cache.num_blocks);
    let (mut steps, mut histories, mut new_values) = (Vec::new(), Vec::new(), Vec::new());
    for (cached, new) in case.sequences {
        let blocks = pool.split_off(pool.len() - (cached + new).div_ceil(BLOCK_SIZE));
        let values = numbers.values((cached + new) * cache.cols, 1.0);
        cache.append(&blocks, &values[..cached * cache.cols]);
        let first_token = (new_values.len() / cache.cols) as u32;
        new_values.extend_from_slice(&values[cached * cache.cols..]);
        steps.push(SequenceStep {
            tokens: (first_token..first_token + *new as u32).collect(),
            start: *cached,
            blocks,
        });
        histories.push(values);
    }

    let Cache { rig, kv, .. } = &mut cache;
    let plan = rig.backend.begin(&batch_of(&steps)).expect("a small batch");
    let mut qkv = rig.tensor(&plan, &new_values, num_new);
    rig.backend.rope_append(&plan, &mut qkv, kv).expect("rope runs");
    let mut out = rig.activation(num_new, num_heads * head_dim);
    rig.backend
        .attention(&plan, &qkv, kv, case.window, case.scheme, &mut out)
        .expect("attention runs");
    let got = rig.read_activation(&plan, &out, [num_new, num_heads * head_dim], case.scheme);
    (got, histories)
}

/// One layer's cache and the backend that owns it.
struct Cache<B: Backend> {
    rig: Rig<B>,
    kv: B::KvLayer,
    num_blocks: usize,
    /// Of a row of q, k and v.
    cols: usize,
    max_tokens: usize,
}

impl<B: Backend> Cache<B> {
    /// Room for the case's sequences and half as many pages again, all of them NaN.
    fn poisoned(make: &dyn Fn() -> B, case: &Case<'_>, num_new: usize) -> Self {
        let AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = case.attention;
        let used: usize = case
            .sequences
            .iter()
            .map(|(cached, new)| (cached + new).div_ceil(BLOCK_SIZE))
            .sum();
        let num_blocks = used * 3 / 2 + 1;
        let max_tokens = num_new.max(256);
        let mut rig = Rig::with_attention(make, max_tokens, num_blocks * BLOCK_SIZE, case.attention);
        let kv = rig
            .backend
            .alloc_kv_layer(num_blocks, BLOCK_SIZE, case.scales)
            .expect("the cache is small");
        let cols = (num_heads + 2 * num_kv_heads) * head_dim;
        let mut cache = Self {
            rig,
            kv,
            num_blocks,
            cols,
            max_tokens,
        };
        let all: Vec<u32> = (0..num_blocks as u32).collect();
        cache.append(&all, &vec![f32::NAN; num_blocks * BLOCK_SIZE * cols]);
        cache
    }

    /// Writes the keys and values of a sequence's first positions, in steps of what the backend can take.
    fn append(&mut self, blocks: &[u32], values: &[f32]) {
        for (index, chunk) in values.chunks(self.max_tokens * self.cols).enumerate() {
            let rows = chunk.len() / self.cols;
            let (tokens, start) = ((0..rows as u32).collect(), index * self.max_tokens);
            let step = SequenceStep {
                tokens,
                start,
                blocks: blocks.to_vec(),
            };
            let plan = self.rig.backend.begin(&batch_of(&[step])).expect("a small batch");
            let mut qkv = self.rig.tensor(&plan, chunk, rows);
            self.rig
                .backend
                .rope_append(&plan, &mut qkv, &mut self.kv)
                .expect("rope runs");
        }
    }
}

/// What attention makes of one row.
struct Attended {
    /// `[num_heads * head_dim]`
    values: Vec<f64>,
    /// How far any of them may be off because a key or value lies so close to the middle of two e4m3 numbers that
    /// arithmetic which errs a little may round it to either.
    leeway: f64,
}

/// A sequence's queries, keys and values as attention reads them: rotated, and rounded as the cache rounds.
struct History {
    /// `[num_heads + 2 * num_kv_heads][head_dim]` of each position.
    rows: Vec<Vec<f64>>,
    /// How far each element may be off; of queries, nothing.
    leeway: Vec<Vec<f64>>,
}

impl History {
    fn new(case: &Case<'_>, qkv: &[f32]) -> Self {
        let AttentionConfig {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = case.attention;
        let cols = (num_heads + 2 * num_kv_heads) * head_dim;
        let first_key = num_heads * head_dim;
        let first_value = first_key + num_kv_heads * head_dim;
        let mut rows: Vec<Vec<f64>> = qkv.chunks(cols).map(exact).collect();
        let mut leeway = vec![vec![0.0; cols]; rows.len()];
        for (position, (row, leeway)) in rows.iter_mut().zip(&mut leeway).enumerate() {
            rotate(&mut row[..first_value], position, head_dim);
            if case.attention.kv_cache_dtype == KvCacheDtype::Native {
                continue;
            }
            // Of a rotated pair, whose length is at most sqrt(2); the quotient of a value is rounded once.
            let key_error = 1.5 * (Bounds::F32.element + position as f64 * ERROR_PER_POSITION);
            for column in first_key..cols {
                let (scale, error) = if column < first_value {
                    (case.scales.key, key_error)
                } else {
                    (case.scales.value, row[column].abs() * f64::from(f32::EPSILON))
                };
                (row[column], leeway[column]) = store(row[column], error, scale);
            }
        }
        Self { rows, leeway }
    }

    fn key(&self, case: &Case<'_>, position: usize, kv_head: usize) -> (&[f64], &[f64]) {
        let AttentionConfig {
            num_heads, head_dim, ..
        } = case.attention;
        let key = (num_heads + kv_head) * head_dim..(num_heads + kv_head + 1) * head_dim;
        (&self.rows[position][key.clone()], &self.leeway[position][key])
    }
}

/// What an e4m3 cache gives back for `value`, and how far that may be off if `value` is off by up to `error`. Rounding is
/// monotone, so what lies in between rounds to something in between.
fn store(value: f64, error: f64, scale: f32) -> (f64, f64) {
    let round = |value: f64| round_e4m3(value / f64::from(scale)) * f64::from(scale);
    let stored = round(value);
    (
        stored,
        f64::max(round(value + error) - stored, stored - round(value - error)),
    )
}

/// Attention of the positions from `first` on of one sequence, given its q, k and v rows before rotation.
fn attend(case: &Case<'_>, qkv: &[f32], first: usize) -> Vec<Attended> {
    let AttentionConfig {
        num_heads,
        num_kv_heads,
        ..
    } = case.attention;
    let history = History::new(case, qkv);
    (first..history.rows.len())
        .map(|position| {
            let mut row = Attended {
                values: Vec::new(),
                leeway: 0.0,
            };
            for head in 0..num_heads {
                attend_head(
                    case,
                    &history,
                    position,
                    (head, head / (num_heads / num_kv_heads)),
                    &mut row,
                );
            }
            row
        })
        .collect()
}

fn attend_head(
    case: &Case<'_>,
    history: &History,
    position: usize,
    (head, kv_head): (usize, usize),
    out: &mut Attended,
) {
    let AttentionConfig {
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        softcap,
        ..
    } = case.attention;
    let begin = case.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let q = &history.rows[position][head * head_dim..][..head_dim];
    let seen = || {
        history.rows[begin..=position]
            .iter()
            .zip(&history.leeway[begin..=position])
    };
    let score = |j: usize| {
        let (key, leeway) = history.key(case, j, kv_head);
        let score = q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale);
        // The soft-cap only makes it smaller.
        let off = q.iter().zip(leeway).map(|(q, off)| q.abs() * off).sum::<f64>() * f64::from(scale);
        let capped = softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
        (capped.exp(), off)
    };
    let weights: Vec<(f64, f64)> = (begin..=position).map(score).collect();
    let total: f64 = weights.iter().map(|(weight, _)| weight).sum();
    let least_total: f64 = weights.iter().map(|(weight, off)| weight * (-off).exp()).sum();
    for dim in 0..head_dim {
        let column = (num_heads + num_kv_heads + kv_head) * head_dim + dim;
        let sum: f64 = weights
            .iter()
            .zip(seen())
            .map(|((weight, _), (row, _))| weight * row[column])
            .sum();
        let mean = sum / total;
        // Weights w become w e^d, with d at most `off`: the mean moves by sum(w (e^d - 1) (v - mean)) / sum(w e^d).
        let moved: f64 = weights
            .iter()
            .zip(seen())
            .map(|((weight, off), (row, leeway))| {
                weight * (off.exp_m1() * (row[column] - mean).abs() + off.exp() * leeway[column])
            })
            .sum();
        out.leeway = out.leeway.max(moved / least_total);
        out.values.push(mean);
    }
}

/// Rotates the halves of every head against each other, by angles in f32 as transformers computes them.
fn rotate(heads: &mut [f64], position: usize, head_dim: usize) {
    let half = head_dim / 2;
    for head in heads.chunks_mut(head_dim) {
        for pair in 0..half {
            let frequency = f64::from(ROPE_THETA).powf(-(2.0 * pair as f64) / head_dim as f64) as f32;
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            let (a, b) = (head[pair], head[pair + half]);
            (head[pair], head[pair + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
}
