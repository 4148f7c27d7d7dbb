use std::collections::BTreeSet;
use std::sync::LazyLock;

use half::bf16;
use lapidary_model::{ActivationScheme, DType, HostTensor};

use super::*;
use crate::device::{bytes_of, on_device, read_back};
use crate::matmul::Matmul;
use crate::pack::{Order, Panels, e4m3_to_f32, upload};
use crate::rows::{RowCount, RowKernels};
use crate::slab_gemm::SlabGemm;
use crate::tensor::{Activation, Tensor};
use crate::testing;

/// Five panels of e4m3, the last one not full: one promotion after four, one at the end; ten of bf16.
const K: usize = 600;
/// A wide tile and part of another; the padding is not a multiple of any tile.
const COLUMNS: usize = 296;
/// Two row tiles and part of a third, so that a pair of blocks has one without rows.
const ROWS: usize = 270;
const ROW_STRIDE: usize = 384;
/// A persistent block has at least three tiles, a pair two.
const FEW_MULTIPROCESSORS: usize = 2;
const SENTINEL: u16 = 0x1234;

/// Operands as bytes of a checkpoint, and their product.
struct Fixture {
    element: Element,
    x: Vec<u8>,
    w: Vec<u8>,
    x_scales: Vec<f32>,
    w_scales: Vec<f32>,
    /// Sums of products and of their magnitudes, without scales.
    sums: Vec<[f64; 2]>,
}

static E4M3_RANDOM: LazyLock<Fixture> = LazyLock::new(|| Fixture::random(Element::E4m3));
static BF16_RANDOM: LazyLock<Fixture> = LazyLock::new(|| Fixture::random(Element::Bf16));

fn random(element: Element) -> &'static Fixture {
    match element {
        Element::E4m3 => &E4M3_RANDOM,
        Element::Bf16 => &BF16_RANDOM,
    }
}

fn values(element: Element, bytes: &[u8]) -> Vec<f32> {
    match element {
        Element::E4m3 => bytes.iter().map(|code| e4m3_to_f32(*code)).collect(),
        Element::Bf16 => {
            let pairs = bytes.as_chunks::<2>().0.iter();
            pairs.map(|pair| bf16::from_le_bytes(*pair).to_f32()).collect()
        }
    }
}

