//! Single operations, by the seam the decoder uses.

use half::bf16;
use lapidary_cpu::{Cpu, CpuConfig};
use lapidary_engine::{Batch, BlockId, RequestId};
use lapidary_model::{
    ActivationScheme, AttentionConfig, Backend, DType, HostTensor, KvCacheDtype, KvScales, LinearWeights, NormArgs,
    StepLimits, Width,
};

use crate::best_of;
use crate::random::Random;

const MAX_TOKENS: usize = 512;
const FEW_INPUTS: usize = 16;

const ATTENTION: AttentionConfig = AttentionConfig {
    num_heads: 8,
    num_kv_heads: 4,
    head_dim: 256,
    scale: 0.0625,
    softcap: Some(50.0),
    rope_theta: 1e4,
    kv_cache_dtype: KvCacheDtype::Native,
};

pub(crate) fn run(config: CpuConfig) {
    let mut cpu = prepared(config, KvCacheDtype::Native);
    let fp8 = ActivationScheme::Fp8Static { scale: 0.02 };
    for (rows, cols) in [(4096, 2304), (18_432, 2304), (2304, 9216), (1024, 256)] {
        for (dtype, input) in [
            (DType::F8E4M3, fp8),
            (DType::F8E4M3, ActivationScheme::None),
            (DType::Bf16, ActivationScheme::None),
            (DType::F32, ActivationScheme::None),
        ] {
            linear(&mut cpu, [rows, cols], dtype, input);
        }
    }
    for num_tokens in [1, 8, 512] {
        elementwise(&mut cpu, num_tokens);
    }
}

pub(crate) fn run_attention(config: CpuConfig) {
    for kv_cache_dtype in [KvCacheDtype::Native, KvCacheDtype::Fp8E4m3] {
        println!("attention over a KV cache that is {kv_cache_dtype}:");
        let mut cpu = prepared(config, kv_cache_dtype);
        for (num_tokens, context) in [(1, 128), (1, 4096), (512, 512), (512, 4096)] {
            attention(&mut cpu, num_tokens, context);
        }
    }
}

fn prepared(config: CpuConfig, kv_cache_dtype: KvCacheDtype) -> Cpu {
    let mut cpu = Cpu::new(config).expect("the default configuration fits the machine");
    let limits = StepLimits {
        max_tokens: MAX_TOKENS,
        max_seqs: MAX_TOKENS,
        max_model_len: 4096,
    };
    let attention = AttentionConfig {
        kv_cache_dtype,
        ..ATTENTION
    };
    cpu.prepare(limits, attention).expect("the shapes are Gemma's");
    cpu
}

fn linear(cpu: &mut Cpu, [rows, cols]: [usize; 2], dtype: DType, input: ActivationScheme) {
    let mut random = Random(1);
    let mut data: Vec<u8> = (0..rows * cols / 8 * dtype.size_bytes())
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    // Exponents of all types stay in the middle: no NaN, no infinity, no subnormals.
    data.iter_mut().for_each(|byte| *byte = (*byte & 0xbf) | 0x38);
    let shape = [rows, cols];
    let parts = vec![HostTensor {
        data: &data,
        dtype,
        shape: &shape,
    }];
    let scales = if dtype == DType::F8E4M3 {
        vec![0.001; rows]
    } else {
        Vec::new()
    };
    let weights = cpu
        .upload_linear(&LinearWeights { parts, scales, input })
        .expect("it fits");
    let (mut x, mut out) = (
        cpu.alloc_activation(MAX_TOKENS, cols).expect("it fits"),
        cpu.alloc_tensor(MAX_TOKENS, rows, Width::Native).expect("it fits"),
    );
    print!(
        "linear {rows:6} x {cols:5} {dtype:?}, input {}:",
        if input == ActivationScheme::None { "f32" } else { "fp8" }
    );
    for num_tokens in [1, 2, 4, 8, 64, 512] {
        let plan = cpu.begin(&batch(num_tokens, num_tokens)).expect("it keeps the limits");
        fill(cpu, &plan, num_tokens, cols, input, &mut x);
        let seconds = best_of(if num_tokens > 64 { 4 } else { 30 }, || {
            cpu.linear(&plan, &x, &weights, &mut out).expect("it runs")
        });
        let gflops = 2.0 * (rows * cols * num_tokens) as f64 / seconds / 1e9;
        print!("  {num_tokens}: {:.1} us", seconds * 1e6);
        if num_tokens == 1 {
            print!(" {:.1} GB/s", data.len() as f64 / seconds / 1e9);
        } else {
            print!(" {gflops:.0} GFLOP/s");
        }
    }
    println!();
}

/// Random rows, by way of an embedding and a norm.
fn fill(
    cpu: &mut Cpu,
    plan: &<Cpu as Backend>::Plan,
    rows: usize,
    cols: usize,
    scheme: ActivationScheme,
    x: &mut <Cpu as Backend>::Activation,
) {
    let mut tensor = random_tensor(cpu, plan, rows, cols);
    let weight = norm(cpu, cols);
    let args = NormArgs {
        weight: &weight,
        eps: 1e-6,
        out_scheme: scheme,
    };
    cpu.norm(plan, &tensor, args, x).expect("it runs");
    std::hint::black_box(&mut tensor);
}

