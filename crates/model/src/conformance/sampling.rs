//! Choosing tokens. What holds exactly is checked exactly; what is random, by its distribution.

use std::sync::Arc;

use half::bf16;
use lapidary_engine::{Batch, FedToken, SampleRow, SampledToken, SamplingParams, TokenHistory, TokenId, TokenMask};

use super::Bounds;
use super::rig::{Numbers, Rig, SequenceStep, Stored, batch_of, exact, sampling_batch, shape};
use super::sampling_reference::{distribution, log_softmax};
use crate::backend::{Backend, DType, Width};

/// Rows of a sampling step.
const ROWS: usize = 256;
/// Steps of a distribution check: 10240 draws.
const STEPS: usize = 40;

/// Temperature 0 is the arg max, whatever else is asked; of equals the lowest id.
pub fn greedy_takes_the_lowest_of_equals<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(10);
    for vocab in [1, 2, 17, 257, 1023, 5000] {
        let vocab = shape(vocab, bounds);
        let mut logits = numbers.values(8 * vocab, 10.0);
        for row in logits.chunks_mut(vocab).take(7) {
            for _ in 0..3 {
                row[numbers.below(vocab)] = 12.0;
            }
        }
        let samples: Vec<_> = (0..8)
            .map(|seed| {
                row(SamplingParams {
                    seed,
                    top_p: 0.5,
                    ..greedy()
                })
            })
            .collect();
        let got = sample(&mut Rig::new(make, ROWS), &samples, &logits);
        for (got, logits) in got.iter().zip(logits.chunks(vocab)) {
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let lowest = logits
                .iter()
                .position(|logit| *logit == largest)
                .expect("it is one of them");
            assert_eq!(got.token as usize, lowest, "vocabulary of {vocab}");
            assert_eq!(got.logprobs, None, "nobody asked for log-probabilities");
        }
    }
}

/// A banned token is never chosen, a bias counts before everything else, and both leave the neighbours alone.
pub fn bans_and_biases_hold<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let logits: Vec<f32> = (0..32).map(|token| 8.0 - 0.25 * token as f32).collect();
    let biased = |logit_bias| SamplingParams { logit_bias, ..greedy() };
    let samples = [
        row(greedy()),
        SampleRow {
            banned: Some([0, 1, 3].into()),
            ..row(greedy())
        },
        row(biased(vec![(31, 100.0)])),
        row(biased(vec![(0, -100.0), (1, -100.0)])),
        SampleRow {
            banned: Some([31].into()),
            ..row(biased(vec![(31, 100.0), (30, 50.0)]))
        },
        row(SamplingParams {
            top_k: 1,
            temperature: 1.0,
            ..biased(vec![(9, 20.0)])
        }),
        row(greedy()),
    ];
    check_certain(make, &samples, &logits, &[0, 2, 31, 2, 30, 9, 0]);

    let banned: Arc<[TokenId]> = (0..31).collect();
    let random = SamplingParams {
        temperature: 50.0,
        ..SamplingParams::default()
    };
    let samples: Vec<_> = (0..ROWS as u64)
        .map(|seed| SampleRow {
            banned: Some(banned.clone()),
            ..row(SamplingParams { seed, ..random.clone() })
        })
        .collect();
    check_certain(make, &samples, &logits, &[31; ROWS]);
}

/// A token outside its row's mask is never chosen, whatever else is asked; any in it can be; log-probabilities know
/// nothing of masks; neighbours without one are free.
pub fn masks_hold<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(15);
    // Vocabularies that end within, at and after a word's end.
    for vocab in [2, 17, 32, 257, 5000] {
        let vocab = shape(vocab, bounds);
        let logits = numbers.values(vocab, 4.0);
        let exact_logprobs = log_softmax(&exact(&logits));
        let samples = masked_samples(&mut numbers, &logits);
        let got = sample(&mut Rig::new(make, ROWS), &samples, &repeated(&logits, samples.len()));
        for (index, (got, sample)) in got.iter().zip(&samples).enumerate() {
            let probability = distribution(&exact(&logits), sample, None)[got.token as usize];
            let is_certain = sample.params.temperature == 0.0;
            assert!(
                probability > 0.0 && (!is_certain || probability == 1.0),
                "vocabulary of {vocab}, sample {index}: token {} has probability {probability}",
                got.token
            );
            check_logprobs(got, sample.params.logprobs, &exact_logprobs, bounds);
        }
    }
    // Nothing but the mask decides: all of its tokens, across words, come up.
    let vocab = shape(100, bounds);
    let allowed = [1, 31, 32, 63, 64, 95];
    let samples: Vec<_> = (0..ROWS as u64)
        .map(|seed| SampleRow {
            mask: Some(mask_of(vocab, &allowed)),
            ..row(hot(seed))
        })
        .collect();
    let got = sample(&mut Rig::new(make, ROWS), &samples, &vec![0.0; ROWS * vocab]);
    let mut drawn: Vec<TokenId> = got.iter().map(|sampled| sampled.token).collect();
    drawn.sort_unstable();
    drawn.dedup();
    assert_eq!(drawn, allowed);
}

