//! Exact answers from a picture's truth, and when a question may be asked at all.
//!
//! Everything has a margin: what hangs on a few pixels, on a half-hidden thing or on a near tie
//! has no answer here, and is not asked.

use serde_json::{Value, json};

use super::recipe::{Measure, most_measure, side_measure};
use super::spec::{Dim, More, Most, Near, Noun, Nouns, Spec};
use super::{Colour, Kind, Thing, View};

/// Ratio by which depths must differ, by the tool's reading and by the things' centres.
pub const DEPTH_MARGIN: f64 = 1.15;
/// Share of the picture's side by which centres must differ, beyond a quarter of the extents.
pub const PLACE_MARGIN: f64 = 0.05;
/// Ratio by which true sizes must differ.
pub const SIZE_MARGIN: f64 = 1.2;
/// Deviation of the correct program on exact depth from the true metric size that still may be asked.
pub const SIZE_ERROR: f64 = 0.05;
/// A side that is measured has at least so many pixels.
pub const MIN_MEASURED_PIXELS: f64 = 14.;

/// Clear, and not only just.
fn plain(thing: &Thing) -> bool {
    thing.is_clear() && thing.visible_fraction >= 0.3 && thing.visible_pixels >= 60
}

/// Its true extent, metres.
pub(super) fn truth_size(thing: &Thing, dim: Dim) -> f64 {
    match dim {
        Dim::Width => thing.size[0],
        Dim::Height => thing.size[1],
    }
}

/// The whole of it is in the picture, and next to nothing stands before it.
fn measurable(thing: &Thing, dim: Dim) -> bool {
    let b = thing.bbox;
    let pixels = match dim {
        Dim::Width => b[2] - b[0],
        Dim::Height => b[3] - b[1],
    };
    !thing.truncated && thing.visible_fraction >= 0.9 && b == thing.full_bbox && pixels >= MIN_MEASURED_PIXELS
}

impl View {
    /// All things of a noun, if nobody could argue about their number: every thing of that kind
    /// in view is plain to see.
    pub fn all_of(&self, noun: Noun) -> Option<Vec<&Thing>> {
        let of_kind = || self.things.iter().filter(|t| t.kind == noun.kind);
        of_kind()
            .all(plain)
            .then(|| of_kind().filter(|t| noun.colour.is_none_or(|c| c == t.colour)).collect())
    }

    /// The one thing that a noun stands for.
    pub fn the(&self, noun: Noun) -> Option<&Thing> {
        match self.all_of(noun)?[..] {
            [thing] => Some(thing),
            _ => None,
        }
    }

    fn measured(&self, thing: &Thing, measure: Measure) -> f64 {
        let b = thing.bbox;
        match measure {
            Measure::X => b[0] + b[2],
            Measure::Y => b[1] + b[3],
            Measure::Depth => self.depth_at(b),
            Measure::Height => (b[3] - b[1]) * self.depth_at(b),
            Measure::Width => (b[2] - b[0]) * self.depth_at(b),
            Measure::PixelHeight => b[3] - b[1],
            Measure::PixelWidth => b[2] - b[0],
        }
    }

