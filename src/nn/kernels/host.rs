//! The kernels as C++ on the processor, for tests: compiled once a process, loaded, called.

use super::Arg;
use candle_core::Result;
use std::ffi::{CString, c_void};
use std::process::Command;
use std::sync::OnceLock;

/// An address from `dlopen`, which any thread may use.
struct Library(*mut c_void);

// SAFETY: the handle is only passed to `dlsym`, which may be called from any thread.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// `None` where there is no C++ compiler. An error in the kernels is a panic.
fn library() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let (source, out) = (dir.path().join("kernels.cpp"), dir.path().join("kernels.so"));
            std::fs::write(&source, include_str!("kernels.cu")).unwrap();
            let flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"];
            let run = Command::new("c++").args(flags).args([&out, &source]).output();
            let run = match run {
                Ok(run) => run,
                Err(e) if std::env::var_os("VALOR_NEEDS_CXX").is_none() => {
                    eprintln!("no C++ compiler ({e}): the kernels are not tested");
                    return None;
                }
                Err(e) => panic!("c++: {e}"),
            };
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            let name = CString::new(out.to_str().unwrap()).unwrap();
            // SAFETY: the library was just made, and nothing of it runs when it is loaded.
            let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW) };
            assert!(!handle.is_null(), "the kernels' library does not load");
            Some(Library(handle))
        })
        .as_ref()
}

pub fn available() -> bool {
    library().is_some()
}

pub fn launch(kernel: &str, (columns, rows): (u32, u32), threads: u32, args: &[Arg]) -> Result<()> {
    let Some(library) = library() else { candle_core::bail!("no C++ compiler") };
    let name = CString::new(format!("{kernel}_f32")).map_err(candle_core::Error::wrap)?;
    // SAFETY: the handle is of a loaded library, the name a C string.
    let f = unsafe { libc::dlsym(library.0, name.as_ptr()) };
    if f.is_null() {
        candle_core::bail!("no kernel {kernel}")
    }
    type Kernel = unsafe extern "C" fn(u32, u32, u32, *const *const c_void);
    // SAFETY: every exported function has this signature (see DEFINE in the source).
    let f: Kernel = unsafe { std::mem::transmute(f) };
    let args: Vec<*const c_void> = args.iter().map(Arg::address).collect();
    // SAFETY: the arguments are those of the kernel's declaration; the caller answers for its pointers.
    unsafe { f(columns, rows, threads, args.as_ptr()) };
    Ok(())
}
