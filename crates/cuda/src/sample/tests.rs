use std::sync::Arc;

use half::bf16;
use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_engine::{BlockId, FedToken, RequestId, SampleRow, SamplingParams, TokenHistory};
use lapidary_model::{AttentionConfig, Backend, DType, HostTensor, KvCacheDtype, StepLimits, Width};

use super::*;
use crate::step::tests::buffers;
use crate::testing::{Numbers, device};

const MAX_ROWS: usize = 64;
const MAX_VOCAB: usize = 3 * SLICE + 5;

struct Bench {
    device: Box<dyn Device>,
    step: StepBuffers,
    sampler: Sampler,
}

impl Bench {
    fn new() -> Self {
        let mut device = device();
        let step = buffers(&mut *device, MAX_ROWS);
        let limits = SampleLimits {
            max_samples: MAX_ROWS,
            max_model_len: 64,
            max_vocab: MAX_VOCAB,
        };
        let sampler = Sampler::alloc(&mut *device, &step, limits).expect("the kernels exist");
        Self { device, step, sampler }
    }

    /// One step that samples from `[choices, vocab]` logits.
    fn sample(&mut self, batch: &Batch, choices: &[Choice<'_>], logits: &[f32]) -> Vec<SampledToken> {
        let vocab = logits.len() / choices.len();
        // A bucket is larger than the step it serves.
        let grid = (choices.len() + 1).min(MAX_ROWS);
        let tensor = Tensor::alloc(&mut *self.device, "test data", [grid, vocab], true).expect("tensors are small");
        self.device.upload(tensor.data, bytes_of(logits)).expect("uploads work");
        self.step.upload(&mut *self.device, batch).expect("the step is small");
        self.step.begin(&mut *self.device).expect("the step is small");
        let needs = self
            .sampler
            .upload(&mut *self.device, batch, choices.iter().copied(), vocab)
            .expect("the step is small");
        self.sampler
            .run(&mut *self.device, &tensor, grid, needs)
            .expect("sampling runs");
        self.step.finish();
        let choices = self.sampler.start_readback(&mut *self.device, &self.step, batch);
        choices
            .and_then(|choices| choices.finish(&mut *self.device))
            .expect("tokens come back")
    }

    fn sample_all(&mut self, samples: &[SampleRow], logits: &[f32]) -> Vec<SampledToken> {
        let choices: Vec<_> = samples.iter().map(plain).collect();
        self.sample(&batch(samples), &choices, logits)
    }
}

fn plain(sample: &SampleRow) -> Choice<'_> {
    Choice {
        sample,
        given: None,
        mask: None,
    }
}

fn row(params: SamplingParams) -> SampleRow {
    SampleRow {
        row: 0,
        position: 1,
        given: None,
        params: Arc::new(params),
        banned: None,
        mask: None,
        history: None,
    }
}

/// Sequences of one token each, all sampled.
fn batch(samples: &[SampleRow]) -> Batch {
    let rows = samples.len() as u32;
    let samples = samples.iter().enumerate().map(|(index, sample)| SampleRow {
        row: index as u32,
        ..sample.clone()
    });
    Batch {
        request_ids: (0..u64::from(rows)).map(RequestId).collect(),
        token_ids: (0..rows).collect(),
        positions: vec![0; rows as usize],
        slot_mapping: (0..rows).map(|row| row * 16).collect(),
        query_start: (0..=rows).collect(),
        context_lens: vec![1; rows as usize],
        block_start: (0..=rows).collect(),
        block_ids: (0..rows).map(BlockId).collect(),
        samples: samples.collect(),
        ..Batch::default()
    }
}

