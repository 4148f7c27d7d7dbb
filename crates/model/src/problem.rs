//! Everything that can be wrong with the tensors of a checkpoint, each fault by its tensor's name.

use std::fmt;

/// Most problems listed: enough to see a pattern, few enough to read.
const MAX_LISTED: usize = 32;

/// One fault.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The model needs it and no file has it.
    #[error("{name} is missing")]
    Missing {
        /// Tensor.
        name: String,
    },
    /// Not a tensor of Gemma-2.
    #[error("{name} is not a tensor of this model")]
    Unexpected {
        /// Tensor.
        name: String,
    },
    /// The configuration asks for another shape.
    #[error("{name} has shape {found:?}, expected {expected}")]
    Shape {
        /// Tensor.
        name: String,
        /// By the configuration.
        expected: String,
        /// In the file.
        found: Vec<usize>,
    },
    /// An element type that cannot be here.
    #[error("{name} is {found}, expected {expected}")]
    DType {
        /// Tensor.
        name: String,
        /// What it may be.
        expected: &'static str,
        /// In the file.
        found: String,
    },
    /// A scale that no quantiser writes.
    #[error("{name}: scale {value} at {row} is not positive and finite")]
    Scale {
        /// Tensor.
        name: String,
        /// Index of the value.
        row: usize,
        /// The value.
        value: f32,
    },
    /// Asymmetric quantisation.
    #[error("{name} is not zero: asymmetric quantisation is not supported")]
    ZeroPoint {
        /// Tensor.
        name: String,
    },
    /// Projections that run as one are stored in two ways.
    #[error("{} must be quantised alike: they run as one projection", modules.join(", "))]
    MixedSchemes {
        /// Modules.
        modules: Vec<String>,
    },
    /// Projections that run as one have different element types.
    #[error("{} must have the same element type: they run as one projection", modules.join(", "))]
    MixedDTypes {
        /// Modules.
        modules: Vec<String>,
    },
    /// Two dialects' scales of the same keys or values.
    #[error("{} must be equal: they scale the same, and are {scales:?}", names.join(", "))]
    KvScalesDiffer {
        /// Tensors.
        names: Vec<String>,
        /// Their values.
        scales: Vec<f32>,
    },
    /// Scales that are not of 8-bit floats.
    #[error("kv_cache_scheme {scheme} is not of 8-bit floats: its scales do not fit an FP8 KV cache")]
    KvCacheScheme {
        /// What the configuration says.
        scheme: String,
    },
    /// NaN or infinite weights.
    #[error("{name} has {count} values that are not finite numbers")]
    NotFinite {
        /// Tensor.
        name: String,
        /// How many.
        count: usize,
    },
}

/// All faults found, the first of them in full.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Problems {
    listed: Vec<Problem>,
    omitted: usize,
}

impl Problems {
    /// The faults, the first `MAX_LISTED` of them.
    #[must_use]
    pub fn listed(&self) -> &[Problem] {
        &self.listed
    }

    /// Faults found but not listed.
    #[must_use]
    pub fn omitted(&self) -> usize {
        self.omitted
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    pub(crate) fn push(&mut self, problem: Problem) {
        if self.listed.len() < MAX_LISTED {
            self.listed.push(problem);
        } else {
            self.omitted += 1;
        }
    }
}

impl Extend<Problem> for Problems {
    fn extend<T: IntoIterator<Item = Problem>>(&mut self, problems: T) {
        for problem in problems {
            self.push(problem);
        }
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.listed.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more", self.omitted)?;
        }
        Ok(())
    }
}
