//! Linear layers: every weight type, every activation scheme, stacked parts, odd shapes.

use super::Bounds;
use super::elementwise::gelu_tanh;
use super::rig::{
    Error, Numbers, Rig, SCHEMES, Stored, assert_close, assert_quantized, exact, quantized, round_bf16, shape,
};
use crate::backend::{ActivationScheme, Backend, DType, LinearWeights, NormArgs, Width};

/// `[tokens, in, outs of the stacked parts]`.
const SHAPES: [(usize, usize, &[usize]); 12] = [
    (1, 1, &[1]),
    (1, 15, &[17]),
    (2, 16, &[16, 1]),
    (3, 17, &[15, 5, 5]),
    (1, 63, &[65]),
    (4, 64, &[64, 32, 32]),
    (15, 127, &[129]),
    (16, 128, &[127, 127]),
    (17, 129, &[63, 1, 64]),
    (65, 256, &[96]),
    (2, 4095, &[33]),
    (129, 4097, &[17, 16]),
];

/// `x * weights^T` with the scale of every output row, from inputs that no scheme rounds ambiguously.
pub fn linear_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let kinds = [
        (DType::Bf16, ActivationScheme::None),
        (DType::F16, ActivationScheme::None),
        (DType::F32, ActivationScheme::None),
        (DType::F8E4M3, ActivationScheme::None),
        (DType::F8E4M3, ActivationScheme::Fp8Static { scale: 0.0371 }),
        // Clips most of its input.
        (DType::F8E4M3, ActivationScheme::Fp8Static { scale: 0.0011 }),
        (DType::F8E4M3, ActivationScheme::Fp8Token),
    ];
    let mut numbers = Numbers::new(5);
    for (rows, in_features, outs) in SHAPES {
        let in_features = shape(in_features, bounds);
        let outs: Vec<usize> = outs.iter().map(|out| shape(*out, bounds)).collect();
        for (dtype, scheme) in kinds {
            check(
                make,
                &mut numbers,
                Case {
                    rows,
                    in_features,
                    outs: &outs,
                    dtype,
                    scheme,
                    operands: Operands::Random,
                },
                bounds,
            );
        }
    }
}

#[derive(Clone, Copy)]
struct Case<'a> {
    rows: usize,
    in_features: usize,
    outs: &'a [usize],
    dtype: DType,
    scheme: ActivationScheme,
    operands: Operands,
}

fn check<B: Backend>(make: &dyn Fn() -> B, numbers: &mut Numbers, case: Case<'_>, bounds: &Bounds) {
    let Computed { x, weights, got } = case.compute(make, numbers);
    let (want, magnitude) = weights.product(&x, case.scheme);
    assert_close(&case.to_string(), &got, &want, &magnitude, bounds.dot);
}

/// What a backend made of a case.
struct Computed {
    x: Vec<f64>,
    weights: KnownWeights,
    got: Vec<f64>,
}

impl Case<'_> {
    fn compute<B: Backend>(self, make: &dyn Fn() -> B, numbers: &mut Numbers) -> Computed {
        let mut rig = Rig::new(make, self.rows);
        let plan = rig.begin(self.rows);
        let size = [self.rows, self.in_features];
        let (x, activation) = known_activation(&mut rig, &plan, numbers, size, self.scheme, self.operands);
        let weights = KnownWeights::new(numbers, self.outs, self.in_features, self.dtype, self.operands);
        let uploaded = rig
            .backend
            .upload_linear(&weights.for_input(self.scheme))
            .expect("weights are small");
        let mut out = rig.alloc(self.rows, self.outs.iter().sum(), Width::Native);
        rig.backend
            .linear(&plan, &activation, &uploaded, &mut out)
            .expect("linear runs");
        let got = rig.read(&out, self.rows);
        Computed { x, weights, got }
    }
}

impl std::fmt::Display for Case<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            rows,
            in_features,
            outs,
            dtype,
            scheme,
            operands,
        } = self;
        write!(
            f,
            "linear {dtype:?} {scheme:?} {rows}x{in_features} by {outs:?}, {operands:?}"
        )
    }
}

