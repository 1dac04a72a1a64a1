//! What suits a model where nothing was said. The defaults are those of the embedded models, small ones that
//! know rooms; a released checkpoint at 144 pixels or after eight tokens would answer worse than it can, and
//! say nothing of it.

use toml::{Table, Value};

use super::{ENDPOINT, Origins};
use crate::weights::gguf::is_gguf;
use crate::weights::source::Source;

/// Where a model is from, as far as its name tells.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum From {
    Embedded,
    /// A folder or file: a released checkpoint, or what a training here has left.
    Path,
    /// The hub, a server, a GGUF file: none of ours.
    Elsewhere,
}

impl From {
    fn of(model: &str) -> Self {
        match Source::parse(model) {
            _ if model.is_empty() => Self::Embedded,
            _ if model.starts_with(ENDPOINT) || is_gguf(model) => Self::Elsewhere,
            Ok(Source::Embedded { .. }) => Self::Embedded,
            Ok(Source::Path(_)) => Self::Path,
            // What is no source is refused later, by its name.
            Ok(Source::Hub(_) | Source::Preset(_)) | Err(_) => Self::Elsewhere,
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
        if From::of(model) >= least && !origins.contains_key(&full) {
            origins.insert(full, format!("suits {part}.model = {model}"));
            section.insert(key.into(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

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
        // A planner that was trained here wants the instructions of its training.
        let (c, _) = of(&["planner.model=runs/reasoner/model", "detector.model=runs/tuned/model"]);
        assert_eq!((c.planner.prompt.as_str(), c.planner.max_new_tokens), ("rooms", 320));
        assert_eq!((c.detector.shortest_side, c.detector.box_threshold), (0, ours.detector.box_threshold));
    }
}
