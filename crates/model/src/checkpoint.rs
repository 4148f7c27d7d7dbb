//! A checkpoint: configuration and weights, from a directory or from inside the program.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::config::{ConfigError, ConfigOverrides, GenerationDefaults, ModelConfig};
use crate::warning::Warning;
use crate::weights::{Weights, WeightsError};

/// Largest file of a checkpoint that is read whole; Gemma's `tokenizer.json` has 34 MB.
const MAX_SIDE_FILE_BYTES: u64 = 256 << 20;

/// A model that was opened and described but not yet loaded.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    config: ModelConfig,
    generation: GenerationDefaults,
    weights: Weights,
    warnings: Vec<Warning>,
}

/// The files of a checkpoint that is part of the program: names as in a directory, and contents.
///
/// `config.json` and `model.safetensors` must be among them.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

/// Why a checkpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that every checkpoint has.
    #[error("no {name} in {place}")]
    FileMissing {
        /// Its name.
        name: &'static str,
        /// Where it should be.
        place: String,
    },
    /// The system refused.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Too large to be what its name says.
    #[error("{} has {bytes} bytes, more than any such file needs", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A configuration file that cannot be served.
    #[error("{file}")]
    Config {
        /// Which file.
        file: &'static str,
        /// Why.
        #[source]
        source: ConfigError,
    },
    /// Weight files that cannot be read.
    #[error("the weights cannot be read")]
    Weights(#[from] WeightsError),
}

#[derive(Debug)]
enum Source {
    Dir(PathBuf),
    Embedded(EmbeddedFiles),
}

impl Checkpoint {
    /// Opens a Hugging Face model directory.
    ///
    /// # Errors
    /// Files that are missing, corrupt, or describe a model that cannot be served.
    pub fn open_dir(dir: &Path, overrides: ConfigOverrides) -> Result<Self, CheckpointError> {
        let source = Source::Dir(dir.to_owned());
        // The configuration is checked first: of a model that cannot be served, its weights do not matter.
        let (config, generation, warnings) = read_configs(&source, overrides)?;
        let weights = Weights::open_dir(dir)?;
        Ok(Self {
            source,
            config,
            generation,
            weights,
            warnings,
        })
    }

    /// Opens a checkpoint that is part of the program.
    ///
    /// # Errors
    /// As [`Self::open_dir`].
    pub fn from_embedded(files: EmbeddedFiles, overrides: ConfigOverrides) -> Result<Self, CheckpointError> {
        let source = Source::Embedded(files);
        let (config, generation, warnings) = read_configs(&source, overrides)?;
        let name = "model.safetensors";
        let bytes = files
            .iter()
            .find(|(file, _)| *file == name)
            .ok_or_else(|| source.missing(name))?
            .1;
        let weights = Weights::from_static(bytes)?;
        Ok(Self {
            source,
            config,
            generation,
            weights,
            warnings,
        })
    }

    /// Opens a checkpoint that was made in memory; it has no other files.
    ///
    /// # Errors
    /// As [`Self::open_dir`].
    pub fn from_bytes(
        config_json: &[u8],
        safetensors: Vec<u8>,
        overrides: ConfigOverrides,
    ) -> Result<Self, CheckpointError> {
        let (config, warnings) =
            ModelConfig::from_json(config_json, overrides).map_err(|source| CheckpointError::Config {
                file: "config.json",
                source,
            })?;
        let weights = Weights::from_bytes(safetensors)?;
        let (source, generation) = (Source::Embedded(&[]), GenerationDefaults::default());
        Ok(Self {
            source,
            config,
            generation,
            weights,
            warnings,
        })
    }

    /// The model's shape and constants.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What `generation_config.json` recommends; all `None` without the file.
    #[must_use]
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// The named tensors.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// What was corrected or ignored so far.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Tokens that end a text by `config.json` or `generation_config.json`; the tokenizer may know more.
    #[must_use]
    pub fn stop_token_ids(&self) -> BTreeSet<u32> {
        self.config
            .eos_token_ids
            .iter()
            .chain(&self.generation.eos_token_ids)
            .copied()
            .collect()
    }

    /// Another file of the checkpoint (`tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`), if it exists.
    ///
    /// # Errors
    /// The file exists but cannot be read.
    pub fn file(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        self.source.read(name)
    }

    /// The directory it was opened from; `None` if it is part of the program.
    #[must_use]
    pub fn dir(&self) -> Option<&Path> {
        match &self.source {
            Source::Dir(dir) => Some(dir),
            Source::Embedded(_) => None,
        }
    }
}

impl Source {
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match self {
            Self::Embedded(files) => Ok(files
                .iter()
                .find(|(file, _)| *file == name)
                .map(|(_, bytes)| Cow::Borrowed(*bytes))),
            Self::Dir(dir) => read_file(&dir.join(name)).map(|bytes| bytes.map(Cow::Owned)),
        }
    }

    fn missing(&self, name: &'static str) -> CheckpointError {
        let place = match self {
            Self::Dir(dir) => dir.display().to_string(),
            Self::Embedded(_) => "the embedded checkpoint".to_owned(),
        };
        CheckpointError::FileMissing { name, place }
    }
}

fn read_configs(
    source: &Source,
    overrides: ConfigOverrides,
) -> Result<(ModelConfig, GenerationDefaults, Vec<Warning>), CheckpointError> {
    let name = "config.json";
    let json = source.read(name)?.ok_or_else(|| source.missing(name))?;
    let (config, warnings) =
        ModelConfig::from_json(&json, overrides).map_err(|source| CheckpointError::Config { file: name, source })?;
    let name = "generation_config.json";
    let generation = match source.read(name)? {
        Some(json) => {
            GenerationDefaults::from_json(&json).map_err(|source| CheckpointError::Config { file: name, source })?
        }
        None => GenerationDefaults::default(),
    };
    Ok((config, generation, warnings))
}

fn read_file(path: &Path) -> Result<Option<Vec<u8>>, CheckpointError> {
    let io = |source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io)?,
    };
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > MAX_SIDE_FILE_BYTES {
        return Err(CheckpointError::TooLarge {
            path: path.to_owned(),
            bytes,
        });
    }
    let mut content = Vec::new();
    file.take(MAX_SIDE_FILE_BYTES).read_to_end(&mut content).map_err(io)?;
    Ok(Some(content))
}

#[cfg(test)]
mod tests;
