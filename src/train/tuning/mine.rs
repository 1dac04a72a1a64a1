//! Mining: pictures and questions → boxes that a verifier stands by (method.md 5).
//!
//! The planner's programs tell what to look for, by their text and by being run; the detector looks with
//! thresholds so low that it finds too much; the verifier drops what is wrong. A picture's record is
//! appended to `pictures.jsonl` as soon as it is decided, and everything else in the folder is made anew
//! from it, so a killed run loses the pictures under way at most, and nothing is mined twice. What a
//! record says does not hang on where a run was broken off. A picture that cannot be read, or whose
//! verifier cannot be reached, has no record: the next run takes it up again.

use super::record::{self, Mined};
use crate::config::{Config, Mining};
use crate::data::odvg::LabelMap;
use crate::data::queries::Asked;
use crate::files::{sha256_hex, write_atomic};
use crate::llm::ChatError;
use crate::models::grounding_dino::caption::nouns_of;
use crate::models::grounding_dino::postprocess::{Thresholds, nms};
use crate::pipeline::{identity, question_seed};
use crate::planner::{self, Planner};
use crate::program::check::check;
use crate::program::{ErrorKind, IMAGE, Reply, Sandbox};
use crate::sight::{Detection, Picture, ToolErrorKind, Tools};
use crate::tools::real::{Perception, RealTools, vqa_prompts};
use crate::train::Broken;
use crate::verify::boxes::{BoxJudge, Case};
use anyhow::{Context, Result, bail, ensure};
use candle_core::Tensor;
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What mining takes.
pub struct Miner<'a> {
    pub config: &'a Config,
    pub planner: &'a Planner,
    pub perception: &'a Perception,
    pub judge: &'a BoxJudge,
    pub sandbox: Sandbox,
    pub dir: &'a Path,
    pub stop: &'a AtomicBool,
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub records: Vec<Mined>,
    /// Pictures that the verifier could not be asked about, with the first reason.
    pub unverified: (usize, Option<String>),
    /// Stopped before the last picture.
    pub stopped: bool,
}

pub const PICTURES: &str = "pictures.jsonl";

/// Pictures tried before their losses end a run.
const LEAST: usize = 16;

/// Words that tell where a thing is, not what it looks like: a detector takes "leftmost chair" for a
/// chair at best (method.md 2), so such a noun is not looked for.
const SPATIAL: [&str; 38] = [
    "left",
    "leftmost",
    "right",
    "rightmost",
    "top",
    "topmost",
    "bottom",
    "bottommost",
    "upper",
    "lower",
    "above",
    "below",
    "over",
    "under",
    "front",
    "back",
    "behind",
    "before",
    "near",
    "nearest",
    "nearer",
    "closest",
    "closer",
    "far",
    "farthest",
    "farther",
    "furthest",
    "middle",
    "center",
    "centre",
    "between",
    "beside",
    "next",
    "tallest",
    "largest",
    "smallest",
    "biggest",
    "highest",
];

/// Is it a name for a thing by its looks?
fn is_noun(noun: &str) -> bool {
    noun.chars().any(char::is_alphabetic)
        && noun.len() <= 60
        && !noun.split([' ', '-']).any(|word| SPATIAL.contains(&word))
}

