//! What the tests of kernels share.

use crate::device::{Device, Driver, Emulator, devices};

/// The device under test.
pub(crate) fn device() -> Box<dyn Device> {
    match std::env::var("LAPIDARY_TEST_DEVICE").as_deref() {
        Ok("gpu") => {
            let devices = devices().unwrap_or_else(|why| panic!("LAPIDARY_TEST_DEVICE=gpu: {why}"));
            Box::new(Driver::open(devices[0].clone()).expect("the GPU can be opened"))
        }
        Ok("emulator-portable") => Box::new(Emulator::new(89)),
        _ => Box::new(Emulator::new(90)),
    }
}
