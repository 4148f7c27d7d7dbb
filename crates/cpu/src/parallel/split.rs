//! Safe views of disjoint parts of one output, a part for each task.
#![expect(unsafe_code, reason = "tasks on several threads write disjoint parts of one slice")]

use std::marker::PhantomData;

use super::Pool;

/// A slice whose parts go to different threads; private to this file, which keeps the parts disjoint.
struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`; every use below hands out disjoint parts, each to one task.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    fn new(data: &'a mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            owner: PhantomData,
        }
    }

    /// # Safety
    /// No element of `first..first + len` may be in another part that is still alive.
    unsafe fn part(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first, "part outside the slice");
        // SAFETY: in bounds by the assertion.
        let start = unsafe { self.start.add(first) };
        // SAFETY: in bounds of the slice this borrows for `'a`; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// Some adjacent columns of a row-major matrix.
pub(crate) struct Columns<'a> {
    matrix: &'a Shared<'a, f32>,
    row_len: usize,
    first: usize,
    width: usize,
}

impl Columns<'_> {
    /// Number of the first column.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Number of columns.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// These columns of a row.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        // SAFETY: `Pool::for_columns` gives each task other columns, and `&mut self` keeps this one's rows apart.
        unsafe { self.matrix.part(row * self.row_len + self.first, self.width) }
    }
}

impl Pool {
    /// Runs `task(worker, index, chunk)` for each chunk of `chunk_len` elements; the last may be shorter.
    pub(crate) fn for_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        let len = data.len();
        let shared = Shared::new(data);
        self.run(len.div_ceil(chunk_len.max(1)), |worker, index| {
            let first = index * chunk_len;
            // SAFETY: each index occurs once, and chunks do not overlap.
            let chunk = unsafe { shared.part(first, chunk_len.min(len - first)) };
            task(worker, index, chunk);
        });
    }

    /// Runs `task(worker, index, part)` for each `index`, with `part` being `data[starts[index]..starts[index + 1]]`.
    ///
    /// # Panics
    /// When `starts` descends or leaves `data`.
    pub(crate) fn for_parts<T: Send>(
        &self,
        data: &mut [T],
        starts: &[usize],
        task: impl Fn(usize, usize, &mut [T]) + Sync,
    ) {
        assert!(starts.is_sorted(), "parts overlap");
        let shared = Shared::new(data);
        self.run(starts.len().saturating_sub(1), |worker, index| {
            // SAFETY: each index occurs once, and ascending starts make the parts disjoint.
            let part = unsafe { shared.part(starts[index], starts[index + 1] - starts[index]) };
            task(worker, index, part);
        });
    }

    /// Runs `task(worker, columns)` for each `width` columns of a row-major matrix; the last may be fewer.
    pub(crate) fn for_columns(
        &self,
        matrix: &mut [f32],
        row_len: usize,
        width: usize,
        task: impl Fn(usize, Columns<'_>) + Sync,
    ) {
        assert_eq!(matrix.len() % row_len.max(1), 0, "rows of another length");
        let shared = Shared::new(matrix);
        self.run(row_len.div_ceil(width.max(1)), |worker, index| {
            let first = index * width;
            task(
                worker,
                Columns {
                    matrix: &shared,
                    row_len,
                    first,
                    width: width.min(row_len - first),
                },
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_parts_and_columns_cover_everything_once() {
        let pool = Pool::new(3).unwrap();
        let mut data = vec![0.0f32; 21];
        pool.for_chunks(&mut data, 4, |_, _, chunk| chunk.iter_mut().for_each(|x| *x += 1.0));
        pool.for_parts(&mut data, &[0, 5, 5, 21], |_, _, part| {
            part.iter_mut().for_each(|x| *x += 1.0)
        });
        pool.for_columns(&mut data, 7, 3, |_, mut columns| {
            for row in 0..3 {
                columns.row(row).iter_mut().for_each(|x| *x += 1.0);
            }
        });
        assert_eq!(data, vec![3.0; 21]);
    }

    #[test]
    #[should_panic(expected = "parts overlap")]
    fn descending_parts_are_refused() {
        Pool::new(1)
            .unwrap()
            .for_parts(&mut [0.0f32; 8], &[0, 5, 3], |_, _, _| ());
    }
}
