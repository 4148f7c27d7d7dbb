//! Times the kernels one by one on a GPU, for `benches/kernels.rs`: cold weights, graph replays, medians.

use std::fmt;

use lapidary_model::{ActivationScheme, AttentionConfig, BackendError, KvCacheDtype, KvScales, StepLimits};

pub use crate::attention::DecodeTuning;
use crate::attention::{Attention, AttentionInputs, value_bytes};
use crate::device::{Device, DeviceInfo, DevicePtr, Driver};
use crate::gemm::{Output, Tuning};
use crate::matmul::{Matmul, Product};
use crate::pack::{Element, PANEL_BYTES, Panels, ROW_MULTIPLE};
use crate::rope::Rope;
use crate::rows::{Branch, RowCount, RowKernels};
use crate::step::StepBuffers;
use crate::tensor::{Activation, ActivationParams, KvLayer, Norm, Tensor};

mod chain;
pub use chain::{Before, ChainLoad, Layer};

/// Weights rotate through more memory than any L2 cache holds.
const ROTATION_BYTES: usize = 600 << 20;
const MAX_COPIES: usize = 64;
/// Inputs of row kernels are so small that many copies are needed to be more than L2 holds.
const MAX_ROW_COPIES: usize = 4096;
/// Tokens of a block of the KV cache.
const BLOCK: usize = 16;
/// Replays of which the median counts.
const REPEATS: usize = 9;
/// Row tiles together and panels of lead that the kernels for many tokens are tried with.
const TILE_TUNINGS: [(usize, usize); 4] = [(16, 0), (16, 2), (8, 2), (32, 2)];
/// The same of those that gate: the longer a tile's end takes, the more a lead may be worth.
const GATED_TUNINGS: [(usize, usize); 4] = [(16, 2), (16, 3), (16, 4), (8, 2)];

/// A model's matrices, `[outputs, inputs]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrices {
    /// As in the table.
    pub model: &'static str,
    /// qkv, o, gate_up, down.
    pub linears: [(usize, usize); 4],
    /// The output projection.
    pub output: (usize, usize),
}

/// Of the three sizes of Gemma-2.
pub const MODELS: [Matrices; 3] = [
    Matrices {
        model: "2b",
        linears: [(4096, 2304), (2304, 2048), (18432, 2304), (2304, 9216)],
        output: (256_000, 2304),
    },
    Matrices {
        model: "9b",
        linears: [(8192, 3584), (3584, 4096), (28672, 3584), (3584, 14336)],
        output: (256_000, 3584),
    },
    Matrices {
        model: "27b",
        linears: [(8192, 4608), (4608, 4096), (73728, 4608), (4608, 36864)],
        output: (256_000, 4608),
    },
];

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Timing {
    /// Which kernel, at which shape.
    pub what: String,
    /// Of one launch.
    pub microseconds: f64,
    /// Bytes it has to read at least; of operations on rows, to read and to write.
    pub bytes: f64,
    /// Additions and multiplications.
    pub flops: f64,
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gigabytes, teraflops) = (
            self.bytes / self.microseconds / 1e3,
            self.flops / self.microseconds / 1e6,
        );
        write!(
            f,
            "{:34} {:9.2} us {gigabytes:6.0} GB/s {teraflops:6.0} TFLOP/s",
            self.what, self.microseconds
        )
    }
}

/// Random tokens, and random weights of one shape many times over.
struct Operands {
    x: Activation,
    weights: Vec<Panels>,
    w_scales: DevicePtr,
    out: Tensor,
    num_rows: DevicePtr,
}

