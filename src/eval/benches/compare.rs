//! Two runs on the same questions: paired differences, and which samples flipped.
//!
//! The interval of the mean difference is a bootstrap over pictures; McNemar's exact test (1947) looks
//! at the samples on which only one of the two is right, where a score of one half or more is right.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::Value;

use super::metric::Form;
use super::record::{Record, SAMPLES, each};
use crate::eval::stats::Mean;
use crate::text::{plain, shown};

#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    pub bench: String,
    /// Questions that both runs have a score of.
    pub n: usize,
    pub a: f64,
    pub b: f64,
    /// Of B from A.
    pub difference: Mean,
    pub only_a_right: usize,
    pub only_b_right: usize,
    /// McNemar's exact test, two-sided.
    pub p: f64,
    pub flipped: Vec<Flip>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Flip {
    pub index: usize,
    pub question: String,
    pub truth: Value,
    pub a: Option<Value>,
    pub b: Option<Value>,
    pub right: &'static str,
}

/// Runs that can be compared, bench by bench; and how many samples only one of them has.
///
/// # Errors
/// Folders without records, or whose records are of other questions.
pub fn compare(a: &Path, b: &Path, form: Form) -> Result<(Vec<Compared>, usize)> {
    let score = |r: &Record| match form {
        Form::Reference => r.reference,
        Form::Strict => r.strict,
    };
    let mut first: HashMap<(String, usize), Record> = HashMap::new();
    each(&a.join(SAMPLES), |r: Record| {
        first.insert((r.bench.clone(), r.index), Record { calls: Vec::new(), reply: None, ..r });
        Ok(())
    })?;
    let mut pairs: BTreeMap<String, Vec<(Record, Record)>> = BTreeMap::new();
    let mut alone = 0;
    each(&b.join(SAMPLES), |r: Record| {
        let Some(l) = first.remove(&(r.bench.clone(), r.index)) else {
            alone += 1;
            return Ok(());
        };
        if (&l.question, &l.truth) != (&r.question, &r.truth) {
            bail!(
                "{} and {} are runs on different data: {} row {} asks {:?} in one and {:?} in the other",
                a.display(),
                b.display(),
                r.bench,
                r.index,
                l.question,
                r.question
            )
        }
        match (score(&l), score(&r)) {
            (Some(_), Some(_)) => pairs.entry(r.bench.clone()).or_default().push((l, r)),
            _ => alone += 1,
        }
        Ok(())
    })?;
    alone += first.len();
    if pairs.is_empty() {
        bail!("{} and {} have no sample in common", a.display(), b.display())
    }
    let of = |(bench, pairs): (String, Vec<(Record, Record)>)| {
        let s = |r: &Record| score(r).expect("both have one");
        let n = pairs.len();
        let mean = |side: &dyn Fn(&(Record, Record)) -> f64| pairs.iter().map(side).sum::<f64>() / n as f64;
        let differences = pairs.iter().map(|(l, r)| (l.picture.as_str(), s(r) - s(l)));
        let flips = pairs.iter().filter(|(l, r)| (s(l) >= 0.5) != (s(r) >= 0.5));
        let flipped: Vec<Flip> = flips
            .map(|(l, r)| Flip {
                index: l.index,
                question: l.question.clone(),
                truth: l.truth.clone(),
                a: l.answer.clone(),
                b: r.answer.clone(),
                right: if s(l) >= 0.5 { "a" } else { "b" },
            })
            .collect();
        let only_a_right = flipped.iter().filter(|f| f.right == "a").count();
        let only_b_right = flipped.len() - only_a_right;
        Compared {
            n,
            a: mean(&|p| s(&p.0)),
            b: mean(&|p| s(&p.1)),
            difference: Mean::bootstrap(differences).expect("at least one pair"),
            only_a_right,
            only_b_right,
            p: mcnemar(only_a_right, only_b_right),
            flipped,
            bench,
        }
    };
    Ok((pairs.into_iter().map(of).collect(), alone))
}

/// Two-sided, from the binomial distribution of the discordant pairs.
pub fn mcnemar(only_a: usize, only_b: usize) -> f64 {
    let n = only_a + only_b;
    // Logarithms of binomial coefficients, so that thousands of pairs do not overflow.
    let mut log_choose = 0.;
    let mut tail = 0.;
    for k in 0..=only_a.min(only_b) {
        if k > 0 {
            log_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        tail += (log_choose - n as f64 * std::f64::consts::LN_2).exp();
    }
    (2. * tail).min(1.)
}

/// Flips that a terminal shows of each bench.
const SHOWN: usize = 10;

/// For a terminal.
pub fn table(all: &[Compared], alone: usize, form: Form) -> String {
    let mut out = format!(
        "{:<14} {:>6} {:>7} {:>7}  {:<24} {:>7} {:>7}  McNemar's p ({})\n",
        "bench",
        "n",
        "A, %",
        "B, %",
        "B − A, points",
        "only A",
        "only B",
        form.name()
    );
    for c in all {
        let d = &c.difference;
        let difference = format!("{:+.1} [{:+.1}, {:+.1}]", 100. * d.value, 100. * d.low, 100. * d.high);
        let _ = writeln!(
            out,
            "{:<14} {:>6} {:>7.1} {:>7.1}  {difference:<24} {:>7} {:>7}  {:.4}",
            c.bench,
            c.n,
            100. * c.a,
            100. * c.b,
            c.only_a_right,
            c.only_b_right,
            c.p
        );
    }
    if alone > 0 {
        let _ = writeln!(out, "{alone} samples have a score in one run only, and are left out");
    }
    for c in all {
        let told = |v: &Value| shown(&plain(v)).into_owned();
        let said = |v: &Option<Value>| v.as_ref().map_or("no answer".into(), told);
        for f in c.flipped.iter().take(SHOWN) {
            let _ = writeln!(
                out,
                "  {} {}: {:?}, right is {}; A {}, B {}",
                c.bench,
                f.index,
                f.question,
                told(&f.truth),
                said(&f.a),
                said(&f.b)
            );
        }
        if c.flipped.len() > SHOWN {
            let _ = writeln!(out, "  {}: {} more flipped; --json has all", c.bench, c.flipped.len() - SHOWN);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mcnemars_test_gives_the_binomials_tails() {
        // 2·(C(6,0)+C(6,1))/2⁶ = 14/64; 2/2⁵; equal halves are no evidence at all.
        assert!((mcnemar(1, 5) - 14. / 64.).abs() < 1e-12);
        assert!((mcnemar(5, 0) - 2. / 32.).abs() < 1e-12);
        assert_eq!((mcnemar(0, 0), mcnemar(4, 4)), (1., 1.));
        assert!(mcnemar(1000, 1200) < 1e-4 && mcnemar(1000, 1200) > 1e-6);
    }
}
