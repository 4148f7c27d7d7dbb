//! `/v1/responses`, the part of it that keeps no state: a request becomes a chat, its answer the newer shape.

pub(super) mod body;
mod writer;

pub(super) use self::body::{ResponsesBody, Settings, chat, rename};
pub(super) use self::writer::ResponsesWriter;
