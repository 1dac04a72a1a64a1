use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: valor::program::WorkerAllocator = valor::program::WorkerAllocator;

fn main() -> ExitCode {
    // Before anything else: a worker must not do what only the main process may.
    if let Some(code) = valor::program::worker_dispatch() {
        return code;
    }
    few_cores();
    valor::cli::main()
}

/// candle's own workers share each element-wise operation, for one caller at a time, and spin before they
/// sleep. On few cores they would hold up the parts of a batch that run side by side, and spin where those
/// work.
fn few_cores() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    let few = std::thread::available_parallelism().is_ok_and(|n| n.get() <= 4);
    if few && std::env::var_os(THREADS).is_none() {
        // SAFETY: no other thread has been started.
        unsafe { std::env::set_var(THREADS, "1") }
    }
}
