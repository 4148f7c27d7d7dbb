//! Speed of the kernels on the first GPU: `cargo bench -p lapidary-cuda --bench kernels -- [--models 9b] [--only fp8,output,slabs,decode]`.
//!
//! Fails without a GPU. The figures kept in `benches/results` were made with it; `tests/gpu/baseline.py` prints torch's for
//! the same products.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::error::Error;

use lapidary_cuda::measure::{Bench, MODELS};
use lapidary_model::AttentionConfig;

const FEW_TOKENS: [usize; 6] = [1, 8, 16, 32, 48, 64];
const SWEPT_TOKENS: [usize; 4] = [1, 16, 32, 64];
const MANY_TOKENS: [usize; 6] = [128, 256, 512, 1024, 2048, 8192];
const BATCHES: [usize; 5] = [1, 8, 32, 64, 128];
const CONTEXTS: [usize; 3] = [512, 2048, 8192];
/// Keys and values of one layer that a card holds beside everything else.
const MAX_LAYER_BYTES: usize = 6 << 30;

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next()?;
    arguments.next()
}

fn main() -> Result<(), Box<dyn Error>> {
    let device = lapidary_cuda::devices()?.swap_remove(0);
    println!("# {}", device.name);
    let mut bench = Bench::new(device)?;
    let models = option("--models").unwrap_or_else(|| "9b".to_owned());
    let only = option("--only").unwrap_or_else(|| "fp8,output,decode".to_owned());
    let wanted = |what: &str| only.split(',').any(|word| word == what);
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        if wanted("fp8") {
            for shape in matrices.linears {
                for timing in bench.matmul(shape, &[FEW_TOKENS, MANY_TOKENS].concat(), false)? {
                    println!("{timing}");
                }
            }
        }
        if wanted("output") {
            for timing in bench.matmul(matrices.output, &FEW_TOKENS, true)? {
                println!("{timing}");
            }
        }
    }
    if wanted("slabs") {
        slabs(&mut bench, &models)?;
    }
    if wanted("decode") {
        decode(&mut bench)?;
    }
    Ok(())
}

/// Other ways to cut products of few tokens: the standard one and the twelve fastest.
fn slabs(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        let linears = matrices.linears.map(|shape| (shape, false));
        for (shape, is_output) in linears.into_iter().chain([(matrices.output, true)]) {
            for tokens in SWEPT_TOKENS {
                let timings = bench.slab_sweep(shape, tokens, is_output)?;
                timings.iter().take(13).for_each(|timing| println!("{timing}"));
            }
        }
    }
    Ok(())
}

/// Heads of 9b.
fn decode(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let config = AttentionConfig {
        num_heads: 16,
        num_kv_heads: 8,
        head_dim: 256,
        scale: 1.0 / 16.0,
        softcap: Some(50.0),
        rope_theta: 1e4,
    };
    for batch in BATCHES {
        for context in CONTEXTS {
            if 2 * batch * context * config.num_kv_heads * config.head_dim * 2 > MAX_LAYER_BYTES / 2 {
                continue;
            }
            println!("{}", bench.decode_attention(config, [batch, context], None)?);
            if context > 4096 {
                println!("{}", bench.decode_attention(config, [batch, context], Some(4096))?);
            }
        }
    }
    Ok(())
}
