//! Pages of mapped files that have been copied and are not wanted twice.

/// Gives back the memory of a mapped file's bytes once they have been copied: until the kernel wants it for
/// something else, it counts beside the copy as the process's own, and loading takes twice a network's size.
/// Whoever looks at the bytes again has them from the file again.
///
/// # Safety
/// The bytes must be part of a read-only mapping of a file (of other memory they would be lost).
pub(super) unsafe fn release(bytes: &[u8]) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: asking for a setting has no conditions.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let Ok(page) = usize::try_from(page) else { return };
        let start = bytes.as_ptr() as usize;
        // Whole pages only: the rest of those at the ends belongs to others.
        let (from, to) = (start.next_multiple_of(page), (start + bytes.len()) / page * page);
        if from < to {
            // SAFETY: the pages lie within `bytes`, which by the caller's word can be read again. A refusal
            // costs memory and nothing else, so it is not looked at.
            unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn bytes_given_back_are_the_same_when_read_again() {
        let all: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&all).unwrap();
        // SAFETY: nothing changes the file.
        let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        for range in [0..100_000, 1..99_999, 4096..8192, 5000..5001, 7..7] {
            assert_eq!(map[range.clone()], all[range.clone()]);
            // SAFETY: they are of a file's mapping.
            unsafe { release(&map[range]) };
            assert_eq!(map[..], all[..]);
        }
    }
}
