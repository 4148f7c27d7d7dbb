//! A GPU behind the CUDA driver, which is loaded at run time: a program without it starts and says so.

#![allow(unsafe_code, reason = "calls the CUDA driver")]

use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr::NonNull;

use cudarc::driver::{DriverError, result, sys};
use lapidary_model::{BackendError, MemoryInfo};

use super::fault::{Fault, failed};
use super::images::{self, Image};
use super::{Device, DevicePtr, GraphId, Grid, Kernel, READBACK_BYTES, Readback};

/// CUDA 13.0: what the kernels are compiled for.
const MIN_DRIVER_VERSION: i32 = 13000;
/// The oldest part with e4m3 arithmetic.
const MIN_COMPUTE_CAPABILITY: u32 = 89;
/// Pinned memory a step's inputs pass through; more than the steps in flight, so that none waits for it.
const UPLOAD_SLOTS: usize = 16;
const UPLOAD_BYTES: usize = 1 << 20;
/// Steps in flight, and some.
const READBACK_SLOTS: usize = 4;
/// Two of these hold weights on their way: one fills while the other is copied.
const STAGING_BYTES: usize = 64 << 20;
const STAGING_SLOTS: usize = 2;
/// More threads do not fill pinned memory faster.
const MAX_FILL_THREADS: usize = 16;

/// Why there is no GPU to run on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The program has no kernels.
    #[error("this program was built without CUDA kernels")]
    NoKernels,
    /// libcuda cannot be loaded.
    #[error("the NVIDIA driver is not installed (libcuda.so.1 was not found)")]
    NoDriver,
    /// The driver is older than the kernels.
    #[error("the NVIDIA driver supports CUDA {}.{}, the kernels need {}.{}: install driver 580 or newer", have / 1000, have % 1000 / 10, need / 1000, need % 1000 / 10)]
    DriverTooOld {
        /// 12080 for 12.8.
        have: i32,
        /// The same.
        need: i32,
    },
    /// The driver refuses to start.
    #[error("the NVIDIA driver does not start")]
    Driver(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A driver without a GPU.
    #[error("there is no NVIDIA GPU")]
    NoDevice,
    /// None that the kernels run on.
    #[error("{name} has compute capability {}.{}, the kernels need 8.9 or newer", compute_capability / 10, compute_capability % 10)]
    TooOld {
        /// As the driver names it.
        name: String,
        /// 80 for 8.0.
        compute_capability: u32,
    },
}

impl From<DriverError> for Unavailable {
    fn from(error: DriverError) -> Self {
        Self::Driver(Box::new(error))
    }
}

/// A GPU that can be opened.
#[derive(Debug, Clone)]
pub struct DeviceInfo {
    /// Of the GPUs that the driver sees.
    pub ordinal: usize,
    /// As the driver names it.
    pub name: String,
    /// 90 for 9.0.
    pub compute_capability: u32,
    /// Of its memory.
    pub total_bytes: u64,
}

/// The GPUs that the kernels run on. Never panics, also where there is no driver.
///
/// # Errors
/// Why there is none.
pub fn devices() -> Result<Vec<DeviceInfo>, Unavailable> {
    if !images::any() {
        return Err(Unavailable::NoKernels);
    }
    // SAFETY: only tries to load libraries by name. All other calls panic where this is false.
    if !unsafe { sys::is_culib_present() } {
        return Err(Unavailable::NoDriver);
    }
    let mut have = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&raw mut have) }.result()?;
    if have < MIN_DRIVER_VERSION {
        let need = MIN_DRIVER_VERSION;
        return Err(Unavailable::DriverTooOld { have, need });
    }
    match result::init() {
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(Unavailable::NoDevice),
        result => result?,
    }
    let count = usize::try_from(result::device::get_count()?).unwrap_or(0);
    let all = (0..count).map(describe).collect::<Result<Vec<_>, _>>()?;
    let (usable, too_old): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|device| device.compute_capability >= MIN_COMPUTE_CAPABILITY);
    match (usable.is_empty(), too_old.into_iter().next()) {
        (false, _) => Ok(usable),
        (true, None) => Err(Unavailable::NoDevice),
        (
            true,
            Some(DeviceInfo {
                name,
                compute_capability,
                ..
            }),
        ) => Err(Unavailable::TooOld {
            name,
            compute_capability,
        }),
    }
}

