//! What each model is worth by itself on Rooms: the detector's average precision, the error of
//! depth, the VLM's answers about crops, the verifier's verdicts on a planner's own replies.
//!
//! All on test scenes, through the same code that programs' tool calls take.

use super::audit::Labelled;
use super::detection::{self, AveragePrecision, Scored, Truth};
use super::rooms::SIZE;
use super::stats::{Share, percentiles};
use crate::config::Head;
use crate::data::odvg::{Boxes, Instance};
use crate::llm::{ChatError, ChatReply};
use crate::pipeline::question_seed;
use crate::planner::Planner;
use crate::program::Reply;
use crate::rooms::mistakes::{self, Mistake, demonstration, judge};
use crate::rooms::questions::{Question, Split, scene_seed};
use crate::rooms::vqa::{parse_crop, vqa_samples};
use crate::rooms::{self, Kind, Look, View};
use crate::sight::Picture;
use crate::tools::real::{DepthEstimator, Detector, Vlm};
use crate::verify::{Judge, Verdict};
use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::BTreeMap;

/// A test scene.
pub(super) fn view(look: Look, seed: u64, index: u64) -> View {
    rooms::generate(scene_seed(Split::Test, seed, index), look, SIZE.0, SIZE.1)
}

fn picture(view: &View) -> Picture {
    Picture::new(view.width, view.height, view.rgb.clone())
}

/// Average precision of one prompt that asks for every kind of thing. What is hardly to be seen
/// counts neither way.
pub fn detector(
    detector: &Detector,
    look: Look,
    seed: u64,
    pictures: u64,
    mut progress: impl FnMut(),
) -> Result<AveragePrecision> {
    let nouns: Vec<String> = Kind::ALL.iter().map(|k| k.to_string()).collect();
    let mut scored = Vec::new();
    for i in 0..pictures {
        let view = view(look, seed, i);
        let truth = |t: &rooms::Thing| {
            let class = Kind::ALL.iter().position(|k| *k == t.kind).expect("all kinds");
            Truth::new(class, t.bbox, !t.is_clear())
        };
        let truths = view.things.iter().map(truth).collect();
        let pixels = detector.pixels(&picture(&view))?;
        let mut found = Vec::new();
        for (bbox, scores) in detector.scores(&pixels, (view.height, view.width), &nouns)? {
            let each = scores.into_iter().enumerate();
            found.extend(each.map(|(class, s)| detection::Found { class, bbox, score: s.into() }));
        }
        scored.push(Scored { truths, found });
        progress();
    }
    Ok(detection::with_interval(&scored, nouns.len()))
}

/// Detections of a picture that count, over all classes: as the original's evaluation on COCO.
const MOST_FOUND: usize = 300;

/// Average precision on pictures with true boxes, asked for every label, as many at once as fit into a
/// caption. Pictures that cannot be read count nowhere; `progress` hears of each one, and why if so.
///
/// # Errors
/// If a label alone is too long for the detector, or the network fails.
pub fn detection(
    detector: &Detector,
    boxes: &Boxes,
    pictures: usize,
    mut progress: impl FnMut(Option<String>),
) -> Result<AveragePrecision> {
    let names = boxes.labels.names();
    let mut lists: Vec<std::ops::Range<usize>> = Vec::new();
    for i in 0..names.len() {
        match lists.last_mut() {
            Some(list) if detector.fits(&names[list.start..=i]) => list.end = i + 1,
            _ => lists.push(i..i + 1),
        }
    }
    let mut scored = Vec::new();
    for (i, record) in boxes.records.iter().enumerate().take(pictures) {
        let picture = match Picture::open(&boxes.picture(i)) {
            Ok(picture) => picture,
            Err(e) => {
                progress(Some(e.to_string()));
                continue;
            }
        };
        let d = &record.detection;
        let truth = |b: &Instance, ignore| {
            let truth = Truth::new(b.label, b.bbox, ignore);
            Truth { area: b.area.unwrap_or(truth.area), ..truth }
        };
        let mut truths: Vec<Truth> = d.instances.iter().map(|b| truth(b, false)).collect();
        truths.extend(d.crowds.iter().map(|b| truth(b, true)));
        let everywhere = |&bbox| (0..names.len()).map(move |class| Truth::new(class, bbox, true));
        truths.extend(d.ignore.iter().flat_map(everywhere));
        let pixels = detector.pixels(&picture)?;
        let mut found: Vec<detection::Found> = Vec::new();
        for list in &lists {
            for (bbox, scores) in
                detector.scores(&pixels, (picture.height(), picture.width()), &names[list.clone()])?
            {
                let each = list.clone().zip(scores);
                found.extend(each.map(|(class, s)| detection::Found { class, bbox, score: s.into() }));
            }
        }
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(MOST_FOUND);
        scored.push(Scored { truths, found });
        progress(None);
    }
    Ok(detection::with_interval(&scored, names.len()))
}

