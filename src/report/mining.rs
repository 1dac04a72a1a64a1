//! The page of a mining: what was found, what was dropped, by which stage and why.
//!
//! Reads records and the pictures that they name; those that cannot be read are left out.

use super::{data_url, escape, head};
use crate::sight::{BBox, Picture};
use crate::tools::draw::{COLOURS, Canvas};
use crate::tools::real;
use crate::verify::boxes::show::MARGIN;
use serde::Deserialize;
use std::fmt::Write;
use std::path::Path;

/// What the page reads of a picture's record.
#[derive(Deserialize)]
struct Record {
    image: String,
    nouns: Vec<String>,
    found: Vec<Found>,
    denied: Vec<String>,
}

#[derive(Deserialize)]
struct Found {
    bbox: BBox,
    label: String,
    score: f64,
    dropped: Option<String>,
    reason: String,
}

/// As the verifier's stages follow one another.
const STAGES: [&str; 3] = ["coarse", "crop", "dedupe"];

/// Pictures shown, evenly from all.
const SHOWN: usize = 40;
/// Boxes shown of a picture, those that a stage dropped first.
const BOXES: usize = 24;

/// `records` are the lines of a mining's `pictures.jsonl`, overruled or not; `precision` is a table, where
/// the truth is known; `folder` is what pictures' names are relative to.
///
/// # Errors
/// If a picture cannot be encoded, or a record is none.
pub fn page(records: &[serde_json::Value], precision: Option<&str>, folder: &Path) -> anyhow::Result<String> {
    let records: Vec<Record> = records.iter().map(Record::deserialize).collect::<Result<_, _>>()?;
    let mut out = head("Mined boxes");
    let _ = write!(out, "<h1>Mined boxes</h1>\n<p>{} pictures.</p>\n", records.len());
    out.push_str(&counts(&records));
    if let Some(p) = precision {
        let _ = write!(out, "<h2>Precision, where the truth is known</h2>\n<pre>{}</pre>\n", escape(p));
    }
    let with: Vec<&Record> = records.iter().filter(|r| !r.found.is_empty()).collect();
    let shown = with.len().min(SHOWN);
    let _ = writeln!(
        out,
        "<h2>Pictures</h2>\n<p>{shown} of {}. To overrule a verdict, give its picture and number to --overrule: \
         <code>{{\"image\": \"…\", \"index\": 0, \"keep\": true}}</code></p>",
        with.len()
    );
    for k in 0..shown {
        picture(&mut out, with[k * with.len() / shown], folder)?;
    }
    out.push_str("</main></body></html>\n");
    Ok(out)
}

fn counts(records: &[Record]) -> String {
    let mut out = String::from("<table><tr><th>stage</th><th>dropped</th><th>left</th></tr>\n");
    let all = || records.iter().flat_map(|r| &r.found);
    let mut left = all().count();
    let _ = writeln!(out, "<tr><td>found</td><td></td><td>{left}</td></tr>");
    for stage in STAGES {
        let dropped = all().filter(|f| f.dropped.as_deref() == Some(stage)).count();
        left -= dropped;
        let _ = writeln!(out, "<tr><td>{stage}</td><td>{dropped}</td><td>{left}</td></tr>");
    }
    out + "</table>\n"
}

fn picture(out: &mut String, r: &Record, folder: &Path) -> image::ImageResult<()> {
    let _ = writeln!(out, "<h2>{}</h2>", escape(&r.image));
    let line = |name: &str, nouns: &[String]| {
        let nouns = if nouns.is_empty() { "none".into() } else { nouns.join(", ") };
        format!("<p>{name}: {}</p>\n", escape(&nouns))
    };
    out.push_str(&line("Asked for", &r.nouns));
    out.push_str(&line("Denied", &r.denied));
    let Ok(picture) = Picture::open(&folder.join(&r.image)) else {
        out.push_str("<p class=\"failed\">The picture cannot be read any more.</p>\n");
        return Ok(());
    };
    let side = i64::from(picture.width().max(picture.height()));
    let (thick, scale) = ((side / 300).max(1), (side / 500).max(1));
    let mut canvas = Canvas::new(&picture);
    for (i, f) in r.found.iter().enumerate().filter(|(_, f)| f.dropped.is_none()) {
        let colour = COLOURS[i % COLOURS.len()];
        canvas.outline(f.bbox, colour, thick);
        canvas.label(f.bbox, &format!("{i} {}", f.label), colour, thick, scale);
    }
    let kept = canvas.finish();
    out.push_str("<div class=\"pictures\">\n");
    let _ = writeln!(
        out,
        "<figure><img src=\"{}\" alt=\"\"><figcaption>Kept</figcaption></figure>",
        data_url(&kept)?
    );
    out.push_str("<figure><table>\n<tr><th></th><th></th><th>box</th><th>score</th><th>verdict</th></tr>\n");
    let mut order: Vec<usize> = (0..r.found.len()).collect();
    order.sort_by_key(|&i| r.found[i].dropped.is_none());
    for i in order.into_iter().take(BOXES) {
        let f = &r.found[i];
        let crop = real::crop(&picture, Some(f.bbox), MARGIN);
        let verdict = f.dropped.as_ref().map_or("kept".to_owned(), |s| format!("dropped, {}", escape(s)));
        let _ = writeln!(
            out,
            "<tr{}><td class=\"n\">{i}</td><td><img src=\"{}\" alt=\"\" style=\"height:3rem;width:auto\"></td>\
             <td>{}</td><td>{:.2}</td><td>{verdict}: {}</td></tr>",
            if f.dropped.is_some() { " class=\"bad\"" } else { "" },
            data_url(&crop)?,
            escape(&f.label),
            f.score,
            escape(&f.reason)
        );
    }
    out.push_str("</table></figure>\n</div>\n");
    Ok(())
}
