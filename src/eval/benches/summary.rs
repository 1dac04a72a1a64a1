//! The table of a run, made of its records: accuracy in both forms with intervals, failures, and the
//! published rows beside it (method.md 8).
//!
//! Rows that could not be measured (broken picture, dead link, a server that gave no reply) are counted and in
//! no accuracy; failures of the method are wrong answers, counted by kind; answers without a verdict are in no
//! strict figure, and where they are many there is none: the easy ones, word for word, need no verdict.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::feed::{Note, OMNI3D_PUBLISHED, is_untrained};
use super::metric::Judged;
use super::record::{Record, SAMPLES, each};
use crate::data::Bench;
use crate::eval::stats::Mean;
use crate::text::shown;

/// Published accuracies, %, in the order of [`Bench::ALL`].
pub const PUBLISHED: [(&str, [f64; 8]); 5] = [
    ("GPT-4o + tools", [38.0, 56.6, 64.2, 67.4, 54.5, 58.0, 49.9, 67.6]),
    ("Gemini-2.5-Flash + tools", [37.1, 68.7, 61.5, 68.5, 62.2, 65.2, 48.9, 65.6]),
    ("base (Qwen3-8B + tools)", [37.5, 60.5, 63.9, 68.2, 53.3, 57.4, 50.1, 68.6]),
    ("VALOR-RL", [43.9, 61.8, 67.3, 70.3, 53.5, 57.6, 49.5, 67.6]),
    ("VALOR", [44.0, 69.5, 69.2, 75.6, 57.3, 64.4, 51.0, 75.9]),
];

/// Accuracy on a part of a bench; on all that is published of it where the part has no name.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub part: String,
    /// Rows that were measured.
    pub n: usize,
    pub pictures: usize,
    pub reference: Option<Mean>,
    pub strict: Option<Mean>,
    /// Answers without a verdict that can be read; in no strict figure.
    pub unjudged: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub bench: String,
    #[serde(flatten)]
    pub note: Note,
    pub table: Vec<Row>,
    /// Rows that could not be measured, with why, the first ones.
    pub unmeasured: usize,
    /// Those among them to which a server gave no reply.
    pub unanswered: usize,
    /// Answers on which the judge kept silent.
    pub unheard: usize,
    pub unmeasured_why: Vec<String>,
    /// Failures of the method, by kind.
    pub failures: BTreeMap<String, usize>,
    /// Whose fault wrong answers are.
    pub faults: BTreeMap<String, usize>,
    /// Answers before which a detector's call gave no box, right or wrong.
    pub nothing_detected: usize,
    /// Replies that ended at their limit on tokens.
    pub cut: usize,
    /// Replies that were read although they are not of the form asked for.
    pub lenient: usize,
    /// Rows that ask what an earlier one asks about the same picture: the row, the earlier one.
    pub duplicates: Vec<[usize; 2]>,
    /// Words were compared where a judge should have been asked.
    pub without_judge: bool,
    /// What `valor infer` and other readers must know of the rows that were tested.
    pub remarks: Vec<String>,
}

/// What is kept of a record until the end.
struct Kept {
    part: String,
    index: usize,
    picture: String,
    reference: Option<f64>,
    strict: Option<f64>,
}

#[derive(Default)]
struct Tally {
    kept: Vec<Kept>,
    unmeasured: usize,
    unmeasured_why: Vec<String>,
    failures: BTreeMap<String, usize>,
    faults: BTreeMap<String, usize>,
    nothing_detected: usize,
    unanswered: usize,
    unheard: usize,
    cut: usize,
    lenient: usize,
    duplicates: Vec<[usize; 2]>,
    without_judge: bool,
}

/// Of answers without a verdict one in so many is too many for a strict figure.
const UNJUDGED: usize = 20;

/// The first reasons are worth reading, a thousand dead links are not.
const REASONS: usize = 3;

