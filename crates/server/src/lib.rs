//! HTTP in, SSE out; wires the rest together.
