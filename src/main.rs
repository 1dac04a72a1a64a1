use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: valor::program::WorkerAllocator = valor::program::WorkerAllocator;

fn main() -> ExitCode {
    // Before anything else: a worker must not do what only the main process may.
    if let Some(code) = valor::program::worker_dispatch() {
        return code;
    }
    valor::cli::main()
}
