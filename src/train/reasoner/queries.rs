//! The questions that a reasoner is trained on: no pictures, no answers.

use crate::config;
use crate::eval::rooms::questions;
use crate::rooms::demos::training_question;
use crate::rooms::{Look, Question, View};
use crate::text::without_bom;
use anyhow::{Context, Result, ensure};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// `reasoner.queries` for questions about rooms.
pub const ROOMS: &str = "rooms";

/// Questions asked at an evaluation.
pub enum HeldOut {
    /// With rooms, so that answers on exact tools can be compared beside.
    Rooms(Vec<(Arc<View>, Question)>),
    Questions(Vec<String>),
}

impl HeldOut {
    pub fn texts(&self) -> Vec<&str> {
        match self {
            Self::Rooms(asked) => asked.iter().map(|(_, q)| q.text.as_str()).collect(),
            Self::Questions(all) => all.iter().map(String::as_str).collect(),
        }
    }
}

/// Sets the rooms of held-out questions apart from those that a seed names elsewhere.
const HELD_OUT: u64 = 0x6865_6c64_206f_7574;

/// What is trained on, and what is not.
pub struct Queries {
    pub training: Vec<String>,
    pub held_out: HeldOut,
}

impl Queries {
    pub fn open(cfg: &config::Reasoner) -> Result<Self> {
        if cfg.queries == ROOMS {
            ensure!(
                cfg.questions > 0,
                "reasoner.questions: of rooms there is no end of questions; say how many"
            );
            let mut rng = ChaCha8Rng::seed_from_u64(cfg.seed);
            let mut seen = HashSet::new();
            let mut training = Vec::with_capacity(cfg.questions);
            while training.len() < cfg.questions {
                let (_, question) = training_question(&mut rng);
                if seen.insert(question.clone()) {
                    training.push(question);
                }
            }
            // Whoever sees no picture knows a question again by its words. They choose the best policy: what
            // `eval --bench rooms` asks with the same seed are others.
            let held_out =
                questions(Look::Studio, cfg.seed ^ HELD_OUT).filter(|(_, q)| !seen.contains(&q.text));
            let held_out = held_out.take(cfg.held_out).collect();
            return Ok(Self { training, held_out: HeldOut::Rooms(held_out) });
        }
        let mut all = read(Path::new(&cfg.queries)).context("reasoner.queries")?;
        all.shuffle(&mut ChaCha8Rng::seed_from_u64(cfg.seed));
        ensure!(
            all.len() > cfg.held_out,
            "{} has {} questions, and reasoner.held_out keeps {} of them: none is left to train on",
            cfg.queries,
            all.len(),
            cfg.held_out
        );
        let held_out = all.split_off(all.len() - cfg.held_out);
        if cfg.questions > 0 {
            all.truncate(cfg.questions);
        }
        Ok(Self { training: all, held_out: HeldOut::Questions(held_out) })
    }

    /// Numbers of the questions of a step, `round` of its resampling: each question comes once an
    /// epoch, in an order of that epoch's.
    pub fn batch(&self, cfg: &config::Reasoner, step: u64, round: u64) -> Vec<usize> {
        let n = self.training.len();
        let order = |epoch: u64| {
            let mut all: Vec<usize> = (0..n).collect();
            let mut rng = ChaCha8Rng::seed_from_u64(cfg.seed);
            rng.set_stream(1 + epoch + (round << 32));
            all.shuffle(&mut rng);
            all
        };
        let first = step as usize * cfg.batch;
        let mut out = Vec::with_capacity(cfg.batch);
        while out.len() < cfg.batch {
            let at = first + out.len();
            let rest = &order((at / n) as u64)[at % n..];
            out.extend(rest.iter().take(cfg.batch - out.len()));
        }
        out
    }
}

