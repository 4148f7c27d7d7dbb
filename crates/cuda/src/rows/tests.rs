use half::bf16;
use lapidary_cpu::e4m3;
use lapidary_engine::SampleRow;
use lapidary_model::{ActivationScheme, DType, FP8_MAX, FP8_MIN_TOKEN_SCALE, HostTensor};

use super::*;
use crate::device::{bytes_of, on_device, read_back};
use crate::pack::{Element, Order, PANEL_BYTES, upload};
use crate::step::tests::{buffers, sequence};
use crate::tensor::Activation;
use crate::testing::{Numbers, device};

const WIDTHS: [usize; 14] = [1, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 520, 2304, 3584];
const SCHEMES: [ActivationScheme; 3] = [
    ActivationScheme::None,
    // No power of two, and clips some values.
    ActivationScheme::Fp8Static { scale: 0.0037 },
    ActivationScheme::Fp8Token,
];
/// Rows of a launch, of which the last is not asked for.
const GRID: usize = 4;
const ROWS: usize = 3;

struct Bench {
    device: Box<dyn Device>,
    kernels: RowKernels,
    numbers: Numbers,
    rows: RowCount,
}

impl Bench {
    fn new() -> Self {
        Self::of(GRID, ROWS)
    }

    /// Launches are for `grid` rows, of which `rows` are asked for.
    fn of(grid: usize, rows: usize) -> Self {
        let mut device = device();
        let kernels = RowKernels::load(&mut *device).expect("the kernels exist");
        let on_device = on_device(&mut *device, &[rows as i32]);
        Self {
            device,
            kernels,
            numbers: Numbers::new(1),
            rows: RowCount {
                on_device,
                at_most: grid,
            },
        }
    }

    /// `[grid, cols]` values in `-size..size`, exact in bf16, and the tensor that holds them.
    fn tensor(&mut self, cols: usize, size: f32, is_wide: bool) -> (Vec<f32>, Tensor) {
        let shape = [self.rows.at_most, cols];
        let values = self.numbers.bf16_values(shape[0] * cols, size);
        let tensor = Tensor::alloc(&mut *self.device, "test data", shape, is_wide).expect("tensors are small");
        if is_wide {
            self.device
                .upload(tensor.data, bytes_of(&values))
                .expect("uploads work");
        } else {
            let narrow: Vec<_> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            self.device
                .upload(tensor.data, bytes_of(&narrow))
                .expect("uploads work");
        }
        (values, tensor)
    }

    fn norm(&mut self, cols: usize) -> (Vec<f32>, Norm) {
        let values: Vec<_> = self.numbers.bf16_values(cols, 0.5).iter().map(|w| 1.0 + w).collect();
        let factors = on_device(&mut *self.device, &values);
        (values, Norm { factors })
    }

    fn activation(&mut self, cols: usize) -> Activation {
        Activation::alloc(&mut *self.device, self.rows.at_most, cols).expect("activations are small")
    }

    fn write(&mut self, out: &mut Activation, scheme: ActivationScheme) -> ActivationParams {
        out.write(&mut *self.device, scheme).expect("the device can zero")
    }

    /// Codes or bf16 bits of row `row`, and its scale. Checks that padding is zero.
    fn read(&mut self, out: &Activation, row: usize) -> (Vec<u16>, f32) {
        let params = out.params();
        let element = Element::of_input(out.scheme);
        let (stride, panels) = (params.row_stride as usize, element.panels(out.cols));
        let bytes: Vec<u8> = read_back(&mut *self.device, params.panels, panels * stride * PANEL_BYTES);
        let at = |k: usize| {
            let line = (k / PANEL_BYTES * stride + row) * PANEL_BYTES;
            bytes[line + ((k % PANEL_BYTES / 16) ^ (row & 7)) * 16 + k % 16]
        };
        let wide = |i: usize| u16::from_le_bytes([at(2 * i), at(2 * i + 1)]);
        let (values, padded): (Vec<u16>, usize) = match element {
            Element::E4m3 => ((0..out.cols).map(|k| u16::from(at(k))).collect(), panels * PANEL_BYTES),
            Element::Bf16 => ((0..out.cols).map(wide).collect(), panels * PANEL_BYTES / 2),
        };
        for k in out.cols..padded {
            let padding = if element == Element::E4m3 {
                u16::from(at(k))
            } else {
                wide(k)
            };
            assert_eq!(padding, 0, "padding of row {row}, column {k} of {}", out.cols);
        }
        let scales: Vec<f32> = read_back(&mut *self.device, params.scales, stride);
        (values, scales[row])
    }

