//! The real tools: GroundingDINO, MoGe-2 and a VLM behind [`Tools`] (method.md 7).
//!
//! [`Perception`] holds the three models, loaded once; [`RealTools`] is the context of one picture:
//! decoded once, its depth computed once and for it alone (method.md 10.1), detections kept per
//! prompt. Everything here is deterministic: the VLM answers greedily.

pub(crate) mod detector;
mod estimator;
mod questions;

pub use detector::{Detector, DetectorParts};
pub use estimator::DepthEstimator;
pub use questions::{Vlm, crop, vqa_prompts};

use crate::config::{Config, ConfigError};
use crate::llm::local;
use crate::llm::{ChatModel, ChatModels};
use crate::models::grounding_dino::caption::nouns_of;
use crate::sight::{BBox, Depth, Detection, Picture, ToolError, ToolErrorKind, Tools};
use crate::weights::{WeightsError, message_of};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Chat(#[from] local::LoadError),
    #[error("{name}: {}", message_of(.source))]
    Model { name: String, source: candle_core::Error },
}

/// The models that look at pictures.
pub struct Perception {
    pub detector: Detector,
    pub depth: DepthEstimator,
    pub vlm: Vlm,
}

impl Perception {
    /// Loads the three models of a configuration, each in a thread of its own.
    pub fn load(config: &Config, device: &Device, chats: &ChatModels) -> Result<Self, LoadError> {
        chats.check_vlm()?;
        let (detector, depth, vlm) = std::thread::scope(|s| {
            let detector = s.spawn(|| Detector::load(&config.detector, device));
            let depth = s.spawn(|| DepthEstimator::load(&config.depth, device));
            let vlm = chats.vlm();
            let join = "loading a model does not panic";
            (detector.join().expect(join), depth.join().expect(join), vlm)
        });
        Ok(Self { detector: detector?, depth: depth?, vlm: Vlm::new(vlm?, &config.vlm)? })
    }

    /// With any chat model as the VLM, such as a remote one or a test's.
    pub fn with_vlm(config: &Config, device: &Device, vlm: Arc<dyn ChatModel>) -> Result<Self, LoadError> {
        Ok(Self {
            detector: Detector::load(&config.detector, device)?,
            depth: DepthEstimator::load(&config.depth, device)?,
            vlm: Vlm::new(vlm, &config.vlm)?,
        })
    }

    /// Part and model, for notices and reports.
    pub fn names(&self) -> [(&'static str, &str); 3] {
        [("detector", self.detector.name()), ("depth", self.depth.name()), ("vlm", self.vlm.name())]
    }
}

/// The tools for one picture.
pub struct RealTools<'a> {
    models: &'a Perception,
    picture: &'a Picture,
    /// The detector's input, made at the first question.
    pixels: Option<Tensor>,
    detections: HashMap<Vec<String>, Vec<Detection>>,
    depth: Option<Depth>,
    outage: Option<String>,
}

impl<'a> RealTools<'a> {
    pub fn new(models: &'a Perception, picture: &'a Picture) -> Self {
        Self { models, picture, pixels: None, detections: HashMap::new(), depth: None, outage: None }
    }

    /// Of the whole picture; computed now if no program has asked for it yet.
    pub fn depth_map(&mut self) -> Result<&Depth, ToolError> {
        if self.depth.is_none() {
            let estimated = self.models.depth.estimate(self.picture).map_err(network);
            self.depth = Some(self.noting("depth", estimated)?);
        }
        Ok(self.depth.as_ref().expect("there now"))
    }

    /// A network that fails (for want of memory, say) says nothing about the program that called it.
    fn noting<T>(&mut self, tool: &str, result: Result<T, ToolError>) -> Result<T, ToolError> {
        if let Err(e) = &result
            && e.kind == ToolErrorKind::Runtime
        {
            self.outage.get_or_insert_with(|| format!("{tool}: {}", e.message));
        }
        result
    }

    /// The lists of nouns that the detector has looked for so far, each once, in no order.
    pub fn looked_for(&self) -> impl Iterator<Item = &[String]> {
        self.detections.keys().map(Vec::as_slice)
    }
}

impl Tools for RealTools<'_> {
    /// Boxes whose phrase is one of the nouns asked for, whatever their capitals, best first.
    /// Labels are lower case with single blanks. No noun, no boxes.
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        let nouns = nouns_of(prompt);
        if nouns.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(known) = self.detections.get(&nouns) {
            return Ok(known.clone());
        }
        let (detector, picture) = (&self.models.detector, self.picture);
        let mut look = || {
            let pixels = match &self.pixels {
                Some(p) => p,
                None => self.pixels.insert(detector.pixels(picture).map_err(network)?),
            };
            detector.detect(pixels, (picture.height(), picture.width()), &nouns)
        };
        let found = look();
        let found = self.noting("gd_detect", found)?;
        self.detections.insert(nouns, found.clone());
        Ok(found)
    }

    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError> {
        let (models, picture) = (self.models, self.picture);
        models.depth.read(self.depth_map()?, picture, bbox)
    }

    fn point3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        let picture = self.picture;
        let depth = self.depth_map()?;
        depth.point_at(estimator::scaled(depth, picture, bbox)).map_err(|e| value(e.to_string()))
    }

    fn size3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        let picture = self.picture;
        let depth = self.depth_map()?;
        depth.size_in(estimator::scaled(depth, picture, bbox)).map_err(|e| value(e.to_string()))
    }

    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        self.models.vlm.ask(self.picture, bbox, prompt).map_err(|e| {
            if e.is_outage() || e.is_of_model() {
                self.outage.get_or_insert_with(|| e.to_string());
            }
            runtime(e)
        })
    }

    fn outage(&mut self) -> Option<String> {
        self.outage.take()
    }
}

fn runtime(e: impl std::fmt::Display) -> ToolError {
    ToolError { kind: ToolErrorKind::Runtime, message: e.to_string() }
}

fn network(e: candle_core::Error) -> ToolError {
    runtime(message_of(&e))
}

fn value(message: String) -> ToolError {
    ToolError { kind: ToolErrorKind::Value, message }
}
