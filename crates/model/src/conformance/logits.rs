//! The end of the decoder.

use std::sync::Arc;

use lapidary_engine::{Batch, SampleRow, SamplingParams};

use super::Bounds;
use super::elementwise::norm;
use super::rig::{Numbers, Rig, SequenceStep, Stored, assert_close, batch_of, exact, shape};
use crate::backend::{Backend, DType, LastHidden, Width};

/// `[rows, sampled rows in their order]`.
const SAMPLED: [(usize, &[u32]); 4] = [(1, &[0]), (5, &[4]), (17, &[16, 0, 3, 9]), (3, &[2, 1, 0])];

/// Residual, two norms, the tied embedding and the soft-cap, for the sampled rows alone and in their order.
pub fn logits_match_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(9);
    for (rows, sampled) in SAMPLED {
        for (hidden, vocab) in [(15, 17), (64, 257), (129, 1000), (256, 5000)] {
            for (dtype, softcap) in [(DType::Bf16, Some(30.0)), (DType::F16, Some(1.0)), (DType::F32, None)] {
                let shape = [rows, shape(hidden, bounds), shape(vocab, bounds)];
                check(make, &mut numbers, shape, sampled, (dtype, softcap), bounds);
            }
        }
    }
}

fn check<B: Backend>(
    make: &dyn Fn() -> B,
    numbers: &mut Numbers,
    [rows, hidden, vocab]: [usize; 3],
    sampled: &[u32],
    (dtype, softcap): (DType, Option<f32>),
    bounds: &Bounds,
) {
    let mut rig = Rig::new(make, rows);
    let params = Arc::new(SamplingParams::default());
    let sample = |row: &u32| SampleRow {
        row: *row,
        position: row + 1,
        given: None,
        params: params.clone(),
        banned: None,
        mask: None,
        history: None,
    };
    let sequence = SequenceStep::new((0..rows as u32).collect(), 0, 0);
    let batch = Batch {
        samples: sampled.iter().map(sample).collect(),
        ..batch_of(&[sequence])
    };
    let plan = rig.backend.begin(&batch).expect("a small batch");

    let (x, residual) = (numbers.values(rows * hidden, 1.0), numbers.values(rows * hidden, 3.0));
    let (post, last) = (numbers.values(hidden, 0.5), numbers.values(hidden, 0.5));
    let table = numbers.values(vocab * hidden, 0.25);
    let (x_tensor, residual_tensor) = (rig.tensor(&plan, &x, rows), rig.wide_tensor(&plan, &residual, rows));
    let (post_norm, last_norm) = (rig.norm_weight(&post), rig.norm_weight(&last));
    let stored = Stored::new(&table, &[vocab, hidden], dtype);
    let embedding = rig.backend.upload_embedding(stored.host()).expect("tables are small");
    let mut logits = rig.alloc(rows, vocab, Width::Wide);
    let hidden_state = LastHidden {
        x: &x_tensor,
        post: &post_norm,
        residual: &residual_tensor,
        norm: &last_norm,
        eps: 1e-6,
    };
    rig.backend
        .logits(&plan, hidden_state, &embedding, softcap, &mut logits)
        .expect("logits run");
    let got = rig.read(&logits, sampled.len());

    let added = norm(&exact(&x), &post, 1e-6);
    let sum: Vec<f64> = exact(&residual)
        .iter()
        .zip(&added)
        .map(|(old, added)| old + added)
        .collect();
    let normed = norm(&sum, &last, 1e-6);
    let table = exact(&table);
    let (mut want, mut magnitude) = (Vec::new(), Vec::new());
    for row in sampled {
        let row = &normed[*row as usize * hidden..][..hidden];
        for entry in table.chunks(hidden) {
            let logit: f64 = row.iter().zip(entry).map(|(x, weight)| x * weight).sum();
            want.push(softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh()));
            magnitude.push(row.iter().zip(entry).map(|(x, weight)| (x * weight).abs()).sum::<f64>());
        }
    }
    // The hidden state was normed twice before the product.
    let bound = bounds.dot + 4.0 * bounds.element;
    assert_close(
        &format!("logits {rows}x{hidden}x{vocab} {dtype:?} {softcap:?}"),
        &got,
        &want,
        &magnitude,
        bound,
    );
}
