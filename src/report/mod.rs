//! Records made visible: one self-contained HTML page for an answered question, and the pictures in it;
//! one for a training run ([`training`]), and one for a run on benches ([`benches`]). And where a run
//! stands, told in a log ([`pulse`]).
//!
//! Reads traces only. Everything in a trace that came from a model, a program or a file name is a
//! stranger's text: it is escaped, and the page's own policy forbids scripts and requests.

pub mod benches;
pub mod mining;
pub mod pictures;
pub mod pulse;
pub mod tensorboard;
pub mod training;

use base64::Engine as _;
use serde_json::Value;
use std::fmt::Write;

use crate::sight::{Depth, Picture};
use crate::text::{is_unruly, plain};
use crate::tools::draw::COLOURS;
use pictures::{boxes_of, depth_picture, png};

/// The page of one trace, as `valor infer --json` prints it.
///
/// # Errors
/// If a picture cannot be encoded.
pub fn page(trace: &Value, picture: &Picture, depth: Option<&Depth>) -> image::ImageResult<String> {
    let mut out = String::new();
    let question = trace["question"].as_str().unwrap_or_default();
    write!(out, "{}", head(question)).expect("a string takes all");
    let push = |out: &mut String, part: String| out.push_str(&part);
    push(&mut out, format!("<h1>{}</h1>\n", escape(question)));
    push(
        &mut out,
        match &trace["answer"] {
            Value::Null => format!("<p class=\"answer failed\">No answer: {}</p>\n", escape(&why(trace))),
            answer => format!("<p class=\"answer\">{}</p>\n", escape(&plain(answer))),
        },
    );
    push(&mut out, "<div class=\"pictures\">\n".into());
    push(&mut out, figure_of_boxes(trace, picture)?);
    if let Some(depth) = depth {
        push(&mut out, figure_of_depth(depth)?);
    }
    push(&mut out, "</div>\n".into());
    if let Some(plan) = trace["plan"].as_str() {
        push(&mut out, format!("<h2>Plan</h2>\n<pre class=\"plan\">{}</pre>\n", escape(plan.trim())));
    }
    if let Some(program) = trace["program"].as_str() {
        push(&mut out, "<h2>Program</h2>\n".into());
        push(&mut out, program_table(program, trace));
    }
    push(&mut out, "<h2>How it went</h2>\n".into());
    push(&mut out, facts(trace));
    push(&mut out, "</main></body></html>\n".into());
    Ok(out)
}