/// Errors of metric depth, means over pictures, with 95 % intervals where those are two or more.
#[derive(Clone, Debug, Serialize)]
pub struct DepthReport {
    /// Mean of |d − truth| / truth over all pixels.
    pub abs_rel: f64,
    pub abs_rel_interval: Option<[f64; 2]>,
    /// The same after scaling each picture by its median of truth over prediction.
    pub abs_rel_aligned: f64,
    pub abs_rel_aligned_interval: Option<[f64; 2]>,
    pub pictures: u64,
}

pub fn depth(
    estimator: &DepthEstimator,
    look: Look,
    seed: u64,
    pictures: u64,
    mut progress: impl FnMut(),
) -> Result<DepthReport> {
    let (mut rel, mut aligned) = (Vec::new(), Vec::new());
    for i in 0..pictures {
        let view = view(look, seed, i);
        let got = estimator.estimate(&picture(&view))?;
        rel.push(super::depth::abs_rel(&got, &view.depth));
        aligned.push(super::depth::abs_rel_aligned(&got, &view.depth));
        progress();
    }
    let mean = |errors: &[f64]| errors.iter().sum::<f64>() / pictures as f64;
    let interval = |errors: &[f64]| {
        let drawn = |times: &[usize]| times.iter().zip(errors).map(|(t, e)| *t as f64 * e).sum::<f64>();
        percentiles(errors.len(), |times| drawn(times) / pictures as f64)
    };
    Ok(DepthReport {
        abs_rel: mean(&rel),
        abs_rel_interval: interval(&rel),
        abs_rel_aligned: mean(&aligned),
        abs_rel_aligned_interval: interval(&aligned),
        pictures,
    })
}

/// Crops of one picture at most, so that pictures are many.
const CROPS: usize = 5;

/// The share of right answers about crops, by what is asked, and in all.
pub fn vlm(
    vlm: &Vlm,
    look: Look,
    seed: u64,
    crops: usize,
    mut progress: impl FnMut(),
) -> Result<BTreeMap<&'static str, Share>> {
    let mut answered: Vec<(&'static str, u64, bool)> = Vec::new();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for i in 0.. {
        let view = view(look, seed, i);
        let picture = picture(&view);
        let mut asked = vqa_samples(&view, &mut rng);
        asked.retain(|(bbox, _, _)| bbox.is_some());
        asked.shuffle(&mut rng);
        for (bbox, prompt, truth) in asked.into_iter().take(CROPS) {
            let name = parse_crop(&prompt).context("an unknown wording")?.name();
            answered.push((name, i, vlm.ask(&picture, bbox, &prompt)? == truth));
            progress();
            if answered.len() == crops {
                return Ok(by_name(&answered));
            }
        }
    }
    unreachable!("pictures have no end")
}

