//! What mining found out about each picture, and what follows from it: ODVG to train on, and how good
//! each stage of verification was where the truth is known.

use crate::data::odvg::{Boxes, Detected, Instance, LabelMap, Record};
use crate::data::queries::Asked;
use crate::eval::stats::Share;
use crate::sight::{BBox, bbox};
use crate::text::without_bom;
use crate::verify::boxes::Stage;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// One picture: a line of `pictures.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mined {
    /// Relative to the queries' folder.
    pub image: String,
    pub width: u32,
    pub height: u32,
    pub questions: usize,
    /// Of the questions' replies, those that held a program.
    pub programs: usize,
    /// What the programs look for.
    pub nouns: Vec<String>,
    pub found: Vec<Found>,
    /// Nouns that the verifier says are not in the picture.
    pub denied: Vec<String>,
    /// Hash of the picture and its questions.
    pub key: String,
}

/// A box and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    pub bbox: BBox,
    pub label: String,
    pub score: f64,
    /// The stage that dropped it.
    pub dropped: Option<Stage>,
    /// Dropped since nothing certain was said.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsure: bool,
    pub reason: String,
}

impl Mined {
    /// Were there boxes of that name, none of which shows one?
    pub fn shows_only_others(&self, noun: &str) -> bool {
        let mut of = self.found.iter().filter(|f| f.label == noun).peekable();
        of.peek().is_some() && of.all(|f| f.dropped == Some(Stage::Coarse) && !f.unsure)
    }
}

/// A person's word on a box: a line of the file of `--overrule`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overrule {
    pub image: String,
    /// Of [`Mined::found`].
    pub index: usize,
    pub keep: bool,
}

/// The overrules of a file, each with its place for messages.
pub fn overrules(path: &Path) -> Result<Vec<(String, Overrule)>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read --overrule {}", path.display()))?;
    let lines = without_bom(&text).lines().zip(1..).filter(|(l, _)| !l.trim().is_empty());
    let read = lines.map(|(line, number)| {
        let at = format!("--overrule {}, line {number}", path.display());
        let o = serde_json::from_str(line)
            .with_context(|| format!("{at}: expected {{\"image\", \"index\", \"keep\"}}"))?;
        Ok((at, o))
    });
    read.collect()
}

/// That a file of overrules can be followed, as far as it can be told before mining: each is of a picture
/// that is to be mined or is mined, and if that is mined, of one of its boxes.
pub fn check_overrules(path: &Path, records: &[Mined], pictures: &[Asked]) -> Result<()> {
    for (at, o) in overrules(path)? {
        match records.iter().find(|r| r.image == o.image) {
            Some(record) => ensure!(o.index < record.found.len(), "{}", no_such_box(&at, &o, record)),
            None => ensure!(
                pictures.iter().any(|p| p.image == o.image),
                "{at}: {:?} is none of the pictures of grounding.queries",
                o.image
            ),
        }
    }
    Ok(())
}

fn no_such_box(at: &str, o: &Overrule, record: &Mined) -> String {
    format!("{at}: {:?} has {} boxes, numbered from 0, and none is {}", o.image, record.found.len(), o.index)
}

/// Reads a file of overrules and puts them into the records.
pub fn overrule(records: &mut [Mined], path: &Path) -> Result<usize> {
    let mut n = 0;
    for (at, o) in overrules(path)? {
        let Some(record) = records.iter_mut().find(|r| r.image == o.image) else {
            bail!("{at}: {:?} was not mined", o.image)
        };
        if o.index >= record.found.len() {
            bail!("{}", no_such_box(&at, &o, record))
        }
        let found = &mut record.found[o.index];
        found.dropped = (!o.keep).then_some(Stage::Coarse);
        found.unsure = false;
        found.reason = "overruled".into();
        n += 1;
    }
    Ok(n)
}