/// Rows with masks of one token and of half the vocabulary, between two without.
fn masked_samples(numbers: &mut Numbers, logits: &[f32]) -> Vec<SampleRow> {
    let vocab = logits.len() as TokenId;
    let mut samples = vec![row(greedy())];
    // One token alone, against bias, penalties and filters.
    for token in [0, vocab - 1, 31.min(vocab - 1), 32.min(vocab - 1)] {
        let alone = |params| SampleRow {
            mask: Some(mask_of(vocab as usize, &[token])),
            history: Some(TokenHistory {
                prompt: [token].into(),
                output: vec![token],
            }),
            ..row(params)
        };
        samples.push(alone(greedy()));
        samples.push(alone(SamplingParams {
            logit_bias: vec![(token, -100.0), ((token + 1) % vocab, 100.0)],
            repetition_penalty: 2.0,
            presence_penalty: 2.0,
            top_k: 1,
            top_p: 0.1,
            min_p: 0.9,
            ..hot(1)
        }));
    }
    // Half of the tokens: greedy takes the best of them, and of those that are not banned.
    let half: Vec<TokenId> = numbers.shuffled(vocab as usize).split_off(vocab as usize / 2);
    let masked = |params| SampleRow {
        mask: Some(mask_of(vocab as usize, &half)),
        ..row(params)
    };
    samples.push(masked(greedy()));
    if half.len() > 1 {
        samples.push(SampleRow {
            banned: Some(half[1..].into()),
            ..masked(hot(0))
        });
    }
    samples.extend((0..100).map(|seed| masked(hot(seed))));
    samples.push(row(greedy()));
    samples
}

/// Nearly all tokens equally likely.
fn hot(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 100.0,
        logprobs: Some(2),
        seed,
        ..SamplingParams::default()
    }
}

/// The mask that allows these tokens.
fn mask_of(vocab: usize, tokens: &[TokenId]) -> TokenMask {
    let mut mask = vec![0_u32; vocab.div_ceil(32)];
    for token in tokens {
        mask[*token as usize / 32] |= 1 << (token % 32);
    }
    mask.into()
}

/// Repetition looks at prompt and output, presence and frequency at the output; positive and negative logits.
pub fn penalties_follow_the_history<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let positive: Vec<f32> = (0..16).map(|token| 8.0 - 0.5 * token as f32).collect();
    let history = |prompt: &[TokenId], output: &[TokenId]| {
        Some(TokenHistory {
            prompt: prompt.into(),
            output: output.to_vec(),
        })
    };
    let with = |params, history| SampleRow { history, ..row(params) };
    let repetition = || SamplingParams {
        repetition_penalty: 1.5,
        ..greedy()
    };
    let presence = || SamplingParams {
        presence_penalty: 0.75,
        ..greedy()
    };
    let frequency = || SamplingParams {
        frequency_penalty: 0.4,
        ..greedy()
    };
    let samples = [
        with(repetition(), history(&[0, 1], &[2])),
        with(presence(), history(&[0, 1], &[])),
        with(presence(), history(&[5], &[0, 0, 0])),
        with(frequency(), history(&[0, 0, 0], &[0])),
        with(frequency(), history(&[], &[0, 0])),
        with(
            SamplingParams {
                frequency_penalty: -1.0,
                ..greedy()
            },
            history(&[], &[9, 9, 9, 9, 9]),
        ),
        with(
            SamplingParams {
                repetition_penalty: 0.5,
                ..greedy()
            },
            history(&[4], &[]),
        ),
    ];
    check_certain(make, &samples, &positive, &[3, 0, 1, 0, 1, 9, 4]);

    // Below zero, repetition pushes down by multiplying.
    let negative: Vec<f32> = (0..16).map(|token| -2.0 - 0.5 * token as f32).collect();
    let repetition = || SamplingParams {
        repetition_penalty: 2.5,
        ..greedy()
    };
    let samples = [
        with(repetition(), history(&[0], &[])),
        with(repetition(), history(&[0], &[0, 1, 2, 3])),
    ];
    check_certain(make, &samples, &negative, &[1, 4]);
}