/// Numbers without order, the same in every run.
fn noise(count: usize, mut state: u64) -> Vec<u32> {
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Elements between 1/8 and 4 in magnitude, of either sign.
fn noisy_elements(element: Element, count: usize, seed: u64) -> Vec<u8> {
    let noise = noise(count, seed);
    match element {
        Element::E4m3 => noise
            .iter()
            .map(|n| (n % 40 + 32) as u8 | (n >> 8 & 0x80) as u8)
            .collect(),
        Element::Bf16 => {
            let value = |n: &u32| (f32::from(*n as u16) / 16384.0 - 2.0) * if n >> 20 & 1 == 0 { 1.0 } else { 0.3 };
            noise
                .iter()
                .flat_map(|n| bf16::from_f32(value(n)).to_le_bytes())
                .collect()
        }
    }
}

impl Fixture {
    fn random(element: Element) -> Self {
        let x = noisy_elements(element, ROWS * K, 1);
        let w = noisy_elements(element, COLUMNS * K, 2);
        Self::new(element, x, w)
    }

    fn new(element: Element, x: Vec<u8>, w: Vec<u8>) -> Self {
        let (x_values, w_values) = (values(element, &x), values(element, &w));
        let mut sums = Vec::with_capacity(ROWS * COLUMNS);
        for x_row in x_values.chunks(K) {
            for w_row in w_values.chunks(K) {
                let products = || x_row.iter().zip(w_row).map(|(x, w)| f64::from(*x) * f64::from(*w));
                sums.push([products().sum(), products().map(f64::abs).sum()]);
            }
        }
        Self {
            element,
            x,
            w,
            x_scales: (0..ROWS).map(|row| 0.5 + 0.01 * row as f32).collect(),
            w_scales: (0..COLUMNS).map(|column| 1.5 - 0.003 * column as f32).collect(),
            sums,
        }
    }

    fn row_bytes(&self) -> usize {
        self.x.len() / ROWS
    }

    /// `[sum, sum of magnitudes]` with scales.
    fn want(&self, row: usize, column: usize) -> [f64; 2] {
        let x_scale = match self.element {
            Element::E4m3 => f64::from(self.x_scales[row]),
            Element::Bf16 => 1.0,
        };
        self.sums[row * COLUMNS + column].map(|sum| sum * x_scale * f64::from(self.w_scales[column]))
    }
}

/// A fixture in device memory.
struct Loaded {
    device: Box<dyn Device>,
    weights: Panels,
    scales: DevicePtr,
}

impl Loaded {
    fn new(fixture: &Fixture) -> Self {
        let mut device = testing::device();
        let dtype = match fixture.element {
            Element::E4m3 => DType::F8E4M3,
            Element::Bf16 => DType::Bf16,
        };
        let shape = [COLUMNS, K];
        let part = HostTensor {
            data: &fixture.w,
            dtype,
            shape: &shape,
        };
        let weights = upload(&mut *device, "weights", &[part], fixture.element, Order::Stacked).expect("weights fit");
        let mut padded = fixture.w_scales.clone();
        padded.resize(weights.padded_rows, 0.0);
        let scales = on_device(&mut *device, &padded);
        Self {
            device,
            weights,
            scales,
        }
    }

    /// The given rows of the fixture's activations. Rows after them are no numbers.
    fn activation(&mut self, fixture: &Fixture, rows: &[usize]) -> Activation {
        let scheme = match fixture.element {
            Element::E4m3 => ActivationScheme::Fp8Token,
            Element::Bf16 => ActivationScheme::None,
        };
        let mut x = Activation::alloc(&mut *self.device, ROWS, K).expect("it fits");
        let params = x.write(&mut *self.device, scheme).expect("it can be written");
        let panels = fixture.element.panels(K);
        let mut bytes = vec![0xff; panels * ROW_STRIDE * PANEL_BYTES];
        for (to, from) in rows.iter().enumerate() {
            let row = &fixture.x[from * fixture.row_bytes()..][..fixture.row_bytes()];
            for k in 0..panels * PANEL_BYTES {
                let line = k / PANEL_BYTES * ROW_STRIDE + to;
                let at = line * PANEL_BYTES + ((k % PANEL_BYTES / 16) ^ (to & 7)) * 16 + k % 16;
                bytes[at] = row.get(k).copied().unwrap_or(0);
            }
        }
        self.device.upload(params.panels, &bytes).expect("it fits");
        let mut scales = vec![f32::NAN; ROW_STRIDE];
        for (to, from) in rows.iter().enumerate() {
            scales[to] = fixture.x_scales[*from];
        }
        self.device.upload(params.scales, bytes_of(&scales)).expect("it fits");
        x
    }

    /// The product by one kernel.
    fn multiply(&mut self, fixture: &Fixture, tiling: &Tiling, rows: &[usize], softcap: Option<f32>) -> Vec<f32> {
        self.multiply_tuned(fixture, tiling, rows, softcap, Tuning::default())
    }

    fn multiply_tuned(
        &mut self,
        fixture: &Fixture,
        tiling: &Tiling,
        rows: &[usize],
        softcap: Option<f32>,
        tuning: Tuning,
    ) -> Vec<f32> {
        let mut gemm = Gemm::load_family(&mut *self.device, std::slice::from_ref(tiling)).expect("the kernel exists");
        gemm.multiprocessors = FEW_MULTIPROCESSORS;
        self.product(
            fixture,
            tiling.output == Output::F32,
            rows,
            softcap,
            |device, product| {
                let launched = gemm.multiply_as(device, product, tiling.name, tuning);
                launched.expect("the product is possible");
            },
        )
    }

    /// What `launch` makes of the given rows of the fixture, `[rows, COLUMNS]`. It must not touch other rows of the output.
    fn product(
        &mut self,
        fixture: &Fixture,
        is_wide: bool,
        rows: &[usize],
        softcap: Option<f32>,
        launch: impl FnOnce(&mut dyn Device, &Product<'_>),
    ) -> Vec<f32> {
        let x = self.activation(fixture, rows);
        let device = &mut *self.device;
        let out = Tensor::alloc(device, "output", [ROWS, COLUMNS], is_wide).expect("it fits");
        let count = ROWS * COLUMNS * if is_wide { 2 } else { 1 };
        device
            .upload(out.data, bytes_of(&vec![SENTINEL; count]))
            .expect("it fits");
        let product = Product {
            x: &x.params(),
            w: &self.weights,
            w_scales: self.scales,
            out: &out,
            softcap,
            num_rows: on_device(device, &[rows.len() as i32]),
            max_rows: ROWS,
        };
        launch(device, &product);
        let words: Vec<u16> = read_back(device, out.data, count);
        assert!(
            words[rows.len() * count / ROWS..].iter().all(|word| *word == SENTINEL),
            "no row beyond the last is stored"
        );
        let wide = |pair: &[u16; 2]| f32::from_bits(u32::from(pair[1]) << 16 | u32::from(pair[0]));
        let mut values: Vec<f32> = if is_wide {
            words.as_chunks::<2>().0.iter().map(wide).collect()
        } else {
            words.iter().map(|word| bf16::from_bits(*word).to_f32()).collect()
        };
        values.truncate(rows.len() * COLUMNS);
        values
    }
}

/// The kernels this device runs.
fn tilings(device: &dyn Device) -> Vec<Tiling> {
    let hopper = if device.compute_capability() == 90 { HOPPER } else { &[] };
    hopper.iter().chain(PORTABLE).copied().collect()
}

fn first_rows(count: usize) -> Vec<usize> {
    (0..count).collect()
}

fn assert_close(fixture: &Fixture, tiling: &Tiling, got: &[f32], finish: impl Fn(f64) -> f64) {
    let rounding = if tiling.output == Output::F32 {
        1e-6
    } else {
        1.0 / 256.0
    };
    // A tensor core's sums of e4m3 products, and the emulator's, are off by up to 2.3e-3 of the sum of magnitudes
    // (tests/gpu/probes.cu). To the bit: `conformance::linear_equals`.
    let summing = if tiling.element == Element::E4m3 { 3e-3 } else { 1e-5 };
    for (index, got) in got.iter().enumerate() {
        let (row, column) = (index / COLUMNS, index % COLUMNS);
        let [sum, magnitude] = fixture.want(row, column);
        let want = finish(sum);
        let tolerance = want.abs() * rounding + magnitude * summing;
        assert!(
            (f64::from(*got) - want).abs() <= tolerance,
            "{} row {row} column {column}: {got} is not {want}",
            tiling.name
        );
    }
}

fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(
            got.to_bits(),
            want.to_bits(),
            "{what} row {} column {}: {got} is not {want}",
            index / COLUMNS,
            index % COLUMNS
        );
    }
}