impl Operands {
    fn random(
        device: &mut Driver,
        (n, k): (usize, usize),
        max_tokens: usize,
        is_output: bool,
    ) -> Result<Self, BackendError> {
        let element = if is_output { Element::Bf16 } else { Element::E4m3 };
        let bytes = element.panels(k) * PANEL_BYTES * n.next_multiple_of(ROW_MULTIPLE);
        let copies = (ROTATION_BYTES / bytes).clamp(2, MAX_COPIES);
        let mut x = Activation::alloc(device, max_tokens, k)?;
        random_activation(device, &mut x, element, max_tokens)?;
        let w_scales = match element {
            Element::E4m3 => random_floats(device, n.next_multiple_of(ROW_MULTIPLE))?,
            Element::Bf16 => DevicePtr::NULL,
        };
        Ok(Self {
            x,
            weights: (0..copies as u64)
                .map(|copy| random_panels(device, element, [n, k], copy))
                .collect::<Result<_, _>>()?,
            w_scales,
            out: Tensor::alloc(device, "output", [max_tokens, n], is_output)?,
            num_rows: device.alloc("count", 4)?,
        })
    }

    /// By the `index`th copy of the weights, which take turns.
    fn product<'a>(&'a self, x: &'a ActivationParams, index: usize, tokens: usize) -> Product<'a> {
        Product {
            x,
            w: &self.weights[index % self.weights.len()],
            w_scales: self.w_scales,
            out: &self.out,
            softcap: self.out.is_wide.then_some(30.0),
            num_rows: self.num_rows,
            max_rows: tokens,
        }
    }

    fn timing(&self, tokens: usize, microseconds: f64, how: &str) -> Timing {
        let Panels {
            rows,
            cols,
            padded_rows,
            panels,
            ..
        } = self.weights[0];
        let kind = if self.out.is_wide { "output" } else { "fp8" };
        Timing {
            what: format!("{kind} {rows}x{cols} M {tokens}{how}"),
            microseconds,
            bytes: (panels * padded_rows * PANEL_BYTES) as f64,
            flops: 2.0 * (rows * cols * tokens) as f64,
        }
    }
}

/// The bench.
#[derive(Debug)]
pub struct Bench {
    device: Driver,
    matmul: Matmul,
}

impl Bench {
    /// # Errors
    /// The driver refused.
    pub fn new(device: DeviceInfo) -> Result<Self, BackendError> {
        let mut device = Driver::open(device)?;
        let matmul = Matmul::load(&mut device)?;
        Ok(Self { device, matmul })
    }

