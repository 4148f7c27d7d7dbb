//! What a failed call of the driver means for what comes after it.

use std::borrow::Cow;
use std::fmt;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult as Code;
use lapidary_model::BackendError;

/// A call that failed. Kernels run behind the host's back: a kernel's failure is told by whatever call comes next.
#[derive(Debug)]
pub(crate) struct Fault {
    code: Code,
    doing: Cow<'static, str>,
}

/// Whose fault it is, as far as a code tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The call's own: the next one may succeed.
    Call,
    Kernel,
    Hardware,
    /// The context is gone, or nobody knows.
    Device,
}

impl Fault {
    pub(crate) fn new(code: Code, doing: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            doing: doing.into(),
        }
    }

    /// Unknown codes are taken for the worst: a restart mends what can be mended, failing every step from now on nothing.
    fn cause(&self) -> Cause {
        use Code as C;
        match self.code {
            C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_LAUNCH_FAILED => Cause::Kernel,
            C::CUDA_ERROR_ECC_UNCORRECTABLE | C::CUDA_ERROR_NVLINK_UNCORRECTABLE => Cause::Hardware,
            C::CUDA_ERROR_INVALID_VALUE
            | C::CUDA_ERROR_OUT_OF_MEMORY
            | C::CUDA_ERROR_INVALID_IMAGE
            | C::CUDA_ERROR_NO_BINARY_FOR_GPU
            | C::CUDA_ERROR_INVALID_PTX
            | C::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | C::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | C::CUDA_ERROR_INVALID_HANDLE
            | C::CUDA_ERROR_NOT_FOUND
            | C::CUDA_ERROR_NOT_READY
            | C::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
            | C::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE
            | C::CUDA_ERROR_NOT_PERMITTED
            | C::CUDA_ERROR_NOT_SUPPORTED
            | C::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            | C::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            | C::CUDA_ERROR_STREAM_CAPTURE_MERGE
            | C::CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
            | C::CUDA_ERROR_STREAM_CAPTURE_UNJOINED
            | C::CUDA_ERROR_STREAM_CAPTURE_ISOLATION
            | C::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
            | C::CUDA_ERROR_CAPTURED_EVENT
            | C::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD => Cause::Call,
            _ => Cause::Device,
        }
    }

    /// Whether a capture that is to be thrown away had failed already: then there is nothing to throw away.
    pub(crate) fn is_failed_capture(error: DriverError) -> bool {
        error.0 == Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, doing } = self;
        write!(f, "{code:?} while {doing}")?;
        f.write_str(match self.cause() {
            Cause::Call => "",
            Cause::Kernel => {
                ": a kernel failed, this one or one before it; where it happens again, CUDA_LAUNCH_BLOCKING=1 and \
                 --enforce-eager name the kernel"
            }
            Cause::Hardware => ": the GPU is damaged; `nvidia-smi -q` tells more, and a reset or a replacement helps",
            Cause::Device => ": the GPU or its driver is gone; the system's log (`dmesg`, Xid) tells more",
        })
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for BackendError {
    fn from(fault: Fault) -> Self {
        match fault.cause() {
            Cause::Call => Self::Refused(Box::new(fault)),
            Cause::Kernel | Cause::Hardware | Cause::Device => Self::Lost(Box::new(fault)),
        }
    }
}

/// For `map_err`: what a failure means while `doing` something that needs memory of the driver's own, or none.
pub(super) fn failed(doing: &'static str) -> impl Fn(DriverError) -> BackendError {
    move |error| match error.0 {
        Code::CUDA_ERROR_OUT_OF_MEMORY => BackendError::OutOfMemory {
            what: doing,
            needed_bytes: None,
            free_bytes: super::driver::free_bytes(),
        },
        code => Fault::new(code, doing).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_that_is_dead_is_told_from_a_call_that_was_refused() {
        let error = |code| BackendError::from(Fault::new(code, "launching kernel `norm`"));
        for code in [
            Code::CUDA_ERROR_ILLEGAL_ADDRESS,
            Code::CUDA_ERROR_LAUNCH_FAILED,
            Code::CUDA_ERROR_ECC_UNCORRECTABLE,
            Code::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            Code::CUDA_ERROR_UNKNOWN,
        ] {
            assert!(matches!(error(code), BackendError::Lost(_)), "{code:?}");
        }
        for code in [
            Code::CUDA_ERROR_INVALID_VALUE,
            Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            Code::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        ] {
            assert!(matches!(error(code), BackendError::Refused(_)), "{code:?}");
        }
    }

    #[test]
    fn a_fault_says_its_name_what_was_being_done_and_what_to_do() {
        let text = |code| Fault::new(code, "launching kernel `norm`").to_string();
        let kernel = text(Code::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert!(kernel.starts_with("CUDA_ERROR_ILLEGAL_ADDRESS while launching kernel `norm`: "));
        assert!(kernel.contains("CUDA_LAUNCH_BLOCKING=1"));
        assert!(text(Code::CUDA_ERROR_ECC_UNCORRECTABLE).contains("nvidia-smi"));
        assert_eq!(
            text(Code::CUDA_ERROR_INVALID_VALUE),
            "CUDA_ERROR_INVALID_VALUE while launching kernel `norm`"
        );
    }
}
