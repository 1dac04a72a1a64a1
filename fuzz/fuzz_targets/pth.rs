//! PyTorch's own checkpoints: whatever the bytes, an error or tensors, no panic, and no more memory than
//! the file can account for.
//!
//! ```sh
//! mkdir -p fuzz/corpus/pth
//! cargo +nightly fuzz run pth fuzz/corpus/pth fuzz/seeds/pth -- \
//!   -dict=fuzz/pth.dict -max_len=65536 -timeout=10 -max_total_time=3600
//! ```
//!
//! The two files are compiled in here by themselves: valor as a whole takes far longer to instrument.

#![no_main]

#[allow(dead_code)]
#[path = "../../src/weights/pickle.rs"]
mod pickle;
#[allow(dead_code)]
#[path = "../../src/weights/pth.rs"]
mod pth;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use candle_core::Device;
use libfuzzer_sys::fuzz_target;

/// Bytes of the structure in memory for one of the file: an opcode of one byte is a value of some fifty, in
/// vectors that grow by doubling; a member of the archive, a record of the `zip` crate.
const STRUCTURE: usize = 256;
/// What is needed for any file.
const ANY: usize = 256 << 10;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(live, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at once meanwhile, above what was held before.
fn most<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Relaxed);
    MOST.store(before, Relaxed);
    let result = work();
    (result, MOST.load(Relaxed) - before)
}

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
    file.write_all(bytes).expect("memory for the input");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let (opened, held) = most(|| pth::Pth::open(path.as_ref()));
    assert!(held <= STRUCTURE * bytes.len() + ANY, "{held} bytes for a file of {}", bytes.len());
    let Ok(opened) = opened else { return };
    for (name, shape) in opened.shapes() {
        let (tensor, held) = most(|| opened.load(&name, &Device::Cpu));
        // The numbers as bytes and as a tensor.
        assert!(held <= 2 * bytes.len() + ANY, "{held} bytes for {name} of a file of {}", bytes.len());
        if let Ok(tensor) = tensor {
            assert_eq!(tensor.dims(), shape, "{name}");
        }
    }
});
