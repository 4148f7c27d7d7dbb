//! Embedding, norms and the gated activation.

use half::bf16;

use super::Bounds;
use super::rig::{
    Error, Numbers, Rig, SCHEMES, SequenceStep, Stored, assert_close, assert_quantized, batch_of, exact, shape,
};
use crate::backend::{ActivationScheme, Backend, DType, LinearWeights, NormArgs, Width};

const WIDTHS: [usize; 12] = [1, 15, 16, 17, 63, 65, 127, 128, 129, 1000, 4095, 4097];

/// Rows of the table, scaled, of every type a table can have.
pub fn embed_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(1);
    let tokens = vec![4, 0, 6, 6, 2];
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        for cols in WIDTHS {
            let cols = shape(cols, bounds);
            let values = numbers.values(7 * cols, 1.0);
            let mut rig = Rig::new(make, 5);
            let plan = rig
                .backend
                .begin(&batch_of(&[SequenceStep::new(tokens.clone(), 0, 0)]))
                .expect("a small batch");
            let table = Stored::new(&values, &[7, cols], dtype);
            let table = rig.backend.upload_embedding(table.host()).expect("tables are small");
            let mut out = rig.alloc(5, cols, Width::Wide);
            rig.backend
                .embed(&plan, &table, bf16::from_f32(59.75), &mut out)
                .expect("embed runs");
            let got = rig.read(&out, 5);
            let want: Vec<f64> = tokens
                .iter()
                .flat_map(|token| &values[*token as usize * cols..][..cols])
                .map(|value| f64::from(*value) * 59.75)
                .collect();
            let magnitude: Vec<f64> = want.iter().map(|value| value.abs()).collect();
            assert_close(
                &format!("embed {dtype:?} {cols}"),
                &got,
                &want,
                &magnitude,
                bounds.element,
            );
        }
    }
}

/// `x * rsqrt(mean(x^2) + eps) * (1 + w)`, quantised by every scheme; a row of zeros and one of large values among them.
pub fn norm_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(2);
    let rows = 4;
    for cols in WIDTHS {
        let cols = shape(cols, bounds);
        let mut x = numbers.values(rows * cols, 3.0);
        x[cols..2 * cols].fill(0.0);
        x[2 * cols..3 * cols].iter_mut().for_each(|value| *value *= 4096.0);
        let weight = numbers.values(cols, 1.0);
        for scheme in SCHEMES {
            let got = compute_norm(make, [rows, cols, cols], &x, &weight, scheme);
            let want = norm(&exact(&x), &weight, 1e-6);
            assert_quantized(
                &format!("norm {cols}"),
                &got,
                &want,
                cols,
                scheme,
                Error::relative(bounds.element),
            );
        }
    }
}

fn compute_norm<B: Backend>(
    make: &dyn Fn() -> B,
    [rows, cols, last]: [usize; 3],
    x: &[f32],
    weight: &[f32],
    scheme: ActivationScheme,
) -> Vec<f64> {
    let mut rig = Rig::new(make, rows);
    let plan = rig.begin(rows);
    let tensor = rig.wide_tensor(&plan, x, rows);
    let weights = rig.norm_weight(weight);
    let mut out = rig.activation(rows, cols);
    let args = NormArgs {
        weight: &weights,
        eps: 1e-6,
        out_scheme: scheme,
    };
    rig.backend.norm(&plan, &tensor, args, &mut out).expect("norm runs");
    rig.read_columns(&plan, &out, [rows, cols, last], scheme)
}