/// What the reference backend samples; `logits` are exact in bf16.
fn reference(samples: &[SampleRow], logits: &[f32]) -> Vec<SampledToken> {
    let mut cpu = Cpu::new(CpuConfig::default()).expect("this machine has a CPU");
    let limits = StepLimits {
        max_tokens: MAX_ROWS,
        max_seqs: MAX_ROWS,
        max_model_len: 64,
    };
    let attention = AttentionConfig {
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 32,
        scale: 1.0,
        softcap: None,
        rope_theta: 1e4,
        kv_cache_dtype: KvCacheDtype::Native,
    };
    cpu.prepare(limits, attention).expect("limits are small");
    let (rows, batch) = (samples.len(), batch(samples));
    let vocab = logits.len() / rows;
    let bytes: Vec<u8> = logits.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let table = HostTensor {
        data: &bytes,
        dtype: DType::Bf16,
        shape: &[rows, vocab],
    };
    let plan = cpu.begin(&batch).expect("the step is small");
    let table = cpu.upload_embedding(table).expect("tables are small");
    let mut tensor = cpu.alloc_tensor(rows, vocab, Width::Wide).expect("tensors are small");
    cpu.embed(&plan, &table, bf16::ONE, &mut tensor).expect("embed runs");
    cpu.sample(&plan, &batch, &mut tensor).expect("sampling runs");
    cpu.collect().expect("the step ran")
}

fn tokens(sampled: &[SampledToken]) -> Vec<TokenId> {
    sampled.iter().map(|sampled| sampled.token).collect()
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut bench = Bench::new();
    let mut numbers = Numbers::new(1);
    for vocab in [1, 2, 15, 17, 1000, SLICE - 1, SLICE, SLICE + 1, MAX_VOCAB] {
        let mut logits = numbers.bf16_values(8 * vocab, 10.0);
        for row in logits.chunks_mut(vocab).take(6) {
            for _ in 0..3 {
                row[numbers.next() as usize % vocab] = 12.0;
            }
        }
        logits[6 * vocab..7 * vocab].fill(f32::NEG_INFINITY);
        logits[7 * vocab..].fill(f32::NAN);
        let samples: Vec<_> = (0..8).map(|_| row(greedy())).collect();
        let mut want: Vec<TokenId> = logits
            .chunks(vocab)
            .map(|row| {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                row.iter().position(|logit| *logit == largest).unwrap_or(0) as TokenId
            })
            .collect();
        assert_eq!(
            tokens(&bench.sample_all(&samples, &logits)),
            want,
            "vocabulary of {vocab}"
        );
        // Nothing to weigh, or nothing but one infinite logit: no draw can choose.
        logits[5 * vocab + vocab / 2] = f32::INFINITY;
        want[5] = vocab as u32 / 2;
        let samples: Vec<_> = (0..3).map(|_| row(SamplingParams::default())).collect();
        let got = bench.sample_all(&samples, &logits[5 * vocab..]);
        assert_eq!(tokens(&got), want[5..], "vocabulary of {vocab}");
    }
}

/// Every way to cut a distribution.
fn filters() -> Vec<SamplingParams> {
    let plain = SamplingParams::default;
    vec![
        plain(),
        SamplingParams {
            temperature: 0.5,
            ..plain()
        },
        SamplingParams {
            temperature: 0.01,
            ..plain()
        },
        SamplingParams { min_p: 0.2, ..plain() },
        SamplingParams { min_p: 1.0, ..plain() },
        SamplingParams { top_k: 1, ..plain() },
        SamplingParams { top_k: 7, ..plain() },
        SamplingParams { top_k: 600, ..plain() },
        SamplingParams {
            top_k: 1_000_000,
            ..plain()
        },
        SamplingParams { top_p: 0.5, ..plain() },
        SamplingParams { top_p: 0.97, ..plain() },
        SamplingParams { top_p: 1e-6, ..plain() },
        SamplingParams {
            temperature: 1.7,
            min_p: 0.01,
            top_k: 300,
            top_p: 0.8,
            ..plain()
        },
    ]
}

#[test]
fn draws_choose_what_the_reference_chooses() {
    const ROWS: usize = 24;
    let mut bench = Bench::new();
    let mut numbers = Numbers::new(2);
    let (mut num_draws, mut num_different) = (0, 0);
    // From a few likely tokens to nearly equal ones, of which many are equal after rounding.
    for (vocab, size) in [(24, 4.0), (1000, 8.0), (SLICE + 4, 1.0), (2 * SLICE + 17, 14.0)] {
        let logits = numbers.bf16_values(ROWS * vocab, size);
        for (case, params) in filters().into_iter().enumerate() {
            let samples: Vec<_> = (0..ROWS as u32)
                .map(|index| SampleRow {
                    position: 1 + index / 2,
                    ..row(SamplingParams {
                        seed: 0x1234_5678_9abc_def0 + u64::from(index % 2) + case as u64,
                        ..params.clone()
                    })
                })
                .collect();
            let (got, want) = (bench.sample_all(&samples, &logits), reference(&samples, &logits));
            num_draws += ROWS;
            num_different += tokens(&got)
                .iter()
                .zip(tokens(&want))
                .filter(|(a, b)| **a != *b)
                .count();
        }
    }
    // The two differ where a draw falls within rounding of a border.
    assert!(
        num_different * 300 <= num_draws,
        "{num_different} of {num_draws} draws are not the reference's"
    );
}