fn describe(ordinal: usize) -> Result<DeviceInfo, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal as i32)?;
    let major = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device)?,
        compute_capability: (major * 10 + minor) as u32,
        // SAFETY: the device exists.
        total_bytes: unsafe { result::device::total_mem(device) }? as u64,
    })
}

fn attribute(device: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<i32, DriverError> {
    // SAFETY: the device exists.
    unsafe { result::device::get_attribute(device, attribute) }
}

/// Pinned host memory and the event after which it may be reused.
#[derive(Debug)]
struct Slot {
    memory: NonNull<u8>,
    bytes: usize,
    event: sys::CUevent,
}

impl Slot {
    fn new(bytes: usize) -> Result<Self, BackendError> {
        // SAFETY: a plain allocation; cached, because the host also reads such memory.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(failed("allocating pinned host memory"))?;
        let memory = NonNull::new(memory.cast()).ok_or(BackendError::OutOfMemory {
            what: "pinned host memory",
            needed_bytes: Some(bytes as u64),
            free_bytes: 0,
        })?;
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("creating an event"))?;
        Ok(Self { memory, bytes, event })
    }

    fn wait(&self, doing: &'static str) -> Result<(), BackendError> {
        // SAFETY: the event lives as long as the slot; one never recorded is complete.
        unsafe { result::event::synchronize(self.event) }.map_err(failed(doing))
    }

    fn record(&self, stream: sys::CUstream) -> Result<(), BackendError> {
        // SAFETY: both live as long as the device.
        unsafe { result::event::record(self.event, stream) }.map_err(failed("recording an event"))
    }

    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: the slot owns so much initialised memory, and `&mut self` that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: owned, and the device synchronises before its slots go. After a device error nothing can be freed.
        let _ = unsafe { result::free_host(self.memory.as_ptr().cast()) };
        // SAFETY: owned.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// A GPU.
pub(crate) struct Driver {
    info: DeviceInfo,
    /// Whether a kernel may start while the one before it ends.
    starts_early: bool,
    multiprocessors: usize,
    max_shared_bytes: i32,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    allocations: Vec<sys::CUdeviceptr>,
    graphs: Vec<sys::CUgraphExec>,
    uploads: Vec<Slot>,
    next_upload: usize,
    readbacks: Vec<Slot>,
    readback_bytes: [usize; READBACK_SLOTS],
    next_readback: usize,
    staging: Vec<Slot>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// Opens a GPU and loads the kernels that fit it. The calling thread is the one that uses it.
    ///
    /// # Errors
    /// The driver refused.
    pub(crate) fn open(info: DeviceInfo) -> Result<Self, BackendError> {
        use sys::CUdevice_attribute as Attribute;
        let device = result::device::get(info.ordinal as i32).map_err(failed("finding the GPU"))?;
        // SAFETY: the device exists.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("opening the GPU"))?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("opening the GPU"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("creating a stream"))?;
        let multiprocessors = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("asking what the GPU has"))?;
        let max_shared_bytes = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
            .map_err(failed("asking what the GPU has"))?;
        let images = images::for_device(info.compute_capability);
        let modules = images.iter().map(load_module).collect::<Result<_, _>>()?;
        Ok(Self {
            info,
            starts_early: images.iter().all(Image::waits_for_previous_kernels),
            multiprocessors: multiprocessors as usize,
            max_shared_bytes,
            stream,
            modules,
            allocations: Vec::new(),
            graphs: Vec::new(),
            uploads: (0..UPLOAD_SLOTS)
                .map(|_| Slot::new(UPLOAD_BYTES))
                .collect::<Result<_, _>>()?,
            next_upload: 0,
            readbacks: (0..READBACK_SLOTS)
                .map(|_| Slot::new(READBACK_BYTES))
                .collect::<Result<_, _>>()?,
            readback_bytes: [0; READBACK_SLOTS],
            next_readback: 0,
            staging: Vec::new(),
        })
    }

    /// Memory reserved from here on is given back by [`Driver::release`].
    pub(crate) fn mark(&self) -> usize {
        self.allocations.len()
    }

    /// Frees what was reserved since the mark.
    pub(crate) fn release(&mut self, mark: usize) -> Result<(), BackendError> {
        self.synchronize()?;
        for pointer in self.allocations.drain(mark..) {
            // SAFETY: owned, and nothing runs any more.
            unsafe { result::free_sync(pointer) }.map_err(failed("freeing memory"))?;
        }
        Ok(())
    }

    /// Records what `work` launches and replays it: the median of `repeats` replays, in microseconds.
    pub(crate) fn time(
        &mut self,
        repeats: usize,
        work: &mut dyn FnMut(&mut dyn Device) -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        self.begin_capture()?;
        let outcome = work(self);
        let graph = self.end_capture(outcome.is_ok())?;
        outcome?;
        let graph = graph.expect("a kept capture is a graph");
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("creating an event"));
        let (start, end) = (event()?, event()?);
        let mut times = Vec::new();
        // The first replay warms up.
        for _ in 0..=repeats {
            // SAFETY: event and stream are ours.
            unsafe { result::event::record(start, self.stream) }.map_err(failed("timing"))?;
            self.replay(graph)?;
            // SAFETY: as above.
            unsafe { result::event::record(end, self.stream) }.map_err(failed("timing"))?;
            self.synchronize()?;
            // SAFETY: both were recorded and have passed.
            let milliseconds = unsafe { result::event::elapsed(start, end) }.map_err(failed("timing"))?;
            times.push(f64::from(milliseconds) * 1e3);
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn find_function(&self, name: &'static str) -> Result<sys::CUfunction, BackendError> {
        let c_name = CString::new(name).map_err(|error| BackendError::Refused(Box::new(error)))?;
        for module in &self.modules {
            // SAFETY: modules live as long as the device.
            match unsafe { result::module::get_function(*module, c_name.clone()) } {
                Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_FOUND => {}
                found => return found.map_err(failed("looking for a kernel")),
            }
        }
        Err(BackendError::Unsupported(format!(
            "there is no kernel `{name}` for {}",
            self.info.name
        )))
    }

    fn copy_to_device(&self, to: DevicePtr, slot: &Slot, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: the slot stays untouched until its event, recorded next, has passed.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, slot.memory.as_ptr().cast(), bytes, self.stream) }
            .result()
            .map_err(failed("copying to the device"))?;
        slot.record(self.stream)
    }
}

