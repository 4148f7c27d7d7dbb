//! What every backend must prove: each operation against obvious f64 loops, on awkward shapes.
//!
//! ```ignore
//! lapidary_model::conformance_tests!(Cpu::new(), Bounds::F32);
//! ```
//!
//! gives one `#[test]` a check. Inputs are exactly representable in bf16 and FP8, so every backend starts from the same
//! numbers; what it may deviate by is [`Bounds`], stated with its reason, and nothing else.
//!
//! # Sampling
//!
//! Log-probabilities and ranks are those of the raw soft-capped logits (`log_softmax`, before everything below). A row
//! with a `given` token answers that token and its log-probabilities; nothing is chosen. For the others then, as vLLM
//! orders it:
//!
//! 1. `logit_bias` is added; `banned` tokens and those that `mask` does not have are removed; penalties are applied: repetition (divides positive,
//!    multiplies negative logits of every token of prompt or output), then frequency (times its count in the output)
//!    and presence (once) are subtracted. A token that was fed from the previous step counts as output.
//! 2. Temperature 0 takes the largest logit, of equals the lowest id.
//! 3. Otherwise logits are divided by the temperature; `min_p` drops tokens below its share of the most likely one's
//!    probability; `top_k` keeps the k largest; `top_p` keeps the smallest set of the rest that reaches it, at least
//!    one; one of those is drawn by its renormalised probability.
//!
//! The draw depends on `(seed, position)` and the distribution alone: never on the row, the step or the neighbours.

mod attention;
mod elementwise;
mod fp8_cache;
mod invariance;
mod linear;
mod logits;
mod rig;
mod runner;
mod sampling;
mod sampling_reference;

pub use attention::{attention_equals, attention_matches_f64, rope_matches_f64, unused_cache_is_never_read};
pub use elementwise::{
    add_norm_matches_f64, embed_matches_f64, geglu_matches_f64, norm_matches_f64, row_operations_equal,
};
pub use fp8_cache::{
    attention_over_fp8_cache_matches_f64, fp8_cache_holds_more_tokens, fp8_cache_rounds_half_to_even_and_saturates,
    fp8_cache_uses_the_scales_of_each_layer,
};
pub use invariance::{
    chunks_do_not_change_logits, chunks_do_not_change_logits_over_fp8_cache, neighbours_do_not_change_logits,
    neighbours_do_not_change_logits_over_fp8_cache,
};
pub use linear::{gated_linear_matches_f64, linear_equals, linear_matches_f64};
pub use logits::logits_match_f64;
pub use runner::{
    chunks_without_samples_give_no_tokens, runner_loads_only_whole_checkpoints, runner_refuses_what_was_not_reserved,
    runner_sizes_its_cache,
};
pub use sampling::{
    bans_and_biases_hold, draws_depend_on_seed_and_position_alone, draws_follow_the_distribution,
    fed_tokens_are_read_and_counted, given_tokens_are_scored, greedy_takes_the_lowest_of_equals,
    logprobs_are_of_the_raw_logits, masks_hold, penalties_follow_the_history,
};

/// How far a backend may be from exact arithmetic.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Of an element-wise result, relative to it.
    pub element: f64,
    /// Of a sum of products, relative to the sum of their absolute values.
    pub dot: f64,
    /// Of an attention output, relative to the largest value attended to.
    pub attention: f64,
    /// Of a log-probability, absolute.
    pub logprob: f64,
    /// Shapes are rounded up to a multiple of this where a backend has no kernel for odd ones; 1 leaves them odd.
    pub shape_multiple: usize,
    /// Head sizes to try.
    pub head_dims: &'static [usize],
    /// Whether neighbours may change no bit of a sequence's logits.
    pub bit_exact_neighbours: bool,
    /// Whether the cuts of its prompt may not either.
    pub bit_exact_chunks: bool,
}

impl Bounds {
    /// f32 between operations and in all sums. An f32 operation errs by 2^-24; a norm chains about ten of them after a
    /// sum whose errors average out; a dot product of 5000 terms in blocked order stays under 32 roundings of its
    /// absolute sum; softmax adds exponentials of differences that lost bits to cancellation.
    pub const F32: Self = Self {
        element: 4e-6,
        dot: 2e-6,
        attention: 2e-5,
        logprob: 2e-5,
        shape_multiple: 1,
        head_dims: &[32, 64, 128, 256],
        bit_exact_neighbours: true,
        bit_exact_chunks: true,
    };

    /// bf16 between operations, f32 in sums. Storing a bf16 errs by 2^-9; inputs that were exact, a result that was
    /// stored once or twice on its way: 2^-8, and half as much again for f32 in between. Attention also stores q, k,
    /// v and the probabilities in bf16.
    pub const BF16: Self = Self {
        element: 6e-3,
        dot: 6e-3,
        attention: 2e-2,
        logprob: 2e-3,
        shape_multiple: 16,
        head_dims: &[64, 128, 256],
        bit_exact_neighbours: true,
        // One token and several take different attention kernels, whose sums are in different orders.
        bit_exact_chunks: false,
    };
}

/// One `#[test]` for each check, on backends made by the first expression and judged by the second.
#[macro_export]
macro_rules! conformance_tests {
    ($make:expr, $bounds:expr) => {
        $crate::conformance_tests!(@each $make, $bounds;
            embed_matches_f64, norm_matches_f64, add_norm_matches_f64, geglu_matches_f64, linear_matches_f64, gated_linear_matches_f64,
            rope_matches_f64, attention_matches_f64, unused_cache_is_never_read, logits_match_f64,
            greedy_takes_the_lowest_of_equals, bans_and_biases_hold, masks_hold, penalties_follow_the_history,
            logprobs_are_of_the_raw_logits, draws_follow_the_distribution, draws_depend_on_seed_and_position_alone,
            fed_tokens_are_read_and_counted, given_tokens_are_scored, neighbours_do_not_change_logits, chunks_do_not_change_logits,
            chunks_without_samples_give_no_tokens, runner_loads_only_whole_checkpoints,
            runner_refuses_what_was_not_reserved, runner_sizes_its_cache,
            attention_over_fp8_cache_matches_f64, fp8_cache_rounds_half_to_even_and_saturates,
            chunks_do_not_change_logits_over_fp8_cache, neighbours_do_not_change_logits_over_fp8_cache,
            fp8_cache_holds_more_tokens, fp8_cache_uses_the_scales_of_each_layer,
        );
    };
    (@each $make:expr, $bounds:expr; $($check:ident),* $(,)?) => {
        $(
            #[test]
            fn $check() {
                $crate::conformance::$check(&|| $make, &$bounds);
            }
        )*
    };
}