#[test]
fn a_nucleus_too_large_to_collect_is_drawn_from_whole() {
    let mut device = device();
    let step = buffers(&mut *device, 2);
    let vocab = 5 * SLICE;
    let limits = SampleLimits {
        max_samples: 2,
        max_model_len: 64,
        max_vocab: vocab,
    };
    let sampler = Sampler::alloc(&mut *device, &step, limits).expect("the kernels exist");
    let mut bench = Bench { device, step, sampler };
    // All logits are equal: what is kept are the lowest ids, in their order.
    let logits = vec![1.0; vocab];
    for (top_k, top_p, kept) in [(0, 0.9, 0.9), (20_000, 0.5, 0.488_281_25), (18_000, 1.0, 0.878_906_25)] {
        for position in 0..3 {
            let params = SamplingParams {
                top_k,
                top_p,
                ..SamplingParams::default()
            };
            let sample = SampleRow {
                position,
                ..row(params)
            };
            let got = bench.sample_all(std::slice::from_ref(&sample), &logits)[0].token;
            let everything = SampleRow {
                position,
                ..row(SamplingParams::default())
            };
            let uncut = bench.sample_all(std::slice::from_ref(&everything), &logits)[0].token;
            let want = (f64::from(uncut) + 0.5) * kept;
            assert!(
                (f64::from(got) - want).abs() <= 1.5,
                "top_k {top_k}, top_p {top_p}: {got}, expected {want}"
            );
        }
    }
}

#[test]
fn a_draw_depends_on_its_row_alone() {
    let mut bench = Bench::new();
    let vocab = 2 * SLICE + 100;
    let logits = Numbers::new(3).bf16_values(vocab, 6.0);
    let params = filters().into_iter().map(|params| SamplingParams {
        logprobs: Some(2),
        ..params
    });
    let samples: Vec<_> = params.map(row).collect();
    let together = bench.sample_all(&samples, &logits.repeat(samples.len()));
    for (sample, together) in samples.iter().zip(&together) {
        // A block for each slice, for two of them, and for all.
        for enough_blocks in [100, 2, 1] {
            bench.sampler.enough_blocks = enough_blocks;
            let alone = bench.sample_all(std::slice::from_ref(sample), &logits);
            assert_eq!(alone[0], *together, "{:?}", sample.params);
        }
    }
}

#[test]
fn lists_bend_logits_as_in_the_reference() {
    let mut bench = Bench::new();
    let mut numbers = Numbers::new(4);
    let vocab = 130;
    let mut samples = Vec::new();
    for index in 0..MAX_ROWS {
        let mut some = |count: usize| -> Vec<TokenId> { (0..count).map(|_| numbers.next() as u32 % 140).collect() };
        // Tokens beyond the vocabulary are passed over, and some are named twice.
        let (prompt, output) = (some(20), some(30));
        let (banned, biased) = (some(40), some(50));
        let params = SamplingParams {
            temperature: if index % 2 == 0 { 0.0 } else { 1.0 },
            repetition_penalty: [1.0, 1.3, 0.7][index % 3],
            frequency_penalty: [0.0, 0.5, -0.25][index / 3 % 3],
            presence_penalty: [0.0, 0.75][index / 9 % 2],
            logit_bias: biased
                .iter()
                .map(|token| (*token, 0.125 * (token % 9) as f32))
                .collect(),
            seed: index as u64,
            ..SamplingParams::default()
        };
        samples.push(SampleRow {
            banned: (index % 4 != 0).then(|| banned.into()),
            history: params.needs_history().then(|| TokenHistory {
                prompt: prompt.into(),
                output,
            }),
            ..row(params)
        });
    }
    let logits = numbers.bf16_values(MAX_ROWS * vocab, 3.0);
    let got = bench.sample_all(&samples, &logits);
    assert_eq!(tokens(&got), tokens(&reference(&samples, &logits)));
}

