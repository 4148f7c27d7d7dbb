//! The strict loader: a checkpoint goes to the device layer by layer, or is refused with every fault it has.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::backend::{ActivationScheme, Backend, BackendError, HostTensor, KvCacheDtype, KvScales, LinearWeights};
use crate::checkpoint::Checkpoint;
use crate::problem::{Problem, Problems};
use crate::scalars::count_not_finite;
use crate::tensors::{LayerTensors, ModelTensors, Named, verify};
use crate::warning::Warning;

/// Groups of tensors scanned ahead of the upload: one being uploaded, one ready, one being read from disk.
const SCAN_AHEAD: usize = 2;

/// How far a load has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// What is being done.
    pub phase: LoadPhase,
    /// Bytes of this phase that are done; of a warm-up, steps.
    pub done_bytes: u64,
    /// The same of the whole phase.
    pub total_bytes: u64,
}

/// The phases of a load, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadPhase {
    /// Weights are read, checked and uploaded.
    Weights,
    /// Scratch and KV cache are reserved.
    KvCache,
    /// Steps run for the first time. Told before each.
    WarmUp,
}

/// Why a checkpoint cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its tensors are not the model's.
    #[error("the checkpoint is not what its configuration says:\n{0}")]
    Problems(Problems),
    /// The device refused a tensor.
    #[error("cannot upload {tensor}")]
    Upload {
        /// Which.
        tensor: String,
        /// Why.
        #[source]
        source: BackendError,
    },
}

/// The weights of a model on a device.
pub(crate) struct ModelWeights<B: Backend> {
    pub(crate) embedding: B::Embedding,
    pub(crate) layers: Vec<LayerWeights<B>>,
    pub(crate) final_norm: B::Norm,
}

/// One decoder layer's.
pub(crate) struct LayerWeights<B: Backend> {
    pub(crate) input_norm: B::Norm,
    pub(crate) qkv: Projection<B::Linear>,
    pub(crate) o: Projection<B::Linear>,
    pub(crate) post_attention_norm: B::Norm,
    pub(crate) pre_feedforward_norm: B::Norm,
    pub(crate) gate_up: Projection<B::GatedLinear>,
    pub(crate) down: Projection<B::Linear>,
    pub(crate) post_feedforward_norm: B::Norm,
}

/// A linear layer, and the form in which it wants its input.
pub(crate) struct Projection<W> {
    pub(crate) weights: W,
    pub(crate) input: ActivationScheme,
}

/// What a checkpoint turned out to hold.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointReport {
    /// Tensors the model uses.
    pub num_tensors: usize,
    /// Their bytes.
    pub weight_bytes: u64,
    /// Of every projection of every layer, in order.
    pub scales: Vec<ProjectionScales>,
    /// What each layer's keys and values are divided by in an FP8 KV cache; of no other are there any.
    pub kv_scales: Vec<KvScales>,
    /// What is not an error.
    pub warnings: Vec<Warning>,
}

/// The scales of projections that run as one.
#[derive(Debug, Clone, PartialEq)]
pub struct ProjectionScales {
    /// Decoder layer.
    pub layer: usize,
    /// Weights by their names in the checkpoint.
    pub names: Vec<String>,
    /// Smallest and largest scale of the weights; `None` where those are not quantised.
    pub weights: Option<(f32, f32)>,
    /// How the input arrives.
    pub input: ActivationScheme,
}

impl ProjectionScales {
    fn of(layer: usize, linear: &Named<LinearWeights<'_>>) -> Self {
        let scales = &linear.value.scales;
        let smallest = scales.iter().copied().fold(f32::INFINITY, f32::min);
        let largest = scales.iter().copied().fold(0.0, f32::max);
        Self {
            layer,
            names: linear.names.clone(),
            weights: (!scales.is_empty()).then_some((smallest, largest)),
            input: linear.value.input,
        }
    }
}

impl Checkpoint {
    /// Checks every tensor without a device: names, shapes, types, scales (those of such a KV cache too), and every value.
    ///
    /// `progress` is told the bytes read so far.
    ///
    /// # Errors
    /// All faults found.
    pub fn verify(
        &self,
        kv_cache_dtype: KvCacheDtype,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<CheckpointReport, Problems> {
        let (tensors, warnings) = verify(self, kv_cache_dtype)?;
        let total_bytes = tensors.total_bytes();
        let mut problems = Problems::default();
        let (mut done_bytes, mut num_tensors) = (0, 0);
        for (name, tensor) in tensors.iter() {
            problems.extend(scan(name, tensor));
            done_bytes += tensor.data.len() as u64;
            num_tensors += 1;
            progress(LoadProgress {
                phase: LoadPhase::Weights,
                done_bytes,
                total_bytes,
            });
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let warnings = self.warnings_for(kv_cache_dtype).chain(warnings).collect();
        let layers = tensors.layers.iter().enumerate();
        let scales = layers.flat_map(|(index, layer)| {
            let linears = [&layer.qkv, &layer.o, &layer.gate_up, &layer.down];
            linears.map(|linear| ProjectionScales::of(index, linear))
        });
        Ok(CheckpointReport {
            num_tensors,
            weight_bytes: total_bytes,
            scales: scales.collect(),
            kv_scales: match kv_cache_dtype {
                KvCacheDtype::Native => Vec::new(),
                KvCacheDtype::Fp8E4m3 => tensors.layers.iter().map(|layer| layer.kv_scales).collect(),
            },
            warnings,
        })
    }
}

impl Checkpoint {
    /// What opening it found, as far as it concerns a model with such a KV cache.
    pub fn warnings_for(&self, kv_cache_dtype: KvCacheDtype) -> impl Iterator<Item = Warning> {
        let concerns = move |warning: &&Warning| {
            kv_cache_dtype == KvCacheDtype::Native || **warning != Warning::KvCacheSchemeIgnored
        };
        self.warnings().iter().filter(concerns).cloned()
    }
}

/// Loads all weights. A checkpoint with a fault is refused as a whole, however late it is found.
pub(crate) fn load<B: Backend>(
    backend: &mut B,
    tensors: &ModelTensors<'_>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<ModelWeights<B>, LoadError> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(SCAN_AHEAD);
        // Scanning reads the file, so the disk works on the next layer while the device takes this one.
        scope.spawn(move || scan_in_order(tensors, &sender));
        let total_bytes = tensors.total_bytes();
        let mut uploader = Uploader {
            backend,
            scans: receiver,
            progress,
            done_bytes: 0,
            total_bytes,
        };
        uploader.model(tensors)
    })
}

