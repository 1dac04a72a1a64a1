//! What a verifier of boxes is asked in this world, and the true verdicts.
//!
//! Three questions, as the stages of mining ask them (method.md 5.3): does a box show a thing of that
//! name; does it frame one whole thing of that name; do two boxes mark the same one. The samples
//! hold boxes as an over-eager detector makes them: too large, too small, a part of a thing, two things in
//! one, bare wall. Where even the truth is a matter of taste (half on it, a thing that can hardly be
//! seen) nothing is asked.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::spec::Noun;
use super::{Colour, Kind, Thing, View};
use crate::sight::{BBox, bbox};

/// A question about boxes of one picture with its true answer.
#[derive(Clone, Debug, PartialEq)]
pub struct BoxSample {
    pub ask: BoxAsk,
    pub noun: Noun,
    pub yes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BoxAsk {
    /// Is it one of these at all?
    Shows(BBox),
    /// Is it a whole one, and little else?
    Frames(BBox),
    /// Are both the same one?
    Same(BBox, BBox),
}

impl BoxAsk {
    /// As figures name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shows(_) => "shows",
            Self::Frames(_) => "frames",
            Self::Same(..) => "same",
        }
    }
}

/// A box with at least this IoU with a thing frames it. Stricter than the 0.5 at which detectors are
/// measured, since what is taken for a label should be better than what is let pass.
const FRAMES: f64 = 0.6;
/// Between this and [`FRAMES`] it is a matter of taste.
const OFF: f64 = 0.45;

fn is(thing: &Thing, noun: Noun) -> bool {
    thing.kind == noun.kind && noun.colour.is_none_or(|c| c == thing.colour)
}

/// Does the box frame a thing of that name? `None` where that is a matter of taste.
pub fn frames(view: &View, noun: Noun, b: BBox) -> Option<bool> {
    let best = best_of(view, noun, b, bbox::iou);
    match best {
        Some((thing, iou)) if iou >= FRAMES => thing.is_clear().then_some(true),
        Some((_, iou)) if iou > OFF => None,
        _ => Some(false),
    }
}

/// Is a thing of that name what the box shows? `None` where that is a matter of taste.
pub fn shows(view: &View, noun: Noun, b: BBox) -> Option<bool> {
    // A part of a thing shows it too, and so does a box with much around it.
    let covered = |a: BBox, t: BBox| bbox::intersection(a, t) / bbox::area(a).min(bbox::area(t)).max(1e-9);
    match best_of(view, noun, b, bbox::iou) {
        Some((thing, iou)) if iou >= 0.4 => thing.is_clear().then_some(true),
        _ => match best_of(view, noun, b, covered) {
            Some((_, share)) if share > 0.2 => None,
            _ => Some(false),
        },
    }
}

fn best_of(view: &View, noun: Noun, b: BBox, by: impl Fn(BBox, BBox) -> f64) -> Option<(&Thing, f64)> {
    let named = view.things.iter().filter(|t| is(t, noun));
    named.map(|t| (t, by(b, t.bbox))).max_by(|a, b| a.1.total_cmp(&b.1))
}

/// Training data for a verifier of boxes from one picture: `n` of each question, where it gives as many.
pub fn box_samples(view: &View, n: usize, rng: &mut impl Rng) -> Vec<BoxSample> {
    let clear: Vec<&Thing> = view.things.iter().filter(|t| t.is_clear()).collect();
    let mut out = Vec::new();
    if clear.is_empty() {
        return out;
    }
    // As many of either answer as far as the picture allows.
    for i in 0..n {
        let want = i % 2 == 0;
        let tries = (0..12).filter_map(|_| {
            let b = guessed(view, &clear, rng);
            let noun = named(view, b, rng);
            let yes = frames(view, noun, b)?;
            Some(BoxSample { ask: BoxAsk::Frames(b), noun, yes })
        });
        out.extend(pick_answer(tries, want));
    }
    for i in 0..n {
        let want = i % 2 == 0;
        let tries = (0..12).filter_map(|_| {
            let b = guessed(view, &clear, rng);
            let noun = named(view, b, rng);
            let yes = shows(view, noun, b)?;
            Some(BoxSample { ask: BoxAsk::Shows(b), noun, yes })
        });
        out.extend(pick_answer(tries, want));
    }
    for i in 0..n {
        out.extend(pair(&clear, i % 2 == 0, rng));
    }
    out
}

