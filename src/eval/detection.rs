//! COCO's average precision, with the semantics of pycocotools (`bbox`), in all and by size.
//!
//! Per class, detections of all pictures are taken best first; each picture's are matched
//! greedily to its truths at ten IoU thresholds; precision is made monotone and sampled at 101
//! recalls. Truths marked `ignore` are what pycocotools calls crowds: they may swallow any number
//! of detections (overlap over the *detection's* area), which then count neither way. Of one size only
//! truths of that size count; those of another are ignored, and so are detections of another that hit
//! nothing. Not here: average recall, masks.

use super::stats;
use crate::sight::{BBox, bbox};
use rayon::prelude::*;
use serde::Serialize;

/// A thing that is really there, or a region (`ignore`) where detections do not count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truth {
    pub class: usize,
    pub bbox: BBox,
    pub ignore: bool,
    /// Pixels: of its mask where that is known, else of the box. Decides its size.
    pub area: f64,
}

impl Truth {
    /// Of the box's area.
    pub fn new(class: usize, bbox: BBox, ignore: bool) -> Self {
        Self { class, bbox, ignore, area: bbox::area(bbox) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    pub class: usize,
    pub bbox: BBox,
    pub score: f64,
}

/// One picture's truths and detections.
#[derive(Clone, Debug, Default)]
pub struct Scored {
    pub truths: Vec<Truth>,
    pub found: Vec<Found>,
}

/// Means over the classes that occur; NaN where none does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AveragePrecision {
    /// Mean over IoU 0.50, 0.55 … 0.95.
    pub ap: f64,
    pub ap50: f64,
    pub ap75: f64,
    /// Of things below 32² pixels, up to 96², and above; NaN where there are none.
    pub small: f64,
    pub medium: f64,
    pub large: f64,
    /// 95 % interval of AP50, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ap50_interval: Option<[f64; 2]>,
    /// AP50 of each class, `None` where it does not occur.
    pub ap50_by_class: Vec<Option<f64>>,
    /// Truths that count.
    pub truths: usize,
}

const THRESHOLDS: usize = 10;

/// Detections per picture and class that count; pycocotools' `maxDets`.
pub const MAX_DETECTIONS: usize = 100;

/// COCO's sizes: areas in pixels from … to.
const ALL: [f64; 2] = [0., 1e10];
const SMALL: [f64; 2] = [0., 32. * 32.];
const MEDIUM: [f64; 2] = [32. * 32., 96. * 96.];
const LARGE: [f64; 2] = [96. * 96., 1e10];

pub fn average_precision(pictures: &[Scored], classes: usize) -> AveragePrecision {
    let of_size = |size: [f64; 2]| -> Vec<Option<[f64; THRESHOLDS]>> {
        let one = |class| Matched::new(pictures, class, size).precision();
        (0..classes).into_par_iter().map(one).collect()
    };
    let mean = |by_class: &[Option<[f64; THRESHOLDS]>], pick: &dyn Fn(&[f64; THRESHOLDS]) -> f64| {
        let values: Vec<f64> = by_class.iter().flatten().map(pick).collect();
        values.iter().sum::<f64>() / values.len() as f64
    };
    let over_thresholds = |t: &[f64; THRESHOLDS]| t.iter().sum::<f64>() / THRESHOLDS as f64;
    let by_class = of_size(ALL);
    AveragePrecision {
        ap: mean(&by_class, &over_thresholds),
        ap50: mean(&by_class, &|t| t[0]),
        ap50_interval: None,
        ap75: mean(&by_class, &|t| t[5]),
        small: mean(&of_size(SMALL), &over_thresholds),
        medium: mean(&of_size(MEDIUM), &over_thresholds),
        large: mean(&of_size(LARGE), &over_thresholds),
        ap50_by_class: by_class.iter().map(|c| c.map(|t| t[0])).collect(),
        truths: pictures.iter().flat_map(|p| &p.truths).filter(|t| !t.ignore && t.class < classes).count(),
    }
}

/// The same with AP50's interval: percentiles over resampled pictures (Efron 1979).
pub fn with_interval(pictures: &[Scored], classes: usize) -> AveragePrecision {
    let all = average_precision(pictures, classes);
    let matched: Vec<Matched> =
        (0..classes).into_par_iter().map(|class| Matched::new(pictures, class, ALL)).collect();
    let interval = stats::percentiles(pictures.len(), |times| {
        let of_classes = matched.par_iter().filter_map(|m| m.resampled(times, 0));
        let (sum, n) = of_classes.map(|ap| (ap, 1.)).reduce(|| (0., 0.), |a, b| (a.0 + b.0, a.1 + b.1));
        sum / n
    });
    AveragePrecision { ap50_interval: interval, ..all }
}

/// What became of one detection at each threshold.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Hit,
    Miss,
    Ignored,
}

