//! The page of a training run: its curves, and replies before and after.
//!
//! Reads the run's records only (`metrics.jsonl`'s lines, replies to held-out questions).

use super::{escape, head};
use crate::text::plain;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Curves that share a diagram: its title, and the keys of their figures.
const DIAGRAMS: [(&str, &[&str]); 8] = [
    ("Reward", &["reward", "held_out_reward", "held_out_right"]),
    ("Heads", &["format", "syntax", "logic", "attribute", "spatial", "adherence"]),
    ("Divergence from the base (k3)", &["kl"]),
    ("Entropy of a token", &["entropy"]),
    ("Groups with spread, distinct, missing", &["groups_with_spread", "distinct", "missing"]),
    ("Tokens of a reply", &["reply_tokens"]),
    ("Gradient norm", &["grad_norm"]),
    ("Tokens whose ratio was clipped", &["clipped"]),
];

const COLOURS: [&str; 6] = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"];

/// Pairs shown.
const EXAMPLES: usize = 12;

/// A run's page. `metrics` are its lines in order; `before` and `after` the replies to the same held-out
/// questions at its beginning and now, each `{"question", "reply", "reward"}`.
pub fn page(title: &str, metrics: &[Value], before: &[Value], after: &[Value]) -> String {
    let mut out = beginning(title, DIAGRAMS, metrics);
    out.push_str(&phases(metrics));
    let reward = |v: &Value| v["reward"].as_f64();
    let mut changed: Vec<(&Value, &Value)> = before
        .iter()
        .zip(after)
        .filter(|(b, a)| b["question"] == a["question"] && b["reply"] != a["reply"])
        .collect();
    // What changed most comes first, for better or worse.
    let by = |(b, a): &(&Value, &Value)| (reward(a).unwrap_or(0.) - reward(b).unwrap_or(0.)).abs();
    changed.sort_by(|x, y| by(y).total_cmp(&by(x)));
    let _ = writeln!(
        out,
        "<h2>Before and after</h2>\n<p>{} of {} held-out questions are answered otherwise than before the \
         training.</p>",
        changed.len(),
        after.len()
    );
    for (b, a) in changed.into_iter().take(EXAMPLES) {
        let side = |name: &str, v: &Value| {
            let reward = reward(v).map_or("missing".to_owned(), |r| format!("{r:.2}"));
            let reply = escape(plain(&v["reply"]).trim());
            format!("<figure><figcaption>{name}, reward {reward}</figcaption><pre>{reply}</pre></figure>\n")
        };
        let _ = writeln!(
            out,
            "<h2>{}</h2>\n<div class=\"pictures\">\n{}{}</div>",
            escape(&plain(&a["question"])),
            side("before", b),
            side("after", a)
        );
    }
    out.push_str("</main></body></html>\n");
    out
}

/// The page of a run that leaves nothing but figures: a curve of each, for whatever a trainee measures.
pub fn curves(title: &str, metrics: &[Value]) -> String {
    let keys = metrics.iter().filter_map(Value::as_object).flatten().map(|(key, _)| key.as_str());
    let keys: BTreeSet<&str> = keys.filter(|key| !CLOCKS.contains(key)).collect();
    let diagrams = keys.iter().map(|key| (*key, std::slice::from_ref(key)));
    let mut out = beginning(title, diagrams, metrics);
    out.push_str("</main></body></html>\n");
    out
}

/// What of a line says when it was, not how it went.
const CLOCKS: [&str; 3] = ["step", "seconds", "unix"];