    /// A product of random e4m3 (or bf16, `is_output`: with f32 results and soft-cap) operands at several numbers of tokens.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn matmul(
        &mut self,
        (n, k): (usize, usize),
        tokens: &[usize],
        is_output: bool,
    ) -> Result<Vec<Timing>, BackendError> {
        let memory = self.device.mark();
        let max_tokens = tokens.iter().copied().max().unwrap_or(1);
        let operands = Operands::random(&mut self.device, (n, k), max_tokens, is_output)?;
        let mut timings = Vec::new();
        for &count in tokens {
            let microseconds =
                self.time_product(&operands, count, |matmul, device, product| matmul.run(device, product))?;
            timings.push(operands.timing(count, microseconds, ""));
        }
        self.device.release(memory)?;
        Ok(timings)
    }

    /// The same product of at most 64 tokens, on Hopper: first as it is cut into slabs, then in every other way worth
    /// trying, fastest first.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn slab_sweep(
        &mut self,
        shape: (usize, usize),
        tokens: usize,
        is_output: bool,
    ) -> Result<Vec<Timing>, BackendError> {
        let memory = self.device.mark();
        let operands = Operands::random(&mut self.device, shape, tokens, is_output)?;
        let plans = self.matmul.slabs()?.plans(&operands.weights[0], tokens);
        let mut timings = Vec::new();
        for plan in &plans {
            let microseconds = self.time_product(&operands, tokens, |matmul, device, product| {
                matmul.slabs()?.launch_plan(device, product, 0, plan)
            })?;
            timings.push(operands.timing(tokens, microseconds, &format!(" {plan}")));
        }
        timings[1..].sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        self.device.release(memory)?;
        Ok(timings)
    }

    /// The same product of many tokens: first as it is, then with every kernel and some tunings of it, fastest first.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn tile_sweep(
        &mut self,
        shape: (usize, usize),
        tokens: usize,
        is_output: bool,
    ) -> Result<Vec<Timing>, BackendError> {
        let memory = self.device.mark();
        let operands = Operands::random(&mut self.device, shape, tokens, is_output)?;
        let chosen = self.time_product(&operands, tokens, |matmul, device, product| {
            matmul.gemm().multiply(device, product)
        })?;
        let mut timings = vec![operands.timing(tokens, chosen, "")];
        let output = if is_output { Output::F32 } else { Output::Bf16 };
        for name in self.matmul.gemm().candidates(operands.weights[0].element, output) {
            for (row_tiles_together, lead_panels) in TILE_TUNINGS {
                let tuning = Tuning {
                    row_tiles_together,
                    lead_panels,
                };
                let microseconds = self.time_product(&operands, tokens, |matmul, device, product| {
                    matmul.gemm().multiply_as(device, product, name, tuning)
                })?;
                let how = format!(" {name} together {row_tiles_together} lead {lead_panels}");
                timings.push(operands.timing(tokens, microseconds, &how));
            }
        }
        timings[1..].sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        self.device.release(memory)?;
        Ok(timings)
    }

    /// Gate and up of many tokens: as product and row kernel, as the product that gates, then as every kernel of that kind with
    /// some tunings, fastest first.
    ///
    /// # Errors
    /// Not enough memory, the device failed, or it has no kernels that gate.
    pub fn gated(&mut self, shape: (usize, usize), tokens: usize) -> Result<Vec<Timing>, BackendError> {
        let memory = self.device.mark();
        let operands = Operands::random(&mut self.device, shape, tokens, false)?;
        let rows = RowKernels::load(&mut self.device)?;
        let gated = written(&mut self.device, tokens, shape.0 / 2)?;
        let apart = self.time_product(&operands, tokens, |matmul, device, product| {
            matmul.run(device, product)?;
            let count = RowCount {
                on_device: product.num_rows,
                at_most: tokens,
            };
            rows.geglu(device, count, product.out, gated)
        })?;
        let chosen = self.time_product(&operands, tokens, |matmul, device, product| {
            matmul.run_gated(device, product, gated)
        })?;
        let mut timings = vec![
            operands.timing(tokens, apart, " and geglu"),
            operands.timing(tokens, chosen, " gated"),
        ];
        for name in self.matmul.gemm().candidates(Element::E4m3, Output::Gated) {
            for (row_tiles_together, lead_panels) in GATED_TUNINGS {
                let tuning = Tuning {
                    row_tiles_together,
                    lead_panels,
                };
                let microseconds = self.time_product(&operands, tokens, |matmul, device, product| {
                    matmul.gemm().multiply_gated_as(device, product, gated, name, tuning)
                })?;
                let how = format!(" {name} together {row_tiles_together} lead {lead_panels}");
                timings.push(operands.timing(tokens, microseconds, &how));
            }
        }
        timings[2..].sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
        self.device.release(memory)?;
        Ok(timings)
    }

    /// Microseconds of one `launch`, whose weights come from DRAM.
    fn time_product(
        &mut self,
        operands: &Operands,
        tokens: usize,
        launch: impl Fn(&Matmul, &mut dyn Device, &Product<'_>) -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        let launches = operands.weights.len() * if tokens <= 64 { 4 } else { 1 };
        self.device.upload(operands.num_rows, &(tokens as i32).to_le_bytes())?;
        let (matmul, x) = (&self.matmul, operands.x.params());
        let microseconds = self.device.time(REPEATS, &mut |device| {
            for index in 0..launches {
                launch(matmul, device, &operands.product(&x, index, tokens))?;
            }
            Ok(())
        })?;
        Ok(microseconds / launches as f64)
    }

    /// One layer's attention.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn attention(&mut self, config: AttentionConfig, load: AttentionLoad) -> Result<Timing, BackendError> {
        let AttentionLoad {
            batch,
            context,
            queries,
            window,
            tuning,
            is_portable,
            ..
        } = load;
        let device = &mut self.device;
        let memory = device.mark();
        let is_hopper = device.compute_capability() == 90 && !is_portable;
        let limits = StepLimits {
            max_tokens: batch * queries,
            max_seqs: batch,
            max_model_len: context,
        };
        let attention = Attention::tuned(device, config, limits, tuning, is_hopper)?;
        let blocks_each = context.div_ceil(BLOCK);
        let mut step = StepBuffers::alloc(device, limits, batch * blocks_each, batch)?;
        let batch_step = load.batch(BLOCK);
        step.upload(device, &batch_step)?;
        let plan = attention.plan(device, &batch_step, BLOCK)?;
        step.begin(device)?;
        let value_bytes = value_bytes(&config);
        let layer_bytes = 2 * batch * blocks_each * BLOCK * config.num_kv_heads * config.head_dim * value_bytes;
        let copies = (ROTATION_BYTES / layer_bytes).clamp(2, MAX_COPIES);
        let layers = (0..copies as u64)
            .map(|copy| random_cache(device, layer_bytes, copy, config.kv_cache_dtype))
            .collect::<Result<Vec<_>, _>>()?;
        let width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        let qkv = random_bf16(device, batch * queries * width, 99)?;
        let mut out = Activation::alloc(device, batch * queries, config.num_heads * config.head_dim)?;
        let scheme = ActivationScheme::Fp8Static { scale: 0.01 };
        let out = out.write(device, scheme)?;
        let pointers = *step.pointers();
        let launches = copies * 2;
        let microseconds = device.time(REPEATS, &mut |device| {
            for launch in 0..launches {
                let inputs = AttentionInputs {
                    step: pointers,
                    max_seqs: batch,
                    qkv,
                    kv: layers[launch % copies],
                    scales: KvScales::default(),
                    block_size: BLOCK,
                    window,
                    out,
                    rows: DevicePtr::NULL,
                };
                attention.run(device, &plan, &inputs)?;
            }
            Ok(())
        })? / launches as f64;
        device.release(memory)?;
        Ok(Timing {
            what: load.to_string(),
            microseconds,
            bytes: (2 * batch * load.keys_read() * config.num_kv_heads * config.head_dim * value_bytes) as f64,
            flops: (4 * batch * load.visible_pairs() * config.num_heads * config.head_dim) as f64,
        })
    }
}

