//! What rooms look like to [`Familiar`]: statistics of rendered pictures, no training.

use crate::files::write_atomic;
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::{self, Look};
use crate::sight::Picture;
use crate::tools::familiar::{Familiar, features};
use rayon::prelude::*;
use std::io::Write;
use std::path::Path;

const SEED: u64 = 1;
/// Of each look.
const PICTURES: u64 = 2_000;
/// Width and height by turns. One that has the size of a copy which is looked at comes to it unsmoothed.
const SIZES: [(u32, u32); 4] = [(256, 192), (192, 144), (256, 192), (320, 240)];

/// Writes `familiar.json`.
pub fn export(out: &Path) -> anyhow::Result<()> {
    let samples: Vec<_> = (0..2 * PICTURES)
        .into_par_iter()
        .map(|i| {
            let look = if i.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
            let (width, height) = SIZES[(i / 2) as usize % SIZES.len()];
            let view = rooms::generate(scene_seed(Split::Train, SEED, i), look, width, height);
            features(&Picture::new(view.width, view.height, view.rgb))
        })
        .collect();
    let known = Familiar::of(&samples);
    write_atomic(&out.join("familiar.json"), |w| writeln!(w, "{}", serde_json::to_string(&known)?))?;
    Ok(())
}
