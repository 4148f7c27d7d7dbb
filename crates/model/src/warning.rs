//! What a checkpoint says that is not an error but that its user should know.

/// Something the server corrected or ignored, to be logged once at start.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// An early upload of 9b.
    #[error(
        "query_pre_attn_scalar {found} is a known mistake of early 9b uploads: using {used} \
         (--query-pre-attn-scalar forces a value)"
    )]
    QueryScalarCorrected {
        /// In the file.
        found: f32,
        /// Instead.
        used: f32,
    },
    /// The checkpoint asks for an FP8 KV cache.
    #[error("kv_cache_scheme is ignored: the KV cache is not quantised")]
    KvCacheSchemeIgnored,
    /// Projections that read the same input were calibrated apart.
    #[error("{group}: input scales {scales:?} differ, using the largest")]
    InputScalesDiffer {
        /// The stacked projections.
        group: String,
        /// In stacking order.
        scales: Vec<f32>,
    },
    /// A tensor the model does not need.
    #[error("{count} tensors that Gemma-2 does not use are ignored (the first is {first})")]
    TensorsIgnored {
        /// How many.
        count: usize,
        /// For example.
        first: String,
    },
}