fn on_gpu() -> bool {
    std::env::var("LAPIDARY_TEST_DEVICE").is_ok_and(|device| device == "gpu")
}

/// On a GPU mma.sync and wgmma may sum the products of one instruction differently.
fn share_bits(a: &Tiling, b: &Tiling) -> bool {
    !on_gpu() || (a.work == Work::BlockPerTile) == (b.work == Work::BlockPerTile)
}

fn every_tiling_agrees(format: Format) {
    let fixture = random(format.0);
    let mut loaded = Loaded::new(fixture);
    let mut first: Option<(Tiling, Vec<f32>)> = None;
    for tiling in tilings(&*loaded.device).iter().filter(|tiling| tiling.fits(format)) {
        let got = loaded.multiply(fixture, tiling, &first_rows(ROWS), None);
        assert_close(fixture, tiling, &got, |sum| sum);
        match &first {
            Some((reference, want)) if share_bits(tiling, reference) => assert_same_bits(tiling.name, &got, want),
            _ => first = Some((*tiling, got)),
        }
    }
    assert!(first.is_some(), "there are kernels of {format:?}");
}

#[test]
fn every_tiling_of_e4m3_gives_the_product_and_the_same_bits() {
    every_tiling_agrees(E4M3);
}

#[test]
fn every_tiling_of_bf16_gives_the_product_and_the_same_bits() {
    every_tiling_agrees(BF16);
}

#[test]
fn every_tiling_with_f32_output_gives_the_product_and_the_same_bits() {
    every_tiling_agrees(E4M3_WIDE);
    every_tiling_agrees(BF16_WIDE);
}

