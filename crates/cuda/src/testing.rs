//! What the tests of kernels share.

use crate::device::{Device, Driver, Emulator, devices};

/// The device under test.
pub(crate) fn device() -> Box<dyn Device> {
    if let Some(emulator) = emulator() {
        return Box::new(emulator);
    }
    let devices = devices().unwrap_or_else(|why| panic!("LAPIDARY_TEST_DEVICE=gpu: {why}"));
    Box::new(Driver::open(devices[0].clone()).expect("the GPU can be opened"))
}

/// The device under test, unless it is a GPU.
pub(crate) fn emulator() -> Option<Emulator> {
    match std::env::var("LAPIDARY_TEST_DEVICE").as_deref() {
        Ok("gpu") => None,
        Ok("emulator-portable") => Some(Emulator::new(89)),
        _ => Some(Emulator::new(90)),
    }
}

/// Repeatable numbers (splitmix64).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In `-1..1`.
    pub(crate) fn symmetric(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// `count` values in `-size..size`, exact in bf16.
    pub(crate) fn bf16_values(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count)
            .map(|_| half::bf16::from_f32(self.symmetric() * size).to_f32())
            .collect()
    }
}