/// Log-probability, rank and alternatives are the model's own, whatever bends the choice.
pub fn logprobs_are_of_the_raw_logits<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(11);
    for vocab in [2, 17, 257, 5000] {
        let vocab = shape(vocab, bounds);
        // Rounded to bf16, many of a large vocabulary are equal.
        let order = numbers.shuffled(vocab);
        let spread = if vocab > 256 { 1.0 / 256.0 } else { 0.0625 };
        let logits: Vec<f32> = order.iter().map(|rank| 8.0 - spread * (*rank % 2048) as f32).collect();
        let logits: Vec<f32> = logits.iter().map(|logit| bf16::from_f32(*logit).to_f32()).collect();
        let bent = SamplingParams {
            temperature: 3.0,
            top_k: 3,
            logit_bias: vec![(1, 30.0)],
            ..SamplingParams::default()
        };
        let wanted = [Some(0), Some(1), Some(5), Some(20), None];
        let samples: Vec<_> = wanted
            .iter()
            .flat_map(|logprobs| {
                let with = |params: &SamplingParams| {
                    row(SamplingParams {
                        logprobs: *logprobs,
                        ..params.clone()
                    })
                };
                [with(&greedy()), with(&bent), with(&SamplingParams::default())]
            })
            .collect();
        let got = sample(&mut Rig::new(make, ROWS), &samples, &repeated(&logits, samples.len()));
        let exact = log_softmax(&exact(&logits));
        for (got, sample) in got.iter().zip(&samples) {
            check_logprobs(got, sample.params.logprobs, &exact, bounds);
        }
    }
}

/// A given token comes back as it is, with the raw logits' log-probability, rank and alternatives, and without a draw: in
/// its own rows, between rows that choose, and in several rows of one sequence.
pub fn given_tokens_are_scored<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(15);
    for vocab in [2, 17, 257, 5000] {
        let vocab = shape(vocab, bounds);
        let logits = numbers.values(8 * vocab, 6.0);
        let samples: Vec<_> = (0..8)
            .map(|index| {
                let scored = SamplingParams {
                    logprobs: Some([0, 1, 5, 20][index / 2]),
                    ..greedy()
                };
                // Every other row chooses, so that a backend cannot treat a step as one kind.
                let given = (index % 2 == 0).then(|| numbers.below(vocab) as TokenId);
                SampleRow { given, ..row(scored) }
            })
            .collect();
        let got = sample(&mut Rig::new(make, ROWS), &samples, &logits);
        for (index, (got, sample)) in got.iter().zip(&samples).enumerate() {
            let exact = log_softmax(&exact(&logits[index * vocab..][..vocab]));
            let best = (0..vocab).rev().max_by(|a, b| exact[*a].total_cmp(&exact[*b]));
            let expected = sample.given.map_or(best, |token| Some(token as usize));
            assert_eq!(Some(got.token as usize), expected, "row {index} of vocabulary {vocab}");
            check_logprobs(got, sample.params.logprobs, &exact, bounds);
        }
    }

    let vocab = shape(64, bounds);
    let logits = numbers.values(5 * vocab, 6.0);
    let samples: Vec<_> = (0..5)
        .map(|index| SampleRow {
            row: index,
            position: index + 1,
            given: (index < 4).then_some(index * 7),
            ..row(SamplingParams {
                logprobs: Some(2),
                ..greedy()
            })
        })
        .collect();
    let batch = Batch {
        samples: samples.clone(),
        ..batch_of(&[SequenceStep::new((0..5).collect(), 0, 0)])
    };
    let got = sample_batch(&mut Rig::new(make, ROWS), &batch, &logits);
    for (index, (got, sample)) in got.iter().zip(&samples).enumerate() {
        if let Some(given) = sample.given {
            assert_eq!(got.token, given, "row {index} of the prompt");
        }
        let exact = log_softmax(&exact(&logits[index * vocab..][..vocab]));
        check_logprobs(got, Some(2), &exact, bounds);
    }
}