impl Miner<'_> {
    fn cfg(&self) -> &Mining {
        &self.config.grounding.mining
    }

    /// What a folder's records hang on, of models and prompts what they are: files under one name can change.
    fn settings(&self) -> Result<Value> {
        let c = self.config;
        let mut of_run = json!(self.cfg());
        for free in ["missing_limit", "prompts", "model"] {
            of_run.as_object_mut().expect("a table").remove(free);
        }
        let prompts = format!("{}\n{:?}", planner::prompt(c)?, vqa_prompts(&c.vlm)?);
        Ok(json!({
            "mining": of_run, "seed": c.grounding.seed, "judge": self.judge.identity(),
            "queries": c.grounding.queries, "planner": self.planner.model.identity(),
            "planning": c.planner, "detector": c.detector, "depth": c.depth, "vlm": c.vlm,
            "detector_is": identity(c, &c.detector.model, "detector")?,
            "depth_is": identity(c, &c.depth.model, "depth")?, "vlm_is": identity(c, &c.vlm.model, "vlm")?,
            "prompts_sha256": sha256_hex(prompts.as_bytes(), 32), "sandbox": c.sandbox,
        }))
    }

    /// Mines those of `pictures` that the folder has no record of. `progress` hears how many are done.
    ///
    /// # Errors
    /// [`Broken`] if a model fails or too many pictures cannot be judged; what is mined stays. Others if
    /// the folder was mined with other settings, or cannot be written.
    pub fn run(&mut self, pictures: &[Asked], mut progress: impl FnMut(usize)) -> Result<Outcome> {
        std::fs::create_dir_all(self.dir).with_context(|| self.dir.display().to_string())?;
        self.same_settings()?;
        let path = self.dir.join(PICTURES);
        let (mut records, whole) = record::read(&path)?;
        let named = || path.display().to_string();
        let file = OpenOptions::new().create(true).append(true).open(&path).with_context(named)?;
        file.set_len(whole as u64).with_context(named)?;
        let by_name: HashMap<&str, &Asked> = pictures.iter().map(|p| (p.image.as_str(), p)).collect();
        for record in &records {
            let Some(picture) = by_name.get(record.image.as_str()) else { continue };
            ensure!(
                key(picture)? == record.key,
                "{} was mined with another picture or other questions of the name {:?}; name another --out",
                self.dir.display(),
                record.image
            );
        }
        let mut done: HashSet<String> = records.iter().map(|r| r.image.clone()).collect();
        let (mut through, before) = (done.len(), done.len());
        progress(through);
        let mut out = Outcome::default();
        // Always the same chunks, so that what is drawn for a picture does not hang on where a run began.
        for (first, chunk) in (0..).step_by(self.cfg().together).zip(pictures.chunks(self.cfg().together)) {
            let open: Vec<(usize, &Asked)> =
                (first..).zip(chunk).filter(|(_, p)| !done.contains(&p.image)).collect();
            if open.is_empty() {
                continue;
            }
            if self.stop.load(Ordering::Relaxed) {
                out.stopped = true;
                break;
            }
            let earlier: HashSet<&str> = pictures[..first].iter().map(|p| p.image.as_str()).collect();
            let vocabulary = record::vocabulary(records.iter().filter(|r| earlier.contains(&*r.image)));
            for m in self.mine(&open, &vocabulary)? {
                through += 1;
                match m {
                    Ok(record) => {
                        append(&file, &record).with_context(named)?;
                        done.insert(record.image.clone());
                        records.push(record);
                    }
                    Err(why) => {
                        out.unverified.0 += 1;
                        out.unverified.1.get_or_insert(why);
                    }
                }
            }
            file.sync_data().with_context(named)?;
            progress(through);
            self.check_losses(&out, through - before, LEAST)?;
        }
        if !out.stopped {
            self.check_losses(&out, through - before, 1)?;
        }
        out.records = records;
        Ok(out)
    }

    /// That not too many of the pictures `tried` were lost, if at least so many were.
    fn check_losses(&self, out: &Outcome, tried: usize, least: usize) -> Result<()> {
        let (lost, why) = &out.unverified;
        if tried < least || *lost as f64 <= self.cfg().missing_limit * tried as f64 {
            return Ok(());
        }
        Err(Broken(format!(
            "{lost} of {tried} pictures could not be mined, more than grounding.mining.missing_limit = {} \
             allows; the first: {}. What is mined is kept: mend that and start the command again",
            self.cfg().missing_limit,
            why.as_deref().unwrap_or_default(),
        ))
        .into())
    }

    fn same_settings(&self) -> Result<()> {
        let (path, is) = (self.dir.join("settings.json"), self.settings()?);
        if !path.exists() {
            write_atomic(&path, |w| writeln!(w, "{is:#}"))?;
            return Ok(());
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let was: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        let differ = crate::train::differences(&was, &is);
        ensure!(
            differ.is_empty(),
            "{} was mined with other settings ({}); name another --out",
            self.dir.display(),
            differ.join("; ")
        );
        Ok(())
    }

    /// Records of some pictures, by number and what is asked about them.
    fn mine(
        &mut self,
        chunk: &[(usize, &Asked)],
        vocabulary: &[String],
    ) -> Result<Vec<std::result::Result<Mined, String>>> {
        let seed = self.config.grounding.seed;
        let opened: Vec<std::result::Result<Picture, String>> =
            chunk.iter().map(|(_, a)| Picture::open(&a.path).map_err(|e| e.to_string())).collect();
        let mut asked: Vec<(&str, u64)> = Vec::new();
        let mut of = Vec::new();
        for (k, (i, a)) in chunk.iter().enumerate().filter(|(k, _)| opened[*k].is_ok()) {
            for (n, q) in a.questions.iter().enumerate() {
                asked.push((q, question_seed(seed, *i, n)));
                of.push(k);
            }
        }
        let replies = self.planner.ask(&asked, None);
        let mut programs: Vec<Vec<String>> = vec![Vec::new(); chunk.len()];
        let mut unplanned: Vec<Option<String>> = vec![None; chunk.len()];
        for (k, reply) in of.into_iter().zip(replies) {
            match reply {
                Ok(reply) => programs[k].extend(Reply::parse(&reply.text).ok().map(|r| r.program)),
                Err(e) if e.is_of_model() => return Err(gone("planner", &e)),
                Err(e) => unplanned[k] = Some(format!("the planner gave no reply: {e}")),
            }
        }
        let mut records = Vec::with_capacity(chunk.len());
        for (k, (_, a)) in chunk.iter().enumerate() {
            let blank = Mined {
                image: a.image.clone(),
                width: 0,
                height: 0,
                questions: a.questions.len(),
                programs: programs[k].len(),
                nouns: Vec::new(),
                found: Vec::new(),
                denied: Vec::new(),
                key: String::new(),
            };
            let picture = match (&opened[k], unplanned[k].take()) {
                (Err(why), _) => {
                    records.push((Err(why.clone()), Vec::new()));
                    continue;
                }
                (_, Some(why)) => {
                    records.push((Err(why), Vec::new()));
                    continue;
                }
                (Ok(picture), None) => picture,
            };
            let looked = self.prompts(&programs[k], picture).and_then(|p| Ok((self.find(picture, &p)?, p)));
            let (found, prompts) = match looked {
                Ok(both) => both,
                Err(why) => {
                    records.push((Err(why), Vec::new()));
                    continue;
                }
            };
            let mut nouns: Vec<String> = Vec::new();
            for noun in prompts.into_iter().flatten() {
                if !nouns.contains(&noun) {
                    nouns.push(noun);
                }
            }
            let (width, height) = (picture.width(), picture.height());
            let key = key(a)?;
            records.push((Ok(Mined { width, height, nouns, key, ..blank }), found));
        }
        self.verify(&opened, &mut records)?;
        self.deny(chunk, &opened, vocabulary, &mut records)?;
        Ok(records.into_iter().map(|r| r.0).collect())
    }

    /// The lists of nouns that programs give to the detector, each once; or which tool failed, so that programs
    /// may have stopped before one.
    fn prompts(
        &mut self,
        programs: &[String],
        picture: &Picture,
    ) -> std::result::Result<Vec<Vec<String>>, String> {
        let mut lists: Vec<Vec<String>> = Vec::new();
        let mut add = |nouns: Vec<String>| {
            let nouns: Vec<String> = nouns.into_iter().filter(|n| is_noun(n)).collect();
            if !nouns.is_empty() && !lists.contains(&nouns) {
                lists.push(nouns);
            }
        };
        for program in programs {
            if let Ok(checked) = check(program) {
                checked.prompts.iter().for_each(|p| add(nouns_of(p)));
            }
        }
        let mut tools = RealTools::new(self.perception, picture);
        for program in programs {
            // Whatever the program makes of it, if it can be run.
            let ended = self.sandbox.run(program, IMAGE, &mut tools).result;
            if let Err(e) = ended
                && e.kind == ErrorKind::NoSandbox
            {
                return Err(e.to_string());
            }
        }
        if let Some(why) = tools.outage() {
            return Err(why);
        }
        let mut looked_for: Vec<Vec<String>> = tools.looked_for().map(<[String]>::to_vec).collect();
        looked_for.sort();
        looked_for.into_iter().for_each(add);
        Ok(lists)
    }

    /// Far too many boxes, best first.
    fn find(
        &self,
        picture: &Picture,
        prompts: &[Vec<String>],
    ) -> std::result::Result<Vec<Detection>, String> {
        let detector = &self.perception.detector;
        let thresholds = Thresholds {
            boxes: self.cfg().box_threshold as f32,
            text: self.cfg().text_threshold as f32,
            nms: None,
        };
        let failed = |e: &dyn std::fmt::Display| format!("the detector failed: {e}");
        let pixels: Tensor = detector.pixels(picture).map_err(|e| failed(&e))?;
        let mut found = Vec::new();
        for nouns in prompts {
            match detector.detect_above(&pixels, (picture.height(), picture.width()), nouns, thresholds) {
                Ok(boxes) => found.extend(boxes),
                // A list that is too long for the detector is one that it would refuse a program, too.
                Err(e) if e.kind == ToolErrorKind::Value => {}
                Err(e) => return Err(failed(&e.message)),
            }
        }
        found.sort_by(|a, b| b.score.unwrap_or(0.).total_cmp(&a.score.unwrap_or(0.)));
        Ok(nms(found, self.cfg().nms))
    }

    fn verify(
        &self,
        opened: &[std::result::Result<Picture, String>],
        records: &mut [(std::result::Result<Mined, String>, Vec<Detection>)],
    ) -> Result<()> {
        let open: Vec<usize> =
            (0..records.len()).filter(|&k| records[k].0.is_ok() && opened[k].is_ok()).collect();
        let cases: Vec<Case> = open
            .iter()
            .map(|&k| Case { picture: opened[k].as_ref().expect("filtered above"), boxes: &records[k].1 })
            .collect();
        let judged = self.judge.judge(&cases).map_err(|e| gone("verifier of boxes", &e))?;
        for (k, decisions) in open.into_iter().zip(judged) {
            let (record, boxes) = &mut records[k];
            match (decisions, record.as_mut()) {
                (Err(why), _) => *record = Err(why),
                (Ok(decisions), Ok(record)) => {
                    record.found = std::mem::take(boxes)
                        .into_iter()
                        .zip(decisions)
                        .map(|(b, d)| record::Found {
                            // Whole hundredths of a pixel are read more easily.
                            bbox: b.bbox.map(|v| (v * 100.).round() / 100.),
                            label: b.label,
                            score: (b.score.unwrap_or(0.) * 1e4).round() / 1e4,
                            dropped: d.dropped,
                            unsure: d.unsure,
                            reason: d.reason,
                        })
                        .collect();
                }
                (Ok(_), Err(_)) => {}
            }
        }
        Ok(())
    }

    /// Has the verifier deny nouns on the whole picture: those all of whose boxes show something else, since a
    /// thing that the detector missed is no hard negative; and some that other pictures were asked for.
    fn deny(
        &self,
        chunk: &[(usize, &Asked)],
        opened: &[std::result::Result<Picture, String>],
        vocabulary: &[String],
        records: &mut [(std::result::Result<Mined, String>, Vec<Detection>)],
    ) -> Result<()> {
        let (mut asked, mut at) = (Vec::new(), Vec::new());
        for (k, (i, _)) in chunk.iter().enumerate() {
            let (Ok(record), Ok(picture)) = (&records[k].0, &opened[k]) else { continue };
            let mut rng =
                ChaCha8Rng::seed_from_u64(question_seed(self.config.grounding.seed, *i, usize::MAX));
            let others: Vec<&String> = vocabulary.iter().filter(|n| !record.nouns.contains(n)).collect();
            let drawn = others.choose_multiple(&mut rng, self.cfg().negatives).copied();
            let missed = record.nouns.iter().filter(|n| record.shows_only_others(n));
            for noun in missed.chain(drawn) {
                asked.push((picture, noun.clone()));
                at.push(k);
            }
        }
        let asks: Vec<(&Picture, &str)> = asked.iter().map(|(p, n)| (*p, n.as_str())).collect();
        let replies = self.judge.deny(&asks).map_err(|e| gone("verifier of boxes", &e))?;
        for ((k, (_, noun)), reply) in at.into_iter().zip(asked).zip(replies) {
            match (reply, &mut records[k].0) {
                (Ok(Some(true)), Ok(record)) => record.denied.push(noun),
                // What nobody denies is no negative.
                (Ok(_), _) | (Err(_), Err(_)) => {}
                (Err(why), record) => *record = Err(why),
            }
        }
        Ok(())
    }
}

