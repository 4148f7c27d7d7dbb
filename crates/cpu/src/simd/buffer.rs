//! Memory aligned to cache lines, zeroed, of a fixed length.
#![expect(unsafe_code, reason = "a slice view of cache lines")]

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of an AVX-512 register.
const LINE: usize = 64;

/// Bytes between two elements that are touched to have all pages: the smallest page there is.
const PAGE: usize = 4096;

/// Types of which every bit pattern is a value, with no alignment above a cache line's.
pub(crate) trait Plain: Copy + Default + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for f32 {}

/// `len` elements, the first at the start of a cache line.
pub(crate) struct Buffer<T> {
    /// Of a byte type, because the allocator has large zeroed ones for free: pages are made when first touched.
    bytes: Vec<u8>,
    /// Where the first element is.
    start: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// All zero bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        let bytes = vec![0u8; len * size_of::<T>() + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        assert!(start < LINE, "bytes can be aligned to anything");
        Self {
            bytes,
            start,
            len,
            element: PhantomData,
        }
    }

    /// As [`Buffer::zeroed`], with all pages made now: what is reserved at start cannot be missing hours later.
    pub(crate) fn resident(len: usize) -> Self {
        let mut buffer = Self::zeroed(len);
        make_pages(&mut buffer);
        buffer
    }

    /// Grows to at least `len` elements; what was in it is lost when it does.
    pub(crate) fn reserve(&mut self, len: usize) {
        if self.len < len {
            *self = Self::zeroed(len);
        }
    }
}

/// Writes to every page of zeros that nobody has touched.
pub(crate) fn make_pages<T: Plain>(zeros: &mut [T]) {
    // Opaque, or the compiler leaves out writes of what is there already.
    let touch = |element: &mut T| *element = std::hint::black_box(T::default());
    zeros.iter_mut().step_by(PAGE / size_of::<T>()).for_each(touch);
    zeros.last_mut().into_iter().for_each(touch);
}

impl<T: Plain> Default for Buffer<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let bytes = &self.bytes[self.start..][..self.len * size_of::<T>()];
        // SAFETY: as many bytes as `len` elements take, aligned to a cache line, each of them set; any is a Plain value.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = &mut self.bytes[self.start..][..self.len * size_of::<T>()];
        // SAFETY: as for `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), self.len) }
    }
}