fn check_logprobs(got: &SampledToken, wanted: Option<u32>, exact: &[f64], bounds: &Bounds) {
    let Some(wanted) = wanted else {
        assert_eq!(got.logprobs, None, "nobody asked for log-probabilities");
        return;
    };
    let logprobs = got.logprobs.as_ref().expect("log-probabilities were asked for");
    let own = exact[got.token as usize];
    let close = |got: f32, want: f64| (f64::from(got) - want).abs() <= bounds.logprob * (1.0 + want.abs());
    assert!(
        close(logprobs.logprob, own),
        "log-probability of {} is {}, expected {own}",
        got.token,
        logprobs.logprob
    );
    let (better, equal) = exact.iter().fold((0, 0), |(better, equal), other| {
        (better + u32::from(*other > own), equal + u32::from(*other == own))
    });
    assert!(
        (better + 1..=better + equal).contains(&logprobs.rank),
        "rank {} of {better} better",
        logprobs.rank
    );
    let mut order: Vec<usize> = (0..exact.len()).collect();
    order.sort_by(|a, b| exact[*b].total_cmp(&exact[*a]).then(a.cmp(b)));
    order.truncate(wanted as usize);
    let tokens: Vec<_> = logprobs.top.iter().map(|(token, _)| *token as usize).collect();
    assert_eq!(tokens, order, "the most likely tokens, of equals the lowest id first");
    for (token, logprob) in &logprobs.top {
        assert!(
            close(*logprob, exact[*token as usize]),
            "log-probability {logprob} of alternative {token}"
        );
    }
}

/// Frequencies of ten thousand draws against the exact distribution, for every filter and for all of them together.
pub fn draws_follow_the_distribution<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(12);
    // Spaced so that no filter's edge is within rounding of a token.
    let order = numbers.shuffled(shape(24, bounds));
    let logits: Vec<f32> = order.iter().map(|rank| 4.0 - 0.1875 * *rank as f32).collect();
    let plain = SamplingParams::default;
    let cases = [
        plain(),
        SamplingParams {
            temperature: 0.5,
            ..plain()
        },
        SamplingParams {
            temperature: 2.0,
            ..plain()
        },
        // As good as greedy.
        SamplingParams {
            temperature: 0.01,
            ..plain()
        },
        SamplingParams { top_k: 1, ..plain() },
        SamplingParams { top_k: 5, ..plain() },
        SamplingParams { top_k: 100, ..plain() },
        SamplingParams { top_p: 0.62, ..plain() },
        SamplingParams { top_p: 0.01, ..plain() },
        SamplingParams { min_p: 0.2, ..plain() },
        SamplingParams { min_p: 1.0, ..plain() },
        SamplingParams {
            temperature: 1.7,
            min_p: 0.05,
            top_k: 12,
            top_p: 0.8,
            ..plain()
        },
        SamplingParams {
            logit_bias: vec![(3, 2.5), (7, -4.0)],
            top_p: 0.9,
            ..plain()
        },
    ];
    let mut rig = Rig::new(make, ROWS);
    for params in cases {
        check_distribution(&mut rig, &logits, &params);
    }
    let wide = numbers.values(shape(5000, bounds), 1.0);
    check_distribution(&mut rig, &wide, &plain());
    check_distribution(
        &mut rig,
        &wide,
        &SamplingParams {
            top_k: 40,
            top_p: 0.95,
            temperature: 0.7,
            ..plain()
        },
    );
}

fn check_distribution<B: Backend>(rig: &mut Rig<B>, logits: &[f32], params: &SamplingParams) {
    let expected = distribution(&exact(logits), &row(params.clone()), None);
    let mut counts = vec![0_usize; logits.len()];
    for step in 0..STEPS {
        let samples: Vec<_> = (0..ROWS)
            .map(|index| {
                // Half the draws share a seed, the other half a position.
                let varied = (step * ROWS + index) as u64;
                let (seed, position) = if index % 2 == 0 { (77, varied + 1) } else { (varied, 1) };
                SampleRow {
                    position: position as u32,
                    ..row(SamplingParams { seed, ..params.clone() })
                }
            })
            .collect();
        for got in sample(rig, &samples, &repeated(logits, ROWS)) {
            counts[got.token as usize] += 1;
        }
    }
    for (token, (count, probability)) in counts.iter().zip(&expected).enumerate() {
        assert!(
            *count == 0 || *probability > 0.0,
            "{params:?}: token {token} was filtered, yet drawn {count} times"
        );
    }
    // Tokens are pooled until a pool expects enough draws for the statistic to be chi-squared.
    let draws = (STEPS * ROWS) as f64;
    let (mut statistic, mut freedom) = (0.0, -1.0);
    let mut pool = (0.0, 0.0);
    for (token, probability) in expected.iter().enumerate() {
        pool = (pool.0 + counts[token] as f64, pool.1 + probability * draws);
        if pool.1 >= 20.0 {
            statistic += (pool.0 - pool.1) * (pool.0 - pool.1) / pool.1;
            freedom += 1.0;
            pool = (0.0, 0.0);
        }
    }
    // Six standard deviations above the mean: the seeds are fixed, so this passes always or never.
    let limit = freedom + 6.0 * (2.0 * f64::max(freedom, 1.0)).sqrt();
    assert!(
        statistic <= limit,
        "{params:?}: chi-squared {statistic} for {freedom} degrees of freedom"
    );
}