/// The residual gains the normed branch, and its own norm comes out.
pub fn add_norm_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(3);
    let rows = 3;
    for cols in WIDTHS {
        let cols = shape(cols, bounds);
        let (x, residual) = (numbers.values(rows * cols, 0.5), numbers.values(rows * cols, 20.0));
        let (post, pre) = (numbers.values(cols, 1.0), numbers.values(cols, 1.0));
        for scheme in SCHEMES {
            let (got_residual, got) =
                compute_add_norm(make, [rows, cols, cols], [&x, &residual], [&post, &pre], scheme);
            let added = norm(&exact(&x), &post, 1e-6);
            let sum: Vec<f64> = exact(&residual)
                .iter()
                .zip(&added)
                .map(|(old, added)| old + added)
                .collect();
            let magnitude: Vec<f64> = exact(&residual)
                .iter()
                .zip(&added)
                .map(|(old, added)| old.abs() + added.abs())
                .collect();
            assert_close(
                &format!("add_norm residual {cols}"),
                &got_residual,
                &sum,
                &magnitude,
                bounds.element,
            );
            // Judged from the residual the backend really has: a sum that cancels may be off by more than itself.
            let want = norm(&got_residual, &pre, 1e-6);
            assert_quantized(
                &format!("add_norm {cols}"),
                &got,
                &want,
                cols,
                scheme,
                Error::relative(4.0 * bounds.element),
            );
        }
    }
}

/// The residual, and the last columns of the activation.
fn compute_add_norm<B: Backend>(
    make: &dyn Fn() -> B,
    [rows, cols, last]: [usize; 3],
    [x, residual]: [&[f32]; 2],
    [post, pre]: [&[f32]; 2],
    scheme: ActivationScheme,
) -> (Vec<f64>, Vec<f64>) {
    let mut rig = Rig::new(make, rows);
    let plan = rig.begin(rows);
    let branch = rig.tensor(&plan, x, rows);
    let mut stream = rig.wide_tensor(&plan, residual, rows);
    let (post_norm, pre_norm) = (rig.norm_weight(post), rig.norm_weight(pre));
    let mut out = rig.activation(rows, cols);
    let args = NormArgs {
        weight: &pre_norm,
        eps: 1e-6,
        out_scheme: scheme,
    };
    rig.backend
        .add_norm(&plan, &branch, &post_norm, &mut stream, args, &mut out)
        .expect("add_norm runs");
    (
        rig.read(&stream, rows),
        rig.read_columns(&plan, &out, [rows, cols, last], scheme),
    )
}

/// `gelu_tanh(gate) * up`, also far out, where it is the identity or nothing.
pub fn geglu_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(4);
    let rows = 3;
    for cols in WIDTHS {
        let cols = shape(cols, bounds);
        let mut gate_up = numbers.values(rows * 2 * cols, 4.0);
        gate_up[0] = 40.0;
        gate_up[2 * cols] = -40.0;
        let want: Vec<f64> = exact(&gate_up)
            .chunks(2 * cols)
            .flat_map(|row| {
                (0..cols)
                    .map(|col| gelu_tanh(row[col]) * row[cols + col])
                    .collect::<Vec<_>>()
            })
            .collect();
        for scheme in SCHEMES {
            let got = compute_geglu(make, [rows, cols, cols], &gate_up, scheme);
            // 1 + tanh cancels for negative gates: the error is relative to gate * up, at most 16 but for the outliers.
            let error = Error {
                relative: bounds.element,
                absolute: bounds.element * 16.0,
            };
            assert_quantized(&format!("geglu {cols}"), &got, &want, cols, scheme, error);
        }
    }
}

fn compute_geglu<B: Backend>(
    make: &dyn Fn() -> B,
    [rows, cols, last]: [usize; 3],
    gate_up: &[f32],
    scheme: ActivationScheme,
) -> Vec<f64> {
    let mut rig = Rig::new(make, rows);
    let plan = rig.begin(rows);
    let x = unit_rows(&mut rig, &plan, rows);
    let weights = columns_of(gate_up, rows);
    let [gate, up] = weights.map(|part| Stored::new(&part, &[cols, UNIT_COLS], DType::Bf16));
    let weights = LinearWeights {
        parts: vec![gate.host(), up.host()],
        scales: Vec::new(),
        input: ActivationScheme::None,
    };
    let weights = rig.backend.upload_gated_linear(&weights).expect("weights are small");
    let mut between = rig.alloc(rows, 2 * cols, Width::Native);
    let mut out = rig.activation(rows, cols);
    rig.backend
        .gated_linear(&plan, &x, &weights, &mut between, scheme, &mut out)
        .expect("geglu runs");
    rig.read_columns(&plan, &out, [rows, cols, last], scheme)
}