/// Of a run's folder; `notes` name the benches in their order.
///
/// # Errors
/// If the folder's records cannot be read.
pub fn summarise(dir: &Path, notes: &[(String, Note)]) -> Result<Vec<Summary>> {
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    each(&dir.join(SAMPLES), |r: Record| {
        let t = tallies.entry(r.bench.clone()).or_default();
        if let Some(first) = r.duplicate_of {
            t.duplicates.push([r.index, first]);
        }
        if !r.is_measured() {
            t.unmeasured += 1;
            t.unanswered += usize::from(r.is_open());
            if t.unmeasured_why.len() < REASONS {
                t.unmeasured_why.push(format!("row {}: {}", r.index, r.why.unwrap_or_default()));
            }
            return Ok(());
        }
        if let Some(f) = r.failure {
            *t.failures.entry(f).or_default() += 1;
        }
        if let Some(f) = r.fault {
            *t.faults.entry(f.word().to_owned()).or_default() += 1;
        }
        t.nothing_detected += usize::from(r.nothing_detected);
        t.cut += usize::from(r.cut);
        t.lenient += usize::from(!r.flags.is_empty());
        t.without_judge |= r.judged == Some(Judged::Nobody);
        t.unheard += usize::from(r.judged == Some(Judged::Missing));
        let (reference, strict) = (r.reference, r.strict);
        t.kept.push(Kept { part: r.part, index: r.index, picture: r.picture, reference, strict });
        Ok(())
    })?;
    Ok(notes
        .iter()
        .map(|(bench, note)| tallies.remove(bench).unwrap_or_default().summary(bench, note.clone()))
        .collect())
}

impl Tally {
    fn summary(self, bench: &str, note: Note) -> Summary {
        let mut table = Vec::new();
        let mut remarks = Vec::new();
        let headline: Box<dyn Fn(&Kept) -> bool> = if bench == Bench::Omni3d.name() {
            Box::new(|k| k.index < OMNI3D_PUBLISHED)
        } else {
            Box::new(|_| true)
        };
        table.push(row("", &self.kept, &headline));
        if bench == Bench::Omni3d.name() && note.refused.is_none() {
            let untrained = |k: &Kept| is_untrained(k.index, note.rows);
            table.push(row("rows not mined", &self.kept, untrained));
            let (first, overlap) = (
                note.rows.saturating_sub(super::feed::OMNI3D_MINED),
                (0..OMNI3D_PUBLISHED.min(note.rows)).filter(|i| !is_untrained(*i, note.rows)).count(),
            );
            remarks.push(format!(
                "tested as published on rows 0–{}, and apart on the {first} rows before the last {} of {}, which \
                 mining takes",
                OMNI3D_PUBLISHED.min(note.rows).saturating_sub(1),
                note.rows - first,
                note.rows
            ));
            if overlap > 0 {
                remarks.push(format!(
                    "{overlap} of the rows tested as published are among those that mining takes"
                ));
            }
        }
        let parts: BTreeSet<&String> = self.kept.iter().map(|k| &k.part).filter(|p| !p.is_empty()).collect();
        for part in parts {
            table.push(row(part, &self.kept, |k| k.part == *part && headline(k)));
        }
        Summary {
            bench: bench.to_owned(),
            note,
            table,
            unmeasured: self.unmeasured,
            unanswered: self.unanswered,
            unheard: self.unheard,
            unmeasured_why: self.unmeasured_why,
            failures: self.failures,
            faults: self.faults,
            nothing_detected: self.nothing_detected,
            cut: self.cut,
            lenient: self.lenient,
            duplicates: self.duplicates,
            without_judge: self.without_judge,
            remarks,
        }
    }
}

fn row(part: &str, kept: &[Kept], of: impl Fn(&Kept) -> bool) -> Row {
    let these = || kept.iter().filter(|k| of(k));
    let mean = |score: fn(&Kept) -> Option<f64>| {
        Mean::accuracy(these().filter_map(|k| Some((k.picture.as_str(), score(k)?))))
    };
    let (n, unjudged) = (these().count(), these().filter(|k| k.strict.is_none()).count());
    Row {
        part: part.to_owned(),
        n,
        pictures: these().map(|k| &k.picture).collect::<BTreeSet<_>>().len(),
        reference: mean(|k| k.reference),
        strict: if unjudged * UNJUDGED > n { None } else { mean(|k| k.strict) },
        unjudged,
    }
}

