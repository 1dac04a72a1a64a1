use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: valor::program::WorkerAllocator = valor::program::WorkerAllocator;

fn main() -> ExitCode {
    // Before anything else: a worker must not do what only the main process may.
    if let Some(code) = valor::program::worker_dispatch() {
        return code;
    }
    sleep_between_ops();
    valor::cli::main()
}

/// candle's workers spin for a while after each op before they sleep. On few cores they spin where the
/// next op's own threads would work: a training step on two cores took 1.18 times as long.
fn sleep_between_ops() {
    const SPINS: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    let few = std::thread::available_parallelism().is_ok_and(|n| n.get() <= 4);
    if few && std::env::var_os(SPINS).is_none() {
        // SAFETY: no other thread has been started.
        unsafe { std::env::set_var(SPINS, "1") }
    }
}