/// What a record is of: the picture's bytes and the questions about it.
fn key(asked: &Asked) -> Result<String> {
    use sha2::{Digest, Sha256};
    let bytes = std::fs::read(&asked.path).with_context(|| asked.path.display().to_string())?;
    let mut hash = Sha256::new();
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
    asked.questions.iter().for_each(|q| hash.update(format!("{q}\n")));
    Ok(hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect())
}

fn gone(who: &str, e: &ChatError) -> anyhow::Error {
    Broken(format!("the {who} failed: {e}. What is mined is kept: start the command again to go on")).into()
}

fn append(mut file: &File, record: &Mined) -> Result<()> {
    let mut line = serde_json::to_string(record)?;
    line.push('\n');
    // One write a line, so that a kill leaves at most one half.
    file.write_all(line.as_bytes())?;
    Ok(())
}

/// Writes `odvg.jsonl` and `label_map.json` from the records; file names in it are relative to the folder,
/// where `pictures` says what those of the records are relative to. Ids that the folder's map has given
/// stay.
///
/// # Errors
/// [`Broken`] if no box is left; what an earlier run has written is then taken away.
pub fn export(dir: &Path, records: &[Mined], pictures: &Path) -> Result<usize> {
    let map = dir.join("label_map.json");
    let mut labels = if map.exists() { LabelMap::read(&map)? } else { LabelMap::default() };
    let mut lines = record::odvg(records, &mut labels);
    let back = between(dir, pictures)?;
    for line in &mut lines {
        line.filename = back.join(&line.filename).to_string_lossy().into_owned();
    }
    let kept: usize = lines.iter().map(|r| r.detection.instances.len()).sum();
    if kept == 0 {
        // Nouns that it denies would still teach: that nothing is anywhere.
        let _ = std::fs::remove_file(dir.join("odvg.jsonl"));
        bail!(Broken(format!(
            "nothing to train on: of {} boxes in {} pictures the verifier kept none. Look at {}/report.html: either \
             the detector finds nothing, or the verifier knows nothing",
            records.iter().map(|r| r.found.len()).sum::<usize>(),
            records.len(),
            dir.display()
        )))
    }
    // The map first: an id must be known before it is used.
    write_atomic(&map, |w| writeln!(w, "{}", labels.to_json()))?;
    write_atomic(&dir.join("odvg.jsonl"), |w| {
        lines.iter().try_for_each(|r| writeln!(w, "{}", serde_json::to_string(r)?))
    })?;
    Ok(lines.len())
}