    /// The rows asked for are `want` quantised, within `relative` of each value before it is rounded; others are zero.
    fn check(&mut self, what: &str, out: &Activation, want: &[Vec<f64>], relative: f64) {
        for (row, want) in want.iter().enumerate() {
            let (got, scale) = self.read(out, row);
            check_row(
                &format!("{what} {:?} row {row}", out.scheme),
                out.scheme,
                (&got, scale),
                want,
                relative,
            );
        }
        let (beyond, _) = self.read(out, want.len());
        assert!(beyond.iter().all(|code| *code == 0), "{what}: a row nobody asked for");
    }
}

fn check_row(what: &str, scheme: ActivationScheme, (got, scale): (&[u16], f32), want: &[f64], relative: f64) {
    let amax = want.iter().fold(0.0, |amax: f64, x| amax.max(x.abs()));
    let exact_scale = match scheme {
        ActivationScheme::None => None,
        ActivationScheme::Fp8Static { scale } => Some(f64::from(scale)),
        ActivationScheme::Fp8Token => Some((amax / f64::from(FP8_MAX)).max(f64::from(FP8_MIN_TOKEN_SCALE))),
    };
    if let Some(exact) = exact_scale {
        assert!(
            (f64::from(scale) - exact).abs() <= relative * exact,
            "{what}: scale {scale}, expected {exact}"
        );
    }
    for (col, (got, want)) in got.iter().zip(want).enumerate() {
        let (value, allowed) = match exact_scale {
            None => (f64::from(bf16::from_bits(*got).to_f32()), want.abs() / 256.0),
            Some(_) => {
                let limit = f64::from(FP8_MAX * scale);
                let value = f64::from(e4m3::decode(*got as u8) * scale);
                // Half a quantum: a sixteenth of a normal value, 2^-10 of a subnormal one.
                (value, (want.abs().min(limit) / 16.0).max(f64::from(scale) / 1024.0))
            }
        };
        let want = match exact_scale {
            Some(_) => want.clamp(-f64::from(FP8_MAX * scale), f64::from(FP8_MAX * scale)),
            None => *want,
        };
        let allowed = allowed * (1.0 + 1e-3) + relative * want.abs() + 1e-30;
        assert!(
            (value - want).abs() <= allowed,
            "{what}: column {col} is {value}, expected {want} within {allowed}"
        );
    }
}

fn normed(x: &[f64], weights: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weights).map(|(x, w)| x * factor * f64::from(*w)).collect()
}

fn rows_of(values: &[f32], cols: usize) -> Vec<Vec<f64>> {
    let rows = values.chunks(cols).take(ROWS);
    rows.map(|row| row.iter().copied().map(f64::from).collect()).collect()
}

#[test]
fn quantised_rows_are_the_rounded_quotients_to_the_bit() {
    let mut bench = Bench::new();
    for cols in [1, 15, 16, 17, 64, 129, 520, 4096, 4104] {
        // Spans subnormal codes to clipped ones.
        for size in [1e-4, 0.3, 3.0, 1e5] {
            let (mut values, x) = bench.tensor(cols, size, false);
            values[0] = 0.0;
            let narrow: Vec<_> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            bench.device.upload(x.data, bytes_of(&narrow)).expect("uploads work");
            for scheme in SCHEMES {
                let mut out = bench.activation(cols);
                let params = bench.write(&mut out, scheme);
                bench
                    .kernels
                    .quantize(&mut *bench.device, bench.rows, &x, params)
                    .expect("quantising runs");
                for (row, x) in values.chunks(cols).take(ROWS).enumerate() {
                    let amax = x.iter().fold(0.0, |amax: f32, x| amax.max(x.abs()));
                    let scale = match scheme {
                        ActivationScheme::Fp8Static { scale } => scale,
                        _ => (amax / FP8_MAX).max(FP8_MIN_TOKEN_SCALE),
                    };
                    let code = |x: &f32| match scheme {
                        ActivationScheme::None => bf16::from_f32(*x).to_bits(),
                        _ => u16::from(e4m3::encode(x / scale)),
                    };
                    let want: Vec<u16> = x.iter().map(code).collect();
                    let (got, got_scale) = bench.read(&out, row);
                    assert_eq!(got, want, "{scheme:?} {cols} columns of {size}, row {row}");
                    assert!(scheme == ActivationScheme::None || got_scale == scale);
                }
            }
        }
    }
}