/// The distinct questions of a file, in their order.
fn read(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}; give a file of questions, or rooms", path.display()))?;
    let text = without_bom(&text);
    let name = path.display();
    let expected = "expected a text, or an object with \"question\", \"query\" or \"problem\"";
    let question = |v: &Value, at: usize| -> Result<String> {
        let found = ["question", "query", "problem"].iter().find_map(|k| v.get(k)?.as_str());
        let text = v.as_str().or(found).with_context(|| format!("{name}, entry {at}: {expected}"))?;
        Ok(text.trim().to_owned())
    };
    let lines = || text.lines().map(str::trim).zip(1..).filter(|(l, _)| !l.is_empty());
    let all: Vec<String> = if text.trim_start().starts_with('[') {
        let all: Vec<Value> = serde_json::from_str(text).with_context(|| {
            format!("{name} begins as a JSON list and is none; a file of one question a line must not begin with [")
        })?;
        all.iter().zip(1..).map(|(v, at)| question(v, at)).collect::<Result<_>>()?
    } else if lines().next().is_some_and(|(l, _)| l.starts_with(['{', '"'])) {
        lines()
            .map(|(l, at)| {
                let v = serde_json::from_str(l).with_context(|| format!("{name}, line {at}: {expected}"))?;
                question(&v, at)
            })
            .collect::<Result<_>>()?
    } else {
        lines().map(|(l, _)| l.to_owned()).collect()
    };
    let mut seen = HashSet::new();
    let all: Vec<String> = all.into_iter().filter(|q| !q.is_empty() && seen.insert(q.clone())).collect();
    ensure!(!all.is_empty(), "{name} holds no question");
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn cfg(sets: &[String]) -> config::Reasoner {
        Config::resolve(None, sets).unwrap().reasoner
    }

    fn of(text: &str) -> Result<Vec<String>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn questions_are_read_in_three_forms() {
        let want = ["How many?", "Which one?"];
        for text in [
            "How many?\n\nWhich one?\nHow many?\n",
            "{\"question\": \"How many?\"}\n{\"problem\": \" Which one? \"}\n",
            "\u{feff}{\"question\": \"How many?\"}\n{\"problem\": \" Which one? \"}\n",
            "[\"How many?\", {\"query\": \"Which one?\"}]",
        ] {
            assert_eq!(of(text).unwrap(), want, "{text}");
        }
        let e = format!("{:#}", of("{\"question\": \"a\"}\n{\"q\": 1}\n").unwrap_err());
        assert!(e.contains("entry 2") && e.contains("problem"), "{e}");
        let e = format!("{:#}", of("{\"question\": \"a\"}\n{\"question\n").unwrap_err());
        assert!(e.contains("line 2"), "{e}");
        assert!(of("\n").is_err());
        // Not read as lines.
        for text in
            ["[\"How many?\",\n \"Which one?\"\n", "[\"How many?\",\n Which one?]\n", "['How many?']\n"]
        {
            let e = format!("{:#}", of(text).unwrap_err());
            assert!(e.contains("begins as a JSON list and is none") && e.contains(" at line "), "{e}");
        }
        assert_eq!(of(" [\"[1] How many?\"]\n").unwrap(), ["[1] How many?"]);
    }

    #[test]
    fn an_epoch_asks_each_question_once_and_orders_differ() {
        let cfg =
            cfg(&["reasoner.questions=10".into(), "reasoner.batch=4".into(), "reasoner.held_out=0".into()]);
        let q = Queries::open(&cfg).unwrap();
        assert_eq!(q.training.len(), 10);
        let all: Vec<usize> = (0..5).flat_map(|step| q.batch(&cfg, step, 0)).collect();
        let mut epochs: Vec<Vec<usize>> = all.chunks(10).map(<[usize]>::to_vec).collect();
        assert_ne!(epochs[0], epochs[1]);
        epochs.iter_mut().for_each(|e| e.sort_unstable());
        assert_eq!(epochs, vec![(0..10).collect::<Vec<_>>(); 2]);
        assert_ne!(q.batch(&cfg, 0, 0), q.batch(&cfg, 0, 1), "resampling asks others");
    }

    #[test]
    fn held_out_questions_are_not_trained_on() {
        let of_rooms =
            Queries::open(&cfg(&["reasoner.questions=3000".into(), "reasoner.held_out=200".into()])).unwrap();
        let kept = of_rooms.held_out.texts();
        assert_eq!(kept.len(), 200);
        assert!(of_rooms.training.iter().all(|t| !kept.contains(&t.as_str())));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.txt");
        std::fs::write(&path, (0..20).map(|i| format!("Question {i}?\n")).collect::<String>()).unwrap();
        let file = format!("reasoner.queries={}", path.display());
        let q = Queries::open(&cfg(&[file.clone(), "reasoner.held_out=5".into()])).unwrap();
        let kept: Vec<&str> = q.held_out.texts();
        assert_eq!((q.training.len(), kept.len()), (15, 5));
        assert!(q.training.iter().all(|t| !kept.contains(&t.as_str())));
        assert!(Queries::open(&cfg(&[file, "reasoner.held_out=20".into()])).is_err());
    }
}