/// One class's detections in all pictures, best first, matched to its truths.
struct Matched {
    /// Score, picture, and what became of it.
    found: Vec<(f64, usize, [Fate; THRESHOLDS])>,
    /// Truths that count, by picture.
    positives: Vec<usize>,
}

impl Matched {
    /// At each threshold; `None` where the class does not occur.
    fn precision(&self) -> Option<[f64; THRESHOLDS]> {
        let once = vec![1; self.positives.len()];
        self.resampled(&once, 0)?;
        Some(std::array::from_fn(|k| self.resampled(&once, k).unwrap_or(f64::NAN)))
    }

    /// At one threshold, each picture counted so many times.
    fn resampled(&self, times: &[usize], k: usize) -> Option<f64> {
        let positives: usize = self.positives.iter().zip(times).map(|(n, times)| n * times).sum();
        let fates = self.found.iter().map(|(_, picture, fate)| (fate[k], times[*picture]));
        (positives > 0).then(|| area(fates, positives))
    }

    fn new(pictures: &[Scored], class: usize, [least, most]: [f64; 2]) -> Self {
        let is_of_size = |area: f64| (least..=most).contains(&area);
        // Crowds, and what is of another size.
        let ignored = |t: &Truth| t.ignore || !is_of_size(t.area);
        let mut all: Vec<(f64, usize, [Fate; THRESHOLDS])> = Vec::new();
        let mut positives = Vec::new();
        for (picture, p) in pictures.iter().enumerate() {
            // Truths that count come first: a detection prefers them to any ignore region.
            let mut truths: Vec<&Truth> = p.truths.iter().filter(|t| t.class == class).collect();
            truths.sort_by_key(|t| ignored(t));
            positives.push(truths.iter().filter(|t| !ignored(t)).count());
            let mut found: Vec<&Found> = p.found.iter().filter(|f| f.class == class).collect();
            found.sort_by(|a, b| b.score.total_cmp(&a.score));
            found.truncate(MAX_DETECTIONS);
            let overlaps: Vec<Vec<f64>> =
                found.iter().map(|f| truths.iter().map(|t| overlap(f.bbox, t)).collect()).collect();
            let mut fates = vec![[Fate::Miss; THRESHOLDS]; found.len()];
            for k in 0..THRESHOLDS {
                // As numpy's linspace(0.5, 0.95, 10) rounds.
                let threshold = if k == THRESHOLDS - 1 { 0.95 } else { 0.5 + k as f64 * ((0.95 - 0.5) / 9.) };
                let mut taken = vec![false; truths.len()];
                for ((overlaps, fate), found) in overlaps.iter().zip(&mut fates).zip(&found) {
                    let mut best: Option<usize> = None;
                    let mut least = threshold.min(1. - 1e-10);
                    for (i, truth) in truths.iter().enumerate() {
                        if taken[i] && !truth.ignore {
                            continue;
                        }
                        if ignored(truth) && best.is_some_and(|b| !ignored(truths[b])) {
                            break;
                        }
                        if overlaps[i] >= least {
                            (best, least) = (Some(i), overlaps[i]);
                        }
                    }
                    match best {
                        Some(i) => {
                            taken[i] = true;
                            fate[k] = if ignored(truths[i]) { Fate::Ignored } else { Fate::Hit };
                        }
                        None if !is_of_size(bbox::area(found.bbox)) => fate[k] = Fate::Ignored,
                        None => {}
                    }
                }
            }
            all.extend(found.iter().zip(fates).map(|(f, fates)| (f.score, picture, fates)));
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        Self { found: all, positives }
    }
}

/// Area under the monotone precision–recall curve, sampled at recalls 0, 0.01 … 1.
fn area(fates: impl Iterator<Item = (Fate, usize)>, positives: usize) -> f64 {
    let (mut hits, mut misses) = (0usize, 0usize);
    let mut curve: Vec<(f64, f64)> = Vec::new();
    for (fate, times) in fates {
        match fate {
            Fate::Hit => hits += times,
            Fate::Miss => misses += times,
            Fate::Ignored => continue,
        }
        if hits + misses == 0 {
            continue;
        }
        curve.push((hits as f64 / positives as f64, hits as f64 / (hits + misses) as f64));
    }
    for i in (1..curve.len()).rev() {
        curve[i - 1].1 = curve[i - 1].1.max(curve[i].1);
    }
    let at = |recall: f64| {
        let i = curve.partition_point(|p| p.0 < recall);
        curve.get(i).map_or(0., |p| p.1)
    };
    // As numpy's linspace(0, 1, 101) rounds.
    (0..=100).map(|i| at(if i == 100 { 1. } else { i as f64 * 0.01 })).sum::<f64>() / 101.
}

fn overlap(found: BBox, truth: &Truth) -> f64 {
    match truth.ignore {
        true => bbox::intersection(found, truth.bbox) / bbox::area(found).max(f64::MIN_POSITIVE),
        false => bbox::iou(found, truth.bbox),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(class: usize, x: f64) -> Truth {
        Truth::new(class, [x, 0., x + 10., 10.], false)
    }

    fn found(class: usize, x: f64, score: f64) -> Found {
        Found { class, bbox: [x, 0., x + 10., 10.], score }
    }

    fn ap50(truths: Vec<Truth>, found: Vec<Found>) -> f64 {
        average_precision(&[Scored { truths, found }], 1).ap50
    }

    #[test]
    fn the_interval_holds_the_value_and_narrows_with_pictures() {
        let picture = |i: usize| Scored {
            truths: vec![truth(0, 0.), truth(1, 50.)],
            // One of three pictures is seen wrongly.
            found: vec![found(0, if i.is_multiple_of(3) { 30. } else { 0. }, 0.9), found(1, 50., 0.8)],
        };
        let of = |n: usize| {
            let all = with_interval(&(0..n).map(picture).collect::<Vec<_>>(), 2);
            assert_eq!(all.ap50, average_precision(&(0..n).map(picture).collect::<Vec<_>>(), 2).ap50);
            let [low, high] = all.ap50_interval.unwrap();
            assert!(low < all.ap50 && all.ap50 < high, "{low} {} {high}", all.ap50);
            high - low
        };
        let (few, many) = (of(30), of(270));
        assert!((2. ..4.5).contains(&(few / many)), "{few} {many}");
        assert_eq!(with_interval(&[picture(1)], 2).ap50_interval, None, "one picture has none");
    }

    #[test]
    fn perfect_and_absent_detections() {
        assert!(
            (ap50(vec![truth(0, 0.), truth(0, 50.)], vec![found(0, 0., 0.5), found(0, 50., 0.4)]) - 1.).abs()
                < 1e-12
        );
        assert_eq!(ap50(vec![truth(0, 0.)], vec![]), 0.);
        assert!(ap50(vec![], vec![found(0, 0., 0.9)]).is_nan(), "a class that does not occur is left out");
    }

    #[test]
    fn a_better_scored_mistake_halves_the_precision() {
        // Precision 1/2 at every recall.
        let ap = ap50(vec![truth(0, 0.)], vec![found(0, 80., 0.9), found(0, 0., 0.5)]);
        assert!((ap - 0.5).abs() < 1e-12, "{ap}");
        // A worse-scored one costs nothing.
        assert!((ap50(vec![truth(0, 0.)], vec![found(0, 80., 0.1), found(0, 0., 0.5)]) - 1.).abs() < 1e-12);
        // So does a second box on the same thing: it counts as a mistake, after the hit.
        let twice = vec![found(0, 0., 0.9), found(0, 1., 0.8), found(0, 50., 0.7)];
        let ap = ap50(vec![truth(0, 0.), truth(0, 50.)], twice);
        // Recall ≤ 0.5 at precision 1 (51 samples), above at 2/3 (50 samples).
        assert!((ap - (51. + 50. * 2. / 3.) / 101.).abs() < 1e-12, "{ap}");
    }

    #[test]
    fn half_the_truths_found_is_fifty_one_samples() {
        let ap = ap50(vec![truth(0, 0.), truth(0, 50.)], vec![found(0, 0., 0.9)]);
        assert!((ap - 51. / 101.).abs() < 1e-12, "{ap}");
    }

    #[test]
    fn thresholds_run_from_half_to_nearly_one() {
        // Shifted by 1 of 10: IoU 9/11 = 0.818, so seven of ten thresholds hold.
        let all =
            average_precision(&[Scored { truths: vec![truth(0, 0.)], found: vec![found(0, 1., 0.9)] }], 1);
        assert!((all.ap - 0.7).abs() < 1e-12 && all.ap75 == all.ap50, "{all:?}");
    }

    #[test]
    fn ignore_regions_swallow_detections_but_do_not_attract_hits() {
        let region = Truth::new(0, [0., 0., 100., 10.], true);
        let boxes = vec![found(0, 20., 0.9), found(0, 40., 0.8), found(0, 0., 0.7)];
        assert!((ap50(vec![region, truth(0, 0.)], boxes) - 1.).abs() < 1e-12);
        assert!(ap50(vec![region], vec![found(0, 20., 0.9)]).is_nan(), "a region is nothing to be found");
    }

    #[test]
    fn classes_are_averaged_and_pictures_ranked_together() {
        let one = Scored { truths: vec![truth(0, 0.)], found: vec![found(0, 0., 0.4), found(1, 0., 0.9)] };
        let two = Scored { truths: vec![truth(1, 0.)], found: vec![found(0, 0., 0.8), found(1, 0., 0.5)] };
        let got = average_precision(&[one, two], 3);
        assert_eq!(got.ap50_by_class, [Some(0.5), Some(0.5), None]);
        assert!((got.ap50 - 0.5).abs() < 1e-12);
        assert_eq!(got.truths, 2);
    }

    #[test]
    fn a_things_mask_decides_its_size_where_it_is_known() {
        // A thin thing in a box of 100 × 100 pixels.
        let bbox = [0., 0., 100., 100.];
        let thing = Truth::new(0, bbox, false);
        let sizes = |truth: Truth| {
            let scored = Scored { truths: vec![truth], found: vec![Found { class: 0, bbox, score: 0.9 }] };
            let all = average_precision(&[scored], 1);
            [all.small, all.medium, all.large].map(|ap| !ap.is_nan())
        };
        assert_eq!(sizes(thing), [false, false, true]);
        assert_eq!(sizes(Truth { area: 1500., ..thing }), [false, true, false]);
        assert_eq!(sizes(Truth { area: 900., ..thing }), [true, false, false]);
    }

    /// Figures of pycocotools on the same truths and detections (scripts/make_ap_fixture.py).
    #[test]
    fn figures_are_those_of_pycocotools() {
        let case: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/fixtures/average-precision/case.json")).unwrap();
        let number = |v: &serde_json::Value| v.as_f64().unwrap();
        let corners = |v: &serde_json::Value| {
            let [x, y, w, h] = [0, 1, 2, 3].map(|i| number(&v["bbox"][i]));
            [x, y, x + w, y + h]
        };
        let class = |v: &serde_json::Value| v["category_id"].as_u64().unwrap() as usize - 1;
        let list = |v: &serde_json::Value| v.as_array().unwrap().clone();
        let mut pictures = vec![Scored::default(); list(&case["truth"]["images"]).len()];
        let place = |v: &serde_json::Value| v["image_id"].as_u64().unwrap() as usize - 1;
        for a in list(&case["truth"]["annotations"]) {
            let ignore = a["iscrowd"] == 1;
            let truth = Truth { class: class(&a), bbox: corners(&a), ignore, area: number(&a["area"]) };
            pictures[place(&a)].truths.push(truth);
        }
        for f in list(&case["found"]) {
            let found = Found { class: class(&f), bbox: corners(&f), score: number(&f["score"]) };
            pictures[place(&f)].found.push(found);
        }
        let got = average_precision(&pictures, 4);
        let got = [got.ap, got.ap50, got.ap75, got.small, got.medium, got.large];
        for (name, got) in ["ap", "ap50", "ap75", "small", "medium", "large"].iter().zip(got) {
            let want = number(&case["expected"][name]);
            assert!((got - want).abs() < 1e-6, "{name}: {got}, pycocotools has {want}");
        }
    }
}