    /// Is `a` less than `b` in this measure? `None` within the margin, or where the truth and
    /// what a program can see of it differ.
    fn less(&self, a: &Thing, b: &Thing, measure: Measure) -> Option<bool> {
        let by_ratio = |a: f64, b: f64, margin: f64| (a.max(b) >= margin * a.min(b)).then_some(a < b);
        let agree = |x: Option<bool>, y: Option<bool>| if x == y { x } else { None };
        match measure {
            Measure::X | Measure::Y => {
                let (low, high, side) =
                    if measure == Measure::X { (0, 2, self.width) } else { (1, 3, self.height) };
                let place = |a: [f64; 4], b: [f64; 4]| {
                    let gap = (a[low] + a[high] - b[low] - b[high]) / 2.;
                    let extents = (a[high] - a[low] + b[high] - b[low]) / 2.;
                    (gap.abs() >= PLACE_MARGIN * f64::from(side) + extents / 4.).then_some(gap < 0.)
                };
                agree(place(a.bbox, b.bbox), place(a.full_bbox, b.full_bbox))
            }
            Measure::Depth => agree(
                by_ratio(a.centre[2], b.centre[2], DEPTH_MARGIN),
                by_ratio(self.measured(a, measure), self.measured(b, measure), DEPTH_MARGIN),
            ),
            Measure::Height | Measure::Width => {
                let dim = if measure == Measure::Height { Dim::Height } else { Dim::Width };
                // Only the order counts, and the margins below hold for what is seen: a little may
                // be hidden.
                let whole = |t: &Thing| !t.truncated && t.visible_fraction >= 0.6;
                if !whole(a) || !whole(b) {
                    return None;
                }
                agree(
                    by_ratio(truth_size(a, dim), truth_size(b, dim), SIZE_MARGIN),
                    by_ratio(self.measured(a, measure), self.measured(b, measure), 1.1),
                )
            }
            Measure::PixelHeight | Measure::PixelWidth => None,
        }
    }

    /// The best of several things, ahead of every other by the margin.
    fn best<'v>(&self, things: &[&'v Thing], most: Most) -> Option<&'v Thing> {
        let (measure, smallest) = most_measure(most);
        things.iter().copied().find(|a| {
            let ahead = |b: &&Thing| a.id == b.id || self.less(a, b, measure) == Some(smallest);
            things.iter().all(ahead)
        })
    }
}

impl Spec {
    /// The answer, if the question is well posed for this picture.
    pub fn truth(&self, view: &View) -> Option<Value> {
        let kind = |kind: Kind| Noun::new(kind, None);
        let yes_no = |yes: bool| json!(if yes { "yes" } else { "no" });
        let near = |a, b, near: Near| Some(view.less(a, b, Measure::Depth)? == (near == Near::Closer));
        let count = |of: Noun, than: Noun, measure, less| {
            let (all, than) = (view.all_of(of)?, view.the(than)?);
            // With none of the kind in view the program asks the VLM, and the question is odd.
            if all.is_empty() {
                return None;
            }
            let mut n = 0;
            for thing in all {
                n += usize::from(view.less(thing, than, measure)? == less);
            }
            Some(n)
        };
        Some(match self {
            Self::Count { of } => json!(view.all_of(*of)?.len()),
            Self::Exists { of } => yes_no(!view.all_of(*of)?.is_empty()),
            Self::Depth { a, b, near: n } => {
                let a_is = near(view.the(*a)?, view.the(*b)?, *n)?;
                json!(if a_is { a } else { b }.to_string())
            }
            Self::Position { a, b, side } => {
                let (measure, less) = side_measure(*side);
                yes_no(view.less(view.the(*a)?, view.the(*b)?, measure)? == less)
            }
            Self::Size { reference, reference_dim, metres, target, dim } => {
                let (r, t) = (view.the(*reference)?, view.the(*target)?);
                if !measurable(r, *reference_dim) || !measurable(t, *dim) {
                    return None;
                }
                let extent = |thing, dim| view.measured(thing, Measure::of_dim(dim));
                let told = metres * extent(t, *dim) / extent(r, *reference_dim);
                let truth = truth_size(t, *dim);
                if *metres != round_metres(truth_size(r, *reference_dim))
                    || (told - truth).abs() > SIZE_ERROR * truth
                {
                    return None;
                }
                json!((truth * 1000.).round() / 1000.)
            }
            Self::Colour { of } => json!(view.the(kind(*of))?.colour),
            Self::IsColour { of, colour } => yes_no(view.the(kind(*of))?.colour == *colour),
            Self::CompareCounts { a, b, more } => {
                let (a, b) = (view.all_of(*a)?.len(), view.all_of(*b)?.len());
                if a == b {
                    return None;
                }
                yes_no((a > b) == (*more == More::More))
            }
            Self::Superlative { of, most } => {
                let things = of.iter().map(|&k| view.the(kind(k))).collect::<Option<Vec<_>>>()?;
                json!(view.best(&things, *most)?.kind)
            }
            Self::ColourOptions { of, options } => {
                let colour = view.the(kind(*of))?.colour;
                if !options.contains(&colour) {
                    return None;
                }
                json!(colour)
            }
            Self::SideOptions { a, b, options } => {
                let left = view.less(view.the(*a)?, view.the(*b)?, Measure::X)?;
                let first_is_left = options[0].to_lowercase().contains("left");
                json!(options[usize::from(left != first_is_left)])
            }
            Self::DepthOptions { a, b, options } => {
                let front = view.less(view.the(*a)?, view.the(*b)?, Measure::Depth)?;
                let first_is_front = options[0].to_lowercase().contains("front");
                json!(options[usize::from(front != first_is_front)])
            }
            Self::ColourOfMost { of, most } => {
                let all = view.all_of(kind(*of))?;
                // Several of one colour would make the superlative idle.
                if all.iter().all(|t| t.colour == all[0].colour) {
                    return None;
                }
                json!(view.best(&all, *most)?.colour)
            }
            Self::CountBeside { of, than, side } => {
                let (measure, less) = side_measure(*side);
                json!(count(*of, *than, measure, less)?)
            }
            Self::CountNearer { of, than, near } => {
                json!(count(*of, *than, Measure::Depth, *near == Near::Closer)?)
            }
            Self::MostNearer { of, most, than, near: n } => {
                let all = view.all_of(kind(*of))?;
                if all.len() < 2 {
                    return None;
                }
                yes_no(near(view.best(&all, *most)?, view.the(*than)?, *n)?)
            }
        })
    }