fn random_tensor(cpu: &mut Cpu, plan: &<Cpu as Backend>::Plan, rows: usize, cols: usize) -> <Cpu as Backend>::Tensor {
    let mut random = Random(2);
    let mut value = || bf16::from_f32((random.next() >> 40) as f32 / (1 << 24) as f32 - 0.5);
    let table: Vec<u8> = (0..rows * cols).flat_map(|_| value().to_le_bytes()).collect();
    let table = HostTensor {
        data: &table,
        dtype: DType::Bf16,
        shape: &[rows, cols],
    };
    let table = cpu.upload_embedding(table).expect("it fits");
    let mut tensor = cpu.alloc_tensor(rows, cols, Width::Native).expect("it fits");
    cpu.embed(plan, &table, bf16::ONE, &mut tensor).expect("it runs");
    tensor
}

fn norm(cpu: &mut Cpu, cols: usize) -> <Cpu as Backend>::Norm {
    let data = vec![0x3c; 2 * cols];
    cpu.upload_norm(HostTensor {
        data: &data,
        dtype: DType::Bf16,
        shape: &[cols],
    })
    .expect("it fits")
}

fn elementwise(cpu: &mut Cpu, num_tokens: usize) {
    let (hidden, inner) = (2304, 9216);
    let plan = cpu.begin(&batch(num_tokens, num_tokens)).expect("it keeps the limits");
    // So few inputs that the activation is most of the work.
    let mut few = cpu.alloc_activation(num_tokens, FEW_INPUTS).expect("it fits");
    fill(cpu, &plan, num_tokens, FEW_INPUTS, ActivationScheme::None, &mut few);
    let half = vec![0x3c; 2 * inner * FEW_INPUTS];
    let part = HostTensor {
        data: &half,
        dtype: DType::Bf16,
        shape: &[inner, FEW_INPUTS],
    };
    let gate_up = LinearWeights {
        parts: vec![part; 2],
        scales: Vec::new(),
        input: ActivationScheme::None,
    };
    let gate_up = cpu.upload_gated_linear(&gate_up).expect("it fits");
    let mut between = cpu.alloc_tensor(num_tokens, 2 * inner, Width::Native).expect("it fits");
    let x = random_tensor(cpu, &plan, num_tokens, hidden);
    let mut residual = random_tensor(cpu, &plan, num_tokens, hidden);
    let weight = norm(cpu, hidden);
    let mut gated = cpu.alloc_activation(num_tokens, inner).expect("it fits");
    let mut normed = cpu.alloc_activation(num_tokens, hidden).expect("it fits");
    for scheme in [
        ActivationScheme::None,
        ActivationScheme::Fp8Static { scale: 0.02 },
        ActivationScheme::Fp8Token,
    ] {
        let geglu = best_of(20, || {
            cpu.gated_linear(&plan, &few, &gate_up, &mut between, scheme, &mut gated)
                .expect("it runs");
        });
        let add_norm = best_of(20, || {
            let pre = NormArgs {
                weight: &weight,
                eps: 1e-6,
                out_scheme: scheme,
            };
            cpu.add_norm(&plan, &x, &weight, &mut residual, pre, &mut normed)
                .expect("it runs");
        });
        println!(
            "{num_tokens} tokens, {scheme:?}: geglu of {FEW_INPUTS} inputs {:.1} us, add_norm {:.1} us",
            geglu * 1e6,
            add_norm * 1e6
        );
    }
}

fn attention(cpu: &mut Cpu, num_tokens: usize, context: usize) {
    let AttentionConfig {
        num_heads,
        num_kv_heads,
        head_dim,
        ..
    } = ATTENTION;
    let plan = cpu.begin(&batch(num_tokens, context)).expect("it keeps the limits");
    let mut qkv = random_tensor(cpu, &plan, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim);
    let mut kv = cpu
        .alloc_kv_layer(context.div_ceil(16), 16, KvScales::default())
        .expect("it fits");
    let mut out = cpu.alloc_activation(num_tokens, num_heads * head_dim).expect("it fits");
    let rope = best_of(5, || cpu.rope_append(&plan, &mut qkv, &mut kv).expect("it runs"));
    let scheme = ActivationScheme::Fp8Token;
    let seconds = best_of(8, || {
        cpu.attention(&plan, &qkv, &kv, None, scheme, &mut out)
            .expect("it runs")
    });
    let first = context - num_tokens + 1;
    let pairs: usize = (first..=context).sum();
    let gflops = (4 * pairs * num_heads * head_dim) as f64 / seconds / 1e9;
    println!(
        "{num_tokens} tokens of {context}: rope {:.1} us, attention {:.1} us, {gflops:.0} GFLOP/s",
        rope * 1e6,
        seconds * 1e6
    );
}

/// The last `num_tokens` of a sequence of `context`.
fn batch(num_tokens: usize, context: usize) -> Batch {
    let (num_tokens, context) = (num_tokens as u32, context as u32);
    let blocks = context.div_ceil(16);
    Batch {
        request_ids: vec![RequestId(0)],
        token_ids: (0..num_tokens).collect(),
        positions: (context - num_tokens..context).collect(),
        slot_mapping: (context - num_tokens..context).collect(),
        query_start: vec![0, num_tokens],
        context_lens: vec![context],
        block_start: vec![0, blocks],
        block_ids: (0..blocks).map(BlockId).collect(),
        ..Batch::default()
    }
}