fn by_name(answered: &[(&'static str, u64, bool)]) -> BTreeMap<&'static str, Share> {
    let share = |name: Option<&str>| {
        let of = answered.iter().filter(|a| name.is_none_or(|n| n == a.0));
        Share::clustered(of.map(|a| (a.1, a.2)))
    };
    let mut all: BTreeMap<_, _> = answered.iter().map(|a| (a.0, share(Some(a.0)))).collect();
    all.insert("all", share(None));
    all
}

/// How a head's verdicts agree with the truth, where the head applies.
#[derive(Clone, Debug, Serialize)]
pub struct HeadReport {
    /// Of what is right, the share that passes.
    pub passed: Share,
    /// Of what is wrong, the share that is objected to.
    pub objected: Share,
    /// Their mean, and its 95 % interval.
    pub balanced: f64,
    pub balanced_interval: [f64; 2],
    /// Replies without a readable verdict; each counts as wrong.
    pub unreadable: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct VerifierReport {
    /// On the planner's replies.
    pub heads: BTreeMap<&'static str, HeadReport>,
    /// Share of objections by the attribute head to the one mistake that training never showed.
    pub kept_back: Share,
    /// Replies of the planner that hold no plan and program; nothing to judge in them.
    pub unparsed: usize,
    /// Verdicts that the verifier's server did not give; they count nowhere.
    pub silent: usize,
}

/// Questions asked and cases judged in one call of a model.
const BATCH: usize = 48;

/// The planner's sampled replies, batch by batch: the number of its first question, its questions, a reply to each.
pub(super) fn replies<'a>(
    planner: &'a Planner,
    asked: &'a [Question],
    seed: u64,
) -> impl Iterator<Item = (usize, &'a [Question], Vec<Result<ChatReply, ChatError>>)> {
    asked.chunks(BATCH).enumerate().map(move |(batch, chunk)| {
        let start = batch * BATCH;
        let seeded = chunk.iter().enumerate().map(|(i, q)| (&*q.text, question_seed(seed, start + i, 0)));
        (start, chunk, planner.ask(&seeded.collect::<Vec<_>>(), None))
    })
}

/// Verdicts of all heads on the planner's sampled replies to `asked`, against exact labels; and of
/// the attribute head on [`Mistake::KEPT_FROM_VERIFIER`], put into replies to the same questions.
/// `progress` hears what is done and how much there is: questions first, then their cases too.
pub fn verifier(
    verifier: &Judge,
    planner: &Planner,
    asked: &[Question],
    seed: u64,
    mut progress: impl FnMut(usize, usize),
) -> Result<VerifierReport> {
    let mut cases: Vec<Labelled> = Vec::new();
    let mut kept: Vec<Labelled> = Vec::new();
    let mut unparsed = 0;
    let case = |head, number: usize, q: &Question, plan: String, program: String, ok| Labelled {
        head,
        question: q.text.clone(),
        plan,
        program,
        ok,
        mistake: None,
        cluster: number as u64,
    };
    for (start, chunk, replies) in replies(planner, asked, seed) {
        for (i, (q, reply)) in chunk.iter().zip(replies).enumerate() {
            let (reply, number) = (reply?, start + i);
            if Mistake::that_fit(&q.spec).any(|m| m == Mistake::KEPT_FROM_VERIFIER) {
                let wrong = demonstration(&q.spec, &[Mistake::KEPT_FROM_VERIFIER]);
                kept.push(case(Head::Attribute, number, q, wrong.plan, wrong.program, false));
            }
            let Ok(Reply { plan: Some(plan), program, .. }) = Reply::parse(&reply.text) else {
                unparsed += 1;
                continue;
            };
            let labels = judge(&q.spec, &plan, &program);
            for head in Head::ALL.into_iter().filter(|&h| mistakes::applies(&q.spec, h)) {
                cases.push(case(head, number, q, plan.clone(), program.clone(), labels.of(head).ok));
            }
            progress(number + 1, asked.len());
        }
    }
    let (mut done, all) = (asked.len(), asked.len() + cases.len() + kept.len());
    let mut verdicts = |cases: &[&Labelled]| -> Result<Vec<Verdict>> {
        let mut said = Vec::new();
        for chunk in cases.chunks(BATCH) {
            let asks: Vec<_> = chunk.iter().map(|c| c.ask()).collect();
            said.extend(verifier.verdicts(&asks, |_| ())?);
            done += chunk.len();
            progress(done, all);
        }
        Ok(said)
    };
    let silence = |got: &[Verdict]| got.iter().filter(|v| v.silent).count();
    let (mut heads, mut silent) = (BTreeMap::new(), 0);
    for head in Head::ALL {
        let of: Vec<&Labelled> = cases.iter().filter(|c| c.head == head).collect();
        let got = verdicts(&of)?;
        silent += silence(&got);
        let share = |truth: bool| {
            let cases = of.iter().zip(&got).filter(|(c, v)| c.ok == truth && !v.silent);
            Share::clustered(cases.map(|(c, v)| (c.cluster, v.ok == Some(truth))))
        };
        let (passed, objected) = (share(true), share(false));
        let balanced = (passed.value + objected.value) / 2.;
        let unreadable = got.iter().filter(|v| v.ok.is_none() && !v.silent).count();
        let balanced_interval = passed.mean_interval(&objected);
        heads.insert(head.word(), HeadReport { passed, objected, balanced, balanced_interval, unreadable });
    }
    let got = verdicts(&kept.iter().collect::<Vec<_>>())?;
    silent += silence(&got);
    let had = kept.iter().zip(&got).filter(|(_, v)| !v.silent);
    let kept_back = Share::clustered(had.map(|(k, v)| (k.cluster, v.ok == Some(false))));
    Ok(VerifierReport { heads, kept_back, unparsed, silent })
}
