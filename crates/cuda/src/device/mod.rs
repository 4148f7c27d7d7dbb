//! The seam between this crate and whatever runs its kernels: the CUDA driver, or the emulator.
//!
//! Work is issued in order and runs asynchronously; only what says so waits. Memory is reserved at start and lives as
//! long as the device.

use std::ffi::c_void;
use std::fmt::Debug;

use lapidary_model::{BackendError, MemoryInfo};

mod driver;
#[cfg(feature = "emulator")]
mod emulator;
mod fault;
#[cfg(all(test, feature = "emulator"))]
mod faulty;
mod images;

pub(crate) use driver::Driver;
pub use driver::{DeviceInfo, Unavailable, devices};
#[cfg(all(test, feature = "emulator"))]
pub(crate) use emulator::Counts;
#[cfg(feature = "emulator")]
pub(crate) use emulator::Emulator;
#[cfg(all(test, feature = "emulator"))]
pub(crate) use faulty::{Faulty, Next, Trouble};

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// No memory.
    pub(crate) const NULL: Self = Self(0);

    /// `bytes` further on.
    pub(crate) fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// A kernel that a device has loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    /// The driver's or the emulator's handle.
    handle: *const c_void,
    /// Threads of a block: part of how the kernel is written.
    threads: u32,
}

/// How many blocks, and the dynamic shared memory each has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// `blocks` in a row.
    pub(crate) fn line(blocks: usize) -> Self {
        Self {
            blocks: [blocks as u32, 1, 1],
            shared_bytes: 0,
        }
    }

    pub(crate) fn shared(self, bytes: usize) -> Self {
        Self {
            shared_bytes: bytes as u32,
            ..self
        }
    }
}

/// The one struct a kernel takes.
///
/// # Safety
/// `repr(C)`, with the fields of the kernel's struct in its order and sizes.
#[allow(unsafe_code, reason = "the layout is a promise to the kernels")]
pub(crate) unsafe trait Params: Copy + 'static {}

/// Declares structs as parameters of kernels: `kernel_params!(NormParams);`
macro_rules! kernel_params {
    ($($params:ty),+ $(,)?) => {
        $(
            #[allow(unsafe_code, reason = "repr(C), field by field the kernel's struct; the emulator compares sizes")]
            // SAFETY: as the reason says.
            unsafe impl $crate::device::Params for $params {}
        )+
    };
}
pub(crate) use kernel_params;

/// A captured sequence of launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct GraphId(usize);

/// Bytes on their way back to the host.
#[derive(Debug)]
pub(crate) struct Readback(usize);

/// What a device must be able to do.
pub(crate) trait Device: Debug {
    /// What can still be allocated, and what there is in all.
    fn memory(&self) -> MemoryInfo;

    /// Streaming multiprocessors.
    fn multiprocessors(&self) -> usize;

    /// 90 for 9.0.
    fn compute_capability(&self) -> u32;

    /// `threads` of a block must be what the kernel's declaration says.
    fn kernel(&mut self, name: &'static str, threads: u32) -> Result<Kernel, BackendError>;

    /// Aligned to 256 bytes; contents undefined.
    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, BackendError>;

    /// Sets bytes to zero, in order with other work.
    fn zero(&mut self, to: DevicePtr, bytes: usize) -> Result<(), BackendError>;

    /// Copies to the device in order with other work. `bytes` may be reused when it returns.
    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), BackendError>;

    /// Copies `bytes` that `fill` writes, piece by piece, from several threads at once: it gets a piece's offset and
    /// memory. Piece borders are multiples of `granule`.
    fn upload_with(
        &mut self,
        to: DevicePtr,
        bytes: usize,
        granule: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<(), BackendError>;

    /// Waits for all work issued so far and copies to the host.
    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), BackendError>;

    /// Starts to copy at most [`READBACK_BYTES`] bytes to the host, in order with other work.
    fn start_readback(&mut self, from: DevicePtr, bytes: usize) -> Result<Readback, BackendError>;

    /// Waits for one.
    fn finish_readback(&mut self, readback: Readback) -> Result<Vec<u8>, BackendError>;

    /// Launches a kernel whose struct `params` points to. Use [`launch`].
    ///
    /// # Safety
    /// `params` is what the kernel expects, and every address in it is memory of this device for as much as it touches.
    #[allow(unsafe_code, reason = "a kernel writes where its parameters say")]
    unsafe fn launch_raw(
        &mut self,
        kernel: &Kernel,
        grid: Grid,
        params: *const c_void,
        params_bytes: usize,
    ) -> Result<(), BackendError>;

    /// From now on launches are recorded, not run.
    fn begin_capture(&mut self) -> Result<(), BackendError>;

    /// Ends a capture; `keep` false throws it away.
    fn end_capture(&mut self, keep: bool) -> Result<Option<GraphId>, BackendError>;

    /// Runs what was recorded, in order with other work.
    fn replay(&mut self, graph: GraphId) -> Result<(), BackendError>;

    /// Waits for all work issued so far.
    fn synchronize(&mut self) -> Result<(), BackendError>;
}

/// The most a step reads back.
pub(crate) const READBACK_BYTES: usize = 1 << 20;

/// Launches a kernel with its parameters.
#[allow(unsafe_code, reason = "the one place where parameters become bytes")]
pub(crate) fn launch<P: Params>(
    device: &mut dyn Device,
    kernel: &Kernel,
    grid: Grid,
    params: &P,
) -> Result<(), BackendError> {
    // SAFETY: `Params` promises the layout; the modules of this crate pass addresses of buffers they reserved for the
    // largest step, and the runner checks every batch against the same limits.
    unsafe { device.launch_raw(kernel, grid, std::ptr::from_ref(params).cast(), size_of::<P>()) }
}

/// The bytes of plain numbers.
pub(crate) trait Plain: Copy + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for half::bf16 {}

/// Numbers as the bytes they are in memory.
#[allow(unsafe_code, reason = "views of plain numbers")]
pub(crate) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding, and every byte of them is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Numbers read back from the device.
#[cfg(all(test, feature = "emulator"))]
pub(crate) fn read_back<T: Plain + Default>(device: &mut dyn Device, from: DevicePtr, count: usize) -> Vec<T> {
    let mut bytes = vec![0; count * size_of::<T>()];
    device.download(from, &mut bytes).expect("downloads work");
    let mut values = vec![T::default(); count];
    #[allow(unsafe_code, reason = "plain numbers")]
    // SAFETY: both are `count` plain numbers, any bit pattern of which is valid.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.as_mut_ptr().cast(), bytes.len());
    }
    values
}

/// Numbers in fresh device memory.
#[cfg(all(test, feature = "emulator"))]
pub(crate) fn on_device<T: Plain>(device: &mut dyn Device, values: &[T]) -> DevicePtr {
    let to = device
        .alloc("test data", size_of_val(values))
        .expect("test data is small");
    device.upload(to, bytes_of(values)).expect("uploads work");
    to
}