fn load_module(image: &Image) -> Result<sys::CUmodule, BackendError> {
    // PTX ends with a zero byte.
    let text = image.is_ptx.then(|| [image.bytes, &[0]].concat());
    let bytes = text.as_deref().unwrap_or(image.bytes);
    // SAFETY: a whole image as nvcc wrote it; the driver copies it.
    unsafe { result::module::load_data(bytes.as_ptr().cast()) }.map_err(|error| {
        tracing::error!(file = image.file, arch = image.arch, "the driver refuses a kernel");
        failed("loading a kernel")(error)
    })
}

/// 0 where nothing can be asked any more.
pub(super) fn free_bytes() -> u64 {
    result::mem_get_info().map_or(0, |(free, _)| free as u64)
}

impl Device for Driver {
    fn memory(&self) -> MemoryInfo {
        // Only fails where everything fails.
        let (free, total) = result::mem_get_info().unwrap_or((0, 0));
        MemoryInfo {
            free_bytes: free as u64,
            total_bytes: total as u64,
        }
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn compute_capability(&self) -> u32 {
        self.info.compute_capability
    }

    fn kernel(&mut self, name: &'static str, threads: u32) -> Result<Kernel, BackendError> {
        use sys::CUfunction_attribute_enum as Attribute;
        let function = self.find_function(name)?;
        // SAFETY: the function was just found; a kernel that needs less is not slowed by the limit.
        unsafe {
            result::function::set_function_attribute(
                function,
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.max_shared_bytes,
            )
        }
        .map_err(failed("preparing a kernel"))?;
        Ok(Kernel {
            name,
            handle: function.cast_const().cast(),
            threads,
        })
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, BackendError> {
        // SAFETY: freed when the device goes.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(pointer) => {
                self.allocations.push(pointer);
                Ok(DevicePtr(pointer))
            }
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(BackendError::OutOfMemory {
                what,
                needed_bytes: Some(bytes as u64),
                free_bytes: free_bytes(),
            }),
            Err(error) => Err(Fault::new(error.0, format!("allocating {what}")).into()),
        }
    }

