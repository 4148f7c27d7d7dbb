use half::bf16;
use lapidary_model::{DType, HostTensor};

use super::*;
use crate::device::{on_device, read_back};
use crate::gemm::Gemm;
use crate::pack::{Element, Order, Panels, e4m3_to_f32, upload};
use crate::slab_gemm::plan::Variant;
use crate::tensor::{ActivationParams, Tensor};
use crate::testing::device;

/// Columns of the output beyond the result's.
const MARGIN: usize = 8;
/// What no kernel writes: a NaN in both types.
const UNTOUCHED: u8 = 0xff;

/// Evenly spread bits from a seed.
fn random(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// `[rows, cols]`, on the device and as numbers.
struct Matrix {
    panels: Panels,
    values: Vec<f64>,
    cols: usize,
}

impl Matrix {
    fn new(
        device: &mut dyn Device,
        element: Element,
        [rows, cols]: [usize; 2],
        code: impl FnMut(usize, usize) -> u16,
    ) -> Self {
        let mut code = code;
        let codes: Vec<u16> = (0..rows * cols).map(|index| code(index / cols, index % cols)).collect();
        let (dtype, bytes): (_, Vec<u8>) = match element {
            Element::E4m3 => (DType::F8E4M3, codes.iter().map(|code| *code as u8).collect()),
            Element::Bf16 => (DType::Bf16, codes.iter().flat_map(|code| code.to_le_bytes()).collect()),
        };
        let values = codes.iter().map(|code| value(element, *code)).collect();
        let shape = [rows, cols];
        let host = HostTensor {
            data: &bytes,
            dtype,
            shape: &shape,
        };
        let panels =
            upload(device, "a test matrix", &[host], element, Order::Stacked).expect("test matrices are well formed");
        Self { panels, values, cols }
    }

    /// Numbers of all signs and several magnitudes.
    fn random(device: &mut dyn Device, element: Element, shape: [usize; 2], seed: u64) -> Self {
        let mut state = seed;
        Self::new(device, element, shape, |_, _| {
            let bits = random(&mut state);
            match element {
                // Exponents 4 to 11 of 15, any sign and mantissa.
                Element::E4m3 => ((bits & 0x87) | ((4 + (bits >> 8) % 8) << 3)) as u16,
                Element::Bf16 => bf16::from_f32((bits % 4001) as f32 / 1000.0 - 2.0).to_bits(),
            }
        })
    }

    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.cols..][..self.cols]
    }

    /// As the input of a layer. `scales` has one for each row.
    fn activation(&self, device: &mut dyn Device, scales: &[f32]) -> ActivationParams {
        ActivationParams {
            panels: self.panels.data,
            scales: on_device(device, scales),
            row_stride: self.panels.padded_rows as i32,
            scheme: if self.panels.element == Element::E4m3 { 2 } else { 0 },
            static_scale: 1.0,
            padding: 0,
        }
    }
}

fn value(element: Element, code: u16) -> f64 {
    match element {
        Element::E4m3 => f64::from(e4m3_to_f32(code as u8)),
        Element::Bf16 => f64::from(bf16::from_bits(code).to_f32()),
    }
}

/// The code of a small whole number.
fn code_of(element: Element, number: usize) -> u16 {
    let codes = 0..=u16::MAX;
    let exact = codes.into_iter().find(|code| value(element, *code) == number as f64);
    exact.expect("small whole numbers are exact")
}

fn blank(device: &mut dyn Device, [rows, cols]: [usize; 2], is_wide: bool) -> Tensor {
    let data = on_device(device, &vec![UNTOUCHED; Tensor::bytes(rows, cols, is_wide)]);
    Tensor {
        data,
        rows,
        cols,
        is_wide,
    }
}

/// Bits of every element, widened.
fn bits(device: &mut dyn Device, tensor: &Tensor) -> Vec<u32> {
    let count = tensor.rows * tensor.cols;
    if tensor.is_wide {
        read_back(device, tensor.data, count)
    } else {
        let bits: Vec<u16> = read_back(device, tensor.data, count);
        bits.into_iter().map(u32::from).collect()
    }
}

fn number(bits: u32, is_wide: bool) -> f64 {
    f64::from(if is_wide {
        f32::from_bits(bits)
    } else {
        bf16::from_bits(bits as u16).to_f32()
    })
}

/// A product with all that belongs to it.
struct Case {
    x: Matrix,
    w: Matrix,
    x_scales: Vec<f32>,
    w_scales: Vec<f32>,
    softcap: Option<f32>,
    is_wide: bool,
}

