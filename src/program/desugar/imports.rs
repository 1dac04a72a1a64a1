//! Imports: of our modules names are bound to parts of the library, of refused ones to nothing: who reads them ends the program.

use ruff_python_ast::Stmt;
use ruff_text_size::Ranged;

use super::facts::REFUSED_MODULES;
use super::rewrite::{OUR_MODULES, Rewriter};
use super::{OURS, REFUSE, prelude};

pub(super) fn rewrite(rewriter: &mut Rewriter, stmt: &Stmt) {
    let root_of = |module: &str| module.split('.').next().unwrap_or_default().to_owned();
    match stmt {
        Stmt::Import(import) => {
            let ours = |module: &str| {
                let root = root_of(module);
                REFUSED_MODULES.contains(&root.as_str()) || OUR_MODULES.contains(&root.as_str())
            };
            if import.names.iter().any(|alias| ours(alias.name.as_str())) {
                let kept: Vec<&str> = import
                    .names
                    .iter()
                    .filter(|alias| !ours(alias.name.as_str()))
                    .map(|alias| rewriter.text(alias.range()))
                    .collect();
                let text =
                    if kept.is_empty() { "pass".to_owned() } else { format!("import {}", kept.join(", ")) };
                rewriter.edits.replace(import.range, text);
            }
        }
        Stmt::ImportFrom(import) if import.level == 0 => {
            let module = import.module.as_ref().map_or("", |m| m.as_str());
            let refused = REFUSED_MODULES.contains(&root_of(module).as_str());
            let mut kept = vec![];
            let mut parts = vec![];
            for alias in &import.names {
                let bound = alias.asname.as_ref().unwrap_or(&alias.name).as_str();
                let path = format!("{module}.{}", alias.name.as_str());
                if let Some(ours) = prelude::for_path(&path) {
                    parts.push(format!("{bound} = {ours}"));
                } else if refused && alias.name.as_str() == "*" {
                    parts.push(format!("{REFUSE}(\"{path}\")"));
                } else if refused {
                    // It stays unbound, and whoever reads it is told.
                    parts.push("pass".to_owned());
                } else if OUR_MODULES.contains(&root_of(module).as_str()) {
                    parts.push(format!("{OURS}missing(\"{path}\")"));
                } else {
                    kept.push(rewriter.text(alias.range()));
                }
            }
            if !parts.is_empty() {
                if !kept.is_empty() {
                    parts.insert(0, format!("from {module} import {}", kept.join(", ")));
                }
                rewriter.edits.replace(import.range, parts.join("; "));
            }
        }
        _ => {}
    }
}
