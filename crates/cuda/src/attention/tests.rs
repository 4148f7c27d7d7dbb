//! Both kernels against loops in f64, and their promise that a sequence's result depends on nothing else in the batch.
//!
//! Blocks that no sequence owns hold NaN, and so do slots behind a sequence's last token.

use half::bf16;
use lapidary_engine::{BlockId, RequestId};
use lapidary_model::{ActivationScheme, KvCacheDtype, KvScales};

use super::*;
use crate::device::{on_device, read_back};
use crate::pack::e4m3_to_f32;
use crate::tensor::Activation;
use crate::testing::device;

const STATIC: ActivationScheme = ActivationScheme::Fp8Static { scale: 0.013 };

#[derive(Debug, Clone, Copy)]
struct Setup {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    softcap: Option<f32>,
    window: Option<usize>,
    block_size: usize,
    /// Of keys; with 30, logits are far beyond a soft-cap of 50.
    key_size: f32,
    scheme: ActivationScheme,
    /// Of keys; the usual one if none is given.
    chunk: Option<usize>,
    /// Of a warp's ring, if `chunk` is given.
    stages: usize,
    /// As if the device had so few.
    multiprocessors: Option<usize>,
    dtype: KvCacheDtype,
}

impl Setup {
    fn new(head_dim: usize, heads: usize, kv_heads: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            softcap: Some(50.0),
            window: None,
            block_size: 16,
            key_size: 1.0,
            scheme: ActivationScheme::Fp8Token,
            chunk: None,
            stages: 1,
            multiprocessors: None,
            dtype: KvCacheDtype::Native,
        }
    }

    /// The same over an e4m3 cache.
    fn e4m3(self) -> Self {
        Self {
            dtype: KvCacheDtype::Fp8E4m3,
            ..self
        }
    }

    fn is_e4m3(&self) -> bool {
        self.dtype == KvCacheDtype::Fp8E4m3
    }

    fn scales(&self) -> KvScales {
        KvScales {
            key: 0.73 * self.key_size,
            value: 1.7,
        }
    }

    fn config(&self) -> AttentionConfig {
        AttentionConfig {
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).powf(-0.5),
            softcap: self.softcap,
            rope_theta: 1e4,
            kv_cache_dtype: self.dtype,
        }
    }

    fn qkv_cols(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// The last `queries` of `context` tokens are computed. Sequences of one seed begin alike.
#[derive(Debug, Clone, Copy)]
struct Sequence {
    seed: u64,
    context: usize,
    queries: usize,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Query,
    Key,
    Value,
}

impl Sequence {
    fn decode(context: usize) -> Self {
        Self::prefill(context, 1)
    }

    fn prefill(context: usize, queries: usize) -> Self {
        Self {
            seed: context as u64,
            context,
            queries,
        }
    }

    fn noise(&self, what: What, position: usize, head: usize, dim: usize) -> u64 {
        let place = ((what as u64 * 100_000 + position as u64) * 64 + head as u64) * 256 + dim as u64;
        let mut bits = (self.seed << 40 ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits
    }

    /// Element `dim` of a head at a position: zero mean, variance 1 (keys: `key_size` squared), exact in bf16.
    fn element(&self, setup: &Setup, what: What, position: usize, head: usize, dim: usize) -> f32 {
        let bits = self.noise(what, position, head, dim);
        let unit = ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3_f32.sqrt();
        let size = if matches!(what, What::Key) { setup.key_size } else { 1.0 };
        bf16::from_f32(unit * size).to_f32()
    }

    /// The same of an e4m3 cache, of either sign and up to 3.75, seldom below normal numbers.
    fn code(&self, what: What, position: usize, head: usize, dim: usize) -> u8 {
        let bits = (self.noise(what, position, head, dim) >> 40) as u8;
        match bits & 0x78 {
            0..0x08 => bits & 0x87,
            exponent => bits & 0x87 | (4 + (exponent >> 3) % 5) << 3,
        }
    }

    fn head(&self, setup: &Setup, what: What, position: usize, head: usize) -> Vec<f64> {
        let scale = match what {
            What::Query => None,
            What::Key => Some(setup.scales().key),
            What::Value => Some(setup.scales().value),
        };
        let element = |dim| match scale.filter(|_| setup.is_e4m3()) {
            Some(scale) => f64::from(e4m3_to_f32(self.code(what, position, head, dim))) * f64::from(scale),
            None => f64::from(self.element(setup, what, position, head, dim)),
        };
        (0..setup.head_dim).map(element).collect()
    }
}

/// A batch and its memory: blocks in no order, twice as many as are used.
struct Memory {
    batch: Batch,
    kv: Vec<u8>,
    qkv: Vec<bf16>,
}

impl Memory {
    fn new(setup: &Setup, sequences: &[Sequence]) -> Self {
        let used: usize = sequences.iter().map(|s| s.context.div_ceil(setup.block_size)).sum();
        let num_blocks = 2 * used + 1;
        let plane = setup.block_size * setup.head_dim;
        let mut memory = Self {
            batch: Batch {
                query_start: vec![0],
                block_start: vec![0],
                ..Batch::default()
            },
            // NaN in both formats.
            kv: vec![0xff; num_blocks * 2 * setup.kv_heads * plane * value_bytes(&setup.config())],
            qkv: Vec::new(),
        };
        for (index, sequence) in sequences.iter().enumerate() {
            memory.batch.request_ids.push(RequestId(index as u64));
            for block in 0..sequence.context.div_ceil(setup.block_size) {
                // Coprime to the odd number of blocks: a permutation.
                let id = (memory.batch.block_ids.len() * 4 + 2) % num_blocks;
                memory.batch.block_ids.push(BlockId(id as u32));
                memory.fill_block(setup, sequence, block, id);
            }
            memory.add_queries(setup, sequence);
        }
        memory
    }

    fn fill_block(&mut self, setup: &Setup, sequence: &Sequence, block: usize, id: usize) {
        for (plane, what) in [What::Key, What::Value].into_iter().enumerate() {
            for head in 0..setup.kv_heads {
                for slot in 0..setup.block_size {
                    let row = ((id * 2 + plane) * setup.kv_heads + head) * setup.block_size + slot;
                    let position = block * setup.block_size + slot;
                    for dim in 0..setup.head_dim {
                        if position >= sequence.context {
                            // It may be no number.
                            continue;
                        }
                        // Chunks of 16 bytes are permuted by the row.
                        if setup.is_e4m3() {
                            let turn = if setup.head_dim < 128 { slot / 2 % 4 } else { slot % 8 };
                            self.kv[row * setup.head_dim + (dim ^ (turn * 16))] =
                                sequence.code(what, position, head, dim);
                        } else {
                            let place = 2 * (row * setup.head_dim + (dim ^ (slot % 8 * 8)));
                            let element = bf16::from_f32(sequence.element(setup, what, position, head, dim));
                            self.kv[place..place + 2].copy_from_slice(&element.to_le_bytes());
                        }
                    }
                }
            }
        }
    }

    fn add_queries(&mut self, setup: &Setup, sequence: &Sequence) {
        for position in sequence.context - sequence.queries..sequence.context {
            let start = self.qkv.len();
            for head in 0..setup.heads {
                for dim in 0..setup.head_dim {
                    let element = sequence.element(setup, What::Query, position, head, dim);
                    self.qkv.push(bf16::from_f32(element));
                }
            }
            self.qkv.resize(start + setup.qkv_cols(), bf16::NAN);
            self.batch.token_ids.push(0);
        }
        self.batch.query_start.push(self.batch.token_ids.len() as u32);
        self.batch.context_lens.push(sequence.context as u32);
        self.batch.block_start.push(self.batch.block_ids.len() as u32);
    }
}

fn step_on_device(device: &mut dyn Device, batch: &Batch, max_seqs: usize) -> StepPointers {
    let mut padded = |values: &[u32], len: usize| {
        let mut values: Vec<i32> = values.iter().map(|value| *value as i32).collect();
        // What lies behind the step's own values is a former step's.
        values.resize(len, 77);
        on_device(device, &values)
    };
    let block_ids: Vec<u32> = batch.block_ids.iter().map(|id| id.0).collect();
    StepPointers {
        query_start: padded(&batch.query_start, max_seqs + 1),
        context_lens: padded(&batch.context_lens, max_seqs),
        block_start: padded(&batch.block_start, max_seqs + 1),
        block_ids: padded(&block_ids, block_ids.len()),
        counts: padded(&[batch.num_tokens() as u32, batch.num_seqs() as u32, 0, 0], 4),
        ..StepPointers::default()
    }
}

/// The result, `[num_tokens, heads * head_dim]`, of the second of two launches: the first leaves no traces.
fn run(setup: &Setup, sequences: &[Sequence]) -> Vec<f32> {
    let mut device = device();
    let is_hopper = device.compute_capability() == 90;
    run_with(device.as_mut(), is_hopper, setup, sequences)
}

fn run_with(device: &mut dyn Device, is_hopper: bool, setup: &Setup, sequences: &[Sequence]) -> Vec<f32> {
    let memory = Memory::new(setup, sequences);
    let limits = StepLimits {
        max_tokens: memory.batch.num_tokens(),
        max_seqs: sequences.len() + 35,
        max_model_len: sequences.iter().map(|s| s.context).max().unwrap_or(0),
    };
    let tuning = setup.chunk.map(|chunk| DecodeTuning {
        chunk,
        stages: setup.stages,
        blocks: 1,
    });
    let mut attention =
        Attention::tuned(device, setup.config(), limits, tuning, is_hopper).expect("there are kernels for this shape");
    if let Some(few) = setup.multiprocessors {
        attention.multiprocessors = few;
    }
    let (rows, cols) = (memory.batch.num_tokens(), setup.heads * setup.head_dim);
    let mut activation = Activation::alloc(device, rows, cols).expect("it is small");
    let inputs = AttentionInputs {
        step: step_on_device(device, &memory.batch, limits.max_seqs),
        max_seqs: memory.batch.num_seqs(),
        qkv: on_device(device, &memory.qkv),
        kv: on_device(device, &memory.kv),
        scales: setup.scales(),
        block_size: setup.block_size,
        window: setup.window,
        out: activation.write(device, setup.scheme).expect("it can be zeroed"),
        rows: on_device(device, &vec![bf16::NAN; rows * cols]),
    };
    let plan = attention
        .plan(device, &memory.batch, setup.block_size)
        .expect("uploads work");
    for _ in 0..2 {
        attention.run(device, &plan, &inputs).expect("launches work");
    }
    read_result(device, setup, &inputs, rows, cols)
}

fn read_result(device: &mut dyn Device, setup: &Setup, inputs: &AttentionInputs, rows: usize, cols: usize) -> Vec<f32> {
    if setup.scheme == ActivationScheme::Fp8Token {
        let values: Vec<bf16> = read_back(device, inputs.rows, rows * cols);
        return values.into_iter().map(bf16::to_f32).collect();
    }
    let stride = inputs.out.row_stride as usize;
    let size = if setup.scheme == ActivationScheme::None { 2 } else { 1 };
    let panels: Vec<u8> = read_back(device, inputs.out.panels, (cols * size).div_ceil(128) * stride * 128);
    let scales: Vec<f32> = read_back(device, inputs.out.scales, rows);
    let byte =
        |row: usize, k: usize| panels[(k / 128 * stride + row) * 128 + ((k % 128 / 16) ^ (row & 7)) * 16 + k % 16];
    let places = (0..rows).flat_map(|row| (0..cols).map(move |col| (row, col)));
    places
        .map(|(row, col)| match setup.scheme {
            ActivationScheme::None => bf16::from_le_bytes([byte(row, 2 * col), byte(row, 2 * col + 1)]).to_f32(),
            _ => e4m3_to_f32(byte(row, col)) * scales[row],
        })
        .collect()
}

/// Keys and values of one head, and what attention over them gives in f64.
struct Head<'a> {
    setup: &'a Setup,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl<'a> Head<'a> {
    fn new(setup: &'a Setup, sequence: &Sequence, head: usize) -> Self {
        let rows = |what| {
            let row = |position| sequence.head(setup, what, position, head);
            (0..sequence.context).map(row).collect()
        };
        Self {
            setup,
            keys: rows(What::Key),
            values: rows(What::Value),
        }
    }

    /// For the query at `position`: the result, and the average of |v| by the same weights.
    fn attend(&self, query: &[f64], position: usize) -> (Vec<f64>, Vec<f64>) {
        let first = self
            .setup
            .window
            .map_or(0, |window| (position + 1).saturating_sub(window));
        let logit = |keys: &Vec<f64>| {
            let dot: f64 = query.iter().zip(keys).map(|(q, k)| q * k).sum();
            let logit = dot * f64::from(self.setup.config().scale);
            let cap = |cap| f64::from(cap) * (logit / f64::from(cap)).tanh();
            self.setup.softcap.map_or(logit, cap)
        };
        let logits: Vec<f64> = self.keys[first..=position].iter().map(logit).collect();
        let largest = logits.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let (mut output, mut magnitude) = (vec![0.0; query.len()], vec![0.0; query.len()]);
        for (values, weight) in self.values[first..=position].iter().zip(weights) {
            for (dim, value) in values.iter().enumerate() {
                output[dim] += weight / total * value;
                magnitude[dim] += weight / total * value.abs();
            }
        }
        (output, magnitude)
    }
}

fn check(setup: &Setup, sequences: &[Sequence]) {
    let got = run(setup, sequences);
    if sequences.iter().all(|sequence| sequence.queries == 1) {
        // Decoding on Hopper loads in another way and computes in the same.
        let portable = run_with(device().as_mut(), false, setup, sequences);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(
            bits(&got) == bits(&portable),
            "{setup:?}, {sequences:?}: the portable kernel's bits differ"
        );
    }
    let mut rows = got.chunks(setup.heads * setup.head_dim);
    for sequence in sequences {
        let heads: Vec<_> = (0..setup.kv_heads)
            .map(|head| Head::new(setup, sequence, head))
            .collect();
        for position in sequence.context - sequence.queries..sequence.context {
            let row = rows.next().expect("a row for each query token");
            for (head, got) in row.chunks(setup.head_dim).enumerate() {
                let query = sequence.head(setup, What::Query, position, head);
                let (want, magnitude) = heads[head * setup.kv_heads / setup.heads].attend(&query, position);
                let error = worst_error(setup, got, &want, &magnitude);
                assert!(
                    error <= 1.0,
                    "{setup:?}, {sequence:?}, position {position}, head {head}: {error} of what is allowed"
                );
            }
        }
    }
}

/// In units of what rounding may cause: bf16's of the weights, of their sum and of the result; e4m3's.
fn worst_error(setup: &Setup, got: &[f32], want: &[f64], magnitude: &[f64]) -> f64 {
    let error = |((got, want), magnitude): ((&f32, &f64), &f64)| {
        let quantum = match setup.scheme {
            ActivationScheme::Fp8Static { scale } => want.abs() / 16.0 + f64::from(scale) / 1024.0,
            _ => 0.0,
        };
        (f64::from(*got) - want).abs() / (3.0 / 256.0 * magnitude + quantum)
    };
    let errors = got.iter().zip(want).zip(magnitude).map(error);
    // Not `max`, which would pass over a NaN.
    errors.fold(0.0, |worst, error| if error <= worst { worst } else { error })
}

/// Shapes of the kernels; groups of 1, 2, 4, 8 among them.
const SHAPES: [(usize, usize, usize); 5] = [(64, 2, 2), (64, 8, 1), (128, 4, 1), (256, 2, 1), (256, 4, 2)];

#[test]
fn decode_matches_f64_around_tile_and_chunk_borders() {
    for (head_dim, heads, kv_heads) in SHAPES {
        for softcap in [Some(50.0), None] {
            let setup = Setup {
                softcap,
                chunk: Some(64),
                ..Setup::new(head_dim, heads, kv_heads)
            };
            for setup in [setup, setup.e4m3()] {
                check(
                    &setup,
                    &[1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257].map(Sequence::decode),
                );
            }
        }
    }
}

#[test]
fn decode_matches_f64_at_the_border_of_the_window() {
    for (head_dim, heads, kv_heads) in SHAPES {
        for window in [64, 100] {
            let setup = Setup {
                window: Some(window),
                chunk: Some(64),
                ..Setup::new(head_dim, heads, kv_heads)
            };
            for setup in [setup, setup.e4m3()] {
                check(
                    &setup,
                    &[1, 63, 64, 65, 80, 99, 100, 101, 127, 128, 129, 230].map(Sequence::decode),
                );
            }
        }
    }
}

/// Parts are read eight at a time: less, as many and more, twice over.
#[test]
fn any_number_of_chunks_is_merged() {
    for softcap in [Some(50.0), None] {
        let setup = Setup {
            softcap,
            chunk: Some(64),
            ..Setup::new(64, 4, 2)
        };
        for setup in [setup, setup.e4m3()] {
            check(
                &setup,
                &[192, 511, 512, 513, 576, 1024, 1025, 1100].map(Sequence::decode),
            );
        }
    }
}

/// One block has as many units as it lists at a time, some more, and several lists of them. What a list leaves in a warp's
/// ring begins at any stage: with a window, first chunks are cut.
#[test]
fn more_units_than_a_block_lists() {
    let setup = Setup {
        chunk: Some(64),
        multiprocessors: Some(1),
        ..Setup::new(64, 8, 8)
    };
    for (stages, window) in [(1, None), (2, Some(100)), (3, None), (3, Some(100)), (5, None)] {
        let setup = Setup {
            stages,
            window,
            ..setup
        };
        for setup in [setup, setup.e4m3()] {
            // 8 units a chunk.
            for [short, long] in [[LISTED_UNITS / 8, 0], [LISTED_UNITS / 8 + 1, 0], [2, 12]] {
                let lens = [vec![40; short], vec![170; long]].concat();
                let sequences: Vec<_> = (lens.iter().zip(0..))
                    .map(|(len, index)| Sequence::decode(len + index))
                    .collect();
                check(&setup, &sequences);
            }
        }
    }
}

/// The window of Gemma-2, 4096, beside chunks of 512, scaled down to its proportions: 8 chunks, one token more or less.
#[test]
fn a_window_of_whole_chunks_ends_exactly() {
    let setup = Setup {
        window: Some(1024),
        ..Setup::new(64, 2, 1)
    };
    check(&setup, &[1023, 1024, 1025, 1040].map(Sequence::decode));
}

#[test]
fn prefill_matches_f64() {
    for (head_dim, heads, kv_heads) in SHAPES {
        for softcap in [Some(50.0), None] {
            let setup = Setup {
                softcap,
                ..Setup::new(head_dim, heads, kv_heads)
            };
            // Whole prompts, and parts of prompts whose beginnings are in the cache.
            let sequences = [(2, 2), (17, 17), (66, 66), (65, 2), (70, 9), (131, 4)];
            for setup in [setup, setup.e4m3()] {
                check(
                    &setup,
                    &sequences.map(|(context, queries)| Sequence::prefill(context, queries)),
                );
            }
        }
    }
}

#[test]
fn prefill_matches_f64_at_the_border_of_the_window() {
    for (head_dim, heads, kv_heads) in SHAPES {
        for softcap in [Some(50.0), None] {
            let setup = Setup {
                window: Some(64),
                softcap,
                ..Setup::new(head_dim, heads, kv_heads)
            };
            for setup in [setup, setup.e4m3()] {
                check(&setup, &[Sequence::prefill(67, 5), Sequence::prefill(170, 20)]);
            }
        }
    }
}

/// With one kv head few tiles occupy the device, with many the taller ones are taken.
#[test]
fn tall_tiles_match_f64() {
    for softcap in [Some(50.0), None] {
        let setup = Setup {
            softcap,
            ..Setup::new(64, 12, 6)
        };
        check(&setup, &[Sequence::prefill(90, 90)]);
    }
    let setup = Setup::new(256, 12, 6);
    check(&setup, &[Sequence::prefill(70, 70)]);
}

#[test]
fn logits_beyond_the_softcap_and_every_block_size() {
    for (block_size, softcap) in [(16, Some(50.0)), (32, Some(30.0)), (48, None), (64, Some(50.0))] {
        let setup = Setup {
            block_size,
            softcap,
            key_size: 30.0,
            ..Setup::new(128, 4, 2)
        };
        for setup in [setup, setup.e4m3()] {
            check(
                &setup,
                &[
                    Sequence::decode(1),
                    Sequence::decode(150),
                    Sequence::prefill(77, 20),
                    Sequence::decode(64),
                ],
            );
        }
    }
}

#[test]
fn the_result_takes_the_form_the_o_projection_asks_for() {
    for scheme in [ActivationScheme::None, STATIC, ActivationScheme::Fp8Token] {
        for head_dim in [64, 128, 256] {
            let setup = Setup {
                scheme,
                ..Setup::new(head_dim, 6, 2)
            };
            for setup in [setup, setup.e4m3()] {
                check(
                    &setup,
                    &[
                        Sequence::decode(40),
                        Sequence::prefill(33, 21),
                        Sequence::decode(130),
                        Sequence::prefill(20, 2),
                    ],
                );
            }
        }
    }
}

#[test]
fn neighbours_do_not_change_a_bit() {
    for (softcap, window, dtype) in [
        (Some(50.0), None, KvCacheDtype::Native),
        (None, Some(64), KvCacheDtype::Native),
        (Some(50.0), Some(64), KvCacheDtype::Fp8E4m3),
    ] {
        let setup = Setup {
            softcap,
            window,
            dtype,
            ..Setup::new(128, 4, 2)
        };
        let cols = setup.heads * setup.head_dim;
        for alone in [Sequence::decode(300), Sequence::prefill(90, 12)] {
            let want = run(&setup, &[alone]);
            let neighbours = [
                Sequence::decode(200),
                Sequence::prefill(40, 40),
                alone,
                Sequence::decode(17),
            ];
            let got = run(&setup, &neighbours);
            assert_eq!(&got[41 * cols..][..want.len()], &want[..], "{setup:?} {alone:?}");
            // In no group of 32 sequences of its own, more of them than blocks of threads, and two of those a multiprocessor.
            let mut many = vec![Sequence::decode(3); MANY_SEQS + 1];
            many.push(alone);
            let got = run(&setup, &many);
            assert_eq!(&got[(MANY_SEQS + 1) * cols..], &want[..], "{setup:?} {alone:?}");
        }
    }
}

#[test]
fn cutting_a_prompt_does_not_change_a_bit() {
    let length = 150;
    for (softcap, window, dtype) in [
        (Some(50.0), None, KvCacheDtype::Native),
        (None, None, KvCacheDtype::Native),
        (Some(50.0), Some(64), KvCacheDtype::Native),
        (None, Some(64), KvCacheDtype::Native),
        (Some(50.0), Some(64), KvCacheDtype::Fp8E4m3),
    ] {
        let setup = Setup {
            softcap,
            window,
            dtype,
            key_size: 5.0,
            ..Setup::new(64, 4, 2)
        };
        let part = |end, queries| Sequence {
            seed: 9,
            context: end,
            queries,
        };
        let whole = run(&setup, &[part(length, length)]);
        for cuts in [vec![2, 66, 82], vec![64, 64, 22], vec![33, 50, 67]] {
            let (mut pieces, mut end) = (Vec::new(), 0);
            for queries in cuts {
                end += queries;
                pieces.extend(run(&setup, &[part(end, queries)]));
            }
            assert!(pieces == whole, "{setup:?}");
        }
    }
}

/// More of an e4m3 cache than is widened at a time, beside decoding; by blocks of several sizes.
#[test]
fn prompts_over_long_e4m3_contexts_take_turns() {
    for block_size in [16, 48] {
        let setup = Setup {
            block_size,
            ..Setup::new(64, 2, 1)
        }
        .e4m3();
        let long = |context| Sequence::prefill(context, 3);
        check(
            &setup,
            &[
                long(900),
                long(700),
                Sequence::decode(300),
                long(899),
                long(20),
                long(850),
            ],
        );
    }
}

#[test]
fn shapes_without_a_kernel_are_refused() {
    let limits = StepLimits {
        max_tokens: 64,
        max_seqs: 4,
        max_model_len: 128,
    };
    let refused = |setup: Setup, limits: StepLimits| {
        let error = Attention::new(device().as_mut(), setup.config(), limits).err();
        matches!(error, Some(BackendError::Unsupported(_)))
    };
    assert!(!refused(Setup::new(64, 2, 1), limits));
    assert!(refused(Setup::new(96, 2, 1), limits));
    assert!(refused(Setup::new(64, 9, 1), limits));
    assert!(refused(Setup::new(64, 3, 2), limits));
    let too_capped = Setup {
        softcap: Some(1000.0),
        ..Setup::new(64, 2, 1)
    };
    assert!(refused(too_capped, limits));
    let endless = StepLimits {
        max_model_len: 10_000_000,
        ..limits
    };
    assert!(refused(Setup::new(64, 2, 1), endless));
}

#[test]
fn tiles_cover_every_query_token_once_longest_first() {
    let batch = Batch {
        query_start: vec![0, 1, 71, 73, 73 + 64],
        context_lens: vec![50, 70, 500, 64],
        ..Batch::default()
    };
    let tiles = query_tiles(&batch, 32);
    let want = [
        (2, 71, 2),
        (1, 65, 6),
        (1, 33, 32),
        (3, 105, 32),
        (1, 1, 32),
        (3, 73, 32),
    ];
    let got: Vec<_> = tiles
        .iter()
        .map(|tile| (tile.seq, tile.first_row, tile.num_rows))
        .collect();
    assert_eq!(got, want);
}