/// For a terminal.
pub fn table(all: &[Summary]) -> String {
    let cell = |m: &Option<Mean>| m.as_ref().map_or("–".into(), Mean::to_string);
    let mut out = format!(
        "{:<14} {:<17} {:>5} {:>5}  {:<23} {}\n",
        "bench", "part", "n", "pict.", "reference", "strict"
    );
    for s in all {
        for (i, r) in s.table.iter().enumerate().filter(|(_, r)| r.n > 0 || s.note.refused.is_none()) {
            let name = if i == 0 { s.bench.as_str() } else { "" };
            let _ = writeln!(
                out,
                "{name:<14} {:<17} {:>5} {:>5}  {:<23} {}",
                r.part,
                r.n,
                r.pictures,
                cell(&r.reference),
                cell(&r.strict)
            );
        }
        for line in notes(s) {
            let _ = writeln!(out, "  {}: {}", s.bench, shown(&line));
        }
    }
    let shown: Vec<(usize, Bench)> =
        Bench::ALL.into_iter().enumerate().filter(|(_, b)| all.iter().any(|s| s.bench == b.name())).collect();
    if !shown.is_empty() {
        let names: String = shown.iter().map(|(_, b)| format!("{:>14}", b.name())).collect();
        let _ = writeln!(out, "\n{:<26}{names}", "published, %");
        for (model, figures) in PUBLISHED {
            let row: String = shown.iter().map(|(i, _)| format!("{:>14.1}", figures[*i])).collect();
            let _ = writeln!(out, "{model:<26}{row}");
        }
        out.push_str("published figures were measured by the released code: compare them with reference\n");
    }
    out
}

/// What else is to be said of a bench, a line each.
pub fn notes(s: &Summary) -> Vec<String> {
    let counted = |of: &BTreeMap<String, usize>| {
        of.iter().map(|(k, n)| format!("{k} {n}")).collect::<Vec<_>>().join(", ")
    };
    let mut lines = Vec::new();
    if let Some(why) = &s.note.refused {
        let measured = s.table.first().map_or(0, |r| r.n);
        let when = if measured > 0 { format!("broken off after {measured} rows") } else { "refused".into() };
        let why = why.strip_prefix(&format!("{}: ", s.bench)).unwrap_or(why);
        lines.push(format!("{when}: {why}"));
    }
    lines.extend(s.remarks.iter().cloned());
    if s.unmeasured > 0 {
        lines.push(format!("{} not measured; {}", s.unmeasured, s.unmeasured_why.join("; ")));
    }
    if !s.failures.is_empty() {
        lines.push(format!("no answer: {}", counted(&s.failures)));
    }
    if !s.faults.is_empty() {
        lines.push(format!("not right by: {}", counted(&s.faults)));
    }
    if s.nothing_detected > 0 {
        lines.push(format!("nothing was detected in {}", s.nothing_detected));
    }
    if s.cut > 0 {
        lines.push(format!("{} replies ended at planner.max_new_tokens", s.cut));
    }
    if s.lenient > 0 {
        lines.push(format!("{} replies were read although they are not of the form asked for", s.lenient));
    }
    if let Some(first) = s.table.first().filter(|r| r.unjudged > 0) {
        let figure =
            if first.strict.is_some() { "are in no strict figure" } else { "too many for a strict figure" };
        let again = match s.unheard {
            0 => String::new(),
            n => format!("; the judge kept silent on {n}, about which the same command asks again"),
        };
        lines.push(format!("{} answers have no verdict, {figure}{again}", first.unjudged));
    }
    if s.without_judge {
        lines.push(
            "no judge is configured (eval.judge.model): strict compares word by word, which is no published \
             metric, and there is no reference"
                .into(),
        );
    }
    if !s.duplicates.is_empty() {
        let pairs: Vec<String> = s.duplicates.iter().take(5).map(|[a, b]| format!("{a} = {b}")).collect();
        lines.push(format!("duplicate rows, {}: {}", s.duplicates.len(), pairs.join(", ")));
    }
    lines
}
