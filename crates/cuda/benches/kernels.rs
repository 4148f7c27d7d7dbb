//! Speed of the kernels on the first GPU: `cargo bench -p lapidary-cuda --bench kernels -- [--models 9b]
//! [--only fp8,output,chain,slabs,tiles,gated,rows,decode,prefill] [--shapes 8192x3584,3584x4096] [--tokens 1,64,512]
//! [--strides 128,4096] [--batches 1,64] [--contexts 512,2048] [--kv-cache-dtype fp8] [--chunk 128 --stages 3 --blocks 1]
//! [--pages shuffled|sequential|interleaved] [--portable]`: the shapes and tokens are those of products (tokens also of
//! operations on rows), strides are the rows that a chain's inputs are allocated with, the last ones are for attention.
//!
//! Fails without a GPU. The figures kept in `benches/results` were made with it; `tests/gpu/baseline.py` prints torch's for
//! the same products.

#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::error::Error;

use lapidary_cuda::measure::{AttentionLoad, Bench, ChainLoad, DecodeTuning, Layer, MODELS, Matrices, Pages};
use lapidary_model::{AttentionConfig, KvCacheDtype};

const FEW_TOKENS: [usize; 6] = [1, 8, 16, 32, 48, 64];
const SWEPT_TOKENS: [usize; 4] = [1, 16, 32, 64];
const ROWS: [usize; 3] = [1, 64, 4096];
const MANY_TOKENS: [usize; 6] = [128, 256, 512, 1024, 2048, 8192];
const CHAIN_TOKENS: [usize; 4] = [8, 32, 48, 64];
/// Inputs with room for the tokens of a small step, and for those of a large one.
const STRIDES: [usize; 2] = [128, 4096];
/// Of a sweep over tilings, the chosen one and the fastest.
const SHOWN_TILINGS: usize = 8;
const BATCHES: [usize; 5] = [1, 8, 32, 64, 128];
const CONTEXTS: [usize; 3] = [512, 2048, 8192];
/// Keys and values of one layer that a card holds beside everything else.
const MAX_LAYER_BYTES: usize = 6 << 30;

fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.next()?;
    arguments.next()
}

/// The numbers that an option lists, or the usual ones.
fn numbers(name: &str, usual: &[usize]) -> Result<Vec<usize>, Box<dyn Error>> {
    match option(name) {
        Some(list) => list.split(',').map(|number| Ok(number.parse()?)).collect(),
        None => Ok(usual.to_vec()),
    }
}

/// The numbers of tokens that products are measured with.
fn tokens_of(usual: &[usize]) -> Result<Vec<usize>, Box<dyn Error>> {
    numbers("--tokens", usual)
}

/// Whether a matrix is to be measured.
fn is_wanted((n, k): (usize, usize)) -> bool {
    option("--shapes").is_none_or(|list| list.split(',').any(|shape| shape == format!("{n}x{k}")))
}

fn is_portable() -> bool {
    std::env::args().any(|argument| argument == "--portable")
}

fn pages() -> Result<Pages, Box<dyn Error>> {
    match option("--pages").as_deref() {
        None | Some("shuffled") => Ok(Pages::Shuffled),
        Some("sequential") => Ok(Pages::Sequential),
        Some("interleaved") => Ok(Pages::Interleaved),
        Some(other) => Err(format!("--pages {other}: shuffled, sequential or interleaved").into()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let device = lapidary_cuda::devices()?.swap_remove(0);
    println!("# {}", device.name);
    let mut bench = Bench::new(device)?;
    let models = option("--models").unwrap_or_else(|| "9b".to_owned());
    let only = option("--only").unwrap_or_else(|| "fp8,output,decode,prefill".to_owned());
    let wanted = |what: &str| only.split(',').any(|word| word == what);
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        if wanted("fp8") {
            for shape in matrices.linears.into_iter().filter(|shape| is_wanted(*shape)) {
                let tokens = tokens_of(&[FEW_TOKENS, MANY_TOKENS].concat())?;
                for timing in bench.matmul(shape, &tokens, false)? {
                    println!("{timing}");
                }
            }
        }
        if wanted("output") {
            for timing in bench.matmul(matrices.output, &tokens_of(&FEW_TOKENS)?, true)? {
                println!("{timing}");
            }
        }
    }
    if wanted("chain") {
        chain(&mut bench, &models)?;
    }
    if wanted("slabs") {
        slabs(&mut bench, &models)?;
    }
    if wanted("tiles") {
        tiles(&mut bench, &models)?;
    }
    if wanted("gated") {
        gated(&mut bench, &models)?;
    }
    if wanted("rows") {
        rows(&mut bench, &models)?;
    }
    if wanted("decode") {
        decode(&mut bench)?;
    }
    if wanted("prefill") {
        prefill(&mut bench)?;
    }
    Ok(())
}

/// Of 9b.
const BF16_HEADS: AttentionConfig = AttentionConfig {
    num_heads: 16,
    num_kv_heads: 8,
    head_dim: 256,
    scale: 1.0 / 16.0,
    softcap: Some(50.0),
    rope_theta: 1e4,
    kv_cache_dtype: KvCacheDtype::Native,
};
/// As the option says.
fn heads() -> Result<AttentionConfig, Box<dyn Error>> {
    let kv_cache_dtype = match option("--kv-cache-dtype").as_deref() {
        None | Some("auto") => KvCacheDtype::Native,
        Some("fp8") => KvCacheDtype::Fp8E4m3,
        Some(other) => return Err(format!("--kv-cache-dtype {other}: auto or fp8").into()),
    };
    Ok(AttentionConfig {
        kv_cache_dtype,
        ..BF16_HEADS
    })
}
const WINDOW: usize = 4096;

/// Whole prompts, and the last part of a long one.
fn prefill(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    for (batch, context, queries) in [
        (1, 128, 128),
        (1, 512, 512),
        (1, 2048, 2048),
        (4, 512, 512),
        (1, 8192, 8192),
        (1, 8192, 512),
    ] {
        let mut load = AttentionLoad {
            batch,
            context,
            queries,
            window: None,
            tuning: None,
            is_portable: is_portable(),
            pages: pages()?,
        };
        println!("{}", bench.attention(heads()?, load)?);
        if context > WINDOW {
            load.window = Some(WINDOW);
            println!("{}", bench.attention(heads()?, load)?);
        }
    }
    Ok(())
}

/// Gate and up with the activation, in two kernels and in one.
fn gated(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        for tokens in tokens_of(&MANY_TOKENS)? {
            let timings = bench.gated(matrices.linears[2], tokens)?;
            let shown = timings.iter().take(2 + SHOWN_TILINGS);
            shown.for_each(|timing| println!("{timing}"));
        }
    }
    Ok(())
}

