//! The operations, each a file: what a row of its result is, and how rows are spread over threads.

pub(crate) mod attention;
pub(crate) mod elementwise;
pub(crate) mod linear;
pub(crate) mod rope;

/// Elements worth a task of their own: below, handing them to another thread costs more than computing them.
const MIN_TASK_ELEMENTS: usize = 8192;

/// Rows to a task, for work of about a pass over `row_len` elements each.
pub(crate) fn rows_per_task(rows: usize, row_len: usize, threads: usize) -> usize {
    rows.div_ceil(threads).max(MIN_TASK_ELEMENTS.div_ceil(row_len.max(1)))
}
