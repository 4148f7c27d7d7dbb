//! A tokenizer keeps nothing of what it encoded. In a process of its own, since it counts all memory.
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lapidary_text::Tokenizer;

const NUM_TEXTS: usize = 10_000;

struct Counting;

static HELD_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD_BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller keeps the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps the same contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_tokenizer_keeps_nothing_of_what_it_encoded() {
    let tokenizer = Tokenizer::from_bytes(include_bytes!("tiny/tokenizer.json"), None).unwrap();
    // Whatever is made once is made.
    tokenizer.encode("a first text", true).unwrap();
    let before = HELD_BYTES.load(Relaxed);
    for number in 0..NUM_TEXTS {
        tokenizer.encode(&format!("message number {number}"), true).unwrap();
    }
    let kept = HELD_BYTES.load(Relaxed).saturating_sub(before);
    assert!(kept < NUM_TEXTS, "{kept} bytes kept");
}
