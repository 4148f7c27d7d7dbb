//! The reference backend: obvious first, fast second.
