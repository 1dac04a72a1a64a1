//! Pictures with questions, as JSON lines {"image", "question"}.

use crate::text::without_bom;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A line: what `infer --batch`, `reasoner.queries` and `grounding.queries` read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Relative to the file's folder.
    pub image: String,
    pub question: String,
}

/// A picture with every question about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// As the file names it.
    pub image: String,
    pub path: PathBuf,
    pub questions: Vec<String>,
}

/// The pictures of a file, in the order in which they first occur, each question once.
pub fn by_picture(path: &Path) -> Result<Vec<Asked>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut all: Vec<Asked> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for (line, number) in without_bom(&text).lines().zip(1..).filter(|(l, _)| !l.trim().is_empty()) {
        let named = || format!("{}, line {number}", path.display());
        let q: Query = serde_json::from_str(line)
            .with_context(|| format!("{}: expected {{\"image\", \"question\"}}", named()))?;
        let question = q.question.trim();
        ensure!(!question.is_empty(), "{}: the question is empty", named());
        let at = *places.entry(q.image.clone()).or_insert_with(|| {
            all.push(Asked { path: folder.join(&q.image), image: q.image.clone(), questions: Vec::new() });
            all.len() - 1
        });
        if !all[at].questions.iter().any(|known| known == question) {
            all[at].questions.push(question.to_owned());
        }
    }
    ensure!(!all.is_empty(), "{} holds no question", path.display());
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_gathered_by_picture_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        let line = |i: &str, q: &str| format!("{{\"image\": \"{i}\", \"question\": \"{q}\"}}\n");
        std::fs::write(&path, [line("a", "x?"), line("b", "y?"), line("a", "z?"), line("a", " x?")].concat())
            .unwrap();
        let got = by_picture(&path).unwrap();
        let short: Vec<_> = got.iter().map(|a| (a.image.as_str(), a.questions.join(" "))).collect();
        assert_eq!(short, [("a", "x? z?".to_owned()), ("b", "y?".to_owned())]);
        assert_eq!(got[0].path, dir.path().join("a"));
        std::fs::write(&path, "\u{feff}".to_owned() + &line("a", "x?")).unwrap();
        assert_eq!(by_picture(&path).unwrap()[0].questions, ["x?"]);
        std::fs::write(&path, line("a", "x?") + "{}\n").unwrap();
        assert!(format!("{:#}", by_picture(&path).unwrap_err()).contains("line 2"));
        std::fs::write(&path, line("a", " ")).unwrap();
        assert!(by_picture(&path).is_err());
    }
}