#[test]
fn quotients_next_to_a_tie_round_as_the_division_says() {
    let mut bench = Bench::new();
    let cols = 2048;
    for scale in [0.003_f32, 0.7, 1.0 / 3.0, 1.0, 1e-4] {
        let scheme = ActivationScheme::Fp8Static { scale };
        // bf16 values nearest to scale times a tie between two codes: their quotients crowd around ties.
        let ties = (0..cols).map(|i| {
            let low = e4m3::decode((i % 0x7e) as u8);
            let high = e4m3::decode((i % 0x7e) as u8 + 1);
            let near = bf16::from_f32((low + high) / 2.0 * scale).to_bits();
            bf16::from_bits(near + (i / 0x7e % 3) as u16 - u16::from(near > 0))
        });
        let values: Vec<bf16> = ties.collect();
        let x = Tensor::alloc(&mut *bench.device, "test data", [GRID, cols], false).expect("tensors are small");
        bench.device.upload(x.data, bytes_of(&values)).expect("uploads work");
        let mut out = bench.activation(cols);
        let params = bench.write(&mut out, scheme);
        bench
            .kernels
            .quantize(&mut *bench.device, bench.rows, &x, params)
            .expect("quantising runs");
        let want: Vec<_> = values
            .iter()
            .map(|x| u16::from(e4m3::encode(x.to_f32() / scale)))
            .collect();
        assert_eq!(bench.read(&out, 0).0, want, "{scale}");
    }
}

#[test]
fn norms_match_f64() {
    let mut bench = Bench::new();
    for cols in WIDTHS.into_iter().chain([4097, 8191, 16384]) {
        for is_wide in [true, false] {
            let (values, x) = bench.tensor(cols, 3.0, is_wide);
            let (weights, norm) = bench.norm(cols);
            let want: Vec<_> = rows_of(&values, cols)
                .iter()
                .map(|x| normed(x, &weights, 1e-6))
                .collect();
            for scheme in SCHEMES {
                let mut out = bench.activation(cols);
                let params = bench.write(&mut out, scheme);
                bench
                    .kernels
                    .norm(&mut *bench.device, bench.rows, &x, (&norm, 1e-6), params)
                    .expect("norms run");
                bench.check(&format!("norm of {cols}"), &out, &want, 4e-6);
            }
        }
    }
    let (_, x) = bench.tensor(8193, 1.0, true);
    let (_, norm) = bench.norm(8193);
    let mut out = bench.activation(8193);
    let params = bench.write(&mut out, ActivationScheme::None);
    let refused = bench
        .kernels
        .norm(&mut *bench.device, bench.rows, &x, (&norm, 1e-6), params);
    assert!(refused.is_err(), "rows longer than norms can hold");
}

#[test]
fn residuals_take_the_normed_branch_and_are_normed() {
    let mut bench = Bench::new();
    for cols in WIDTHS.into_iter().chain([4096, 4608, 4616]) {
        for scheme in SCHEMES {
            let (values, x) = bench.tensor(cols, 2.0, false);
            let (old, residual) = bench.tensor(cols, 5.0, true);
            let ((post_weights, post), (pre_weights, pre)) = (bench.norm(cols), bench.norm(cols));
            let sums: Vec<Vec<f64>> = rows_of(&values, cols)
                .iter()
                .zip(rows_of(&old, cols))
                .map(|(x, old)| {
                    let added = normed(x, &post_weights, 1e-6);
                    old.iter().zip(added).map(|(old, added)| old + added).collect()
                })
                .collect();
            let want: Vec<_> = sums.iter().map(|sum| normed(sum, &pre_weights, 1e-6)).collect();
            let branch = Branch {
                x: &x,
                post: &post,
                pre: &pre,
                residual: &residual,
                eps: 1e-6,
            };
            let mut out = bench.activation(cols);
            let params = bench.write(&mut out, scheme);
            bench
                .kernels
                .add_norm(&mut *bench.device, bench.rows, branch, params)
                .expect("norms run");
            // What cancels in the sum was rounded before.
            bench.check(&format!("sum of {cols}"), &out, &want, 3e-4);
            let got: Vec<f32> = read_back(&mut *bench.device, residual.data, GRID * cols);
            for (col, (got, want)) in got.iter().zip(sums.concat()).enumerate() {
                assert!(
                    (f64::from(*got) - want).abs() < 1e-5,
                    "residual {col} of {cols} is {got}, expected {want}"
                );
            }
            assert_eq!(got[ROWS * cols..], old[ROWS * cols..], "a row nobody asked for");
        }
    }
}