/// The same seed and position draw the same token in any row of any step; another seed or position draws anew.
pub fn draws_depend_on_seed_and_position_alone<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(13);
    let logits = numbers.values(shape(1000, bounds), 1.0);
    let kinds = [
        SamplingParams::default(),
        SamplingParams {
            top_k: 50,
            ..SamplingParams::default()
        },
        SamplingParams {
            top_p: 0.9,
            temperature: 1.3,
            ..SamplingParams::default()
        },
        SamplingParams {
            min_p: 0.1,
            logprobs: Some(2),
            ..SamplingParams::default()
        },
    ];
    let samples: Vec<_> = (0..64)
        .map(|index| SampleRow {
            position: 1 + index / 8,
            ..row(SamplingParams {
                seed: u64::from(index % 2),
                ..kinds[index as usize / 2 % 4].clone()
            })
        })
        .collect();
    let mut rig = Rig::new(make, ROWS);
    let together = sample(&mut rig, &samples, &repeated(&logits, 64));
    for (index, (lone, want)) in samples.iter().zip(&together).enumerate() {
        let alone = sample(&mut rig, std::slice::from_ref(lone), &logits);
        assert_eq!(alone.first(), Some(want), "row {index} alone");
    }
    let reversed: Vec<_> = samples.iter().rev().cloned().collect();
    let mut got = sample(&mut Rig::new(make, ROWS), &reversed, &repeated(&logits, 64));
    got.reverse();
    assert_eq!(
        got, together,
        "rows in reverse order, on a backend that never drew before"
    );

    let draws = |seed: u64| -> Vec<TokenId> {
        let samples: Vec<_> = (1..=64)
            .map(|position| SampleRow {
                position,
                ..row(SamplingParams {
                    seed,
                    ..SamplingParams::default()
                })
            })
            .collect();
        let got = sample(&mut Rig::new(make, ROWS), &samples, &repeated(&logits, 64));
        got.into_iter().map(|sampled| sampled.token).collect()
    };
    let (first, second) = (draws(1), draws(2));
    let equal = first.iter().zip(&second).filter(|(a, b)| a == b).count();
    assert!(equal < 8, "{equal} of 64 draws of 1000 tokens agree between two seeds");
    let repeats = first.windows(2).filter(|pair| pair[0] == pair[1]).count();
    assert!(
        repeats < 8,
        "{repeats} of 63 draws of 1000 tokens repeat at the next position"
    );
}

