//! `valor config`: what the settings are.

use super::ModelArgs;
use crate::config::{BUILT_IN, Origins};
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;
use toml::{Table, Value};

/// Look at the configuration
#[derive(Debug, clap::Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, clap::Subcommand)]
enum ConfigCommand {
    /// Print the resolved configuration, and where each value came from
    ///
    /// What is printed is itself a configuration file.
    Show(ShowArgs),
}

#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// As JSON: key to value and origin
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    models: ModelArgs,
}

pub fn run(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    let ConfigCommand::Show(args) = args.command;
    let (config, origins) = args.models.explain(&[])?;
    let mut rows = Vec::new();
    leaves(&Table::try_from(&config)?, "", &mut rows);
    let mut out = std::io::stdout().lock();
    if args.json {
        let all: serde_json::Map<_, _> = rows
            .iter()
            .map(|(section, key, value)| {
                let full = format!("{section}.{key}");
                let origin = origin(&origins, &full);
                (full, json!({ "value": value, "origin": origin }))
            })
            .collect();
        writeln!(out, "{:#}", json!(all))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut last = "";
    for (section, key, value) in &rows {
        if section != last {
            let blank = if last.is_empty() { "" } else { "\n" };
            writeln!(out, "{blank}[{section}]")?;
            last = section;
        }
        let line = format!("{key} = {value}");
        writeln!(out, "{line:<40} # {}", origin(&origins, &format!("{section}.{key}")))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn origin<'a>(origins: &'a Origins, key: &str) -> &'a str {
    origins.get(key).map_or(BUILT_IN, String::as_str)
}

/// Section, key and value of every value.
fn leaves(table: &Table, section: &str, rows: &mut Vec<(String, String, Value)>) {
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let section = if section.is_empty() { key.clone() } else { format!("{section}.{key}") };
                leaves(inner, &section, rows);
            }
            _ => rows.push((section.to_owned(), key.clone(), value.clone())),
        }
    }
}
