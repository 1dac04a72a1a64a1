//! Published checkpoints by short names.

use super::source::{HubSource, RepoKind};

/// What a checkpoint can be in a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Planner or verifier.
    Language,
    Vlm,
    Detector,
    Depth,
}

impl Part {
    pub fn word(self) -> &'static str {
        match self {
            Self::Language => "planner, verifier",
            Self::Vlm => "vlm",
            Self::Detector => "detector",
            Self::Depth => "depth",
        }
    }

    /// Can such a network do the work of a configuration's part? One that sees can also read.
    pub fn serves(self, part: &str) -> bool {
        match part {
            "detector" => self == Self::Detector,
            "depth" => self == Self::Depth,
            "vlm" | "box-verifier" => self == Self::Vlm,
            "planner" | "verifier" | "judge" => matches!(self, Self::Language | Self::Vlm),
            // Of no part in particular.
            _ => true,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Preset {
    pub name: &'static str,
    pub part: Part,
    /// `owner/name` on the hub.
    repo: &'static str,
}

impl Preset {
    pub fn source(&self) -> HubSource {
        let (kind, revision) = (RepoKind::Model, "main".into());
        HubSource { kind, repo: self.repo.into(), revision, file: None }
    }
}

const fn preset(name: &'static str, part: Part, repo: &'static str) -> Preset {
    Preset { name, part, repo }
}

/// The paper's models and their smaller and larger relatives (method.md 9).
pub const ALL: &[Preset] = &[
    preset("qwen3-0.6b", Part::Language, "Qwen/Qwen3-0.6B"),
    preset("qwen3-1.7b", Part::Language, "Qwen/Qwen3-1.7B"),
    preset("qwen3-4b", Part::Language, "Qwen/Qwen3-4B"),
    preset("qwen3-8b", Part::Language, "Qwen/Qwen3-8B"),
    preset("qwen3-14b", Part::Language, "Qwen/Qwen3-14B"),
    preset("qwen3-32b", Part::Language, "Qwen/Qwen3-32B"),
    preset("valor-8b", Part::Language, "glab-caltech/VALOR-8B"),
    preset("grounding-dino-tiny", Part::Detector, "IDEA-Research/grounding-dino-tiny"),
    preset("grounding-dino-base", Part::Detector, "IDEA-Research/grounding-dino-base"),
    preset("valor-grounding-dino", Part::Detector, "glab-caltech/VALOR-GroundingDINO"),
    preset("moge-2-vits", Part::Depth, "Ruicheng/moge-2-vits-normal"),
    preset("moge-2-vitb", Part::Depth, "Ruicheng/moge-2-vitb-normal"),
    preset("moge-2-vitl", Part::Depth, "Ruicheng/moge-2-vitl-normal"),
    preset("qwen3-vl-2b", Part::Vlm, "Qwen/Qwen3-VL-2B-Instruct"),
    preset("qwen3-vl-4b", Part::Vlm, "Qwen/Qwen3-VL-4B-Instruct"),
    preset("qwen3-vl-8b", Part::Vlm, "Qwen/Qwen3-VL-8B-Instruct"),
];

pub fn by_name(name: &str) -> Option<&'static Preset> {
    ALL.iter().find(|p| p.name == name)
}

/// Of the presets that can be a configuration's part the one whose name is most like this one.
pub fn nearest(name: &str, part: &str) -> &'static Preset {
    let of_part = ALL.iter().filter(|p| p.part.serves(part));
    of_part.min_by_key(|p| strsim::damerau_levenshtein(p.name, name)).expect("each part has presets")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_repositories_are_well_formed() {
        for (i, p) in ALL.iter().enumerate() {
            assert!(ALL[i + 1..].iter().all(|q| q.name != p.name), "{}", p.name);
            assert_eq!(HubSource::parse(p.repo).unwrap(), p.source());
        }
        assert_eq!(nearest("qwen3-8B", "model").name, "qwen3-8b");
    }

    #[test]
    fn what_is_suggested_can_do_the_parts_work() {
        for part in ["planner", "verifier", "judge", "vlm", "box-verifier", "detector", "depth"] {
            for name in ["qwen3-8b", "grounding-dino", "moge", "?"] {
                assert!(nearest(name, part).part.serves(part), "{name} as {part}");
            }
        }
        assert_eq!(nearest("qwen3-8b", "vlm").name, "qwen3-vl-8b");
        assert_eq!(nearest("grounding-dino-large", "depth").part, Part::Depth);
    }
}
