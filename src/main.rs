use std::process::ExitCode;

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
}
