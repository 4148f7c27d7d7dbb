//! Gemma-2, written once for every backend.
