//! The demo model: small enough to be part of the binary, so that `lapidary serve` works with nothing else.

use lapidary_model::EmbeddedFiles;

macro_rules! embedded {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../../tests/fixtures/demo/", $name)).as_slice())),+]
    };
}

/// Its files, as in a checkpoint directory.
pub(crate) const FILES: EmbeddedFiles = embedded![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors"
];