/// The records to train on, in their order. A noun all of whose boxes show something else, and which the
/// verifier denies on the whole picture, is a hard negative (method.md 5.4). Boxes that show their noun but do not frame it are regions where nothing
/// is known, and so is their noun elsewhere in the picture: it is no negative.
pub fn odvg(records: &[Mined], labels: &mut LabelMap) -> Vec<Record> {
    let all = records.iter();
    all.map(|r| {
        let mut detection = Detected::default();
        for f in &r.found {
            match f.dropped {
                None => detection.instances.push(Instance {
                    bbox: f.bbox,
                    label: labels.id(&f.label),
                    category: f.label.clone(),
                    area: None,
                }),
                // A box over most of the picture would hide all that is wrong in it.
                Some(stage) => {
                    // A duplicate's object is in the box that stays. Without one it was no duplicate, and is unknown.
                    let stays = |k: &Found| {
                        k.dropped.is_none() && k.label == f.label && bbox::intersection(k.bbox, f.bbox) > 0.
                    };
                    let lone = stage == Stage::Dedupe && !r.found.iter().any(stays);
                    let small = bbox::area(f.bbox) <= 0.5 * f64::from(r.width) * f64::from(r.height);
                    if (stage == Stage::Crop || f.unsure || lone) && small {
                        detection.ignore.push(f.bbox);
                    }
                }
            }
        }
        for noun in &r.denied {
            if r.shows_only_others(noun) {
                detection.hard_negatives.push(noun.clone());
            } else if !r.found.iter().any(|f| f.label == *noun) {
                detection.absent.push(noun.clone());
            }
        }
        Record { filename: r.image.clone(), height: r.height, width: r.width, detection }
    })
    // A picture about which nothing is known teaches nothing.
    .filter(|r| {
        let d = &r.detection;
        !(d.instances.is_empty() && d.hard_negatives.is_empty() && d.absent.is_empty())
    })
    .collect()
}

/// How good the boxes are that are left after a stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageRow {
    /// `found`, or a stage.
    pub after: &'static str,
    pub boxes: usize,
    pub precision: Share,
    /// Of the true things that were asked for.
    pub recall: Share,
}

#[derive(Clone, Debug, Serialize)]
pub struct Precision {
    pub rows: Vec<StageRow>,
    /// Precision of the best-scored boxes, as many as have the last row's recall, and their threshold:
    /// what verification has to beat.
    pub threshold: f64,
    pub by_threshold: Share,
    /// Of hard negatives and denied nouns, those that are really not there.
    pub negatives: Share,
}

/// A right box overlaps a thing of its name, which no better box has taken, by this IoU.
const RIGHT: f64 = 0.5;

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Right,
    Wrong,
    /// On a region where nothing is known.
    Neither,
}