/// Operations on rows, each on inputs that come from DRAM.
impl Bench {
    /// `residual += norm(x)`, the norm of which is quantised.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn add_norm(&mut self, rows: usize, cols: usize) -> Result<Timing, BackendError> {
        self.time_rows("add_norm", [rows, cols], (2 + 4, 4 + 1), |device, copies| {
            let (kernels, count) = (RowKernels::load(device)?, row_count(device, rows)?);
            let x = rotated(device, copies, [rows, cols], false)?;
            let residual = rotated(device, copies, [rows, cols], true)?;
            let norms = rotated(device, 2 * copies, [1, cols], true)?;
            let norm = move |index: usize| Norm {
                factors: norms[index].data,
            };
            let out = written(device, rows, cols)?;
            Ok(move |device: &mut dyn Device, copy: usize| {
                let branch = Branch {
                    x: &x[copy],
                    post: &norm(2 * copy),
                    pre: &norm(2 * copy + 1),
                    residual: &residual[copy],
                    eps: 1e-6,
                };
                kernels.add_norm(device, count, branch, out)
            })
        })
    }

    /// The gated activation of rows that hold gate and up, `cols` each.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn geglu(&mut self, rows: usize, cols: usize) -> Result<Timing, BackendError> {
        self.time_rows("geglu", [rows, cols], (2 * 2, 1), |device, copies| {
            let (kernels, count) = (RowKernels::load(device)?, row_count(device, rows)?);
            let gate_up = rotated(device, copies, [rows, 2 * cols], false)?;
            let out = written(device, rows, cols)?;
            Ok(move |device: &mut dyn Device, copy: usize| kernels.geglu(device, count, &gate_up[copy], out))
        })
    }

    /// The rotation of a prompt's queries and keys, and its way into the KV cache.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn rope_append(&mut self, config: AttentionConfig, rows: usize) -> Result<Timing, BackendError> {
        let cols = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim;
        self.time_rows("rope_append", [rows, cols], (2, 2), |device, copies| {
            let limits = StepLimits {
                max_tokens: rows,
                max_seqs: 1,
                max_model_len: rows,
            };
            let rope = Rope::load(device, &config, rows)?;
            let blocks = rows.div_ceil(BLOCK);
            let mut step = StepBuffers::alloc(device, limits, blocks, 1)?;
            let prompt = AttentionLoad {
                batch: 1,
                context: rows,
                queries: rows,
                window: None,
                tuning: None,
                is_portable: false,
                pages: Pages::Shuffled,
            };
            step.upload(device, &prompt.batch(BLOCK))?;
            step.begin(device)?;
            let pointers = *step.pointers();
            let qkv = rotated(device, copies, [rows, cols], false)?;
            let cache = 2 * 2 * blocks * BLOCK * config.num_kv_heads * config.head_dim;
            let kv = KvLayer {
                data: device.alloc("the KV cache of a layer", cache)?,
                block_size: BLOCK,
                scales: KvScales::default(),
            };
            Ok(move |device: &mut dyn Device, copy: usize| rope.append(device, &pointers, rows, &qkv[copy], &kv))
        })
    }

    /// Of an operation that reads and writes so many bytes an element. `prepare` makes as many copies of its inputs as it
    /// is told, and gives what launches it on one of them.
    fn time_rows<Launch>(
        &mut self,
        name: &str,
        [rows, cols]: [usize; 2],
        (read, written): (usize, usize),
        prepare: impl FnOnce(&mut Driver, usize) -> Result<Launch, BackendError>,
    ) -> Result<Timing, BackendError>
    where
        Launch: Fn(&mut dyn Device, usize) -> Result<(), BackendError>,
    {
        let memory = self.device.mark();
        let copies = (ROTATION_BYTES / (rows * cols * read)).clamp(2, MAX_ROW_COPIES);
        let launch = prepare(&mut self.device, copies)?;
        let microseconds = self.device.time(REPEATS, &mut |device| {
            (0..copies).try_for_each(|copy| launch(device, copy))
        })? / copies as f64;
        self.device.release(memory)?;
        Ok(Timing {
            what: format!("{name} {cols} M {rows}"),
            microseconds,
            bytes: (rows * cols * (read + written)) as f64,
            flops: 0.0,
        })
    }
}