    /// The same question about the true size of its reference, told to the centimetre.
    pub fn with_true_metres(mut self, view: &View) -> Self {
        if let Self::Size { reference, reference_dim, metres, .. } = &mut self
            && let Some(thing) = view.the(*reference)
        {
            *metres = round_metres(truth_size(thing, *reference_dim));
        }
        self
    }
}

fn round_metres(metres: f64) -> f64 {
    (metres * 100.).round() / 100.
}

/// The nouns that fit a picture.
pub struct NounsOf<'a, R> {
    view: &'a View,
    rng: &'a mut R,
}

impl<'a, R: rand::Rng> NounsOf<'a, R> {
    pub fn new(view: &'a View, rng: &'a mut R) -> Self {
        Self { view, rng }
    }
}

impl<R: rand::Rng> Nouns for NounsOf<'_, R> {
    fn one(&mut self) -> Option<Noun> {
        let things = &self.view.things;
        let thing = things.get(self.rng.random_range(0..things.len().max(1)))?;
        let (bare, full) = (Noun::new(thing.kind, None), Noun::new(thing.kind, Some(thing.colour)));
        let first = if self.rng.random_bool(0.3) { [full, bare] } else { [bare, full] };
        first.into_iter().find(|&noun| self.view.the(noun).is_some())
    }

    fn many(&mut self) -> Option<Noun> {
        let things = &self.view.things;
        let kind = if self.rng.random_bool(0.8) {
            things.get(self.rng.random_range(0..things.len().max(1)))?.kind
        } else {
            Kind::ALL[self.rng.random_range(0..Kind::ALL.len())]
        };
        let colour = if self.rng.random_bool(0.6) {
            None
        } else {
            // Mostly a colour that is there, or nearly every such count would be zero.
            let there: Vec<Colour> = things.iter().filter(|t| t.kind == kind).map(|t| t.colour).collect();
            match there[..] {
                [_, ..] if self.rng.random_bool(0.7) => Some(there[self.rng.random_range(0..there.len())]),
                _ => Some(Colour::ALL[self.rng.random_range(0..Colour::ALL.len())]),
            }
        };
        Some(Noun::new(kind, colour))
    }
}