/// Rows that several pieces add up, and what is odd about their ends.
const EQUAL_WIDTHS: [usize; 6] = [16, 129, 1000, 2304, 4608, 5000];
/// What is compared of them: one wrong sum is in all columns.
const EQUAL_COLUMNS: usize = 128;

/// Norms and the gated activation to the bit, as another backend whose arithmetic is the same has them. A row of zeros, one
/// of large values, and many roundings to FP8: a value that errs in its last place shows in one of a million.
pub fn row_operations_equal<O: Backend, B: Backend>(oracle: &dyn Fn() -> O, make: &dyn Fn() -> B, bounds: &Bounds) {
    let mut numbers = Numbers::new(8);
    for cols in EQUAL_WIDTHS {
        let (rows, cols) = (5, shape(cols, bounds));
        let mut x = numbers.values(rows * cols, 3.0);
        x[cols..2 * cols].fill(0.0);
        x[2 * cols..3 * cols].iter_mut().for_each(|value| *value *= 4096.0);
        let residual = numbers.values(rows * cols, 20.0);
        let (post, pre) = (numbers.values(cols, 1.0), numbers.values(cols, 1.0));
        let mut gate_up = numbers.values(rows * 2 * cols, 6.0);
        (gate_up[0], gate_up[2 * cols]) = (40.0, -40.0);
        for scheme in SCHEMES {
            let what = format!("{cols} columns, {scheme:?}");
            let shape = [rows, cols, cols.min(EQUAL_COLUMNS)];
            let want = compute_norm(oracle, shape, &x, &pre, scheme);
            assert_eq!(compute_norm(make, shape, &x, &pre, scheme), want, "norm of {what}");
            let want = compute_add_norm(oracle, shape, [&x, &residual], [&post, &pre], scheme);
            let got = compute_add_norm(make, shape, [&x, &residual], [&post, &pre], scheme);
            assert_eq!(got, want, "add_norm of {what}");
            let want = compute_geglu(oracle, shape, &gate_up, scheme);
            assert_eq!(compute_geglu(make, shape, &gate_up, scheme), want, "geglu of {what}");
        }
    }
}

/// Columns of unit rows: the square of the factor that their norm has to take back.
const UNIT_COLS: usize = 16;

/// Row `r` is 1 in column `r` and 0 elsewhere, not quantised: a product with it is a column of the weights.
fn unit_rows<B: Backend>(rig: &mut Rig<B>, plan: &B::Plan, rows: usize) -> B::Activation {
    let mut values = vec![0.0; rows * UNIT_COLS];
    values.iter_mut().step_by(UNIT_COLS + 1).for_each(|value| *value = 1.0);
    let tensor = rig.tensor(plan, &values, rows);
    let weight = rig.norm_weight(&[0.25 - 1.0; UNIT_COLS]);
    let mut out = rig.activation(rows, UNIT_COLS);
    let norm = NormArgs {
        weight: &weight,
        eps: 0.0,
        out_scheme: ActivationScheme::None,
    };
    rig.backend.norm(plan, &tensor, norm, &mut out).expect("norm runs");
    out
}

/// Weights of gate and of up, `[cols, UNIT_COLS]`, that make `gate_up` of unit rows.
fn columns_of(gate_up: &[f32], rows: usize) -> [Vec<f32>; 2] {
    let cols = gate_up.len() / rows / 2;
    [0, cols].map(|first| {
        let mut weights = vec![0.0; cols * UNIT_COLS];
        for (row, values) in gate_up.chunks(2 * cols).enumerate() {
            for (col, value) in values[first..][..cols].iter().enumerate() {
                weights[col * UNIT_COLS + row] = *value;
            }
        }
        weights
    })
}

pub(super) fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let mean_square = row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean_square + f64::from(eps)).sqrt();
            row.iter()
                .zip(weight)
                .map(move |(value, weight)| value * factor * (1.0 + f64::from(*weight)))
        })
        .collect()
}

pub(super) fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}
