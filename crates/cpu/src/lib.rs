//! The reference backend: obvious first, fast second.
//!
//! | module | hides |
//! |---|---|
//! | `backend` | [`Cpu`]: the operations of the model's `Backend`, step by step |
//! | `ops` | what each operation computes, and how its rows are spread over threads |
//! | `sample` | how a token is chosen |
//! | `tensor`, `plan`, `memory` | what is in memory, and how much fits |
//! | `e4m3`, `math` | exact FP8 rounding; tanh and exp that vectorise |
//! | `hopper` | the arithmetic of the CUDA kernels, for comparing with them bit by bit |
//! | `simd` | AVX-512, AVX2 or neither, and the dot product on each |
//! | `parallel` | a thread pool with cheap forks |
//!
//! A row's result depends on nothing but its own sequence, to the last bit: not on the batch, on chunks, on blocks, on
//! what was cached or on the number of threads. Every output element is computed by one order of operations, and speed
//! comes from computing many at once.
//!
//! ```
//! use lapidary_cpu::{Cpu, CpuConfig};
//!
//! let backend = Cpu::new(CpuConfig { threads: 2, ..CpuConfig::default() })?;
//! # Ok::<(), lapidary_model::BackendError>(())
//! ```

mod backend;
pub mod e4m3;
mod hopper;
mod math;
mod memory;
mod ops;
mod parallel;
mod plan;
mod sample;
mod simd;
mod tensor;

pub use backend::{Cpu, CpuConfig, Storage, Sums};
pub use plan::Plan;
pub use simd::Isa;
pub use tensor::{Activation, Embedding, KvLayer, Linear, Norm, Tensor};