/// The same bits as another backend that adds in the same way, of few tokens and of many, over one chain of sums and
/// several. The second half of K takes back what the first half adds: what is left is what the additions lost, and none
/// of it is hidden by the rounding of the result.
pub fn linear_equals<O: Backend, B: Backend>(oracle: &dyn Fn() -> O, make: &dyn Fn() -> B, bounds: &Bounds) {
    let kinds = [
        (DType::Bf16, ActivationScheme::None),
        (DType::F8E4M3, ActivationScheme::None),
        (DType::F8E4M3, ActivationScheme::Fp8Static { scale: 0.0371 }),
        (DType::F8E4M3, ActivationScheme::Fp8Token),
    ];
    let mut lost = 0;
    for (rows, in_features, outs) in SHAPES {
        let outs: Vec<usize> = outs.iter().map(|out| shape(*out, bounds)).collect();
        for (dtype, scheme) in kinds {
            for operands in [Operands::Mirrored, Operands::MirroredSubnormal] {
                let case = Case {
                    rows,
                    in_features: shape(in_features, bounds),
                    outs: &outs,
                    dtype,
                    scheme,
                    operands,
                };
                let want = case.compute(oracle, &mut Numbers::new(7)).got;
                let got = case.compute(make, &mut Numbers::new(7)).got;
                let differ = got.iter().zip(&want).filter(|(got, want)| got != want).count();
                assert_eq!(differ, 0, "{case}: elements of {} that differ", want.len());
                lost += want.iter().filter(|sum| **sum != 0.0).count();
            }
        }
    }
    assert!(lost > 0, "nothing is lost, so that nothing was compared");
}

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Operands {
    /// Without order, and exact in every type.
    Random,
    /// As many bits and as different exponents as the type of the weights allows. Inputs of the second half of K are those
    /// of the first, weights their negatives.
    Mirrored,
    /// The same with weights below the least normal e4m3.
    MirroredSubnormal,
}

/// Makes the second half of each row `map` of the first.
fn mirror(values: &mut [f32], cols: usize, map: impl Fn(f32) -> f32) {
    for row in values.chunks_exact_mut(cols) {
        let (first, second) = row.split_at_mut(cols / 2);
        second.iter_mut().zip(first).for_each(|(to, from)| *to = map(*from));
    }
}

/// `[tokens, in, outputs of gate and of up]`.
const GATED_SHAPES: [(usize, usize, usize); 4] = [(1, 16, 15), (3, 129, 40), (65, 256, 120), (129, 200, 200)];

/// `gelu_tanh(gate) * up` of a product with quantised inputs, of few tokens and of many, quantised in turn.
pub fn gated_linear_matches_f64<B: Backend>(make: &dyn Fn() -> B, bounds: &Bounds) {
    let kinds = [
        (DType::Bf16, ActivationScheme::None),
        (DType::F8E4M3, ActivationScheme::Fp8Static { scale: 0.0371 }),
        (DType::F8E4M3, ActivationScheme::Fp8Token),
    ];
    let mut numbers = Numbers::new(6);
    for (rows, in_features, inner) in GATED_SHAPES {
        let outs = [shape(inner, bounds); 2];
        let in_features = shape(in_features, bounds);
        for (dtype, scheme) in kinds {
            let case = Case {
                rows,
                in_features,
                outs: &outs,
                dtype,
                scheme,
                operands: Operands::Random,
            };
            for out_scheme in SCHEMES {
                check_gated(make, &mut numbers, case, out_scheme, bounds);
            }
        }
    }
}

fn check_gated<B: Backend>(
    make: &dyn Fn() -> B,
    numbers: &mut Numbers,
    case: Case<'_>,
    out_scheme: ActivationScheme,
    bounds: &Bounds,
) {
    let Case {
        rows,
        in_features,
        outs,
        dtype,
        scheme,
        operands,
    } = case;
    let inner = outs[0];
    let mut rig = Rig::new(make, rows);
    let plan = rig.begin(rows);
    let (x, activation) = known_activation(&mut rig, &plan, numbers, [rows, in_features], scheme, operands);
    let weights = KnownWeights::new(numbers, outs, in_features, dtype, operands);
    let uploaded = rig
        .backend
        .upload_gated_linear(&weights.for_input(scheme))
        .expect("weights are small");
    let mut between = rig.alloc(rows, 2 * inner, Width::Native);
    let mut out = rig.activation(rows, inner);
    rig.backend
        .gated_linear(&plan, &activation, &uploaded, &mut between, out_scheme, &mut out)
        .expect("a gated product runs");
    let got = rig.read_activation(&plan, &out, [rows, inner], out_scheme);

    let (product, magnitude) = weights.product(&x, scheme);
    let (mut want, mut absolute) = (Vec::new(), 0.0_f64);
    for (row, magnitude) in product.chunks(2 * inner).zip(magnitude.chunks(2 * inner)) {
        for column in 0..inner {
            let (gate, up) = (row[column], row[inner + column]);
            want.push(gelu_tanh(gate) * up);
            // The slope of gelu is below 1.2.
            let off = up.abs() * magnitude[column] + gate.abs() * magnitude[inner + column];
            absolute = absolute.max(1.2 * bounds.dot * off);
        }
    }
    let error = Error {
        relative: bounds.element,
        absolute: absolute + bounds.element * 16.0,
    };
    let what = format!("gated {dtype:?} {scheme:?} {rows}x{in_features} by {inner}");
    assert_quantized(&what, &got, &want, inner, out_scheme, error);
}

