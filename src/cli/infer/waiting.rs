//! What goes on, for someone who waits at a terminal for one answer; cleared when it is there.

use crate::sight::{BBox, Detection, ToolError, Tools};
use crate::tools::real::RealTools;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

pub(super) const PLANNING: &str = "planning";
/// What follows a program's run, if anything does: another sample's, a repair, a vote.
pub(super) const DECIDING: &str = "deciding";
const RUNNING: &str = "running the program";

/// Shows what is being done, and for how long; nothing where stderr is no terminal.
pub(super) fn spinner(part: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}").expect("a fixed template");
    let bar = ProgressBar::new_spinner().with_style(style).with_message(part);
    if !bar.is_hidden() {
        // Nothing else moves it while a network computes.
        bar.enable_steady_tick(Duration::from_millis(100));
    }
    bar
}

/// Tools that show which of them is at work.
pub(super) struct Watched<'a> {
    pub tools: RealTools<'a>,
    pub bar: &'a ProgressBar,
}

impl<'a> Watched<'a> {
    fn show<T>(&mut self, part: &'static str, call: impl FnOnce(&mut RealTools<'a>) -> T) -> T {
        self.bar.set_message(part);
        let given = call(&mut self.tools);
        self.bar.set_message(RUNNING);
        given
    }
}

impl Tools for Watched<'_> {
    fn gd_detect(&mut self, prompt: &str) -> Result<Vec<Detection>, ToolError> {
        self.show("detector", |tools| tools.gd_detect(prompt))
    }

    fn depth(&mut self, bbox: BBox) -> Result<f64, ToolError> {
        self.show("depth", |tools| tools.depth(bbox))
    }

    fn vqa(&mut self, bbox: Option<BBox>, prompt: &str) -> Result<String, ToolError> {
        self.show("vqa", |tools| tools.vqa(bbox, prompt))
    }

    fn point3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        self.show("depth", |tools| tools.point3d(bbox))
    }

    fn size3d(&mut self, bbox: BBox) -> Result<[f64; 3], ToolError> {
        self.show("depth", |tools| tools.size3d(bbox))
    }

    fn outage(&mut self) -> Option<String> {
        self.tools.outage()
    }
}