#[test]
fn blocks_that_walk_rows_give_the_bits_of_a_block_for_each() {
    /// More than two rounds of three rows on their way for each of three blocks, the last round not full.
    const MANY: usize = 20;
    let mut bench = Bench::of(MANY + 1, MANY);
    // Whole and partly filled warps, and warps without columns.
    for cols in [8, 264, 2304, 2560, 2568, 3584, 4096, 4608] {
        for scheme in SCHEMES {
            let (_, x) = bench.tensor(cols, 2.0, false);
            let (old, residual) = bench.tensor(cols, 5.0, true);
            let ((_, post), (_, pre)) = (bench.norm(cols), bench.norm(cols));
            let branch = Branch {
                x: &x,
                post: &post,
                pre: &pre,
                residual: &residual,
                eps: 1e-6,
            };
            let [each, walked] = [MANY, 1].map(|multiprocessors| {
                bench.kernels.multiprocessors = multiprocessors;
                assert_eq!(bench.kernels.walk_for(cols, MANY + 1).is_some(), multiprocessors == 1);
                bench
                    .device
                    .upload(residual.data, bytes_of(&old))
                    .expect("uploads work");
                let mut out = bench.activation(cols);
                let params = bench.write(&mut out, scheme);
                bench
                    .kernels
                    .add_norm(&mut *bench.device, bench.rows, branch, params)
                    .expect("norms run");
                let sums: Vec<f32> = read_back(&mut *bench.device, residual.data, (MANY + 1) * cols);
                let sums: Vec<u32> = sums.into_iter().map(f32::to_bits).collect();
                let rows: Vec<_> = (0..=MANY).map(|row| bench.read(&out, row)).collect();
                (sums, rows)
            });
            assert_eq!(each, walked, "{scheme:?} {cols} columns");
            assert_ne!(
                each.0[..cols],
                old[..cols].iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn last_norms_are_of_the_sampled_rows_alone() {
    let mut bench = Bench::new();
    let mut step = buffers(&mut *bench.device, GRID);
    let sampled = [2, 0];
    let mut batch = sequence(&[0, 1, 2]);
    batch.samples = sampled
        .map(|row| SampleRow {
            row,
            position: row + 1,
            given: None,
            params: std::sync::Arc::default(),
            banned: None,
            mask: None,
            history: None,
        })
        .into();
    step.run(&mut *bench.device, &batch).expect("the step is small");
    for cols in [1, 64, 65, 2304, 4608] {
        let (values, x) = bench.tensor(cols, 2.0, false);
        let (old, residual) = bench.tensor(cols, 5.0, true);
        let ((post_weights, post), (pre_weights, pre)) = (bench.norm(cols), bench.norm(cols));
        let want: Vec<Vec<f64>> = sampled
            .iter()
            .map(|row| {
                let row = *row as usize;
                let added = normed(&rows_of(&values, cols)[row], &post_weights, 1e-6);
                let sum: Vec<f64> = rows_of(&old, cols)[row].iter().zip(added).map(|(a, b)| a + b).collect();
                normed(&sum, &pre_weights, 1e-6)
            })
            .collect();
        let branch = Branch {
            x: &x,
            post: &post,
            pre: &pre,
            residual: &residual,
            eps: 1e-6,
        };
        let mut out = bench.activation(cols);
        let params = bench.write(&mut out, ActivationScheme::None);
        bench
            .kernels
            .last_norm(&mut *bench.device, step.pointers(), GRID, branch, params)
            .expect("norms run");
        bench.check(&format!("last norm of {cols}"), &out, &want, 3e-4);
        let after: Vec<f32> = read_back(&mut *bench.device, residual.data, GRID * cols);
        assert_eq!(after, old, "the residual stays");
    }
}

#[test]
fn gates_match_f64() {
    let mut bench = Bench::new();
    for cols in WIDTHS.into_iter().chain([2049, 9216]) {
        let (mut values, gate_up) = bench.tensor(2 * cols, 4.0, false);
        // Far beyond where tanh saturates.
        (values[0], values[2 * cols]) = (100.0, -100.0);
        let narrow: Vec<_> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        bench
            .device
            .upload(gate_up.data, bytes_of(&narrow))
            .expect("uploads work");
        let gated = |row: Vec<f64>| {
            let mut stacked = vec![0.0; 2 * cols];
            for (column, value) in row.into_iter().enumerate() {
                stacked[Order::InTurns.stacked_row(column, 2 * cols)] = value;
            }
            let (gate, up) = stacked.split_at(cols);
            let gelu =
                |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh());
            gate.iter().zip(up).map(|(gate, up)| gelu(*gate) * up).collect()
        };
        let want: Vec<Vec<f64>> = rows_of(&values, 2 * cols).into_iter().map(gated).collect();
        for scheme in SCHEMES {
            let mut out = bench.activation(cols);
            let params = bench.write(&mut out, scheme);
            bench
                .kernels
                .geglu(&mut *bench.device, bench.rows, &gate_up, params)
                .expect("gates run");
            bench.check(&format!("gate of {cols}"), &out, &want, 1e-5);
        }
    }
}

#[test]
fn tokens_become_scaled_rows_of_the_table() {
    let mut bench = Bench::new();
    let vocab = 70;
    for cols in WIDTHS {
        let table = bench.numbers.bf16_values(vocab * cols, 1.0);
        let bytes: Vec<u8> = table.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        let host = HostTensor {
            data: &bytes,
            dtype: DType::Bf16,
            shape: &[vocab, cols],
        };
        let panels =
            upload(&mut *bench.device, "test data", &[host], Element::Bf16, Order::Stacked).expect("tables are small");
        let mut step = buffers(&mut *bench.device, GRID);
        let tokens = [69, 0, 7];
        step.run(&mut *bench.device, &sequence(&tokens))
            .expect("the step is small");
        for is_wide in [true, false] {
            let (old, out) = bench.tensor(cols, 1.0, is_wide);
            bench
                .kernels
                .embed(&mut *bench.device, step.pointers(), GRID, (&panels, 59.75), &out)
                .expect("embed runs");
            let got: Vec<f32> = if is_wide {
                read_back(&mut *bench.device, out.data, GRID * cols)
            } else {
                let narrow: Vec<bf16> = read_back(&mut *bench.device, out.data, GRID * cols);
                narrow.iter().map(|x| x.to_f32()).collect()
            };
            for (row, token) in tokens.iter().enumerate() {
                let row_of_table = &table[*token as usize * cols..][..cols];
                let round = |x: f32| if is_wide { x } else { bf16::from_f32(x).to_f32() };
                let want: Vec<f32> = row_of_table.iter().map(|x| round(x * 59.75)).collect();
                assert_eq!(got[row * cols..][..cols], want, "token {token} of {cols} columns");
            }
            assert_eq!(got[ROWS * cols..], old[ROWS * cols..], "a row nobody asked for");
        }
    }
}

#[test]
fn a_row_gets_the_same_bits_in_any_launch() {
    let mut bench = Bench::new();
    let cols = 2304;
    let (values, _) = bench.tensor(cols, 3.0, false);
    let row = &values[..cols];
    let (_, norm) = bench.norm(cols);
    let mut results = Vec::new();
    for at in 0..ROWS {
        let mut narrow: Vec<_> = values.iter().rev().map(|x| bf16::from_f32(*x)).collect();
        narrow[at * cols..][..cols].copy_from_slice(&row.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        let (_, x) = bench.tensor(cols, 1.0, false);
        bench.device.upload(x.data, bytes_of(&narrow)).expect("uploads work");
        let mut out = bench.activation(cols);
        let params = bench.write(&mut out, ActivationScheme::Fp8Token);
        bench
            .kernels
            .norm(&mut *bench.device, bench.rows, &x, (&norm, 1e-6), params)
            .expect("norms run");
        results.push(bench.read(&out, at));
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}
