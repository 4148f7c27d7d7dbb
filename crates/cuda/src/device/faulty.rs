//! An emulated device that gets into trouble when a test says so.

#![allow(unsafe_code, reason = "hands launches through")]

use std::ffi::c_void;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUresult as Code;
use lapidary_model::{BackendError, MemoryInfo};

use super::fault::Fault;
use super::{Device, DevicePtr, Emulator, GraphId, Grid, Kernel, Readback};

/// What happens to one call.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The next launch, of a kernel or of a recorded step, fails like this. A code that means a lost device fails every
    /// call from then on.
    Launch(Code),
    /// The next wait for a step does.
    Wait(Code),
    /// There is no memory for the next recording.
    NoRoomToRecord,
    /// The next wait for a step lasts until the sender is gone.
    Hang(Receiver<()>),
}

/// The test's end.
pub(crate) type Next = Arc<Mutex<Option<Trouble>>>;

#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Emulator,
    next: Next,
    lost: Option<Code>,
}

impl Faulty {
    pub(crate) fn new(inner: Emulator, next: Next) -> Self {
        Self {
            inner,
            next,
            lost: None,
        }
    }

    fn take(&mut self, is_mine: impl Fn(&Trouble) -> bool) -> Option<Trouble> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.take_if(|trouble| is_mine(trouble))
    }

    fn fail(&mut self, code: Code, doing: &str) -> BackendError {
        let error = BackendError::from(Fault::new(code, doing.to_owned()));
        if matches!(error, BackendError::Lost(_)) {
            self.lost = Some(code);
        }
        error
    }

    /// Nothing works on a lost device.
    fn check(&mut self, doing: &str) -> Result<(), BackendError> {
        self.lost.map_or(Ok(()), |code| Err(self.fail(code, doing)))
    }

    fn check_launch(&mut self, doing: &str) -> Result<(), BackendError> {
        self.check(doing)?;
        match self.take(|trouble| matches!(trouble, Trouble::Launch(_))) {
            Some(Trouble::Launch(code)) => Err(self.fail(code, doing)),
            _ => Ok(()),
        }
    }
}

impl Device for Faulty {
    fn memory(&self) -> MemoryInfo {
        self.inner.memory()
    }

    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }

    fn compute_capability(&self) -> u32 {
        self.inner.compute_capability()
    }

    fn kernel(&mut self, name: &'static str, threads: u32) -> Result<Kernel, BackendError> {
        self.inner.kernel(name, threads)
    }

    fn alloc(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, BackendError> {
        self.check("allocating")?;
        self.inner.alloc(what, bytes)
    }

    fn zero(&mut self, to: DevicePtr, bytes: usize) -> Result<(), BackendError> {
        self.check("setting memory to zero")?;
        self.inner.zero(to, bytes)
    }

    fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), BackendError> {
        self.check("copying to the device")?;
        self.inner.upload(to, bytes)
    }

    fn upload_with(
        &mut self,
        to: DevicePtr,
        bytes: usize,
        granule: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
    ) -> Result<(), BackendError> {
        self.check("copying to the device")?;
        self.inner.upload_with(to, bytes, granule, fill)
    }

    fn download(&mut self, from: DevicePtr, bytes: &mut [u8]) -> Result<(), BackendError> {
        self.check("copying from the device")?;
        self.inner.download(from, bytes)
    }

    fn start_readback(&mut self, from: DevicePtr, bytes: usize) -> Result<Readback, BackendError> {
        self.check("copying from the device")?;
        self.inner.start_readback(from, bytes)
    }

    fn finish_readback(&mut self, readback: Readback) -> Result<Vec<u8>, BackendError> {
        let doing = "waiting for a step's tokens";
        self.check(doing)?;
        match self.take(|trouble| matches!(trouble, Trouble::Wait(_) | Trouble::Hang(_))) {
            Some(Trouble::Wait(code)) => return Err(self.fail(code, doing)),
            Some(Trouble::Hang(end)) => assert!(end.recv().is_err(), "nothing is sent"),
            _ => {}
        }
        self.inner.finish_readback(readback)
    }

    unsafe fn launch_raw(
        &mut self,
        kernel: &Kernel,
        grid: Grid,
        params: *const c_void,
        params_bytes: usize,
    ) -> Result<(), BackendError> {
        self.check_launch(&format!("launching kernel `{}`", kernel.name))?;
        // SAFETY: the caller's promise, handed on.
        unsafe { self.inner.launch_raw(kernel, grid, params, params_bytes) }
    }

    fn begin_capture(&mut self) -> Result<(), BackendError> {
        self.check("beginning to record a step")?;
        self.inner.begin_capture()
    }

    fn end_capture(&mut self, keep: bool) -> Result<Option<GraphId>, BackendError> {
        self.check("recording a step")?;
        match self.take(|trouble| matches!(trouble, Trouble::NoRoomToRecord)) {
            Some(_) => Err(BackendError::OutOfMemory {
                what: "recording a step",
                needed_bytes: None,
                free_bytes: self.memory().free_bytes,
            }),
            None => self.inner.end_capture(keep),
        }
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), BackendError> {
        self.check_launch("launching a recorded step")?;
        self.inner.replay(graph)
    }

    fn synchronize(&mut self) -> Result<(), BackendError> {
        self.check("waiting for the device")?;
        self.inner.synchronize()
    }
}