/// The way from one folder to another, as short as it is where neither moves alone.
fn between(from: &Path, to: &Path) -> Result<PathBuf> {
    let whole = |p: &Path| {
        let p = if p.as_os_str().is_empty() { Path::new(".") } else { p };
        p.canonicalize().with_context(|| p.display().to_string())
    };
    let (from, to) = (whole(from)?, whole(to)?);
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    Ok(up.chain(to.components().skip(common)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_between_folders() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("run/mined"), dir.path().join("run/rooms"));
        std::fs::create_dir_all(&a).unwrap();
        std::fs::create_dir_all(&b).unwrap();
        assert_eq!(between(&a, &b).unwrap(), Path::new("../rooms"));
        assert_eq!(between(&a, dir.path()).unwrap(), Path::new("../.."));
        assert_eq!(between(&a, &a).unwrap(), Path::new(""));
    }

    #[test]
    fn where_a_thing_is_is_no_part_of_its_name() {
        for (noun, want) in [
            ("chair", true),
            ("red coffee table", true),
            ("leftmost chair", false),
            ("chair next to the sofa", false),
            ("top-left lamp", false),
            ("laptop", true),
            ("12", false),
            ("", false),
        ] {
            assert_eq!(is_noun(noun), want, "{noun:?}");
        }
    }
}
