//! What suits a model where nothing was said. The defaults are those of the embedded models, small ones that
//! know rooms; a released checkpoint at 144 pixels or after eight tokens would answer worse than it can, and
//! say nothing of it.

use std::path::Path;

use toml::{Table, Value};

use super::{ENDPOINT, Origins};
use crate::weights::gguf::is_gguf;
use crate::weights::source::Source;
use crate::weights::{ModelFiles, WeightsError};

/// Where a model is from, as far as its name tells.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum From {
    Embedded,
    /// A folder that a training on Rooms has left, or one that is not there.
    Path,
    /// The hub, a server, a file, another folder: none of ours.
    Elsewhere,
}

impl From {
    fn of(model: &str, part: &'static str) -> Self {
        match Source::parse(model) {
            _ if model.is_empty() => Self::Embedded,
            _ if model.starts_with(ENDPOINT) || is_gguf(model) => Self::Elsewhere,
            Ok(Source::Embedded { .. }) => Self::Embedded,
            Ok(Source::Path(_)) => Self::of_path(model, part),
            // What is no source is refused later, by its name.
            Ok(Source::Hub(_) | Source::Preset(_)) | Err(_) => Self::Elsewhere,
        }
    }

    /// Models of Rooms say so in their config, which what is trained from one has too; that of an adapter or a delta is
    /// its base's.
    fn of_path(path: &str, part: &'static str) -> Self {
        match ModelFiles::open(path, part) {
            // Its base is on the hub.
            Err(WeightsError::NotFetched { .. }) => Self::Elsewhere,
            // What cannot be read is refused later.
            Err(_) => Self::Path,
            Ok(files) => match files.json::<serde_json::Value>("config.json") {
                Ok(config) if config.get("rooms_version").is_none() => Self::Elsewhere,
                Err(_) if Path::new(path).is_file() => Self::Elsewhere,
                _ => Self::Path,
            },
        }
    }
}

/// By part and key the value for models from there or further.
fn suited() -> [(&'static str, &'static str, From, Value); 11] {
    [
        ("planner", "prompt", From::Elsewhere, "general".into()),
        ("planner", "max_new_tokens", From::Elsewhere, 4096.into()),
        ("detector", "box_threshold", From::Elsewhere, 0.35.into()),
        ("detector", "text_threshold", From::Elsewhere, 0.25.into()),
        // The checkpoint's own.
        ("detector", "shortest_side", From::Path, 0.into()),
        ("detector", "longest_side", From::Path, 0.into()),
        ("depth", "num_tokens", From::Path, 0.into()),
        ("vlm", "prompt", From::Elsewhere, "general".into()),
        ("vlm", "max_new_tokens", From::Path, 64.into()),
        ("verifier", "prompts", From::Elsewhere, "general".into()),
        ("verifier", "max_new_tokens", From::Elsewhere, 4096.into()),
    ]
}

/// Sets what nobody has set to what suits the models that were chosen, and says so in `origins`.
pub(super) fn suit(table: &mut Table, origins: &mut Origins) {
    for (part, key, least, value) in suited() {
        let Some(Value::Table(section)) = table.get_mut(part) else { continue };
        let model = section.get("model").and_then(Value::as_str).unwrap_or_default();
        let full = format!("{part}.{key}");
        if From::of(model, part) >= least && !origins.contains_key(&full) {
            origins.insert(full, format!("suits {part}.model = {model}"));
            section.insert(key.into(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;
    use crate::nn::lora::{LoraConfig, peft_config};

    #[test]
    fn models_that_are_not_ours_get_what_suits_them_where_nothing_was_said() {
        let of = |sets: &[&str]| {
            Config::explain(None, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
        };
        let (ours, _) = of(&[]);
        assert_eq!((ours.planner.prompt.as_str(), ours.vlm.max_new_tokens), ("rooms", 8));
        let (c, origins) = of(&[
            "detector.model=grounding-dino-tiny",
            "depth.model=hub:Ruicheng/moge-2-vitl",
            "planner.model=hub:a/b#c.gguf",
            "vlm.model=qwen3-vl-2b",
            "vlm.max_new_tokens=9",
        ]);
        assert_eq!((c.detector.shortest_side, c.detector.longest_side, c.depth.num_tokens), (0, 0, 0));
        assert_eq!((c.detector.box_threshold, c.detector.text_threshold), (0.35, 0.25));
        assert_eq!((c.planner.prompt.as_str(), c.planner.max_new_tokens), ("general", 4096));
        assert_eq!((c.vlm.prompt.as_str(), c.vlm.max_new_tokens), ("general", 9), "what was said holds");
        assert_eq!(c.verifier, ours.verifier);
        assert_eq!(origins["planner.prompt"], "suits planner.model = hub:a/b#c.gguf");
    }

    /// A planner that was trained on Rooms wants the instructions of its training, any other the general ones.
    #[test]
    fn a_folder_is_told_by_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path.parent().unwrap().display().to_string()
        };
        let of = |model: &str| {
            let sets = [format!("planner.model={model}"), format!("detector.model={model}")];
            let c = Config::resolve(None, &sets).unwrap();
            assert_eq!(c.detector.shortest_side, 0, "{model}");
            (c.planner.prompt, c.planner.max_new_tokens, c.detector.box_threshold)
        };
        let rooms = Config::resolve(None, &[]).unwrap();
        let rooms = (rooms.planner.prompt, rooms.planner.max_new_tokens, rooms.detector.box_threshold);
        let general = ("general".to_owned(), 4096, 0.35);
        let ours = write("ours/config.json", r#"{"model_type": "qwen3", "rooms_version": 3}"#);
        let theirs = write("theirs/config.json", r#"{"model_type": "qwen3"}"#);
        let adapter = |name: &str, base: &str| {
            let of = LoraConfig { rank: 2, alpha: 4., targets: vec!["q_proj".into()] };
            write(&format!("{name}/adapter_config.json"), &peft_config(base, &of).to_string())
        };
        let (on_ours, on_theirs) = (adapter("a", &ours), adapter("b", &theirs));
        for model in [&ours, &on_ours, &adapter("c", "embedded-base"), "runs/none/model"] {
            assert_eq!(of(model), rooms, "{model}");
        }
        let weights = |folder: &str| {
            let path = std::path::Path::new(folder).join("model.safetensors");
            std::fs::write(&path, "").unwrap();
            path.display().to_string()
        };
        for model in [&theirs, &on_theirs, &adapter("d", "none/of-that-name"), &weights(&theirs)] {
            assert_eq!(of(model), general, "{model}");
        }
        // Of a file what lies beside it tells, and a whole model is no adapter.
        assert_eq!(of(&weights(&ours)), rooms);
        adapter("ours", "none/of-that-name");
        assert_eq!(of(&ours), rooms);
        // One that lies on itself is refused later.
        assert_eq!(of(&adapter("e", &dir.path().join("e").display().to_string())), rooms);
    }
}