#[test]
fn the_token_a_row_was_fed_counts_as_output() {
    let mut bench = Bench::new();
    let mut logits = vec![0.0; 3 * 16];
    (logits[5], logits[16 + 9], logits[32 + 2]) = (4.0, 4.0, 4.0);
    let first: Vec<_> = (0..3).map(|_| row(greedy())).collect();
    assert_eq!(tokens(&bench.sample_all(&first, &logits)), [5, 9, 2]);
    let penalised = |output: Vec<TokenId>| SampleRow {
        history: Some(TokenHistory {
            prompt: [7].into(),
            output,
        }),
        ..row(SamplingParams {
            frequency_penalty: 3.0,
            logprobs: Some(1),
            ..greedy()
        })
    };
    // Fed 2, which its output has already; fed 5, which is not in its list.
    let samples = [penalised(vec![2]), penalised(vec![])];
    let mut second = batch(&samples);
    second.fed = vec![FedToken { row: 0, prev_sample: 2 }, FedToken { row: 1, prev_sample: 0 }];
    let mut logits = vec![0.0; 2 * 16];
    (logits[2], logits[3]) = (5.5, 0.5);
    (logits[16 + 5], logits[16 + 6]) = (4.0, 2.0);
    let choices: Vec<_> = second.samples.iter().map(plain).collect();
    let got = bench.sample(&second, &choices, &logits);
    assert_eq!(tokens(&got), [3, 6]);
    // Log-probabilities are of the logits before.
    let tops: Vec<_> = got
        .iter()
        .map(|sampled| sampled.logprobs.as_ref().expect("asked for").top[0].0)
        .collect();
    assert_eq!(tops, [2, 5]);
}

#[test]
fn masks_leave_only_what_they_allow() {
    let mut bench = Bench::new();
    let mut numbers = Numbers::new(5);
    for vocab in [3, 33, 1000, SLICE + 40] {
        let rows = filters().len();
        let logits = numbers.bf16_values(rows * vocab, 5.0);
        let masks: Vec<Vec<u32>> = (0..rows)
            .map(|_| {
                let mut mask: Vec<u32> = (0..vocab.div_ceil(32)).map(|_| numbers.next() as u32).collect();
                mask[0] |= 2;
                mask
            })
            .collect();
        let allows = |mask: &[u32], token: u32| mask[token as usize / 32] >> (token % 32) & 1 == 1;
        let samples: Vec<_> = filters()
            .into_iter()
            .map(|params| {
                row(SamplingParams {
                    logprobs: Some(0),
                    ..params
                })
            })
            .collect();
        let choices: Vec<_> = samples
            .iter()
            .zip(&masks)
            .map(|(sample, mask)| Choice {
                mask: Some(mask),
                ..plain(sample)
            })
            .collect();
        let got = bench.sample(&batch(&samples), &choices, &logits);
        let banned: Vec<_> = samples
            .iter()
            .zip(&masks)
            .map(|(sample, mask)| SampleRow {
                banned: Some((0..vocab as u32).filter(|token| !allows(mask, *token)).collect()),
                ..sample.clone()
            })
            .collect();
        let want = reference(&banned, &logits);
        assert_eq!(tokens(&got), tokens(&want), "vocabulary of {vocab}");
        assert_logprobs_close(&got, &want);
    }
}