#[test]
fn tuning_changes_no_bits() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    let chosen = |tiling: &&Tiling| CHOSEN.contains(&tiling.name) && tiling.work != Work::BlockPerTile;
    for tiling in tilings(&*loaded.device).iter().filter(chosen) {
        let want = loaded.multiply(fixture, tiling, &first_rows(ROWS), None);
        for (row_tiles_together, lead_panels) in [(1, 0), (2, MAX_LEAD)] {
            let tuning = Tuning {
                row_tiles_together,
                lead_panels,
            };
            let got = loaded.multiply_tuned(fixture, tiling, &first_rows(ROWS), None, tuning);
            assert_same_bits(tiling.name, &got, &want);
        }
    }
}

#[test]
fn few_and_many_tokens_get_the_same_bits() {
    for element in [Element::E4m3, Element::Bf16] {
        let fixture = random(element);
        let mut loaded = Loaded::new(fixture);
        if loaded.device.compute_capability() != 90 {
            return;
        }
        let many = HOPPER
            .iter()
            .find(|tiling| tiling.fits((element, Output::F32)))
            .expect("there is one");
        let want = loaded.multiply(fixture, many, &first_rows(ROWS), Some(30.0));
        let slabs = SlabGemm::load(&mut *loaded.device).expect("the kernels exist");
        let got = loaded.product(fixture, true, &first_rows(ROWS), Some(30.0), |device, product| {
            slabs.launch(device, product).expect("the product is possible");
        });
        assert_same_bits("slabs", &got, &want);
    }
}

/// Gate and up of the fixture's tokens in device memory, as a product to come.
struct GateUp {
    x: Activation,
    weights: Panels,
    scales: DevicePtr,
    out: Tensor,
    num_rows: DevicePtr,
}

impl GateUp {
    fn new(loaded: &mut Loaded, fixture: &Fixture, rows: usize, inner: usize) -> Self {
        let x = loaded.activation(fixture, &first_rows(rows));
        let device = &mut *loaded.device;
        let columns = 2 * inner;
        let part = HostTensor {
            data: &noisy_elements(Element::E4m3, columns * K, 3),
            dtype: DType::F8E4M3,
            shape: &[columns, K],
        };
        let weights = upload(device, "weights", &[part], Element::E4m3, Order::Stacked).expect("weights fit");
        let scales: Vec<f32> = (0..weights.padded_rows).map(|row| 0.01 + 1e-4 * row as f32).collect();
        Self {
            x,
            weights,
            scales: on_device(device, &scales),
            out: Tensor::alloc(device, "output", [ROWS, columns], false).expect("it fits"),
            num_rows: on_device(device, &[rows as i32]),
        }
    }

    /// Panels and scales of what `launch` writes, all of them.
    fn gated(
        &self,
        device: &mut dyn Device,
        scale: f32,
        launch: impl FnOnce(&mut dyn Device, &Product<'_>, ActivationParams),
    ) -> (Vec<u8>, Vec<f32>) {
        let product = Product {
            x: &self.x.params(),
            w: &self.weights,
            w_scales: self.scales,
            out: &self.out,
            softcap: None,
            num_rows: self.num_rows,
            max_rows: ROWS,
        };
        let mut gated = Activation::alloc(device, ROWS, self.out.cols / 2).expect("it fits");
        let params = gated
            .write(device, ActivationScheme::Fp8Static { scale })
            .expect("it can be written");
        launch(device, &product, params);
        let bytes = Activation::bytes(ROWS, gated.cols) - 4 * ROW_STRIDE;
        (
            read_back(device, params.panels, bytes),
            read_back(device, params.scales, ROW_STRIDE),
        )
    }
}

#[test]
fn gated_products_have_the_bits_of_product_and_row_kernel() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    if loaded.device.compute_capability() != 90 {
        return;
    }
    let mut gemm = Gemm::load(&mut *loaded.device).expect("the kernels exist");
    gemm.multiprocessors = FEW_MULTIPROCESSORS;
    let row_kernels = RowKernels::load(&mut *loaded.device).expect("the kernels exist");
    // A part of a tile; tiles of every width with another after them, in panels that they do not fill.
    for (rows, inner) in [(65, 8), (ROWS, 120), (129, 200)] {
        let gate_up = GateUp::new(&mut loaded, fixture, rows, inner);
        for scale in [0.0371, 0.5] {
            let want = gate_up.gated(&mut *loaded.device, scale, |device, product, gated| {
                gemm.multiply(device, product).expect("the product is possible");
                let count = RowCount {
                    on_device: product.num_rows,
                    at_most: ROWS,
                };
                row_kernels.geglu(device, count, product.out, gated).expect("gates run");
            });
            let codes: BTreeSet<u8> = want.0.iter().copied().collect();
            assert!(codes.len() > 100, "most codes occur, not only clipped ones");
            for name in gemm.candidates(Element::E4m3, Output::Gated) {
                let got = gate_up.gated(&mut *loaded.device, scale, |device, product, gated| {
                    gemm.multiply_gated_as(device, product, gated, name, Tuning::default())
                        .expect("the product is possible");
                });
                assert_eq!(got.1, want.1, "{name} scales of {rows} rows");
                let differ = got.0.iter().zip(&want.0).position(|(got, want)| got != want);
                assert_eq!(differ, None, "{name} {rows} rows of {inner} by {scale}");
            }
        }
    }
}

