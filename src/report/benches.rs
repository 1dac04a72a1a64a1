//! The page of a run on benches: its table, the published rows, and samples with their traces.
//!
//! Reads a run's folder only. A sample shows picture with boxes, plan, program with what each call gave,
//! answer and truth, and whose fault a wrong one is as far as that can be told; so one can judge from the
//! page alone whether perception, program or judge failed.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use base64::Engine as _;
use serde_json::{Value, json};

use super::{escape, head, program_table};
use crate::data::Bench;
use crate::eval::benches::batch::{SHOWN_RIGHT, SHOWN_WRONG};
use crate::eval::benches::folder::picture_path;
use crate::eval::benches::record::{Record, SAMPLES, each};
use crate::eval::benches::summary::{PUBLISHED, Summary, notes};
use crate::eval::stats::Mean;
use crate::program::Reply;
use crate::text::plain;

/// A run's page, from its folder.
///
/// # Errors
/// If the folder's records cannot be read.
pub fn page(dir: &Path, settings: &Value, all: &[Summary]) -> Result<String> {
    // The samples that are shown: of each bench the first ones, not right and right.
    let mut shown: BTreeMap<String, [Vec<Record>; 2]> = BTreeMap::new();
    each(&dir.join(SAMPLES), |r: Record| {
        let [wrong, right] = shown.entry(r.bench.clone()).or_default();
        let (list, most) = if r.is_right() { (right, SHOWN_RIGHT) } else { (wrong, SHOWN_WRONG) };
        if list.len() < most {
            list.push(r);
        }
        Ok(())
    })?;
    let mut out = head("Benches");
    out.push_str("<h1>Benches</h1>\n");
    out.push_str(&overview(all));
    out.push_str(&published(all));
    for s in all {
        let _ = writeln!(out, "<h2>{}</h2>", escape(&s.bench));
        let lines: String = notes(s).iter().map(|l| format!("<li>{}</li>", escape(l))).collect();
        let _ = writeln!(out, "<p>{}</p>\n<ul>{lines}</ul>", escape(&s.note.origin));
        let none = Default::default();
        let [wrong, right] = shown.get(&s.bench).unwrap_or(&none);
        for (name, records) in [("Not right", wrong), ("Right", right)] {
            for r in records {
                sample(&mut out, dir, name, r);
            }
        }
    }
    let _ = writeln!(out, "<h2>Settings</h2>\n<pre>{}</pre>", escape(&format!("{settings:#}")));
    out.push_str("</main></body></html>\n");
    Ok(out)
}

fn overview(all: &[Summary]) -> String {
    let cell = |m: &Option<Mean>| m.as_ref().map_or("–".into(), Mean::to_string);
    let mut out = String::from(
        "<div class=\"wide\"><table>\n<tr><th>bench</th><th>part</th><th>rows</th><th>pictures</th>\
         <th>reference (as released)</th><th>strict (defects mended)</th></tr>\n",
    );
    for s in all {
        for (i, r) in s.table.iter().enumerate() {
            let name = if i == 0 { s.bench.as_str() } else { "" };
            let _ = writeln!(
                out,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(name),
                escape(&r.part),
                r.n,
                r.pictures,
                cell(&r.reference),
                cell(&r.strict)
            );
        }
    }
    out.push_str("</table></div>\n<p>Intervals are of 95 %, by bootstrap over pictures.</p>\n");
    out
}

fn published(all: &[Summary]) -> String {
    let columns: Vec<(usize, &Summary)> = Bench::ALL
        .iter()
        .enumerate()
        .filter_map(|(i, b)| Some((i, all.iter().find(|s| s.bench == b.name())?)))
        .collect();
    if columns.is_empty() {
        return String::new();
    }
    let heads: String = columns.iter().map(|(_, s)| format!("<th>{}</th>", escape(&s.bench))).collect();
    let mut out = format!("<div class=\"wide\"><table>\n<tr><th>%</th>{heads}</tr>\n");
    let ours: String = columns
        .iter()
        .map(|(_, s)| {
            let figure = s.table.first().and_then(|r| r.reference.as_ref());
            format!("<td>{}</td>", figure.map_or("–".into(), |m| format!("{:.1}", 100. * m.value)))
        })
        .collect();
    let _ = writeln!(out, "<tr><td><b>this run, reference</b></td>{ours}</tr>");
    for (model, figures) in PUBLISHED {
        let row: String = columns.iter().map(|(i, _)| format!("<td>{:.1}</td>", figures[*i])).collect();
        let _ = writeln!(out, "<tr><td>{} (published)</td>{row}</tr>", escape(model));
    }
    out.push_str("</table></div>\n");
    out
}

fn sample(out: &mut String, dir: &Path, class: &str, r: &Record) {
    let verdict = match r.fault {
        Some(fault) => format!("{class}: {}", fault.word()),
        None if !r.is_measured() => "Not measured".into(),
        None => class.to_owned(),
    };
    let answer = match (&r.answer, &r.why) {
        (Some(answer), _) => plain(answer),
        (None, Some(why)) => format!("no answer: {why}"),
        (None, None) => "no answer".into(),
    };
    let score = |s: Option<f64>| s.map_or("missing".into(), |s| format!("{s:.1}"));
    let _ = writeln!(
        out,
        "<h3>{} {}: {}</h3>\n<p><b>{}</b>. Answer: <b>{}</b>; right is <b>{}</b>; reference {}, strict {}{}</p>",
        escape(&r.bench),
        r.index,
        escape(&r.question),
        escape(&verdict),
        escape(&answer),
        escape(&plain(&r.truth)),
        score(r.reference),
        score(r.strict),
        r.judged.map_or(String::new(), |j| format!("; the judge: {}", plain(&json!(j)))),
    );
    out.push_str("<div class=\"pictures\">\n");
    if let (Ok(jpeg), Some(size)) = (std::fs::read(picture_path(dir, &r.bench, r.index)), r.size) {
        let picture = base64::engine::general_purpose::STANDARD.encode(jpeg);
        let url = format!("data:image/jpeg;base64,{picture}");
        out.push_str(&super::figure_of_boxes_on(&json!({ "calls": r.calls }), size, &url));
    }
    let reply = r.reply.as_deref().map(Reply::parse);
    if let Some(Ok(reply)) = &reply {
        out.push_str("<div>\n");
        if let Some(plan) = &reply.plan {
            let _ = writeln!(out, "<pre class=\"plan\">{}</pre>", escape(plan.trim()));
        }
        let trace = json!({ "calls": r.calls, "error": { "line": r.line } });
        out.push_str(&program_table(&reply.program, &trace));
        out.push_str("</div>\n");
    } else {
        if let Some(text) = &r.reply {
            let _ = writeln!(out, "<pre>{}</pre>", escape(text));
        }
        let calls: Vec<String> = r.calls.iter().map(super::call).collect();
        if !calls.is_empty() {
            let _ = writeln!(out, "<p>{}</p>", calls.join("<br>"));
        }
    }
    out.push_str("</div>\n");
}