fn assert_logprobs_close(got: &[SampledToken], want: &[SampledToken]) {
    for (got, want) in got.iter().zip(want) {
        let (Some(got), Some(want)) = (&got.logprobs, &want.logprobs) else {
            assert!(got.logprobs.is_none() && want.logprobs.is_none(), "asked for or not");
            continue;
        };
        let close = |a: f32, b: f32| (a - b).abs() <= 1e-5 * (1.0 + b.abs());
        assert!(close(got.logprob, want.logprob), "{got:?}, expected {want:?}");
        assert_eq!(got.rank, want.rank);
        assert_eq!(got.top.len(), want.top.len());
        for (got, want) in got.top.iter().zip(&want.top) {
            assert!(got.0 == want.0 && close(got.1, want.1), "{got:?}, expected {want:?}");
        }
    }
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let mut bench = Bench::new();
    let mut numbers = Numbers::new(6);
    for vocab in [1, 2, 17, 257, 5000, MAX_VOCAB] {
        let bent = SamplingParams {
            temperature: 3.0,
            top_k: 3,
            logit_bias: vec![(1, 30.0), (0, -2.0)],
            ..SamplingParams::default()
        };
        let kinds = [greedy(), bent, SamplingParams::default()];
        let samples: Vec<_> = [Some(0), Some(1), Some(5), Some(20), None]
            .into_iter()
            .flat_map(|logprobs| kinds.clone().map(|params| row(SamplingParams { logprobs, ..params })))
            .collect();
        // Many are equal after rounding.
        let logits = numbers.bf16_values(samples.len() * vocab, 8.0);
        let (got, want) = (bench.sample_all(&samples, &logits), reference(&samples, &logits));
        assert_eq!(tokens(&got), tokens(&want), "vocabulary of {vocab}");
        assert_logprobs_close(&got, &want);
    }
}

#[test]
fn given_tokens_are_reported_on_not_chosen() {
    let mut bench = Bench::new();
    let vocab = SLICE + 9;
    let logits = Numbers::new(7).bf16_values(4 * vocab, 4.0);
    let given = [0, 17, vocab as u32 - 1, 4097];
    let asked = row(SamplingParams {
        logprobs: Some(3),
        ..SamplingParams::default()
    });
    let samples = vec![asked; 4];
    let choices: Vec<_> = samples
        .iter()
        .zip(given)
        .map(|(sample, token)| Choice {
            given: Some(token),
            ..plain(sample)
        })
        .collect();
    let got = bench.sample(&batch(&samples), &choices, &logits);
    assert_eq!(tokens(&got), given);
    // The reference chooses a token that is pushed up, and reports on the logits before.
    let pushed: Vec<_> = given
        .iter()
        .map(|token| {
            row(SamplingParams {
                logit_bias: vec![(*token, 100.0)],
                logprobs: Some(3),
                ..greedy()
            })
        })
        .collect();
    let want = reference(&pushed, &logits);
    assert_eq!(tokens(&want), given);
    assert_logprobs_close(&got, &want);
}

#[test]
fn steps_need_what_their_rows_ask_for() {
    let mut packer = Packer::default();
    let mut needs = |params: SamplingParams| {
        let samples = [row(greedy()), row(params)];
        packer.pack(&batch(&samples), samples.iter().map(plain), 100)
    };
    assert_eq!(needs(greedy()), Needs::default());
    let draw = Needs {
        draw: true,
        ..Needs::default()
    };
    assert_eq!(needs(SamplingParams::default()), draw);
    let top_k = SamplingParams {
        top_k: 3,
        ..SamplingParams::default()
    };
    assert_eq!(needs(top_k.clone()), Needs { ranking: true, ..draw });
    let greedy_top_k = SamplingParams {
        temperature: 0.0,
        logprobs: Some(0),
        logit_bias: vec![(3, 1.0)],
        ..top_k
    };
    let want = Needs {
        adjustment: true,
        logprobs: true,
        ..Needs::default()
    };
    assert_eq!(needs(greedy_top_k), want);
}

#[test]
fn steps_beyond_the_limits_are_refused() {
    let mut bench = Bench::new();
    let samples = vec![row(greedy()); MAX_ROWS + 1];
    let choices = samples.iter().map(plain);
    let refused = bench.sampler.upload(&mut *bench.device, &batch(&samples), choices, 10);
    assert!(refused.is_err());
    let wide = Tensor::alloc(&mut *bench.device, "test data", [1, MAX_VOCAB + 1], true).expect("tensors are small");
    let needs = Needs::default();
    assert!(bench.sampler.run(&mut *bench.device, &wide, 1, needs).is_err());
    let limits = SampleLimits {
        max_samples: 1,
        max_model_len: 1,
        max_vocab: super::MAX_VOCAB + 1,
    };
    assert!(Sampler::alloc(&mut *bench.device, &bench.step, limits).is_err());
}