    fn zero(&mut self, to: DevicePtr, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: the caller names memory it reserved.
        unsafe { result::memset_d8_async(to.0, 0, bytes, self.stream) }.map_err(failed("setting memory to zero"))
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), BackendError> {
        for (index, piece) in bytes.chunks(UPLOAD_BYTES).enumerate() {
            let slot = &mut self.uploads[self.next_upload];
            slot.wait("waiting for an earlier copy to the device")?;
            slot.as_mut()[..piece.len()].copy_from_slice(piece);
            self.copy_to_device(
                to.offset(index * UPLOAD_BYTES),
                &self.uploads[self.next_upload],
                piece.len(),
            )?;
            self.next_upload = (self.next_upload + 1) % UPLOAD_SLOTS;
        }
        Ok(())
    }

    fn upload_with(
        &mut self,
        to: DevicePtr,
        bytes: usize,
        granule: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<(), BackendError> {
        while self.staging.len() < STAGING_SLOTS {
            self.staging.push(Slot::new(STAGING_BYTES)?);
        }
        let piece = STAGING_BYTES / granule * granule;
        for (turn, start) in (0..bytes).step_by(piece).enumerate() {
            let count = piece.min(bytes - start);
            let slot = &mut self.staging[turn % STAGING_SLOTS];
            slot.wait("waiting for an earlier copy to the device")?;
            fill_in_parallel(&mut slot.as_mut()[..count], granule, &|offset, memory| {
                fill(start + offset, memory)
            });
            self.copy_to_device(to.offset(start), &self.staging[turn % STAGING_SLOTS], count)?;
        }
        Ok(())
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), BackendError> {
        self.synchronize()?;
        // SAFETY: the caller names memory it reserved; the copy is over when the call returns.
        unsafe { result::memcpy_dtoh_sync(bytes, from.0) }.map_err(failed("copying from the device"))
    }

    fn start_readback(&mut self, from: DevicePtr, bytes: usize) -> Result<Readback, BackendError> {
        assert!(bytes <= READBACK_BYTES, "a step reads back at most READBACK_BYTES");
        let index = self.next_readback;
        self.next_readback = (index + 1) % READBACK_SLOTS;
        let slot = &self.readbacks[index];
        self.readback_bytes[index] = bytes;
        if bytes == 0 {
            return slot.record(self.stream).map(|()| Readback(index));
        }
        // SAFETY: the slot is not read before its event has passed, and is not reused while a step in flight owns it.
        unsafe { sys::cuMemcpyDtoHAsync_v2(slot.memory.as_ptr().cast(), from.0, bytes, self.stream) }
            .result()
            .map_err(failed("copying from the device"))?;
        slot.record(self.stream)?;
        Ok(Readback(index))
    }

    fn finish_readback(&mut self, readback: Readback) -> Result<Vec<u8>, BackendError> {
        let slot = &mut self.readbacks[readback.0];
        slot.wait("waiting for a step's tokens")?;
        Ok(slot.as_mut()[..self.readback_bytes[readback.0]].to_vec())
    }

    unsafe fn launch_raw(
        &mut self,
        kernel: &Kernel,
        grid: Grid,
        params: *const c_void,
        _params_bytes: usize,
    ) -> Result<(), BackendError> {
        // SAFETY: a C struct whose all-zero value is valid.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let [x, y, z] = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(self.starts_early),
        };
        let mut arguments = [params.cast_mut()];
        let function = kernel.handle.cast_mut().cast();
        // SAFETY: the caller vouches for the parameters; the driver copies them before it returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| {
            let Grid { blocks, shared_bytes } = grid;
            let threads = kernel.threads;
            let doing = format!(
                "launching kernel `{}` of {blocks:?} blocks of {threads} threads, {shared_bytes} bytes of shared memory each",
                kernel.name
            );
            Fault::new(error.0, doing).into()
        })
    }

    fn begin_capture(&mut self) -> Result<(), BackendError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("beginning to record a step"))
    }

    fn end_capture(&mut self, keep: bool) -> Result<Option<GraphId>, BackendError> {
        // SAFETY: the stream is ours and captures.
        let graph = match unsafe { result::stream::end_capture(self.stream) } {
            Err(error) if !keep && Fault::is_failed_capture(error) => return Ok(None),
            ended => ended.map_err(failed("recording a step"))?,
        };
        let exec = keep.then(|| {
            // SAFETY: just captured.
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }
        });
        // SAFETY: an instance does not need the graph it was made from.
        unsafe { result::graph::destroy(graph) }.map_err(failed("recording a step"))?;
        let Some(exec) = exec.transpose().map_err(failed("recording a step"))? else {
            return Ok(None);
        };
        self.graphs.push(exec);
        Ok(Some(GraphId(self.graphs.len() - 1)))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), BackendError> {
        // SAFETY: both live as long as the device.
        unsafe { result::graph::launch(self.graphs[graph.0], self.stream) }.map_err(failed("launching a recorded step"))
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        // SAFETY: the stream is ours.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("waiting for the device"))
    }
}

