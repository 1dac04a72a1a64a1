//! `valor eval merge`: the shards of a run put together. What is left half done is taken away again.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{REPORT, RESULTS, code, shard, still_open, written};
use crate::cli::fillable;
use crate::eval::benches::batch::Gallery;
use crate::eval::benches::feed::Note;
use crate::eval::benches::folder::{PICTURES, SETTINGS, picture_path, read_json};
use crate::eval::benches::record::{Record, SAMPLES};
use crate::files::write_atomic;

/// A shard's lines in their order.
struct ShardLines {
    reader: std::iter::Enumerate<std::io::Lines<std::io::BufReader<std::fs::File>>>,
    dir: PathBuf,
    next: Option<(usize, usize, String, Record)>,
}

impl ShardLines {
    fn advance(&mut self, order: &[String]) -> Result<()> {
        let Some((above, line)) = self.reader.next() else {
            self.next = None;
            return Ok(());
        };
        let (line, file) = (line?, self.dir.join(SAMPLES));
        let record: Record = serde_json::from_str(&line)
            .with_context(|| format!("{}, line {}: is no sample of a run", file.display(), above + 1))?;
        let bench = order.iter().position(|b| *b == record.bench);
        let bench =
            bench.with_context(|| format!("{}: {} is no bench of this run", file.display(), record.bench))?;
        self.next = Some((bench, record.index, line, record));
        Ok(())
    }
}

/// Checks that the shards are all of one run, and writes what it would have written as one.
pub(super) fn merge(dirs: &[PathBuf], out: &Path, as_json: bool) -> Result<ExitCode> {
    ensure!(
        !out.exists() || std::fs::read_dir(out).is_ok_and(|mut d| d.next().is_none()),
        "--out {} is there already; name a new folder",
        out.display()
    );
    fillable("--out", Some(out))?;
    let mut settings: Option<Value> = None;
    let mut shards: BTreeMap<u64, &PathBuf> = BTreeMap::new();
    let mut notes: Vec<(String, Note)> = Vec::new();
    let mut count = 0;
    for dir in dirs {
        let mut mine = read_json(&dir.join(SETTINGS))?;
        let name = mine["shard"].take();
        let Some(part) = name.as_str().and_then(|s| shard(s).ok()) else {
            bail!("{} is no shard: it was run without --shard", dir.display())
        };
        count = part.of;
        match &settings {
            None => settings = Some(mine),
            Some(first) => ensure!(
                *first == mine,
                "{} and {} are of runs with other settings; merge the shards of one run",
                dirs[0].display(),
                dir.display()
            ),
        }
        if let Some(other) = shards.insert(part.number, dir) {
            bail!("{} and {} are both shard {}", other.display(), dir.display(), name)
        }
        let results = dir.join(RESULTS);
        ensure!(
            results.is_file(),
            "{} is not finished: it has no {RESULTS}; run its command again",
            dir.display()
        );
        for found in read_json(&results)?["benches"].as_array().into_iter().flatten() {
            let bench = found["bench"].as_str().unwrap_or_default().to_owned();
            let note: Note = serde_json::from_value(json!({
                "rows": found["rows"], "origin": found.get("origin").cloned().unwrap_or(json!("")),
                "refused": found["refused"],
            }))
            .with_context(|| results.display().to_string())?;
            match notes.iter_mut().find(|(b, _)| *b == bench) {
                None => notes.push((bench, note)),
                Some((_, known)) => {
                    known.rows = known.rows.max(note.rows);
                    known.refused = known.refused.take().or(note.refused);
                }
            }
        }
    }
    if let Some(missing) = (1..=count).find(|i| !shards.contains_key(i)) {
        bail!("shard {missing}/{count} is missing; give all of them")
    }
    ensure!(shards.len() as u64 == count, "there are shards of several counts; merge the shards of one run");
    let settings = settings.context("there is nothing to merge")?;
    let order: Vec<String> = notes.iter().map(|(b, _)| b.clone()).collect();
    let mut lines = Vec::new();
    for dir in shards.values() {
        let path = dir.join(SAMPLES);
        let file = std::fs::File::open(&path).with_context(|| path.display().to_string())?;
        let reader = std::io::BufReader::new(file).lines().enumerate();
        let mut one = ShardLines { reader, dir: dir.to_path_buf(), next: None };
        one.advance(&order)?;
        lines.push(one);
    }
    let there = out.exists();
    let text = joined(lines, &order, out).and_then(|()| {
        write_atomic(&out.join(SETTINGS), |w| writeln!(w, "{settings:#}"))?;
        written(out, &settings, &notes, as_json)
    });
    if text.is_err() {
        // Half a run is none.
        [SAMPLES, SETTINGS, RESULTS, REPORT]
            .iter()
            .for_each(|file| drop(std::fs::remove_file(out.join(file))));
        let _ = std::fs::remove_dir_all(out.join(PICTURES));
        if !there {
            let _ = std::fs::remove_dir(out);
        }
    }
    let (text, all) = text?;
    crate::cli::stdout().write_all(text.as_bytes())?;
    let remedy = format!("the run's command without --shard, with --out {}, asks again", out.display());
    Ok(still_open(&all, &remedy).unwrap_or(code(&notes)))
}

/// Writes the shards' samples, in their order, and the pictures that are shown of them.
fn joined(mut lines: Vec<ShardLines>, order: &[String], out: &Path) -> Result<()> {
    let mut gallery = Gallery::default();
    let (mut failed, mut last) = (None, None);
    write_atomic(&out.join(SAMPLES), |w| {
        loop {
            let first = lines.iter_mut().filter(|l| l.next.is_some()).min_by_key(|l| {
                let (bench, index, ..) = l.next.as_ref().expect("kept only where there is one");
                (*bench, *index)
            });
            let Some(shard) = first else { return Ok(()) };
            let (bench, index, line, record) = shard.next.take().expect("kept only where there is one");
            // What two runs of one shard at once wrote twice counts once.
            if last.replace((bench, index)) != Some((bench, index)) {
                writeln!(w, "{line}")?;
                let from = picture_path(&shard.dir, &record.bench, index);
                if gallery.takes(&record) && from.is_file() {
                    let to = picture_path(out, &record.bench, index);
                    std::fs::create_dir_all(to.parent().expect("below the folder"))?;
                    std::fs::copy(from, to)?;
                }
            }
            if let Err(e) = shard.advance(order) {
                failed = Some(e);
                return Err(std::io::Error::other("a shard cannot be read"));
            }
        }
    })
    .map_err(|e| failed.take().unwrap_or_else(|| e.into()))
}