/// A page's head, and the diagrams that there are figures for.
fn beginning<'a>(
    title: &str,
    diagrams: impl IntoIterator<Item = (&'a str, &'a [&'a str])>,
    metrics: &[Value],
) -> String {
    let mut out = head(title);
    let last = metrics.iter().filter_map(|m| m["step"].as_u64()).max().unwrap_or(0);
    let _ = writeln!(out, "<h1>{}</h1>\n<p>After step {last}.</p>\n<div class=\"pictures\">", escape(title));
    for (name, keys) in diagrams {
        if let Some(figure) = diagram(name, keys, metrics) {
            out.push_str(&figure);
        }
    }
    out.push_str("</div>\n");
    out
}

/// A diagram of the figures that there are, or nothing.
fn diagram(title: &str, keys: &[&str], metrics: &[Value]) -> Option<String> {
    let curve = |key: &str| -> Vec<(f64, f64)> {
        let point = |m: &Value| Some((m["step"].as_f64()?, m[key].as_f64()?));
        metrics.iter().filter_map(point).filter(|p| p.1.is_finite()).collect()
    };
    let curves: Vec<(&str, Vec<(f64, f64)>)> =
        keys.iter().map(|k| (*k, curve(k))).filter(|c| !c.1.is_empty()).collect();
    let all = || curves.iter().flat_map(|c| &c.1);
    let last = all().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
    if !last.is_finite() {
        return None;
    }
    let (low, high) = all().fold((0f64, f64::NEG_INFINITY), |(l, h), p| (l.min(p.1), h.max(p.1)));
    let high = if high > low { high } else { low + 1. };
    const W: f64 = 360.;
    const H: f64 = 160.;
    const LEFT: f64 = 44.;
    const BELOW: f64 = 18.;
    let x = |step: f64| LEFT + (W - LEFT - 4.) * step / last.max(1.);
    let y = |v: f64| 6. + (H - BELOW - 6.) * (high - v) / (high - low);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {W} {H}\" role=\"img\" aria-label=\"{}\" style=\"position:static;height:auto\" \
         font-size=\"10\" fill=\"currentColor\">",
        escape(title)
    );
    for v in [low, (low + high) / 2., high] {
        let _ = write!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{W}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#8886\"/><text x=\"{1}\" \
             y=\"{2:.1}\" text-anchor=\"end\">{3}</text>",
            y(v),
            LEFT - 4.,
            y(v) + 3.,
            number(v)
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{0}\">0</text><text x=\"{W}\" y=\"{0}\" text-anchor=\"end\">step {last}</text>",
        H - 4.
    );
    let mut caption = String::new();
    for ((key, points), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let path: Vec<String> = points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
        let _ = match points[..] {
            // A line of one point is nothing to see.
            [p] => {
                write!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2\" fill=\"{colour}\"/>", x(p.0), y(p.1))
            }
            _ => write!(
                svg,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>",
                path.join(" ")
            ),
        };
        let now = points.last().map_or(0., |p| p.1);
        let _ = write!(
            caption,
            "<span style=\"white-space:nowrap\"><span class=\"key\" style=\"background:{colour}\"></span>{} {}</span> ",
            escape(&key.replace('_', " ")),
            number(now)
        );
    }
    svg.push_str("</svg>");
    Some(format!(
        "<figure><b>{}</b><div>{svg}</div><figcaption>{caption}</figcaption></figure>\n",
        escape(title)
    ))
}

/// Three digits.
fn number(v: f64) -> String {
    match v.abs() {
        0. => "0".into(),
        a if a < 1e-3 => format!("{v:.1e}"),
        a if a < 1. => format!("{v:.3}"),
        a if a < 100. => format!("{v:.1}"),
        _ => format!("{v:.0}"),
    }
}

/// Where the time of the steps went.
fn phases(metrics: &[Value]) -> String {
    let mut sums: Vec<(&str, f64)> = Vec::new();
    for (phase, s) in metrics.iter().filter_map(|m| m["seconds"].as_object()).flatten() {
        let s = s.as_f64().unwrap_or(0.);
        match sums.iter_mut().find(|(name, _)| name == phase) {
            Some((_, sum)) => *sum += s,
            None => sums.push((phase, s)),
        }
    }
    let all: f64 = sums.iter().map(|s| s.1).sum();
    if all == 0. {
        return String::new();
    }
    let rows: String = sums
        .iter()
        .map(|(name, s)| {
            format!("<tr><th>{}</th><td>{s:.0} s</td><td>{:.0} %</td></tr>\n", escape(name), 100. * s / all)
        })
        .collect();
    format!("<h2>Where the time went</h2>\n<table>\n{rows}</table>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn curves_and_changes_are_shown_and_text_is_text() {
        let metrics: Vec<Value> = (0..5)
            .map(|i| json!({"step": i, "reward": 0.5 + 0.1 * f64::from(i), "seconds": {"update": 2.0}}))
            .collect();
        let reply = |q: &str, r: &str, reward: f64| json!({"question": q, "reply": r, "reward": reward});
        let before = [reply("a", "same", 1.), reply("<b>", "<script>old", 0.2)];
        let after = [reply("a", "same", 1.), reply("<b>", "<script>new", 1.)];
        let page = page("run <1>", &metrics, &before, &after);
        assert!(page.contains("run &lt;1&gt;") && !page.contains("<script") && !page.contains("<b>, "));
        assert!(page.contains("1 of 2 held-out") && page.contains("before, reward 0.20"));
        assert_eq!(page.matches("<polyline").count(), 1, "only what there is has a curve");
        assert!(page.contains("10 s") && page.contains("step 4"));
    }

    #[test]
    fn a_run_without_a_step_has_a_page_too() {
        assert!(page("run", &[], &[], &[]).contains("After step 0"));
        assert!(curves("run", &[]).contains("After step 0"));
    }

    #[test]
    fn whatever_is_measured_has_a_curve_and_clocks_have_none() {
        let metrics = [
            json!({"step": 1, "loss": 0.5, "lr": 1e-3, "skipped": true, "seconds": 2.0}),
            json!({"step": 1, "unix": 5.0, "ap<50>": 0.25}),
        ];
        let page = curves("run <1>", &metrics);
        assert!(page.contains("run &lt;1&gt;") && page.contains("After step 1"));
        assert_eq!(page.matches("<circle").count(), 3, "{page}");
        for name in ["<b>loss</b>", "<b>lr</b>", "<b>ap&lt;50&gt;</b>"] {
            assert!(page.contains(name), "{name}: {page}");
        }
    }
}