/// One of each kind, for tests of many sizes.
const CHOSEN: [&str; 5] = [
    "gemm_e4m3_n192",
    "gemm_pair_e4m3_n192",
    "gemm_portable_e4m3_m16",
    "gemm_portable_e4m3_m64",
    "gemm_portable_e4m3_m128",
];

#[test]
fn a_rows_bits_do_not_depend_on_how_many_rows_there_are() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    for tiling in tilings(&*loaded.device)
        .iter()
        .filter(|tiling| CHOSEN.contains(&tiling.name))
    {
        let all = loaded.multiply(fixture, tiling, &first_rows(ROWS), None);
        for rows in [1, 63, 64, 65, 127, 128, 129, 200] {
            let some = loaded.multiply(fixture, tiling, &first_rows(rows), None);
            assert_same_bits(tiling.name, &some, &all[..rows * COLUMNS]);
        }
    }
}

#[test]
fn a_rows_bits_do_not_depend_on_its_place() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    let places: Vec<usize> = (0..ROWS).map(|row| (row * 7 + 37) % ROWS).collect();
    for tiling in tilings(&*loaded.device)
        .iter()
        .filter(|tiling| CHOSEN.contains(&tiling.name))
    {
        let all = loaded.multiply(fixture, tiling, &first_rows(ROWS), None);
        let moved = loaded.multiply(fixture, tiling, &places, None);
        for (row, from) in places.iter().enumerate() {
            let [moved, all] = [(&moved, row), (&all, *from)].map(|(values, row)| &values[row * COLUMNS..][..COLUMNS]);
            assert_same_bits(tiling.name, moved, all);
        }
    }
}

/// Weights that choose one element of a row each, and rows whose elements are all different in their first 29.
#[test]
fn one_hot_weights_pick_elements() {
    for element in [Element::E4m3, Element::Bf16] {
        let encode = |value: i32| match element {
            // Whole numbers from 0 to 15 in e4m3.
            Element::E4m3 => vec![[0, 56, 64, 68, 72, 74, 76, 78, 80, 81, 82, 83, 84, 85, 86, 87][value as usize]],
            Element::Bf16 => bf16::from_f32(value as f32).to_le_bytes().to_vec(),
        };
        let x = (0..ROWS * K)
            .flat_map(|i| encode(((i / K * 7 + i % K) % 13) as i32))
            .collect();
        let w = (0..COLUMNS * K)
            .flat_map(|i| encode(i32::from(i % K == (i / K * 5 + 3) % K)))
            .collect();
        let mut fixture = Fixture::new(element, x, w);
        fixture.x_scales.fill(0.5);
        fixture.w_scales.fill(4.0);
        let factor = if element == Element::E4m3 { 2.0 } else { 4.0 };
        let mut loaded = Loaded::new(&fixture);
        for tiling in tilings(&*loaded.device)
            .iter()
            .filter(|tiling| tiling.element == element && tiling.output != Output::Gated)
        {
            let got = loaded.multiply(&fixture, tiling, &first_rows(200), None);
            for (index, got) in got.iter().enumerate() {
                let (row, column) = (index / COLUMNS, index % COLUMNS);
                let want = ((row * 7 + (column * 5 + 3) % K) % 13) as f32 * factor;
                assert_eq!(*got, want, "{} row {row} column {column}", tiling.name);
            }
        }
    }
}

