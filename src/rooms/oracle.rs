//! The tools with perfect eyes: exact boxes, exact depth, true answers.
//!
//! They stand for the best that detector, depth network and VLM could be, so that a program's
//! own correctness can be measured. Only clear things are seen, as with the detector's labels.

use super::spec::{Noun, colour_of, kind_of};
use super::vqa::{UNKNOWN, answer_crop, answer_whole, parse_crop};
use super::{Colour, Thing, View};
use crate::sight::{BBox, Depth, DepthError, Detection, ToolError, ToolErrorKind, Tools, bbox};

/// [`Tools`] that know the truth of one picture.
#[derive(Clone, Copy, Debug)]
pub struct OracleTools<'a> {
    view: &'a View,
}

impl<'a> OracleTools<'a> {
    pub fn new(view: &'a View) -> Self {
        Self { view }
    }

    /// The clear things that a phrase names, by id (an order that tells nothing). The first word
    /// that names a kind counts, with a colour if one stands before it; words that it does not
    /// know change nothing, as with open-vocabulary detectors, to which "leftmost chair" is a chair.
    pub fn things(&self, phrase: &str) -> Vec<&'a Thing> {
        let Some(noun) = named(phrase) else { return Vec::new() };
        let fits = |t: &&Thing| t.kind == noun.kind && noun.colour.is_none_or(|c| c == t.colour);
        let mut things: Vec<&Thing> = self.view.things.iter().filter(|t| t.is_clear()).filter(fits).collect();
        things.sort_by_key(|t| t.id);
        things
    }
}

/// The first noun in a phrase.
fn named(phrase: &str) -> Option<Noun> {
    let mut colour: Option<Colour> = None;
    for word in phrase.to_lowercase().split(|c: char| !c.is_alphanumeric()) {
        if let Some(kind) = kind_of(word) {
            return Some(Noun::new(kind, colour));
        }
        colour = colour_of(word).or(colour);
    }
    None
}

/// The true depth through the true camera, read as the network's is.
fn geometry(view: &View) -> Depth {
    let (w, h) = (view.width as usize, view.height as usize);
    let fx = 0.5 / (view.camera.fov_x.to_radians() / 2.).tan();
    Depth::new(w, h, view.depth.clone(), None).through([fx, fx * w as f64 / h as f64])
}

fn value(e: DepthError) -> ToolError {
    ToolError { kind: ToolErrorKind::Value, message: e.to_string() }
}

impl Tools for OracleTools<'_> {
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        let mut detections: Vec<Detection> = Vec::new();
        let mut seen = Vec::new();
        for phrase in prompt.split(',').map(str::trim) {
            for thing in self.things(phrase) {
                if !seen.contains(&thing.id) {
                    seen.push(thing.id);
                    detections.push(Detection {
                        bbox: thing.bbox,
                        label: phrase.to_lowercase(),
                        score: None,
                    });
                }
            }
        }
        Ok(detections)
    }

    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError> {
        Ok(self.view.depth_at(bbox))
    }

    fn point3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        geometry(self.view).point_at(bbox).map_err(value)
    }

    fn size3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        geometry(self.view).size_in(bbox).map_err(value)
    }

    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        let Some(bbox) = bbox else { return Ok(answer_whole(self.view, prompt)) };
        let overlap = |t: &Thing| bbox::iou(t.bbox, bbox);
        let best = self.view.things.iter().max_by(|a, b| overlap(a).total_cmp(&overlap(b)));
        Ok(match (best.filter(|t| overlap(t) > 0.), parse_crop(prompt)) {
            (Some(thing), Some(ask)) => answer_crop(thing, &ask),
            _ => UNKNOWN.to_owned(),
        })
    }
}