fn row_count(device: &mut Driver, rows: usize) -> Result<RowCount, BackendError> {
    let on_device = device.alloc("count", 4)?;
    device.upload(on_device, &(rows as i32).to_le_bytes())?;
    Ok(RowCount {
        on_device,
        at_most: rows,
    })
}

/// Random tensors, one behind the other.
fn rotated(
    device: &mut Driver,
    copies: usize,
    [rows, cols]: [usize; 2],
    is_wide: bool,
) -> Result<Vec<Tensor>, BackendError> {
    let bytes = Tensor::bytes(rows, cols, is_wide);
    // Two bf16 are an f32 of the size of the second.
    let data = random_bf16(device, copies * bytes / 2, 5)?;
    let tensor = |copy| Tensor {
        data: data.offset(copy * bytes),
        rows,
        cols,
        is_wide,
    };
    Ok((0..copies).map(tensor).collect())
}

/// Where an operation leaves e4m3 of one scale.
fn written(device: &mut Driver, rows: usize, cols: usize) -> Result<ActivationParams, BackendError> {
    Activation::alloc(device, rows, cols)?.write(device, ActivationScheme::Fp8Static { scale: 0.01 })
}

/// Sequences that attend.
#[derive(Debug, Clone, Copy)]
pub struct AttentionLoad {
    /// How many there are.
    pub batch: usize,
    /// Tokens of each.
    pub context: usize,
    /// The last tokens, which are computed; 1 is decoding.
    pub queries: usize,
    /// Of the layer.
    pub window: Option<usize>,
    /// The device's usual one if none is given.
    pub tuning: Option<DecodeTuning>,
    /// Not to use what only Hopper has.
    pub is_portable: bool,
    /// Where the sequences' blocks lie.
    pub pages: Pages,
}

