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
    /// The checkpoint was calibrated for an FP8 KV cache, which was not asked for.
    #[error("kv_cache_scheme is ignored: the KV cache is not quantised (--kv-cache-dtype fp8 quantises it)")]
    KvCacheSchemeIgnored,
    /// The same, by its tensors.
    #[error("{count} scales of an FP8 KV cache are ignored (the first is {first}): --kv-cache-dtype fp8 uses them")]
    KvScalesIgnored {
        /// How many.
        count: usize,
        /// For example.
        first: String,
    },
    /// An FP8 KV cache without calibration.
    #[error("{layers} of {num_layers} layers have no scale for keys or values of the FP8 KV cache: it is 1 there")]
    KvScalesMissing {
        /// How many have none for keys, for values or for both.
        layers: usize,
        /// In all.
        num_layers: usize,
    },
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