/// The first sample with the wanted answer, or the last of the others.
fn pick_answer(tries: impl Iterator<Item = BoxSample>, want: bool) -> Option<BoxSample> {
    let mut last = None;
    for sample in tries {
        if sample.yes == want {
            return Some(sample);
        }
        last = Some(sample);
    }
    last
}

/// A box as an over-eager detector might give it.
fn guessed(view: &View, clear: &[&Thing], rng: &mut impl Rng) -> BBox {
    let (w, h) = (f64::from(view.width), f64::from(view.height));
    let thing = clear.choose(rng).expect("not empty").bbox;
    let b = match rng.random_range(0..100) {
        0..45 => moved(thing, 0.12, rng),
        45..70 => moved(thing, 0.45, rng),
        70..78 => part(thing, rng),
        78..86 => {
            let other = clear.choose(rng).expect("not empty").bbox;
            bbox::hull(thing, other)
        }
        _ => {
            let side = |n: f64, rng: &mut dyn rand::RngCore| {
                let len = n * rng.random_range(0.05..0.5);
                let from = rng.random_range(0. ..n - len);
                (from, from + len)
            };
            let ((x1, x2), (y1, y2)) = (side(w, rng), side(h, rng));
            [x1, y1, x2, y2]
        }
    };
    bbox::clipped(b, w, h)
}

/// Each side moved by at most a share of the box's extent.
fn moved([x1, y1, x2, y2]: BBox, share: f64, rng: &mut impl Rng) -> BBox {
    let (w, h) = (x2 - x1, y2 - y1);
    let mut by = |side: f64| rng.random_range(-share..=share) * side;
    [x1 + by(w), y1 + by(h), x2 + by(w), y2 + by(h)]
}

/// Half of a box, more or less.
fn part([x1, y1, x2, y2]: BBox, rng: &mut impl Rng) -> BBox {
    let share = rng.random_range(0.35..0.65);
    let (x, y) = (x1 + share * (x2 - x1), y1 + share * (y2 - y1));
    match rng.random_range(0..4) {
        0 => [x1, y1, x, y2],
        1 => [x, y1, x2, y2],
        2 => [x1, y1, x2, y],
        _ => [x1, y, x2, y2],
    }
}

/// Kinds that look like one.
fn alike(kind: Kind) -> &'static [Kind] {
    use Kind::*;
    match kind {
        Chair => &[Stool, Table, Sofa],
        Stool => &[Chair, Table, Box],
        Table => &[Stool, Bed, Chair],
        Sofa => &[Bed, Chair, Table],
        Bed => &[Sofa, Table],
        Lamp => &[Vase, Plant, Ball],
        Shelf => &[Fridge, Picture, Box],
        Tv => &[Picture, Box],
        Picture => &[Tv, Shelf],
        Plant => &[Vase, Lamp],
        Vase => &[Plant, Lamp, Ball],
        Fridge => &[Box, Shelf],
        Box => &[Fridge, Stool, Tv],
        Ball => &[Vase, Lamp],
    }
}

