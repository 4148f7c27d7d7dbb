//! Work on several threads: a fork/join pool whose forks cost about a microsecond, and safe ways to give each task its
//! own part of an output.

mod pool;
mod split;

pub(crate) use pool::Pool;
pub(crate) use split::Columns;