/// What runs between the products. Heads are those of 9b.
fn rows(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        let [(_, hidden), _, _, (_, inner)] = matrices.linears;
        for rows in tokens_of(&ROWS)? {
            println!("{}", bench.add_norm(rows, hidden)?);
            println!("{}", bench.geglu(rows, inner)?);
            println!("{}", bench.rope_append(BF16_HEADS, rows)?);
        }
    }
    Ok(())
}

/// Every kernel for many tokens beside the one that is chosen.
fn tiles(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        for shape in matrices.linears.into_iter().filter(|shape| is_wanted(*shape)) {
            for tokens in tokens_of(&MANY_TOKENS)? {
                for timing in bench.tile_sweep(shape, tokens, false)?.iter().take(SHOWN_TILINGS) {
                    println!("{timing}");
                }
            }
        }
    }
    Ok(())
}

/// Linear layers after what is ahead of them in a model.
fn chain(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        for load in chain_loads(matrices)? {
            for timing in bench.chain(matrices, load)? {
                println!("{timing}");
            }
        }
    }
    Ok(())
}

fn chain_loads(matrices: &Matrices) -> Result<Vec<ChainLoad>, Box<dyn Error>> {
    let mut loads = Vec::new();
    for (layer, shape) in Layer::ALL.into_iter().zip(matrices.linears) {
        for row_stride in numbers("--strides", &STRIDES)? {
            for tokens in tokens_of(&CHAIN_TOKENS)?.into_iter().filter(|_| is_wanted(shape)) {
                loads.push(ChainLoad {
                    layer,
                    tokens,
                    row_stride,
                });
            }
        }
    }
    Ok(loads)
}

/// Other ways to cut products of few tokens: the standard one and the twelve fastest.
fn slabs(bench: &mut Bench, models: &str) -> Result<(), Box<dyn Error>> {
    for matrices in MODELS
        .iter()
        .filter(|matrices| models.split(',').any(|model| model == matrices.model))
    {
        let linears = matrices.linears.map(|shape| (shape, false));
        let all = linears.into_iter().chain([(matrices.output, true)]);
        for (shape, is_output) in all.filter(|(shape, _)| is_wanted(*shape)) {
            for tokens in tokens_of(&SWEPT_TOKENS)? {
                let timings = bench.slab_sweep(shape, tokens, is_output)?;
                timings.iter().take(13).for_each(|timing| println!("{timing}"));
            }
        }
    }
    Ok(())
}

fn decode(bench: &mut Bench) -> Result<(), Box<dyn Error>> {
    let number = |name: &str| option(name).map(|value| value.parse()).transpose();
    let tuning = number("--chunk")?
        .zip(number("--stages")?)
        .zip(number("--blocks")?.or(Some(1)))
        .map(|((chunk, stages), blocks)| DecodeTuning { chunk, stages, blocks });
    for batch in numbers("--batches", &BATCHES)? {
        for context in numbers("--contexts", &CONTEXTS)? {
            if 2 * batch * context * BF16_HEADS.num_kv_heads * BF16_HEADS.head_dim * 2 > MAX_LAYER_BYTES / 2 {
                continue;
            }
            let mut load = AttentionLoad {
                batch,
                context,
                queries: 1,
                window: None,
                tuning,
                is_portable: is_portable(),
                pages: pages()?,
            };
            println!("{}", bench.attention(heads()?, load)?);
            if context > WINDOW {
                load.window = Some(WINDOW);
                println!("{}", bench.attention(heads()?, load)?);
            }
        }
    }
    Ok(())
}