/// Which blocks of the KV cache a sequence has. It matters: memory channels go by address, and blocks read at the same time
/// may share some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Any, as after long use.
    Shuffled,
    /// One after another, as a prompt gets them in a fresh cache.
    Sequential,
    /// Those of all sequences take turns, as when they grew together.
    Interleaved,
}

impl Pages {
    /// Blocks by sequence, `each` of them.
    fn blocks(self, batch: usize, each: usize) -> Vec<u32> {
        let count = batch * each;
        let mut blocks: Vec<u32> = match self {
            Self::Shuffled | Self::Sequential => (0..count as u32).collect(),
            Self::Interleaved => (0..count).map(|i| (i % each * batch + i / each) as u32).collect(),
        };
        if self == Self::Shuffled {
            for last in (1..count).rev() {
                blocks.swap(last, (mix(last as u64) % (last as u64 + 1)) as usize);
            }
        }
        blocks
    }
}

impl fmt::Display for AttentionLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch, context, .. } = self;
        match self.queries {
            1 => write!(f, "decode attention B {batch} ctx {context}")?,
            queries => write!(f, "prefill attention B {batch} ctx {context} queries {queries}")?,
        }
        write!(f, "{}", if self.window.is_some() { " window" } else { "" })
    }
}

impl AttentionLoad {
    /// Keys that some query token of a sequence sees.
    fn keys_read(&self) -> usize {
        let seen = self.window.map_or(self.context, |window| window + self.queries - 1);
        seen.min(self.context)
    }

    /// Pairs of a query token and a key it sees, of a sequence.
    fn visible_pairs(&self) -> usize {
        let seen = |position: usize| self.window.map_or(position + 1, |window| window.min(position + 1));
        (self.context - self.queries..self.context).map(seen).sum()
    }

    fn batch(&self, block_size: usize) -> lapidary_engine::Batch {
        use lapidary_engine::{BlockId, RequestId};
        let Self {
            batch,
            context,
            queries,
            ..
        } = *self;
        let blocks_each = context.div_ceil(block_size);
        let blocks = self.pages.blocks(batch, blocks_each);
        let block = |seq: usize, index: usize| blocks[seq * blocks_each + index];
        let slot = |seq: usize, position: usize| {
            block(seq, position / block_size) * block_size as u32 + (position % block_size) as u32
        };
        let tokens = || (0..batch).flat_map(|seq| (context - queries..context).map(move |position| (seq, position)));
        lapidary_engine::Batch {
            step: 0,
            request_ids: (0..batch as u64).map(RequestId).collect(),
            token_ids: vec![0; batch * queries],
            fed: Vec::new(),
            positions: tokens().map(|(_, position)| position as u32).collect(),
            slot_mapping: tokens().map(|(seq, position)| slot(seq, position)).collect(),
            query_start: (0..=batch).map(|seq| (seq * queries) as u32).collect(),
            context_lens: vec![context as u32; batch],
            block_start: (0..=batch).map(|seq| (seq * blocks_each) as u32).collect(),
            block_ids: blocks.iter().copied().map(BlockId).collect(),
            samples: Vec::new(),
        }
    }
}