/// Stacked weights that are exact in every type.
struct KnownWeights {
    values: Vec<f32>,
    /// Of every row; none for types that are not quantised.
    scales: Vec<f32>,
    in_features: usize,
    parts: Vec<Stored>,
}

impl KnownWeights {
    fn new(numbers: &mut Numbers, outs: &[usize], in_features: usize, dtype: DType, operands: Operands) -> Self {
        let out_features: usize = outs.iter().sum();
        let mut values = numbers.e4m3_values(out_features * in_features);
        if operands != Operands::Random {
            for value in &mut values {
                *value = match (dtype, operands) {
                    (DType::F8E4M3, Operands::MirroredSubnormal) => (numbers.below(15) as f32 - 7.0) / 512.0,
                    (DType::F8E4M3, _) => *value,
                    _ => round_bf16(numbers.symmetric() * 0.5_f32.powi(numbers.below(16) as i32)),
                };
            }
            mirror(&mut values, in_features, |value| -value);
        }
        let scales: Vec<f32> = match dtype {
            DType::F8E4M3 => (0..out_features).map(|_| 0.02 + 0.01 * numbers.symmetric()).collect(),
            _ => Vec::new(),
        };
        let mut first = 0;
        let mut parts = Vec::new();
        for out in outs {
            let part = &values[first * in_features..(first + out) * in_features];
            parts.push(Stored::new(part, &[*out, in_features], dtype));
            first += out;
        }
        Self {
            values,
            scales,
            in_features,
            parts,
        }
    }

    fn for_input(&self, scheme: ActivationScheme) -> LinearWeights<'_> {
        LinearWeights {
            parts: self.parts.iter().map(Stored::host).collect(),
            scales: self.scales.clone(),
            input: scheme,
        }
    }

    /// `x * weights^T`, row by row, and the sums of the products' magnitudes.
    fn product(&self, x: &[f64], scheme: ActivationScheme) -> (Vec<f64>, Vec<f64>) {
        let weight = exact(&self.values);
        let (mut sums, mut magnitudes) = (Vec::new(), Vec::new());
        for row in x.chunks(self.in_features) {
            let row = quantized(scheme, row);
            for (index, weight) in weight.chunks(self.in_features).enumerate() {
                let scale = self.scales.get(index).map_or(1.0, |scale| f64::from(*scale));
                let products = || row.iter().zip(weight).map(|(x, weight)| x * weight * scale);
                sums.push(products().sum());
                magnitudes.push(products().map(f64::abs).sum());
            }
        }
        (sums, magnitudes)
    }
}

/// An activation whose values are known exactly: the norm of a row of signs is the row itself, times `1 + weight`.
///
/// The values are multiples of 1/64 up to 125/64: none of them, divided by the largest or by a scale above, comes near
/// the middle between two e4m3 values, so that all backends round alike.
fn known_activation<B: Backend>(
    rig: &mut Rig<B>,
    plan: &B::Plan,
    numbers: &mut Numbers,
    [rows, cols]: [usize; 2],
    scheme: ActivationScheme,
    operands: Operands,
) -> (Vec<f64>, B::Activation) {
    let mut gains: Vec<f32> = (0..cols).map(|_| (numbers.below(251) as f32 - 125.0) / 64.0).collect();
    gains[cols / 2] = 125.0 / 64.0;
    let mut signs: Vec<f32> = (0..rows * cols)
        .map(|_| if numbers.below(2) == 0 { 1.0 } else { -1.0 })
        .collect();
    if operands != Operands::Random {
        gains[0] = gains[cols / 2];
        mirror(&mut gains, cols, |gain| gain);
        mirror(&mut signs, cols, |sign| sign);
    }
    let tensor = rig.tensor(plan, &signs, rows);
    let weight: Vec<f32> = gains.iter().map(|gain| gain - 1.0).collect();
    let weight = rig.norm_weight(&weight);
    let mut out = rig.activation(rows, cols);
    let norm = NormArgs {
        weight: &weight,
        eps: 0.0,
        out_scheme: scheme,
    };
    rig.backend.norm(plan, &tensor, norm, &mut out).expect("norm runs");
    let values = signs
        .iter()
        .zip(gains.iter().cycle())
        .map(|(sign, gain)| f64::from(sign * gain))
        .collect();
    (values, out)
}
