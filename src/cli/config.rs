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
    leaves(&Table::try_from(&config)?, &[], &mut rows);
    let mut out = super::stdout();
    if args.json {
        let all: serde_json::Map<_, _> = rows
            .iter()
            .map(|(section, key, value)| {
                let full = format!("{}.{key}", section.join("."));
                let origin = origin(&origins, &full);
                (full, json!({ "value": value, "origin": origin }))
            })
            .collect();
        writeln!(out, "{:#}", json!(all))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut last: &[String] = &[];
    for (section, key, value) in &rows {
        if section != last {
            let blank = if last.is_empty() { "" } else { "\n" };
            let names: Vec<String> = section.iter().map(|name| in_toml(name)).collect();
            writeln!(out, "{blank}[{}]", names.join("."))?;
            last = section;
        }
        let line = format!("{} = {value}", in_toml(key));
        writeln!(out, "{line:<40} # {}", origin(&origins, &format!("{}.{key}", section.join("."))))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn origin<'a>(origins: &'a Origins, key: &str) -> &'a str {
    origins.get(key).map_or(BUILT_IN, String::as_str)
}

/// A key as TOML has it: one of the user's choice may need quotes.
fn in_toml(key: &str) -> String {
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    if bare { key.to_owned() } else { Value::from(key).to_string() }
}

/// Section, key and value of every value, a section's own before those of the sections in it.
fn leaves(table: &Table, section: &[String], rows: &mut Vec<(Vec<String>, String, Value)>) {
    for (key, value) in table.iter().filter(|(_, value)| !value.is_table()) {
        rows.push((section.to_vec(), key.clone(), value.clone()));
    }
    for (key, value) in table {
        if let Value::Table(inner) = value {
            leaves(inner, &[section, std::slice::from_ref(key)].concat(), rows);
        }
    }
}
