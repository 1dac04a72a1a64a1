//! Answers that a judge compares, and what is still open of a run.

use std::sync::Mutex;
use std::time::Instant;

use anyhow::Result;
use serde_json::Value;

use super::batch::Done;
use super::folder::Folder;
use super::metric::{Judged, same_words};
use super::record::{NO_REPLY, Record};
use super::run::{Runner, Stopped, Times, finish, spend};
use crate::data::Kind;
use crate::llm::ChatError;
use crate::text::plain;
use crate::verify::{Pair, Said};

impl Runner<'_> {
    /// Goes over what a folder holds: rows to which a server gave no reply go, to be asked again, and verdicts
    /// that are missing are asked for.
    ///
    /// # Errors
    /// See [`Stopped`]; the verdicts that there were before the judge was gone stay.
    pub fn reopen(&self, folder: &mut Folder) -> Result<(), Stopped> {
        let mut gone = None;
        folder.revise(|records: Vec<Record>| {
            let kept = records.into_iter().filter(|r| r.failure.as_deref() != Some(NO_REPLY));
            let (open, mut all): (Vec<Record>, Vec<Record>) = kept.partition(Record::is_open);
            let mut open: Vec<Done> =
                open.into_iter().map(|record| Done { record, thumbnail: None }).collect();
            gone = self.judge(&mut open, &Mutex::default())?;
            for Done { mut record, .. } in open {
                record.fault = None;
                finish(&mut record);
                all.push(record);
            }
            Ok(all)
        })?;
        gone.map_or(Ok(()), |e| Err(e.into()))
    }

    /// Asks the judge about answers that need not match word for word. Why it will answer nothing any more, if it has
    /// said so: verdicts are missing then.
    pub(super) fn judge(&self, done: &mut [Done], times: &Mutex<Times>) -> Result<Option<ChatError>> {
        let started = Instant::now();
        let mut open = Vec::new();
        for (i, Done { record, .. }) in done.iter_mut().enumerate() {
            if record.kind != Kind::Synonym || !record.is_measured() {
                continue;
            }
            record.judged = Some(match &record.answer {
                _ if self.judge.is_none() => Judged::Nobody,
                None => Judged::No,
                Some(answer) if same_words(&record.truth, answer) => Judged::Yes,
                Some(_) => {
                    open.push(i);
                    Judged::Missing
                }
            });
        }
        let Some(judge) = self.judge.filter(|_| !open.is_empty()) else { return Ok(None) };
        let texts: Vec<[String; 3]> = open
            .iter()
            .map(|&i| {
                let r = &done[i].record;
                [r.question.clone(), plain(&r.truth), plain(r.answer.as_ref().unwrap_or(&Value::Null))]
            })
            .collect();
        let pairs: Vec<Pair> =
            texts.iter().map(|[question, truth, given]| Pair { question, truth, given }).collect();
        let (verdicts, gone) = judge.verdicts(&pairs)?;
        for (&i, verdict) in open.iter().zip(verdicts) {
            done[i].record.judged = Some(match verdict {
                Said::Same(true) => Judged::Yes,
                Said::Same(false) => Judged::No,
                Said::Unreadable => Judged::Unreadable,
                Said::Silent => Judged::Missing,
            });
        }
        spend(times, "judge", started);
        Ok(gone)
    }
}
