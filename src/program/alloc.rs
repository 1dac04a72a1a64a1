//! The global allocator of the `valor` binary: the system's, which counts live bytes once the
//! process has become a program worker. monty's memory limit reads that count; without it
//! `[0] * 10**10` would abort the worker instead of raising. In every other process the cost is
//! one relaxed load per call.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use monty_types::{BASELINE_MEMORY, LIVE_MEMORY, OOM_EXIT_CODE};

static COUNTING: AtomicBool = AtomicBool::new(false);
/// Bytes above the baseline at which the worker gives up: the backstop for a single allocation
/// that the interpreter did not announce.
static HARD_LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Set as `#[global_allocator]` in `main.rs`.
pub struct WorkerAllocator;

/// Starts counting in this process. Called once, by a worker, while it has one thread.
pub(super) fn start_counting() {
    // Blocks allocated earlier may be freed later: start high enough never to wrap.
    LIVE_MEMORY.store(1 << 40, Relaxed);
    COUNTING.store(true, Relaxed);
}

/// Takes the present use as zero and sets the hard limit for the next program.
pub(super) fn arm(hard_limit: usize) {
    BASELINE_MEMORY.store(LIVE_MEMORY.load(Relaxed), Relaxed);
    HARD_LIMIT.store(hard_limit, Relaxed);
}

/// Between programs nothing is limited.
pub(super) fn disarm() {
    HARD_LIMIT.store(usize::MAX, Relaxed);
}

// Only a worker's one running thread allocates while counting, so a load and a store will do.
fn grow(bytes: usize) {
    let live = LIVE_MEMORY.load(Relaxed).saturating_add(bytes);
    let limit = HARD_LIMIT.load(Relaxed);
    if limit != usize::MAX && live.saturating_sub(BASELINE_MEMORY.load(Relaxed)) > limit {
        exit_out_of_memory();
    }
    LIVE_MEMORY.store(live, Relaxed);
}

fn shrink(bytes: usize) {
    LIVE_MEMORY.store(LIVE_MEMORY.load(Relaxed).saturating_sub(bytes), Relaxed);
}

/// Ends the worker at once; the parent reads the code as `memory`.
#[cold]
fn exit_out_of_memory() -> ! {
    #[cfg(unix)]
    // SAFETY: `_exit` takes no pointers and does not return.
    unsafe {
        libc::_exit(OOM_EXIT_CODE)
    }
    #[cfg(not(unix))]
    std::process::exit(OOM_EXIT_CODE)
}

// SAFETY: every call is passed on to `System` unchanged; counting touches only atomics and does
// not allocate.
unsafe impl GlobalAlloc for WorkerAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Relaxed) {
            grow(layout.size());
        }
        // SAFETY: the caller's contract is `System`'s.
        let at = unsafe { System.alloc(layout) };
        refuse_null(at);
        at
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Relaxed) {
            grow(layout.size());
        }
        // SAFETY: the caller's contract is `System`'s.
        let at = unsafe { System.alloc_zeroed(layout) };
        refuse_null(at);
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if COUNTING.load(Relaxed) {
            shrink(layout.size());
        }
        // SAFETY: the caller's contract is `System`'s.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if COUNTING.load(Relaxed) {
            grow(new_size);
            shrink(layout.size());
        }
        // SAFETY: the caller's contract is `System`'s.
        let at = unsafe { System.realloc(at, layout, new_size) };
        refuse_null(at);
        at
    }
}

/// The address-space limit was hit: in a worker that is the program's doing.
fn refuse_null(at: *mut u8) {
    if at.is_null() && COUNTING.load(Relaxed) {
        exit_out_of_memory();
    }
}