impl Case {
    /// `max_rows` rows of x, the rest of the shape as given.
    fn random(device: &mut dyn Device, element: Element, [rows, n, k]: [usize; 3]) -> Self {
        let x = Matrix::random(device, element, [rows, k], 1);
        let w = Matrix::random(device, element, [n, k], 2);
        let x_scales = (0..rows).map(|m| 0.01 + 0.003 * (m % 5) as f32).collect();
        let w_scales = (0..n).map(|n| 0.02 + 0.001 * (n % 7) as f32).collect();
        Self {
            x,
            w,
            x_scales,
            w_scales,
            softcap: None,
            is_wide: false,
        }
    }

    fn scale(&self, m: usize, n: usize) -> f64 {
        let x_scale = if self.w.panels.element == Element::E4m3 {
            self.x_scales[m]
        } else {
            1.0
        };
        f64::from(x_scale) * f64::from(self.w_scales[n])
    }

    /// The result's bits for a step of `rows` rows; a plan, or as the launcher chooses.
    fn run(
        &self,
        device: &mut dyn Device,
        kernels: &SlabGemm,
        rows: usize,
        max_rows: usize,
        plan: Option<&Plan>,
    ) -> Vec<u32> {
        self.run_with(device, rows, max_rows, |device, product| match plan {
            Some(plan) => kernels.launch_plan(device, product, 0, plan),
            None => kernels.launch(device, product),
        })
    }

    fn run_with(
        &self,
        device: &mut dyn Device,
        rows: usize,
        max_rows: usize,
        launch: impl FnOnce(&mut dyn Device, &Product<'_>) -> Result<(), BackendError>,
    ) -> Vec<u32> {
        let x = self.x.activation(device, &self.x_scales);
        let out = blank(device, [max_rows + 1, self.w.panels.rows + MARGIN], self.is_wide);
        let product = Product {
            x: &x,
            w: &self.w.panels,
            w_scales: on_device(device, &self.w_scales),
            out: &out,
            softcap: self.softcap,
            num_rows: on_device(device, &[rows as i32]),
            max_rows,
        };
        launch(device, &product).expect("the launch is valid");
        bits(device, &out)
    }

    /// Every element is the sum that f64 gives, and what is no element was not touched.
    fn check(&self, result: &[u32], rows: usize) {
        let n = self.w.panels.rows;
        let untouched = if self.is_wide { u32::MAX } else { u32::from(u16::MAX) };
        for (index, bits) in result.iter().enumerate() {
            let (row, col) = (index / (n + MARGIN), index % (n + MARGIN));
            if row >= rows || col >= n {
                assert_eq!(*bits, untouched, "row {row} column {col} is not part of the result");
                continue;
            }
            let terms = self.x.row(row).iter().zip(self.w.row(col)).map(|(x, w)| x * w);
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let (sum, size) = (sum * self.scale(row, col), size * self.scale(row, col));
            let cap = self.softcap.map(f64::from);
            let want = cap.map_or(sum, |cap| cap * (sum / cap).tanh());
            // A tensor core's sums of e4m3 products are off by up to 2.3e-3 of the sum of magnitudes; bf16 has 8 bits.
            let sums = if self.w.panels.element == Element::E4m3 {
                3e-3
            } else {
                2e-5
            };
            let rounding = if self.is_wide { 0.0 } else { 0.004 };
            let bound = size * sums + want.abs() * rounding + cap.unwrap_or(0.0) * 2e-6;
            let got = number(*bits, self.is_wide);
            assert!((got - want).abs() <= bound, "row {row} column {col}: {got}, not {want}");
        }
    }
}

/// A plan that makes several blocks of several passes, most of them not at a multiple of 8 rows.
fn plan_of(variant: &'static Variant, w: &Panels, w_stages: usize) -> Plan {
    let shape = Shape::new(w, variant.tokens);
    let tuning = Tuning {
        blocks: 2,
        tiles: variant.tiles,
        panels: variant.panels,
        in_flight_bytes: w_stages * variant.panels * variant.tiles * 8192,
        prefetch_bytes: 3 * variant.tiles * 8192,
        tokens_in_flight_bytes: 2 * variant.panels * variant.tokens * 128,
        shared_bytes: 227 << 10,
    };
    Plan::new(shape, tuning).expect("it fits")
}

#[test]
fn every_variant_computes_what_f64_computes() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    for variant in VARIANTS {
        // Two passes in each of two slabs; K ends within a panel and within a stage.
        let n = 2 * (64 * variant.tiles + 5) + 1;
        let k = if variant.element == Element::E4m3 {
            5 * 128 + 16
        } else {
            5 * 64 + 8
        };
        let rows = variant.tokens - 1;
        let case = Case::random(device, variant.element, [rows, n, k]);
        let plan = plan_of(variant, &case.w.panels, 2);
        assert!(plan.slab_rows > plan.pass_rows, "{}", variant.name);
        let result = case.run(device, &kernels, rows, rows, Some(&plan));
        case.check(&result, rows);
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    for (element, k) in [(Element::E4m3, 6 * 128), (Element::Bf16, 6 * 64)] {
        let case = Case::random(device, element, [MAX_TOKENS, 71, k]);
        let all = case.run(device, &kernels, MAX_TOKENS, MAX_TOKENS, None);
        case.check(&all, MAX_TOKENS);
        for rows in 1..MAX_TOKENS {
            let some = case.run(device, &kernels, rows, rows, None);
            assert_eq!(some[..rows * (71 + MARGIN)], all[..rows * (71 + MARGIN)], "{rows} rows");
        }
    }
}

#[test]
fn a_row_has_the_same_bits_at_every_place_and_under_every_plan() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    for (element, k) in [(Element::E4m3, 9 * 128), (Element::Bf16, 9 * 64)] {
        // All rows are the same, with the same scale.
        let mut case = Case::random(device, element, [1, 143, k]);
        let one = case.run(device, &kernels, 1, 1, None);
        let row: Vec<u16> = case
            .x
            .values
            .iter()
            .map(|x| match element {
                Element::E4m3 => (0..=255)
                    .find(|code| value(element, *code) == *x)
                    .expect("it came from one"),
                Element::Bf16 => bf16::from_f64(*x).to_bits(),
            })
            .collect();
        case.x = Matrix::new(device, element, [MAX_TOKENS, k], |_, col| row[col]);
        case.x_scales = vec![case.x_scales[0]; MAX_TOKENS];
        for variant in VARIANTS.iter().filter(|variant| variant.element == element) {
            let plan = plan_of(variant, &case.w.panels, 3);
            let result = case.run(device, &kernels, variant.tokens, variant.tokens, Some(&plan));
            for (place, row) in result.chunks(143 + MARGIN).take(variant.tokens).enumerate() {
                assert_eq!(row[..143], one[..143], "{} row {place}", variant.name);
            }
        }
    }
}

