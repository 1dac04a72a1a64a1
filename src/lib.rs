//! valor: visual reasoners trained and run without labels (VALOR, ICLR 2026), on candle.
//!
//! A map of the house; dependencies point one way, top to bottom, tests aside:
//! - [`cli`]: arguments and one thin file per subcommand
//! - [`train`]: optimiser loops for detector, depth and language models
//! - [`report`]: HTML pages and pictures made from traces and records
//! - [`eval`]: benches, metrics, intervals
//! - [`pipeline`]: question → answer, the path that inference and benches share
//! - [`fit`]: does a checkpoint fit its network? From headers alone
//! - [`verify`]: the heads that judge plans and programs
//! - [`planner`]: question → reply (plan and program)
//! - [`tools`]: `gd_detect`, `depth`, `vqa` behind one trait
//! - [`program`]: the planner's reply: parse, check, run in a jail, trace
//! - [`llm`]: text generation behind one trait
//! - [`models`]: one file or folder per network, weight names as in the checkpoints
//! - [`rooms`]: the synthetic world, inputs only
//! - [`data`]: boxes, questions and published benches from files, inputs only
//! - [`config`]: typed configuration, and what suits the models that it names
//! - [`weights`]: where weights come from
//! - [`nn`]: differentiable building blocks and fused CPU ops
//! - [`sight`]: pictures, boxes, depth, and the trait of the tools
//! - [`files`]: files written whole or not at all
//! - [`text`]: strangers' text for a terminal

/// Tells something on stderr. That nobody listens is no error: work is not lost for want of a reader.
macro_rules! notice {
    ($($told:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($told)*)));
    }};
}

pub mod cli;
pub mod config;
pub mod data;
pub mod eval;
pub mod files;
pub mod fit;
pub mod llm;
pub mod models;
pub mod nn;
pub mod pipeline;
pub mod planner;
pub mod program;
pub mod report;
pub mod rooms;
pub mod sight;
pub mod text;
pub mod tools;
pub mod train;
pub mod verify;
pub mod weights;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    /// The modules, as the map above has them from top to bottom.
    fn map() -> Vec<&'static str> {
        let name = |line: &'static str| Some(line.strip_prefix("//! - [`")?.split_once('`')?.0);
        include_str!("lib.rs").lines().filter_map(name).collect()
    }

    /// The lines of a module's file, tests and comments left out, that name what is not below it on the map.
    fn upward(map: &[&str], module: &str, text: &str) -> Vec<String> {
        let place = |name: &str| map.iter().position(|m| *m == name);
        let own = place(module).unwrap_or_else(|| panic!("{module} is not on the map"));
        let (mut found, mut in_tests) = (Vec::new(), false);
        for line in text.lines() {
            in_tests = line == "mod tests {" || (in_tests && line != "}");
            if in_tests || line.trim_start().starts_with("//") {
                continue;
            }
            for rest in line.split("crate::").skip(1) {
                let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
                if place(name).is_none_or(|at| at < own) {
                    found.push(line.trim().to_owned());
                }
            }
        }
        found
    }

    #[test]
    fn dependencies_point_down_the_map() {
        let map = map();
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let (mut open, mut seen, mut faults) = (vec![src.clone()], BTreeSet::new(), Vec::new());
        while let Some(path) = open.pop() {
            if path.is_dir() {
                open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                continue;
            }
            let name = path.strip_prefix(&src).unwrap().display().to_string().replace('\\', "/");
            let is_test = name.ends_with("/tests.rs") || name.ends_with("_tests.rs");
            if is_test || !name.ends_with(".rs") || name == "lib.rs" || name == "main.rs" {
                continue;
            }
            let module = name.split(['/', '.']).next().unwrap();
            let found = upward(&map, module, &fs::read_to_string(&path).unwrap());
            faults.extend(found.into_iter().map(|line| format!("{name}: {line}")));
            seen.insert(module.to_owned());
        }
        assert!(faults.is_empty(), "these point up the map:\n{}", faults.join("\n"));
        assert_eq!(seen, map.iter().map(|m| m.to_string()).collect::<BTreeSet<_>>());
    }

    #[test]
    fn what_points_up_is_found() {
        let map = ["top", "bottom"];
        let of = |module, text| upward(&map, module, text);
        assert_eq!(of("bottom", "use crate::top::X;\n"), ["use crate::top::X;"]);
        assert_eq!(of("bottom", "mod tests {\n}\nfn f() {\n    crate::top::g()\n}\n"), ["crate::top::g()"]);
        assert_eq!(of("top", "use crate::{bottom, top};\n").len(), 1, "not read, so not passed");
        let fine = "use crate::bottom::X;\n/// [`crate::top`]\nmod tests {\n    use crate::top::X;\n}\n";
        assert!(of("bottom", fine).is_empty());
    }

    #[test]
    fn the_readme_has_the_same_map() {
        let name = |line: &'static str| Some(line.strip_prefix("| `src/")?.split_once('`')?.0);
        let rows: Vec<&str> = include_str!("../README.md").lines().filter_map(name).collect();
        let listed: Vec<&str> = map().into_iter().filter(|m| rows.contains(m)).collect();
        assert_eq!(rows, listed);
    }
}