impl Drop for Driver {
    /// Nobody can act on a failure here: the process ends or the device is lost.
    fn drop(&mut self) {
        // Of a stream that records nothing but this is accepted, and of one that does not, it is refused.
        // SAFETY: the stream is ours.
        if let Ok(graph) = unsafe { result::stream::end_capture(self.stream) } {
            // SAFETY: just captured.
            let _ = unsafe { result::graph::destroy(graph) };
        }
        let _ = self.synchronize();
        for graph in self.graphs.drain(..) {
            // SAFETY: owned, and nothing runs any more.
            let _ = unsafe { result::graph::exec_destroy(graph) };
        }
        for pointer in self.allocations.drain(..) {
            // SAFETY: owned.
            let _ = unsafe { result::free_sync(pointer) };
        }
        for module in self.modules.drain(..) {
            // SAFETY: owned.
            let _ = unsafe { result::module::unload(module) };
        }
        // SAFETY: owned.
        let _ = unsafe { result::stream::destroy(self.stream) };
    }
}

fn fill_in_parallel(memory: &mut [u8], granule: usize, fill: &(dyn Fn(usize, &mut [u8]) + Sync)) {
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_FILL_THREADS);
    let share = memory.len().div_ceil(threads).next_multiple_of(granule);
    std::thread::scope(|scope| {
        for (index, part) in memory.chunks_mut(share).enumerate() {
            scope.spawn(move || fill(index * share, part));
        }
    });
}
