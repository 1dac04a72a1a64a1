use std::process::ExitCode;

<<<<<<< HEAD
use clap::Parser;
use valor::cli::rooms;

#[derive(Parser)]
enum Cli {
    Rooms(rooms::RoomsArgs),
}

fn main() -> ExitCode {
    let Cli::Rooms(args) = Cli::parse();
    rooms::run(args).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
=======
#[global_allocator]
static ALLOCATOR: valor::program::WorkerAllocator = valor::program::WorkerAllocator;

fn main() -> ExitCode {
    // Before anything else: a worker must not do what only the main process may.
    if let Some(code) = valor::program::worker_dispatch() {
        return code;
    }
    valor::cli::main()
>>>>>>> program
}
