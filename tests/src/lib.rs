//! What the end-to-end tests and benches share: an HTTP client that sees every byte, and a handle on a real process.

pub mod churn;
pub mod fuzz;
pub mod hostile;
pub mod http;
pub mod load;
pub mod metrics;
pub mod process;
