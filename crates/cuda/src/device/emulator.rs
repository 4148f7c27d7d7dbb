//! Runs the kernels on this machine's CPU: launches happen at once, device memory is host memory.

#![allow(unsafe_code, reason = "calls the emulator's C interface")]

use std::ffi::{CString, c_char, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lapidary_model::{BackendError, MemoryInfo};

use super::{Device, DevicePtr, GraphId, Grid, Kernel, Readback};

unsafe extern "C" {
    fn lapidary_emulator_kernel(name: *const c_char, params_bytes: *mut usize, threads: *mut c_uint) -> *const c_void;
    fn lapidary_emulator_alloc(bytes: usize) -> *mut c_void;
    fn lapidary_emulator_free(memory: *mut c_void);
    fn lapidary_emulator_launch(
        kernel: *const c_void,
        grid: *const c_uint,
        threads: c_uint,
        shared_bytes: usize,
        params: *const c_void,
    );
}

/// Memory a test may ask for; more is refused as a device would.
const MEMORY_BYTES: u64 = 8 << 30;
/// Few enough that persistent kernels walk several units each.
const MULTIPROCESSORS: usize = 6;

/// A launch with a copy of its parameters.
#[derive(Debug)]
struct Launch {
    kernel: Kernel,
    grid: Grid,
    /// In words, so that it is aligned as the struct was.
    params: Vec<u64>,
}

/// A GPU of compute capability 9.0 in software.
#[derive(Debug)]
pub(crate) struct Emulator {
    compute_capability: u32,
    allocations: Vec<(*mut c_void, usize)>,
    graphs: Vec<Vec<Launch>>,
    capture: Option<Vec<Launch>>,
    readbacks: Vec<Option<Vec<u8>>>,
    counts: Arc<Counts>,
}

/// What was asked of an emulator so far.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Of single kernels that were to run at once.
    pub(crate) launches: AtomicUsize,
    pub(crate) recordings: AtomicUsize,
}