/// Sends the faults of the embedding with the final norm, then of each layer. Ends early when nobody listens.
fn scan_in_order(tensors: &ModelTensors<'_>, sender: &SyncSender<Vec<Problem>>) {
    let ends = [&tensors.embedding, &tensors.final_norm];
    let ends = ends.iter().flat_map(|end| scan(&end.names[0], end.value)).collect();
    if sender.send(ends).is_err() {
        return;
    }
    for layer in &tensors.layers {
        let problems = layer
            .parts()
            .into_iter()
            .flat_map(|(name, tensor)| scan(name, tensor))
            .collect();
        if sender.send(problems).is_err() {
            return;
        }
    }
}

fn scan(name: &str, tensor: HostTensor<'_>) -> Option<Problem> {
    let count = count_not_finite(tensor);
    (count > 0).then(|| Problem::NotFinite {
        name: name.to_owned(),
        count,
    })
}

struct Uploader<'a, B: Backend> {
    backend: &'a mut B,
    scans: Receiver<Vec<Problem>>,
    progress: &'a mut dyn FnMut(LoadProgress),
    done_bytes: u64,
    total_bytes: u64,
}

impl<B: Backend> Uploader<'_, B> {
    fn model(&mut self, tensors: &ModelTensors<'_>) -> Result<ModelWeights<B>, LoadError> {
        self.wait_for_scan()?;
        let embedding = self.upload(&tensors.embedding, |backend, table| backend.upload_embedding(*table))?;
        let final_norm = self.norm(&tensors.final_norm)?;
        let mut layers = Vec::with_capacity(tensors.layers.len());
        for layer in &tensors.layers {
            self.wait_for_scan()?;
            layers.push(self.layer(layer)?);
        }
        Ok(ModelWeights {
            embedding,
            layers,
            final_norm,
        })
    }

    fn layer(&mut self, tensors: &LayerTensors<'_>) -> Result<LayerWeights<B>, LoadError> {
        Ok(LayerWeights {
            input_norm: self.norm(&tensors.input_norm)?,
            qkv: self.linear(&tensors.qkv)?,
            o: self.linear(&tensors.o)?,
            post_attention_norm: self.norm(&tensors.post_attention_norm)?,
            pre_feedforward_norm: self.norm(&tensors.pre_feedforward_norm)?,
            gate_up: self.projection(&tensors.gate_up, B::upload_gated_linear)?,
            down: self.linear(&tensors.down)?,
            post_feedforward_norm: self.norm(&tensors.post_feedforward_norm)?,
        })
    }

    /// One fault stops the uploads but not the scan: the report names every faulty tensor.
    fn wait_for_scan(&mut self) -> Result<(), LoadError> {
        let first = self.scans.recv().expect("the scanner sends one result for each group");
        if first.is_empty() {
            return Ok(());
        }
        let mut problems = Problems::default();
        problems.extend(first);
        problems.extend(self.scans.iter().flatten());
        Err(LoadError::Problems(problems))
    }

    fn norm(&mut self, norm: &Named<HostTensor<'_>>) -> Result<B::Norm, LoadError> {
        self.upload(norm, |backend, weight| backend.upload_norm(*weight))
    }

    fn linear(&mut self, linear: &Named<LinearWeights<'_>>) -> Result<Projection<B::Linear>, LoadError> {
        self.projection(linear, B::upload_linear)
    }

    fn projection<W>(
        &mut self,
        linear: &Named<LinearWeights<'_>>,
        upload: impl FnOnce(&mut B, &LinearWeights<'_>) -> Result<W, BackendError>,
    ) -> Result<Projection<W>, LoadError> {
        Ok(Projection {
            weights: self.upload(linear, upload)?,
            input: linear.value.input,
        })
    }

    fn upload<S: ByteSize, D>(
        &mut self,
        source: &Named<S>,
        upload: impl FnOnce(&mut B, &S) -> Result<D, BackendError>,
    ) -> Result<D, LoadError> {
        let uploaded = upload(self.backend, &source.value).map_err(|error| LoadError::Upload {
            tensor: source.names.join(", "),
            source: error,
        })?;
        self.done_bytes += source.value.byte_size();
        let (done_bytes, total_bytes) = (self.done_bytes, self.total_bytes);
        (self.progress)(LoadProgress {
            phase: LoadPhase::Weights,
            done_bytes,
            total_bytes,
        });
        Ok(uploaded)
    }
}

/// Bytes in the checkpoint.
trait ByteSize {
    fn byte_size(&self) -> u64;
}

impl ByteSize for HostTensor<'_> {
    fn byte_size(&self) -> u64 {
        self.data.len() as u64
    }
}

impl ByteSize for LinearWeights<'_> {
    fn byte_size(&self) -> u64 {
        self.parts.iter().map(ByteSize::byte_size).sum()
    }
}