/// A row fed by the previous step reads that step's token, and penalties count it as output.
pub fn fed_tokens_are_read_and_counted<B: Backend>(make: &dyn Fn() -> B, _: &Bounds) {
    let mut numbers = Numbers::new(14);
    let vocab = 16;
    let mut rig = Rig::new(make, ROWS);
    // Three sequences choose 5, 9 and 2.
    let mut logits = vec![0.0; 3 * vocab];
    (logits[5], logits[vocab + 9], logits[2 * vocab + 2]) = (4.0, 4.0, 4.0);
    let first = sampling_batch(vec![row(greedy()); 3]);
    let plan = rig.backend.begin(&first).expect("a small batch");
    let mut tensor = rig.wide_tensor(&plan, &logits, 3);
    rig.backend.sample(&plan, &first, &mut tensor).expect("sampling runs");

    // The second of them left; the third comes first.
    let fed = vec![FedToken { row: 0, prev_sample: 2 }, FedToken { row: 1, prev_sample: 0 }];
    let sequences = [SequenceStep::new(vec![0], 1, 0), SequenceStep::new(vec![0], 1, 1)];
    let penalised = |at| SampleRow {
        row: at,
        position: 2,
        history: Some(TokenHistory {
            prompt: [7].into(),
            output: Vec::new(),
        }),
        ..row(SamplingParams {
            frequency_penalty: 3.0,
            ..greedy()
        })
    };
    let second = Batch {
        step: 1,
        fed,
        samples: vec![penalised(0), penalised(1)],
        ..batch_of(&sequences)
    };
    // A step whose tokens were not collected yet is still in flight where the backend allows two.
    let early = (rig.backend.max_steps_in_flight() < 2).then(|| rig.backend.collect().expect("the step ran"));
    let plan = rig.backend.begin(&second).expect("a small batch");
    let embedded = numbers.values(vocab * 64, 1.0);
    let table = Stored::new(&embedded, &[vocab, 64], DType::Bf16);
    let table = rig.backend.upload_embedding(table.host()).expect("tables are small");
    let mut hidden = rig.alloc(2, 64, Width::Native);
    rig.backend
        .embed(&plan, &table, bf16::ONE, &mut hidden)
        .expect("embed runs");
    let want: Vec<f64> = [2, 5]
        .iter()
        .flat_map(|token| exact(&embedded[token * 64..][..64]))
        .collect();
    assert_eq!(rig.read(&hidden, 2), want, "the rows of the tokens that were sampled");

    // Without the fed token counted, both would choose 2 again.
    let mut logits = vec![0.0; 2 * vocab];
    (logits[2], logits[3], logits[vocab + 2], logits[vocab + 5]) = (4.0, 2.0, 3.0, 4.0);
    // The step's input tokens are 2 and 5, so these rows of a table become its logits.
    let mut wide = vec![0.0; vocab * vocab];
    wide[2 * vocab..3 * vocab].copy_from_slice(&logits[..vocab]);
    wide[5 * vocab..6 * vocab].copy_from_slice(&logits[vocab..]);
    let table = Stored::new(&wide, &[vocab, vocab], DType::Bf16);
    let table = rig.backend.upload_embedding(table.host()).expect("tables are small");
    let mut tensor = rig.alloc(2, vocab, Width::Wide);
    rig.backend
        .embed(&plan, &table, bf16::ONE, &mut tensor)
        .expect("embed runs");
    rig.backend.sample(&plan, &second, &mut tensor).expect("sampling runs");
    let early = early.unwrap_or_else(|| rig.backend.collect().expect("the first step ran"));
    assert_eq!(early.iter().map(|sampled| sampled.token).collect::<Vec<_>>(), [5, 9, 2]);
    let late = rig.backend.collect().expect("the second step ran");
    assert_eq!(late.iter().map(|sampled| sampled.token).collect::<Vec<_>>(), [3, 2]);
}

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

/// A sample whose row is set by [`sample`].
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

fn repeated(logits: &[f32], rows: usize) -> Vec<f32> {
    logits.repeat(rows)
}

/// One step that samples from these logits, `[samples, vocab]`.
fn sample<B: Backend>(rig: &mut Rig<B>, samples: &[SampleRow], logits: &[f32]) -> Vec<SampledToken> {
    let samples = samples.iter().enumerate().map(|(index, sample)| SampleRow {
        row: index as u32,
        ..sample.clone()
    });
    let batch = sampling_batch(samples.collect());
    sample_batch(rig, &batch, logits)
}

/// The batch's samples from these logits, `[samples, vocab]`; its rows are its samples.
fn sample_batch<B: Backend>(rig: &mut Rig<B>, batch: &Batch, logits: &[f32]) -> Vec<SampledToken> {
    let rows = batch.samples.len();
    let plan = rig.backend.begin(batch).expect("the batch keeps the limits");
    let mut tensor = rig.wide_tensor(&plan, logits, rows);
    rig.backend.sample(&plan, batch, &mut tensor).expect("sampling runs");
    let sampled = rig.backend.collect().expect("the step ran");
    assert_eq!(sampled.len(), rows, "one token for each sample");
    sampled
}

/// All samples, from the same logits, have one possible outcome; the reference and the expectation agree on it.
fn check_certain<B: Backend>(make: &dyn Fn() -> B, samples: &[SampleRow], logits: &[f32], expected: &[TokenId]) {
    let got = sample(&mut Rig::new(make, ROWS), samples, &repeated(logits, samples.len()));
    for (index, ((got, expected), sample)) in got.iter().zip(expected).zip(samples).enumerate() {
        let certain = distribution(&exact(logits), sample, None);
        assert_eq!(certain[*expected as usize], 1.0, "sample {index}: the reference agrees");
        assert_eq!(got.token, *expected, "sample {index}: {:?}", sample.params);
    }
}