impl Emulator {
    /// `compute_capability` decides which kernels a backend chooses: 90 for wgmma, 89 for the portable ones.
    pub(crate) fn new(compute_capability: u32) -> Self {
        Self {
            compute_capability,
            allocations: Vec::new(),
            graphs: Vec::new(),
            capture: None,
            readbacks: Vec::new(),
            counts: Arc::default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    fn used(&self) -> u64 {
        self.allocations.iter().map(|(_, bytes)| *bytes as u64).sum()
    }

    /// Whoever names device memory must own it.
    fn check(&self, at: DevicePtr, bytes: usize) {
        let inside = |(start, size): &(*mut c_void, usize)| {
            let start = *start as u64;
            at.0 >= start && at.0 + bytes as u64 <= start + *size as u64
        };
        assert!(
            self.allocations.iter().any(inside),
            "{at:?} + {bytes} is no memory of the device"
        );
    }

    fn run(launch: &Launch) {
        let Launch {
            kernel, grid, params, ..
        } = launch;
        // SAFETY: `launch_raw`'s caller vouches for the parameters; the handle came from the registry.
        unsafe {
            lapidary_emulator_launch(
                kernel.handle,
                grid.blocks.as_ptr(),
                kernel.threads,
                grid.shared_bytes as usize,
                params.as_ptr().cast(),
            );
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        for (memory, _) in self.allocations.drain(..) {
            // SAFETY: allocated by the same interface and freed once.
            unsafe { lapidary_emulator_free(memory) };
        }
    }
}

impl Device for Emulator {
    fn memory(&self) -> MemoryInfo {
        MemoryInfo {
            free_bytes: MEMORY_BYTES.saturating_sub(self.used()),
            total_bytes: MEMORY_BYTES,
        }
    }

    fn multiprocessors(&self) -> usize {
        MULTIPROCESSORS
    }

    fn compute_capability(&self) -> u32 {
        self.compute_capability
    }

    fn kernel(&mut self, name: &'static str, threads: u32) -> Result<Kernel, BackendError> {
        let c_name = CString::new(name).map_err(|error| BackendError::Refused(Box::new(error)))?;
        let (mut params_bytes, mut declared) = (0, 0);
        // SAFETY: the name is a C string, both results are written before it returns.
        let handle = unsafe { lapidary_emulator_kernel(c_name.as_ptr(), &raw mut params_bytes, &raw mut declared) };
        if handle.is_null() {
            return Err(BackendError::Unsupported(format!("there is no kernel `{name}`")));
        }
        assert_eq!(declared, threads, "threads of a block of {name}");
        Ok(Kernel { name, handle, threads })
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, BackendError> {
        let (needed_bytes, free_bytes) = (bytes as u64, self.memory().free_bytes);
        if needed_bytes > free_bytes {
            return Err(BackendError::OutOfMemory {
                what,
                needed_bytes: Some(needed_bytes),
                free_bytes,
            });
        }
        // SAFETY: a plain allocation.
        let memory = unsafe { lapidary_emulator_alloc(bytes.max(1)) };
        assert!(!memory.is_null(), "the host has less memory than the emulator says");
        self.allocations.push((memory, bytes));
        Ok(DevicePtr(memory as u64))
    }

    fn zero(&mut self, to: DevicePtr, bytes: usize) -> Result<(), BackendError> {
        self.check(to, bytes);
        // SAFETY: checked to be memory of the device, which is memory of this process.
        unsafe { std::ptr::write_bytes(to.0 as *mut u8, 0, bytes) };
        Ok(())
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), BackendError> {
        self.check(to, bytes.len());
        // SAFETY: as above; host and device memory do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn upload_with(
        &mut self,
        to: DevicePtr,
        bytes: usize,
        granule: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<(), BackendError> {
        let mut staging = vec![0; bytes];
        let piece = (bytes / 3).next_multiple_of(granule.max(1)).max(1);
        for (index, piece_bytes) in staging.chunks_mut(piece).enumerate() {
            fill(index * piece, piece_bytes);
        }
        self.upload(to, &staging)
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), BackendError> {
        self.check(from, bytes.len());
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn start_readback(&mut self, from: DevicePtr, bytes: usize) -> Result<Readback, BackendError> {
        let mut data = vec![0; bytes];
        if bytes > 0 {
            self.download(from, &mut data)?;
        }
        self.readbacks.push(Some(data));
        Ok(Readback(self.readbacks.len() - 1))
    }

    fn finish_readback(&mut self, readback: Readback) -> Result<Vec<u8>, BackendError> {
        Ok(self.readbacks[readback.0].take().unwrap_or_default())
    }

    unsafe fn launch_raw(
        &mut self,
        kernel: &Kernel,
        grid: Grid,
        params: *const c_void,
        params_bytes: usize,
    ) -> Result<(), BackendError> {
        let c_name = CString::new(kernel.name).map_err(|error| BackendError::Refused(Box::new(error)))?;
        let (mut declared_bytes, mut threads) = (0, 0);
        // SAFETY: as in `kernel`.
        unsafe { lapidary_emulator_kernel(c_name.as_ptr(), &raw mut declared_bytes, &raw mut threads) };
        assert_eq!(declared_bytes, params_bytes, "parameters of {}", kernel.name);
        let mut copy = vec![0_u64; params_bytes.div_ceil(8)];
        // SAFETY: the caller gives that many bytes, and the copy has room for them.
        unsafe { std::ptr::copy_nonoverlapping(params.cast::<u8>(), copy.as_mut_ptr().cast(), params_bytes) };
        let launch = Launch {
            kernel: *kernel,
            grid,
            params: copy,
        };
        match &mut self.capture {
            Some(capture) => capture.push(launch),
            None => {
                self.counts.launches.fetch_add(1, Relaxed);
                Self::run(&launch);
            }
        }
        Ok(())
    }

    fn begin_capture(&mut self) -> Result<(), BackendError> {
        self.counts.recordings.fetch_add(1, Relaxed);
        self.capture = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&mut self, keep: bool) -> Result<Option<GraphId>, BackendError> {
        let capture = self.capture.take().unwrap_or_default();
        if !keep {
            return Ok(None);
        }
        self.graphs.push(capture);
        Ok(Some(GraphId(self.graphs.len() - 1)))
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), BackendError> {
        self.graphs[graph.0].iter().for_each(Self::run);
        Ok(())
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}