#[test]
fn a_weight_of_one_picks_its_column_of_the_input() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    for (element, k) in [(Element::E4m3, 300), (Element::Bf16, 150)] {
        let (rows, n) = (13, 150);
        let (one, numbers) = (
            code_of(element, 1),
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12].map(|i| code_of(element, i)),
        );
        let picks = |n: usize| n * 37 % k;
        let x = Matrix::new(device, element, [rows, k], |row, col| numbers[(row * 5 + col) % 13]);
        let w = Matrix::new(
            device,
            element,
            [n, k],
            |row, col| if col == picks(row) { one } else { 0 },
        );
        let case = Case {
            x,
            w,
            x_scales: vec![2.0; rows],
            w_scales: vec![0.5; n],
            softcap: None,
            is_wide: true,
        };
        let result = case.run(device, &kernels, rows, rows, None);
        for row in 0..rows {
            for col in 0..n {
                let want = ((row * 5 + picks(col)) % 13) as f64 * case.scale(row, col);
                assert_eq!(
                    number(result[row * (n + MARGIN) + col], true),
                    want,
                    "row {row} column {col}"
                );
            }
        }
    }
}

#[test]
fn logits_are_f32_and_capped() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    let mut case = Case::random(device, Element::Bf16, [5, 999, 128]);
    (case.is_wide, case.softcap) = (true, Some(3.0));
    case.w_scales = vec![1.0; 999];
    let result = case.run(device, &kernels, 5, 5, None);
    case.check(&result, 5);
    let largest = result.iter().map(|bits| number(*bits, true).abs()).fold(0.0, f64::max);
    assert!((2.9..=3.0).contains(&largest), "the cap was reached: {largest}");
}

#[test]
fn batches_of_more_than_64_rows_are_computed_in_turns_and_rows_beyond_the_step_are_left() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    let case = Case::random(device, Element::E4m3, [130, 40, 200]);
    for rows in [130, 128, 66, 3] {
        let result = case.run(device, &kernels, rows, 130, None);
        case.check(&result, rows);
    }
}

#[test]
fn the_gemm_of_many_tokens_gives_the_same_bits() {
    let device = &mut *device();
    let kernels = SlabGemm::load(device).expect("kernels are there");
    let gemm = Gemm::load(device).expect("kernels are there");
    for (element, k) in [(Element::E4m3, 10 * 128), (Element::Bf16, 10 * 64)] {
        // It reads whole tiles of 128 rows, and a scale for each padded row.
        let mut case = Case::random(device, element, [128, 72, k]);
        case.w_scales = (0..128).map(|n| 0.02 + 0.001 * (n % 7) as f32).collect();
        for (is_wide, softcap) in [(false, None), (true, Some(30.0))] {
            (case.is_wide, case.softcap) = (is_wide, softcap);
            let slabs = case.run(device, &kernels, 61, 61, None);
            let tiles = case.run_with(device, 61, 61, |device, product| gemm.multiply(device, product));
            assert!(slabs == tiles, "{element:?}, wide: {is_wide}");
        }
    }
}
