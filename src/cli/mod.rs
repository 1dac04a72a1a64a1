//! Arguments and one thin file per subcommand.

pub mod rooms;
