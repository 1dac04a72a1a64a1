//! How far a judge can be trusted: its verdicts against labelled ones, per head.
//!
//! The paper's judges agree with people on 87 % of verdicts, or on 15 %; which of the two one has is
//! worth knowing before a training that believes it.

use super::stats::Share;
use crate::config::Head;
use crate::rooms::mistakes::{Mistake, applies, demonstration, judge};
use crate::rooms::questions::Question;
use crate::verify::{Ask, Verdict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A verdict that is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Labelled {
    pub head: Head,
    #[serde(default)]
    pub question: String,
    #[serde(default)]
    pub plan: String,
    #[serde(default)]
    pub program: String,
    pub ok: bool,
    /// What is wrong, by name, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mistake: Option<String>,
    /// Cases that are not independent of one another share a number.
    #[serde(default)]
    pub cluster: u64,
}

impl Labelled {
    pub fn ask(&self) -> Ask<'_> {
        Ask { head: self.head, question: &self.question, plan: &self.plan, program: &self.program }
    }
}

/// One head's agreement.
#[derive(Clone, Debug, Serialize)]
pub struct HeadAudit {
    /// Of readable verdicts, those that agree.
    pub accuracy: Share,
    /// Mean of the shares of right verdicts on what is right and on what is wrong.
    pub balanced: f64,
    /// Its 95 % interval.
    pub balanced_interval: [f64; 2],
    /// Of what is wrong, what passes.
    pub false_accept: Share,
    /// Of what is right, what is objected to.
    pub false_reject: Share,
    /// Cohen's kappa: agreement beyond what chance gives; 1 is perfect, 0 is chance.
    pub kappa: f64,
    /// Cases without a readable verdict; in none of the others.
    pub missing: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    pub heads: BTreeMap<Head, HeadAudit>,
    /// Of cases with a mistake of this name, the share that is objected to.
    pub objected: BTreeMap<String, Share>,
}

impl Audit {
    /// Of verdicts on labelled cases, in the same order.
    pub fn new(cases: &[Labelled], verdicts: &[Verdict]) -> Self {
        let mut heads = BTreeMap::new();
        for head in Head::ALL {
            let of: Vec<(&Labelled, Option<bool>)> =
                cases.iter().zip(verdicts).filter(|(c, _)| c.head == head).map(|(c, v)| (c, v.ok)).collect();
            if of.is_empty() {
                continue;
            }
            let read: Vec<(&Labelled, bool)> = of.iter().filter_map(|(c, v)| Some((*c, (*v)?))).collect();
            let share = |of: &dyn Fn(&Labelled) -> bool, hit: &dyn Fn(bool, bool) -> bool| {
                Share::clustered(read.iter().filter(|(c, _)| of(c)).map(|(c, v)| (c.cluster, hit(c.ok, *v))))
            };
            let accuracy = share(&|_| true, &|truth, said| truth == said);
            let false_accept = share(&|c| !c.ok, &|_, said| said);
            let false_reject = share(&|c| c.ok, &|_, said| !said);
            let n = read.len().max(1) as f64;
            let yes =
                |of: &dyn Fn(&(&Labelled, bool)) -> bool| read.iter().filter(|r| of(r)).count() as f64 / n;
            let (truth, said) = (yes(&|r| r.0.ok), yes(&|r| r.1));
            let by_chance = truth * said + (1. - truth) * (1. - said);
            let kappa = if by_chance < 1. { (accuracy.value - by_chance) / (1. - by_chance) } else { 0. };
            let balanced = 1. - (false_accept.value + false_reject.value) / 2.;
            let wrong = false_accept.mean_interval(&false_reject);
            let balanced_interval = [1. - wrong[1], 1. - wrong[0]];
            let missing = of.len() - read.len();
            let audit = HeadAudit {
                accuracy,
                balanced,
                balanced_interval,
                false_accept,
                false_reject,
                kappa,
                missing,
            };
            heads.insert(head, audit);
        }
        let mut named: BTreeMap<String, Vec<(u64, bool)>> = BTreeMap::new();
        for (c, v) in cases.iter().zip(verdicts).filter(|(c, _)| !c.ok) {
            if let (Some(name), Some(said)) = (&c.mistake, v.ok) {
                named.entry(name.clone()).or_default().push((c.cluster, !said));
            }
        }
        let objected = named.into_iter().map(|(name, of)| (name, Share::clustered(of))).collect();
        Self { heads, objected }
    }
}

/// Exact labels on Rooms: of each question its right reply, and its reply with each mistake that fits it,
/// under every head that has something to judge there. Mistakes are told by name.
pub fn rooms(questions: &[Question]) -> Vec<Labelled> {
    let mut all = Vec::new();
    for (i, q) in questions.iter().enumerate() {
        let replies = std::iter::once(None).chain(Mistake::that_fit(&q.spec).map(Some));
        for mistake in replies {
            let reply = demonstration(&q.spec, mistake.as_slice());
            let labels = judge(&q.spec, &reply.plan, &reply.program);
            for head in Head::ALL.into_iter().filter(|&h| applies(&q.spec, h)) {
                all.push(Labelled {
                    head,
                    question: q.text.clone(),
                    plan: reply.plan.clone(),
                    program: reply.program.clone(),
                    ok: labels.of(head).ok,
                    mistake: mistake.and_then(|m| serde_json::to_value(m).ok()?.as_str().map(str::to_owned)),
                    cluster: i as u64,
                });
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(ok: bool, mistake: Option<&str>, cluster: u64) -> Labelled {
        Labelled {
            head: Head::Logic,
            question: String::new(),
            plan: String::new(),
            program: String::new(),
            ok,
            mistake: mistake.map(Into::into),
            cluster,
        }
    }

    #[test]
    fn agreement_is_counted_as_the_textbooks_do() {
        // 20 right ones of which 15 pass, 10 wrong ones of which 4 pass, and two that cannot be read.
        let mut cases = Vec::new();
        let mut verdicts = Vec::new();
        let mut add = |n: usize, ok: bool, said: Option<bool>| {
            for _ in 0..n {
                cases.push(case(ok, (!ok).then_some("slip"), cases.len() as u64));
                verdicts.push(Verdict { ok: said, said: String::new(), silent: false });
            }
        };
        add(15, true, Some(true));
        add(5, true, Some(false));
        add(4, false, Some(true));
        add(6, false, Some(false));
        add(2, false, None);
        let audit = Audit::new(&cases, &verdicts);
        let h = &audit.heads[&Head::Logic];
        assert_eq!((h.accuracy.hits, h.accuracy.n, h.missing), (21, 30, 2));
        assert!((h.false_accept.value - 0.4).abs() < 1e-9 && (h.false_reject.value - 0.25).abs() < 1e-9);
        // Agreement 0.7; by chance 2/3 · 19/30 + 1/3 · 11/30.
        let chance = 2. / 3. * 19. / 30. + 1. / 3. * 11. / 30.;
        assert!((h.kappa - (0.7 - chance) / (1. - chance)).abs() < 1e-9, "{}", h.kappa);
        assert!((h.balanced - 0.675).abs() < 1e-9);
        let [low, high] = h.balanced_interval;
        assert!((0.4..0.675).contains(&low) && (0.675..0.9).contains(&high), "{low} {high}");
        assert_eq!((audit.objected["slip"].hits, audit.objected["slip"].n), (6, 10));
        assert_eq!(audit.heads.len(), 1);
    }
}
