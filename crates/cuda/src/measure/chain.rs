//! What a product takes right after the kernel that writes its input, as in a model, beside what it takes when the input was
//! written long ago.

use std::fmt;

use lapidary_model::{ActivationScheme, BackendError};

use super::{Bench, Matrices, Operands, REPEATS, Timing, random_bf16, random_floats};
use crate::device::{Device, DevicePtr, Driver, bytes_of};
use crate::matmul::Matmul;
use crate::rows::{Branch, RowCount, RowKernels};
use crate::tensor::{Activation, Norm, Tensor};

/// With it inputs use most of e4m3.
const SCHEME: ActivationScheme = ActivationScheme::Fp8Static { scale: 0.05 };
/// Scales with which results of random weights and tokens are about 1.
const TOKEN_SCALE: f32 = 4.0;
const EPS: f32 = 1e-6;
/// Columns of what a kernel without work works on.
const TINY_COLS: usize = 128;
/// Times that all copies of the weights are read.
const ROUNDS: usize = 4;

/// What runs ahead of each product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Another such product.
    Product,
    /// A kernel of one block, on memory of its own.
    Tiny,
    /// The kernel that writes the product's input in a model, but to another place.
    WriterElsewhere,
    /// The kernel that writes the product's input.
    Writer,
    /// The same, and ahead of it the product whose result it reads: of `down` alone.
    Layer,
}

impl Before {
    const ALL: [Self; 5] = [
        Self::Product,
        Self::Tiny,
        Self::WriterElsewhere,
        Self::Writer,
        Self::Layer,
    ];
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Product => "after itself",
            Self::Tiny => "after a tiny kernel",
            Self::WriterElsewhere => "after a writer of another input",
            Self::Writer => "after the input's writer",
            Self::Layer => "after gate_up and the input's writer",
        })
    }
}

/// A linear layer of a model, in the order of [`Matrices::linears`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// Reads what a norm writes.
    Qkv,
    /// Reads what attention left, quantised.
    O,
    /// Reads what a norm writes.
    GateUp,
    /// Reads what `geglu` writes.
    Down,
}

impl Layer {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// One measurement's inputs.
#[derive(Debug, Clone, Copy)]
pub struct ChainLoad {
    /// The layer.
    pub layer: Layer,
    /// At most 64 take the kernels for few.
    pub tokens: usize,
    /// Rows that inputs are allocated with: their panels lie so many apart.
    pub row_stride: usize,
}

/// Kernels in a row and all they touch.
struct Chain {
    layer: Layer,
    tokens: usize,
    rows: RowKernels,
    operands: Operands,
    /// The product that makes what `geglu` reads.
    gate_up: Option<Operands>,
    /// What a writer reads.
    source: Tensor,
    residual: Tensor,
    norm: Norm,
    elsewhere: Activation,
    tiny: (Tensor, Activation),
}

impl Chain {
    fn new(device: &mut Driver, matrices: &Matrices, load: ChainLoad) -> Result<Self, BackendError> {
        let ChainLoad {
            layer,
            tokens,
            row_stride,
        } = load;
        let (n, k) = matrices.linears[layer as usize];
        let capacity = row_stride.max(tokens);
        let mut operands = Operands::random(device, (n, k), capacity, false)?;
        operands.x.write(device, SCHEME)?;
        let gate_up = match layer {
            Layer::Down => {
                let shape = matrices.linears[Layer::GateUp as usize];
                let gate_up = Operands::random(device, shape, capacity, false)?;
                let scales = vec![TOKEN_SCALE; tokens];
                device.upload(gate_up.x.params().scales, bytes_of(&scales))?;
                device.upload(gate_up.num_rows, &(tokens as i32).to_le_bytes())?;
                Some(gate_up)
            }
            _ => None,
        };
        device.upload(operands.num_rows, &(tokens as i32).to_le_bytes())?;
        let cols = if layer == Layer::Down { 2 * k } else { k };
        let mut elsewhere = Activation::alloc(device, capacity, k)?;
        elsewhere.write(device, SCHEME)?;
        let mut tiny = Activation::alloc(device, 1, TINY_COLS)?;
        tiny.write(device, SCHEME)?;
        Ok(Self {
            layer,
            tokens,
            rows: RowKernels::load(device)?,
            operands,
            gate_up,
            source: native(random_bf16(device, tokens * cols, 5)?, tokens, cols),
            residual: Tensor::alloc(device, "residual", [tokens, k], true)?,
            norm: Norm {
                factors: random_floats(device, k)?,
            },
            elsewhere,
            tiny: (Tensor::alloc(device, "nothing", [1, TINY_COLS], false)?, tiny),
        })
    }