/// Measures records against true boxes of the same file names. `None` if they have no picture in common.
pub fn precision(records: &[Mined], truth: &Boxes) -> Option<Precision> {
    let of: HashMap<&str, &Record> = truth.records.iter().map(|r| (r.filename.as_str(), r)).collect();
    let known: Vec<(u64, &Mined, &Record)> =
        records.iter().zip(0..).filter_map(|(r, i)| Some((i, r, *of.get(r.image.as_str())?))).collect();
    if known.is_empty() {
        return None;
    }
    let measure = |keep: &dyn Fn(&Found) -> bool| {
        let (mut right, mut all, mut found) = (Vec::new(), Vec::new(), 0);
        for &(i, r, truth) in &known {
            let kept: Vec<&Found> = r.found.iter().filter(|f| keep(f)).collect();
            found += kept.len();
            let (fates, taken) = judge(&kept, &r.nouns, truth);
            right.extend(fates.into_iter().filter(|f| *f != Fate::Neither).map(|f| (i, f == Fate::Right)));
            all.extend(taken.into_iter().map(|t| (i, t)));
        }
        (found, Share::clustered(right), Share::clustered(all))
    };
    let after = |stages: &[Stage]| {
        let stages = stages.to_vec();
        move |f: &Found| f.dropped.is_none_or(|s| !stages.contains(&s))
    };
    let mut rows = Vec::new();
    for (n, name) in [(0, "found"), (1, "coarse"), (2, "crop"), (3, "dedupe")] {
        let (boxes, precision, recall) = measure(&after(&Stage::ALL[..n]));
        rows.push(StageRow { after: name, boxes, precision, recall });
    }
    // The highest threshold that finds as much; recall falls as it rises.
    let wanted = rows[3].recall.value;
    let mut scores: Vec<f64> = known.iter().flat_map(|k| &k.1.found).map(|f| f.score).collect();
    scores.sort_by(f64::total_cmp);
    scores.dedup();
    let enough = |t: f64| measure(&|f: &Found| f.score >= t).2.value >= wanted;
    let at = scores.partition_point(|&t| enough(t));
    let threshold = scores.get(at.saturating_sub(1)).copied().unwrap_or(0.);
    let (_, by_threshold, _) = measure(&|f: &Found| f.score >= threshold);
    let mut labels = LabelMap::default();
    let made = odvg(records, &mut labels);
    let denied = made.iter().enumerate().flat_map(|(i, r)| {
        let there = of.get(r.filename.as_str()).map(|t| &t.detection.instances);
        let nouns = r.detection.hard_negatives.iter().chain(&r.detection.absent);
        nouns.filter_map(move |n| Some((i as u64, !there?.iter().any(|t| t.category == *n))))
    });
    let negatives = Share::clustered(denied);
    Some(Precision { rows, threshold, by_threshold, negatives })
}

/// What each box is, best first; and of the true things that were asked for, which are found.
fn judge(kept: &[&Found], nouns: &[String], truth: &Record) -> (Vec<Fate>, Vec<bool>) {
    let things: Vec<&Instance> =
        truth.detection.instances.iter().filter(|t| nouns.contains(&t.category)).collect();
    let mut taken = vec![false; things.len()];
    let mut order: Vec<usize> = (0..kept.len()).collect();
    order.sort_by(|&a, &b| kept[b].score.total_cmp(&kept[a].score));
    let mut fates = vec![Fate::Wrong; kept.len()];
    for i in order {
        let f = kept[i];
        let best = (0..things.len())
            .filter(|&k| !taken[k] && things[k].category == f.label)
            .map(|k| (k, bbox::iou(f.bbox, things[k].bbox)))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        fates[i] = match best {
            Some((k, iou)) if iou >= RIGHT => {
                taken[k] = true;
                Fate::Right
            }
            _ => {
                let on = |r: &BBox| bbox::intersection(f.bbox, *r) > 0.5 * bbox::area(f.bbox);
                if truth.detection.ignore.iter().any(on) { Fate::Neither } else { Fate::Wrong }
            }
        };
    }
    (fates, taken)
}

impl Precision {
    /// For a terminal.
    pub fn table(&self) -> String {
        let mut out = format!("{:<10} {:>6}  {:<24} {:<24}\n", "after", "boxes", "precision", "recall");
        for r in &self.rows {
            out += &format!(
                "{:<10} {:>6}  {:<24} {:<24}\n",
                r.after,
                r.boxes,
                r.precision.to_string(),
                r.recall.to_string()
            );
        }
        out += &format!(
            "by score   at the same recall (scores from {:.2}): {}\nnegatives  really absent: {}\n",
            self.threshold, self.by_threshold, self.negatives
        );
        out
    }
}

/// Nouns by how many pictures were asked for them, the most frequent first.
pub fn vocabulary<'a>(records: impl IntoIterator<Item = &'a Mined>) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for noun in records.into_iter().flat_map(|r| &r.nouns) {
        *counts.entry(noun).or_default() += 1;
    }
    let mut all: Vec<(&str, usize)> = counts.into_iter().collect();
    all.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    all.into_iter().map(|(noun, _)| noun.to_owned()).collect()
}