#[test]
fn f32_output_is_soft_capped() {
    let fixture = random(Element::Bf16);
    let mut loaded = Loaded::new(fixture);
    for tiling in tilings(&*loaded.device).iter().filter(|tiling| tiling.fits(BF16_WIDE)) {
        let got = loaded.multiply(fixture, tiling, &first_rows(70), Some(30.0));
        assert_close(fixture, tiling, &got, |sum| 30.0 * (sum / 30.0).tanh());
        assert!(got.iter().any(|value| value.abs() > 20.0), "the cap bites");
    }
}

#[test]
fn no_rows_are_no_work() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    for tiling in tilings(&*loaded.device)
        .iter()
        .filter(|tiling| CHOSEN.contains(&tiling.name))
    {
        assert!(loaded.multiply(fixture, tiling, &[], None).is_empty());
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let fixture = random(Element::E4m3);
    let mut loaded = Loaded::new(fixture);
    let x = loaded.activation(fixture, &[0]);
    let device = &mut *loaded.device;
    let matmul = Matmul::load(device).expect("the kernels exist");
    let out = Tensor::alloc(device, "output", [ROWS, COLUMNS], false).expect("it fits");
    let narrow = Tensor::alloc(device, "output", [ROWS, COLUMNS - 8], false).expect("it fits");
    let odd = Tensor::alloc(device, "output", [ROWS, COLUMNS - 1], false).expect("it fits");
    let odd_weights = Panels {
        rows: COLUMNS - 1,
        ..loaded.weights
    };
    let other_format = Panels {
        element: Element::Bf16,
        ..loaded.weights
    };
    let product = Product {
        x: &x.params(),
        w: &loaded.weights,
        w_scales: loaded.scales,
        out: &out,
        softcap: None,
        num_rows: on_device(device, &[1]),
        max_rows: 1,
    };
    assert!(matmul.run(device, &product).is_ok());
    for refused in [
        Product {
            out: &narrow,
            ..product
        },
        Product {
            out: &odd,
            w: &odd_weights,
            ..product
        },
        Product {
            w: &other_format,
            ..product
        },
        Product {
            max_rows: ROWS + 1,
            ..product
        },
    ] {
        assert!(matmul.run(device, &refused).is_err(), "{refused:?}");
    }
}

#[test]
fn shared_memory_and_grids_are_what_devices_have() {
    for tiling in HOPPER {
        assert!(tiling.shared_bytes() <= 227 << 10, "{}", tiling.name);
        for rows in [1, 128, 129, 300, 8192] {
            let blocks = tiling.grid(rows, 3584, 132).blocks;
            assert!(
                blocks[0] <= 132 && (blocks[0] as usize).is_multiple_of(tiling.cluster()),
                "{} {blocks:?}",
                tiling.name
            );
        }
    }
    for tiling in PORTABLE {
        assert!(tiling.shared_bytes() <= 99 << 10, "{}", tiling.name);
        let blocks = tiling.grid(300, 1000, 132).blocks;
        assert_eq!(
            blocks,
            [
                300_usize.div_ceil(tiling.rows) as u32,
                1000_usize.div_ceil(tiling.columns) as u32,
                1
            ]
        );
    }
}

#[test]
fn tiles_fill_the_device() {
    let chosen = |rows, columns, k| {
        let e4m3 = HOPPER.iter().filter(|tiling| tiling.fits(E4M3));
        let panels = Element::E4m3.panels(k);
        e4m3.min_by_key(|tiling| tiling.clocks(rows, columns, panels, 132))
            .expect("there are some")
    };
    // As measured: two rounds of the widest tile, not three of a narrower one.
    assert_eq!(chosen(2048, 3584, 14336).name, "gemm_e4m3_n224");
    assert_eq!(chosen(2048, 8192, 3584).cluster(), 2, "many tiles share weights");
    // With wide tiles half of the device would idle.
    assert!(chosen(512, 3584, 4096).columns <= 112);
    assert_eq!(chosen(8192, 28672, 3584).cluster(), 2, "many tiles share weights");
    assert_eq!(chosen(100, 28672, 3584).cluster(), 1, "one row tile has no neighbour");
}