    fn has(&self, before: Before) -> bool {
        before != Before::Layer || self.gate_up.is_some()
    }

    /// Launches of a recording.
    fn launches(&self) -> usize {
        self.operands.weights.len() * ROUNDS
    }

    fn count(&self) -> RowCount {
        RowCount {
            on_device: self.operands.num_rows,
            at_most: self.tokens,
        }
    }

    /// Launches the kernel that writes `to` in a model.
    fn write(&self, device: &mut dyn Device, source: &Tensor, to: &Activation) -> Result<(), BackendError> {
        let (count, to) = (self.count(), to.params());
        match self.layer {
            Layer::Down => self.rows.geglu(device, count, source, to),
            Layer::O => self.rows.quantize(device, count, source, to),
            Layer::Qkv | Layer::GateUp => {
                let branch = Branch {
                    x: source,
                    post: &self.norm,
                    pre: &self.norm,
                    residual: &self.residual,
                    eps: EPS,
                };
                self.rows.add_norm(device, count, branch, to)
            }
        }
    }

    /// Launches all that is ahead of a product.
    fn before(
        &self,
        device: &mut dyn Device,
        matmul: &Matmul,
        before: Before,
        index: usize,
    ) -> Result<(), BackendError> {
        match before {
            Before::Product => Ok(()),
            Before::Tiny => {
                let (source, to) = &self.tiny;
                let count = RowCount {
                    at_most: 1,
                    ..self.count()
                };
                self.rows.quantize(device, count, source, to.params())
            }
            Before::WriterElsewhere => self.write(device, &self.source, &self.elsewhere),
            Before::Writer => self.write(device, &self.source, &self.operands.x),
            Before::Layer => {
                let gate_up = self.gate_up.as_ref().expect("`has` was asked");
                let x = gate_up.x.params();
                matmul.run(device, &gate_up.product(&x, index, self.tokens))?;
                self.write(device, &gate_up.out, &self.operands.x)
            }
        }
    }
}

fn native(data: DevicePtr, rows: usize, cols: usize) -> Tensor {
    Tensor {
        data,
        rows,
        cols,
        is_wide: false,
    }
}

impl Bench {
    /// A linear layer after each thing that may be ahead of it: what both take less what the first takes alone.
    ///
    /// # Errors
    /// Not enough memory, or the device failed.
    pub fn chain(&mut self, matrices: &Matrices, load: ChainLoad) -> Result<Vec<Timing>, BackendError> {
        let memory = self.device.mark();
        let chain = Chain::new(&mut self.device, matrices, load)?;
        let mut timings = Vec::new();
        for before in Before::ALL.into_iter().filter(|before| chain.has(*before)) {
            let alone = self.time_before(&chain, before)?;
            let both = self.time_chain(&chain, before)?;
            let how = format!(" stride {} {before}", load.row_stride);
            timings.push(chain.operands.timing(load.tokens, both - alone, &how));
        }
        self.device.release(memory)?;
        Ok(timings)
    }

    /// Microseconds of what is ahead of a product.
    fn time_before(&mut self, chain: &Chain, before: Before) -> Result<f64, BackendError> {
        if before == Before::Product {
            return Ok(0.0);
        }
        let matmul = &self.matmul;
        let microseconds = self.device.time(REPEATS, &mut |device| {
            (0..chain.launches()).try_for_each(|index| chain.before(device, matmul, before, index))
        })?;
        Ok(microseconds / chain.launches() as f64)
    }

    /// Microseconds of a product and what is ahead of it.
    fn time_chain(&mut self, chain: &Chain, before: Before) -> Result<f64, BackendError> {
        let (matmul, x) = (&self.matmul, chain.operands.x.params());
        let microseconds = self.device.time(REPEATS, &mut |device| {
            for index in 0..chain.launches() {
                chain.before(device, matmul, before, index)?;
                matmul.run(device, &chain.operands.product(&x, index, chain.tokens))?;
            }
            Ok(())
        })?;
        Ok(microseconds / chain.launches() as f64)
    }
}