/// The records of a file that an earlier session wrote, without a last line that it did not finish.
pub fn read(path: &Path) -> Result<(Vec<Mined>, usize)> {
    let bytes = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes.with_context(|| format!("cannot read {}", path.display()))?,
    };
    // The half line may end within a character.
    let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
    let text = std::str::from_utf8(&bytes[..whole]).with_context(|| path.display().to_string())?;
    let (mut records, mut seen) = (Vec::<Mined>::new(), HashSet::new());
    for (line, number) in text.lines().zip(1..) {
        let record: Mined =
            serde_json::from_str(line).with_context(|| format!("{}, line {number}", path.display()))?;
        ensure!(
            seen.insert(record.image.clone()),
            "{}, line {number}: {:?} stands there twice",
            path.display(),
            record.image
        );
        records.push(record);
    }
    Ok((records, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(label: &str, x: f64, score: f64, dropped: Option<Stage>) -> Found {
        Found {
            bbox: [x, 0., x + 10., 10.],
            label: label.into(),
            score,
            dropped,
            unsure: false,
            reason: String::new(),
        }
    }

    fn mined(nouns: &[&str], found: Vec<Found>, denied: &[&str]) -> Mined {
        Mined {
            image: "a.png".into(),
            width: 100,
            height: 50,
            questions: 1,
            programs: 1,
            nouns: nouns.iter().map(|n| n.to_string()).collect(),
            found,
            denied: denied.iter().map(|n| n.to_string()).collect(),
            key: String::new(),
        }
    }

    #[test]
    fn what_was_only_badly_framed_is_no_negative() {
        let r = mined(
            &["chair", "sofa", "bed", "ball", "stool"],
            vec![
                found("chair", 0., 0.9, None),
                found("chair", 50., 0.3, Some(Stage::Coarse)),
                found("sofa", 20., 0.5, Some(Stage::Coarse)),
                found("bed", 70., 0.5, Some(Stage::Coarse)),
                found("bed", 72., 0.5, Some(Stage::Crop)),
                // A duplicate of the first, and one of nothing.
                found("chair", 2., 0.8, Some(Stage::Dedupe)),
                found("stool", 30., 0.4, Some(Stage::Dedupe)),
            ],
            &["lamp", "bed", "ball", "sofa"],
        );
        let mut labels = LabelMap::default();
        labels.id("vase");
        let got = odvg(&[r.clone(), mined(&["chair"], vec![], &[])], &mut labels);
        assert_eq!(got.len(), 1, "nothing is known of the others");
        let d = &got[0].detection;
        assert_eq!(
            d.instances,
            [Instance { bbox: [0., 0., 10., 10.], label: 1, category: "chair".into(), area: None }]
        );
        assert_eq!(labels.names(), ["vase", "chair"], "known ids stay");
        assert_eq!(d.hard_negatives, ["sofa"]);
        assert_eq!(d.absent, ["lamp", "ball"]);
        assert_eq!(d.ignore, [[72., 0., 82., 10.], [30., 0., 40., 10.]]);
    }

    #[test]
    fn precision_rises_by_stage_and_is_compared_with_a_threshold() {
        let instance = |x: f64, name: &str| Instance {
            bbox: [x, 0., x + 10., 10.],
            label: 0,
            category: name.into(),
            area: None,
        };
        let truth = Boxes {
            labels: LabelMap::default(),
            folder: Default::default(),
            subfolders: Vec::new(),
            records: vec![Record {
                filename: "a.png".into(),
                width: 100,
                height: 50,
                detection: Detected {
                    instances: vec![
                        instance(0., "chair"),
                        instance(30., "chair"),
                        instance(60., "sofa"),
                        instance(80., "tv"),
                    ],
                    ignore: vec![[88., 0., 100., 10.]],
                    ..Default::default()
                },
            }],
        };
        let r = mined(
            &["chair", "sofa", "lamp"],
            vec![
                found("chair", 0., 0.4, None),
                found("chair", 1., 0.35, Some(Stage::Dedupe)),
                found("chair", 36., 0.8, Some(Stage::Crop)),
                found("lamp", 15., 0.9, Some(Stage::Coarse)),
                found("sofa", 60., 0.5, None),
                found("sofa", 90., 0.6, None),
            ],
            &["tv", "ball", "lamp"],
        );
        let p = precision(&[r], &truth).unwrap();
        let rows: Vec<(usize, usize, usize, usize)> =
            p.rows.iter().map(|r| (r.boxes, r.precision.hits, r.precision.n, r.recall.hits)).collect();
        // The last sofa lies on an unknown region: it counts nowhere.
        assert_eq!(rows, [(6, 2, 5, 2), (5, 2, 4, 2), (4, 2, 3, 2), (3, 2, 2, 2)]);
        assert_eq!(p.rows[0].recall.n, 3, "nobody asked for the tv");
        assert_eq!((p.threshold, p.by_threshold.hits, p.by_threshold.n), (0.4, 2, 4));
        assert_eq!((p.negatives.hits, p.negatives.n), (2, 3), "lamp and ball are absent, the tv is there");
        assert!(precision(&[], &truth).is_none());
    }

    #[test]
    fn a_person_has_the_last_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.jsonl");
        let mut all = vec![mined(&["chair"], vec![found("chair", 0., 0.9, Some(Stage::Crop))], &[])];
        std::fs::write(&path, "{\"image\": \"a.png\", \"index\": 0, \"keep\": true}\n").unwrap();
        assert_eq!(overrule(&mut all, &path).unwrap(), 1);
        assert_eq!(all[0].found[0].dropped, None);
        for (line, why) in [
            ("{\"image\": \"b\", \"index\": 0, \"keep\": true}", "not mined"),
            ("{\"image\": \"a.png\", \"index\": 1, \"keep\": true}", "1 boxes"),
            ("{}", "expected"),
        ] {
            std::fs::write(&path, line).unwrap();
            let e = format!("{:#}", overrule(&mut all, &path).unwrap_err());
            assert!(e.contains(why) && e.contains("line 1"), "{e}");
        }
    }

    #[test]
    fn a_word_that_cannot_count_is_known_before_mining() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o.jsonl");
        let asked = |image: &str| Asked { image: image.into(), path: image.into(), questions: vec![] };
        let (records, pictures) =
            ([mined(&["chair"], vec![found("chair", 0., 0.9, None)], &[])], [asked("a.png"), asked("b.png")]);
        let check = |image: &str, index: usize| {
            let line = format!("{{\"image\": \"{image}\", \"index\": {index}, \"keep\": true}}\n");
            std::fs::write(&path, line).unwrap();
            check_overrules(&path, &records, &pictures).map_err(|e| format!("{e:#}"))
        };
        check("a.png", 0).unwrap();
        // How many boxes it will have is not known yet.
        check("b.png", 7).unwrap();
        let e = check("a.png", 1).unwrap_err();
        assert!(e.contains("o.jsonl, line 1: \"a.png\" has 1 boxes"), "{e}");
        let e = check("c.png", 0).unwrap_err();
        assert!(e.contains("line 1") && e.contains("none of the pictures of grounding.queries"), "{e}");
        std::fs::write(&path, "{\"image\": \"a.png\"}\n").unwrap();
        let e = format!("{:#}", check_overrules(&path, &records, &pictures).unwrap_err());
        assert!(e.contains("line 1: expected") && e.contains("missing field `index`"), "{e}");
    }

    #[test]
    fn a_half_written_line_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.jsonl");
        assert_eq!(read(&path).unwrap(), (vec![], 0));
        let one = mined(&["chair"], vec![found("chair", 0., 0.9, None)], &[]);
        let line = serde_json::to_string(&one).unwrap() + "\n";
        std::fs::write(&path, format!("{line}{}", &line[..20])).unwrap();
        assert_eq!(read(&path).unwrap(), (vec![one], line.len()));
        std::fs::write(&path, format!("{line}{line}")).unwrap();
        assert!(read(&path).is_err());
    }
}
