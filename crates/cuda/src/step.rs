//! What kernels know of a step: `kernels/common/step.cuh` in Rust.

use crate::device::DevicePtr;

/// The kernels' `Step`: where a step's inputs lie, at addresses that never change.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct StepParams {
    pub(crate) counts: DevicePtr,
    pub(crate) token_ids: DevicePtr,
    pub(crate) positions: DevicePtr,
    pub(crate) slots: DevicePtr,
    pub(crate) query_start: DevicePtr,
    pub(crate) context_lens: DevicePtr,
    pub(crate) block_start: DevicePtr,
    pub(crate) block_ids: DevicePtr,
    pub(crate) sample_rows: DevicePtr,
    pub(crate) seq_of_token: DevicePtr,
}