/// Fills memory with bytes made by `make` of a running number, the same on every machine.
fn random(
    device: &mut Driver,
    what: &'static str,
    bytes: usize,
    seed: u64,
    make: impl Fn(u64) -> [u8; 8] + Sync,
) -> Result<DevicePtr, BackendError> {
    let to = device.alloc(what, bytes.next_multiple_of(8))?;
    device.upload_with(to, bytes.next_multiple_of(8), 8, &|offset, memory| {
        for (index, word) in memory.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = make(mix(seed << 40 | (offset / 8 + index) as u64));
        }
    })?;
    Ok(to)
}

/// splitmix64's finaliser.
fn mix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// e4m3 codes of every sign and of exponents around 1: numbers that real weights consist of.
fn e4m3_codes(word: u64) -> [u8; 8] {
    word.to_le_bytes().map(|byte| (byte & 0x80) | (0x20 + (byte & 0x1f)))
}

/// Four bf16 values between 1/4 and 4 in size.
fn bf16_values(word: u64) -> [u8; 8] {
    let mut bytes = [0; 8];
    for (index, value) in bytes.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        let bits = (word >> (16 * index)) as u16;
        *value = ((bits & 0x8000) | (0x3e80 + (bits & 0x1ff))).to_le_bytes();
    }
    bytes
}

fn random_panels(device: &mut Driver, element: Element, [n, k]: [usize; 2], seed: u64) -> Result<Panels, BackendError> {
    let (panels, padded_rows) = (element.panels(k), n.next_multiple_of(ROW_MULTIPLE));
    let bytes = panels * padded_rows * PANEL_BYTES;
    let data = match element {
        Element::E4m3 => random(device, "weights", bytes, seed, e4m3_codes)?,
        Element::Bf16 => random(device, "weights", bytes, seed, bf16_values)?,
    };
    Ok(Panels {
        data,
        element,
        rows: n,
        padded_rows,
        cols: k,
        panels,
    })
}

fn random_activation(
    device: &mut Driver,
    x: &mut Activation,
    element: Element,
    rows: usize,
) -> Result<(), BackendError> {
    let scheme = match element {
        Element::E4m3 => ActivationScheme::Fp8Token,
        Element::Bf16 => ActivationScheme::None,
    };
    let params = x.write(device, scheme)?;
    let bytes = element.panels(x.cols) * params.row_stride as usize * PANEL_BYTES;
    device.upload_with(params.panels, bytes, 8, &|offset, memory| {
        for (index, word) in memory.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let noise = mix(7 << 40 | (offset / 8 + index) as u64);
            *word = if element == Element::E4m3 {
                e4m3_codes(noise)
            } else {
                bf16_values(noise)
            };
        }
    })?;
    let scales = vec![0.01_f32; rows];
    device.upload(params.scales, crate::device::bytes_of(&scales))
}

fn random_floats(device: &mut Driver, count: usize) -> Result<DevicePtr, BackendError> {
    random(device, "scales", 4 * count, 3, |word| {
        let value = |bits: u64| (0.005 + (bits & 0xffff) as f32 * 1e-7).to_le_bytes();
        let (low, high) = (value(word), value(word >> 32));
        [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
    })
}

fn random_cache(device: &mut Driver, bytes: usize, seed: u64, dtype: KvCacheDtype) -> Result<DevicePtr, BackendError> {
    match dtype {
        KvCacheDtype::Native => random(device, "keys and values", bytes, seed, bf16_values),
        KvCacheDtype::Fp8E4m3 => random(device, "keys and values", bytes, seed, e4m3_codes),
    }
}

fn random_bf16(device: &mut Driver, count: usize, seed: u64) -> Result<DevicePtr, BackendError> {
    random(device, "values", 2 * count, seed, bf16_values)
}