fn head(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>{STYLE}</style></head><body><main>\n",
        escape(title)
    )
}

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; } }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.answer { font-size: 1.8rem; margin: .5rem 0 1rem; overflow-wrap: anywhere; }
.failed { color: var(--bad); font-size: 1.1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure > div { position: relative; }
figure img { width: 100%; height: auto; display: block; image-rendering: auto; }
figure svg { position: absolute; inset: 0; width: 100%; height: 100%; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; vertical-align: -.05em; }
pre, code, td.code { font: 13px/1.5 ui-monospace, monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .1rem .6rem .1rem 0; border-bottom: 1px solid var(--line); }
td.code { white-space: pre-wrap; }
td.n { color: #888; text-align: right; user-select: none; }
tr.bad td { color: var(--bad); }
td.calls { font-size: .85rem; overflow-wrap: anywhere; min-width: 9rem; }
.ramp { height: .8rem; margin: .3rem 0 0; }
.scale { display: flex; justify-content: space-between; font-size: .85rem; }
";

/// Text as text, wherever it stands.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            // Others would end or reorder lines.
            c if is_unruly(c) => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn why(trace: &Value) -> String {
    let error = &trace["error"];
    let line = error["line"].as_u64().map_or(String::new(), |l| format!(" at line {l}"));
    format!("{}{line}: {}", plain(&error["kind"]), plain(&error["message"]))
}

fn data_url(picture: &Picture) -> image::ImageResult<String> {
    let png = png(picture)?;
    Ok(format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(png)))
}

/// The picture with every box that the detector gave.
fn figure_of_boxes(trace: &Value, picture: &Picture) -> image::ImageResult<String> {
    Ok(figure_of_boxes_on(trace, (picture.width(), picture.height()), &data_url(picture)?))
}

/// The same with the picture's own size, in which the boxes are, and a copy of it of any size.
fn figure_of_boxes_on(trace: &Value, (w, h): (u32, u32), url: &str) -> String {
    let boxes = boxes_of(trace);
    let mut labels: Vec<&str> = boxes.iter().map(|b| b.1.as_str()).collect();
    labels.sort_unstable();
    labels.dedup();
    let colour = |label: &str| {
        let i = labels.iter().position(|l| *l == label).unwrap_or(0);
        let [r, g, b] = COLOURS[i % COLOURS.len()];
        format!("rgb({r} {g} {b})")
    };
    let (thick, size) = (f64::from(w) / 200., f64::from(w) / 32.);
    let mut svg = format!("<svg viewBox=\"0 0 {w} {h}\" preserveAspectRatio=\"none\">");
    for ([x1, y1, x2, y2], label) in &boxes {
        let (colour, label) = (colour(label), escape(label));
        let _ = write!(
            svg,
            "<rect x=\"{x1:.1}\" y=\"{y1:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"none\" \
             stroke=\"{colour}\" stroke-width=\"{thick:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\" \
             font-size=\"{size:.1}\" paint-order=\"stroke\" stroke=\"#000\" stroke-width=\"{:.1}\">{label}</text>",
            (x2 - x1).max(0.),
            (y2 - y1).max(0.),
            x1 + thick,
            y1 + size,
            size / 8.
        );
    }
    svg.push_str("</svg>");
    let mut caption = format!("{w} × {h}");
    for label in &labels {
        let count = boxes.iter().filter(|b| b.1 == *label).count();
        let _ = write!(
            caption,
            "<span class=\"key\" style=\"background:{}\"></span>{} ({count})",
            colour(label),
            escape(label)
        );
    }
    format!(
        "<figure><div><img alt=\"The picture\" src=\"{url}\">{svg}</div><figcaption>{caption}</figcaption></figure>\n"
    )
}

fn figure_of_depth(depth: &Depth) -> image::ImageResult<String> {
    let (picture, [near, far]) = depth_picture(depth);
    let stops: Vec<String> = (0..=10)
        .map(|i| {
            let [r, g, b] = pictures::ramp(f64::from(i) / 10.);
            format!("rgb({r} {g} {b})")
        })
        .collect();
    Ok(format!(
        "<figure><div><img alt=\"Its depth\" src=\"{}\"></div><figcaption><div class=\"ramp\" \
         style=\"background:linear-gradient(to right,{})\"></div><div class=\"scale\"><span>{near:.2} m</span>\
         <span>depth</span><span>{far:.2} m</span></div></figcaption></figure>\n",
        data_url(&picture)?,
        stops.join(",")
    ))
}

/// The program, each line with what the tools gave it.
fn program_table(program: &str, trace: &Value) -> String {
    let calls: Vec<&Value> = trace["calls"].as_array().into_iter().flatten().collect();
    let failed = trace["error"]["line"].as_u64();
    let mut out = String::from("<div class=\"wide\"><table>\n");
    for (i, line) in program.trim_matches('\n').lines().enumerate() {
        let number = i as u64 + 1;
        let here: Vec<String> =
            calls.iter().filter(|c| c["line"].as_u64() == Some(number)).map(|c| call(c)).collect();
        let class = if failed == Some(number) { " class=\"bad\"" } else { "" };
        let _ = writeln!(
            out,
            "<tr{class}><td class=\"n\">{number}</td><td class=\"code\">{}</td><td class=\"calls\">{}</td></tr>",
            escape(line),
            here.join("<br>")
        );
    }
    out.push_str("</table></div>\n");
    let elsewhere: Vec<String> = calls.iter().filter(|c| c["line"].is_null()).map(|c| call(c)).collect();
    if !elsewhere.is_empty() {
        let _ = writeln!(out, "<p>Called indirectly:<br>{}</p>", elsewhere.join("<br>"));
    }
    out
}

/// One tool call in a line.
fn call(call: &Value) -> String {
    let given = match (&call["error"], &call["value"]) {
        (Value::String(error), _) => error.clone(),
        (_, Value::Array(found)) => {
            let labels: Vec<String> = found.iter().map(|d| plain(&d["label"])).collect();
            format!("{} found{}{}", found.len(), if labels.is_empty() { "" } else { ": " }, labels.join(", "))
        }
        (_, Value::Number(n)) => n.as_f64().map_or_else(|| n.to_string(), |x| format!("{x:.3}")),
        (_, value) => plain(value),
    };
    let asked = match call["args"]["prompt"].as_str() {
        Some(prompt) => format!("{} “{prompt}”", plain(&call["tool"])),
        None => plain(&call["tool"]),
    };
    let seconds = call["seconds"].as_f64().map_or(String::new(), |s| format!(" <small>{s:.2} s</small>"));
    format!("{} → <b>{}</b>{seconds}", escape(&asked), escape(&given))
}

fn facts(trace: &Value) -> String {
    let mut rows = Vec::new();
    for (part, model) in trace["models"].as_object().into_iter().flatten() {
        rows.push((part.clone(), plain(model)));
    }
    rows.push(("seed".into(), plain(&trace["seed"])));
    let mut seconds = |name: String, value: &Value| {
        if let Some(s) = value.as_f64() {
            rows.push((format!("seconds, {name}"), format!("{s:.2}")));
        }
    };
    for (part, value) in trace["seconds"].as_object().into_iter().flatten() {
        match value {
            Value::Object(tools) => tools.iter().for_each(|(tool, s)| seconds(tool.clone(), s)),
            value => seconds(part.clone(), value),
        }
    }
    let printed = trace["printed"].as_str().unwrap_or_default();
    let mut out = String::from("<table>\n");
    for (name, value) in rows {
        let _ = writeln!(out, "<tr><th>{}</th><td>{}</td></tr>", escape(&name), escape(&value));
    }
    out.push_str("</table>\n");
    if !printed.is_empty() {
        let _ = writeln!(out, "<h2>Printed</h2>\n<pre>{}</pre>", escape(printed));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_strangers_wrote_is_text() {
        let evil = "<script>alert(1)</script>\" onload='x' \u{202e}";
        let trace = json!({
            "question": evil, "answer": evil, "plan": evil, "program": format!("x = '{evil}'"), "printed": evil,
            "calls": [
                { "tool": "gd_detect", "args": { "prompt": evil }, "line": 1, "seconds": 0.1,
                  "value": [{ "bbox": [1., 2., 3., 4.], "label": evil }] },
                { "tool": "vqa", "args": { "prompt": evil }, "value": evil, "seconds": 0.1 },
            ],
            "models": { "planner": evil }, "seed": 3, "seconds": { "load": 0.1, "tools": { "vqa": 0.2 } },
        });
        let picture = Picture::new(8, 6, vec![90; 8 * 6 * 3]);
        let depth = Depth::new(4, 3, (0..12).map(|i| 1. + i as f32).collect(), None);
        let page = page(&trace, &picture, Some(&depth)).unwrap();
        assert!(!page.contains("<script") && !page.contains("onload='") && !page.contains('\u{202e}'));
        assert!(page.matches("&lt;script&gt;").count() >= 8);
        // Nothing is asked of anyone.
        for outside in ["http://", "https://", "//cdn", "url(", "@import", "<link", "<iframe"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("default-src 'none'") && page.contains("1.00 m") && page.contains("11.00 m"));
    }

    #[test]
    fn a_failure_is_shown_at_its_line() {
        let trace = json!({
            "question": "How many?", "answer": null, "program": "a = 1\nb = a[0]\n",
            "error": { "kind": "error", "type": "TypeError", "line": 2, "message": "not subscriptable" },
        });
        let page = page(&trace, &Picture::new(2, 2, vec![0; 12]), None).unwrap();
        assert!(page.contains("No answer: error at line 2: not subscriptable"));
        assert!(page.contains("<tr class=\"bad\"><td class=\"n\">2</td>"));
    }
}