/// What a box may be called: mostly the kind that is there, now and then with a colour.
fn named(view: &View, b: BBox, rng: &mut impl Rng) -> Noun {
    let there = view.things.iter().max_by(|s, t| bbox::iou(b, s.bbox).total_cmp(&bbox::iou(b, t.bbox)));
    let there = there.expect("a picture with clear things");
    let kind = match rng.random_range(0..100) {
        0..55 => there.kind,
        // What a detector confuses it with.
        55..80 => *alike(there.kind).choose(rng).expect("not empty"),
        80..92 => view.things.choose(rng).expect("not empty").kind,
        _ => *Kind::ALL.choose(rng).expect("not empty"),
    };
    let colour = match rng.random_range(0..100) {
        0..12 => Some(there.colour),
        12..20 => Some(*Colour::ALL.choose(rng).expect("not empty")),
        _ => None,
    };
    Noun::new(kind, colour)
}

/// Two boxes of one thing, or of two.
fn pair(clear: &[&Thing], same: bool, rng: &mut impl Rng) -> Option<BoxSample> {
    let thing = *clear.choose(rng)?;
    let noun = Noun::new(thing.kind, None);
    let one = moved(thing.bbox, 0.1, rng);
    let other = if same {
        match rng.random_bool(0.25) {
            true => part(thing.bbox, rng),
            false => moved(thing.bbox, 0.3, rng),
        }
    } else {
        // The nearest of its kind, else the one that it overlaps most.
        let others = clear.iter().filter(|t| t.id != thing.id);
        let near = |t: &Thing| {
            let hull = bbox::area(bbox::hull(thing.bbox, t.bbox));
            f64::from(u8::from(t.kind == thing.kind)) * 0.3
                + bbox::area(t.bbox) / hull
                + bbox::iou(thing.bbox, t.bbox)
        };
        moved(others.max_by(|a, b| near(a).total_cmp(&near(b)))?.bbox, 0.12, rng)
    };
    let (a, b) = if rng.random_bool(0.5) { (one, other) } else { (other, one) };
    Some(BoxSample { ask: BoxAsk::Same(a, b), noun, yes: same })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::{Look, generate};
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn verdicts_are_those_of_the_truth_and_both_occur() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut yes, mut no) = ([0; 3], [0; 3]);
        for seed in 0..20 {
            let view = generate(seed, Look::LivedIn, 256, 192);
            for s in box_samples(&view, 6, &mut rng) {
                let (i, iou) = match s.ask {
                    BoxAsk::Shows(b) => (0, b),
                    BoxAsk::Frames(b) => (1, b),
                    BoxAsk::Same(a, _) => (2, a),
                };
                *if s.yes { &mut yes[i] } else { &mut no[i] } += 1;
                let best = view
                    .things
                    .iter()
                    .filter(|t| is(t, s.noun))
                    .map(|t| bbox::iou(t.bbox, iou))
                    .fold(0., f64::max);
                match s.ask {
                    BoxAsk::Frames(_) => assert!(if s.yes { best >= FRAMES } else { best <= OFF }),
                    BoxAsk::Shows(_) => assert!(if s.yes { best >= 0.4 } else { best < 0.4 }),
                    BoxAsk::Same(a, b) => assert!(a != b),
                }
            }
        }
        for i in 0..3 {
            assert!(yes[i] >= 30 && no[i] >= 30, "{yes:?} {no:?}");
        }
    }

    #[test]
    fn a_part_of_a_thing_shows_it_but_does_not_frame_it() {
        let view = generate(3, Look::Studio, 256, 192);
        let thing = view.things.iter().find(|t| t.is_clear()).unwrap();
        let noun = Noun::new(thing.kind, Some(thing.colour));
        let [x1, y1, x2, y2] = thing.bbox;
        let half = [x1, y1, (x1 + x2) / 2., y2];
        assert_eq!(
            (shows(&view, noun, thing.bbox), frames(&view, noun, thing.bbox)),
            (Some(true), Some(true))
        );
        assert_eq!(shows(&view, noun, half), Some(true));
        assert_ne!(frames(&view, noun, half), Some(true));
        let other =
            Colour::ALL.iter().copied().find(|&c| !view.things.iter().any(|t| t.colour == c)).unwrap();
        assert_eq!(frames(&view, Noun::new(thing.kind, Some(other)), thing.bbox), Some(false));
    }
}
