//! Rooms as unlabelled pictures with questions, and beside them the truth that mining is not shown.

use crate::data::odvg::{Detected, Instance, LabelMap, Record};
use crate::files::{sweep, write_atomic};
use crate::rooms::export::picture_png;
use crate::rooms::questions::{Questions, Split, scene_seed};
use crate::rooms::{self, Look, View};
use anyhow::Result;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Rendered size, that of the benches.
const SIZE: (u32, u32) = crate::eval::rooms::SIZE;

/// Writes pictures (`NNNNNN.png`), `queries.jsonl`, `odvg.jsonl` and `label_map.json` into a folder, unless
/// they are there. The same arguments give the same files. Scenes are of the training split.
pub fn write(dir: &Path, look: Look, seed: u64, n: usize) -> Result<()> {
    let stamp = json!({ "rooms": rooms::VERSION, "look": look, "seed": seed, "pictures": n });
    let done = dir.join("rooms.json");
    if std::fs::read_to_string(&done).ok().and_then(|t| serde_json::from_str::<Value>(&t).ok())
        == Some(stamp.clone())
    {
        return Ok(());
    }
    sweep(dir);
    let name = |i: usize| format!("{i:06}.png");
    let views: Vec<Arc<View>> = (0..n)
        .into_par_iter()
        .map(|i| -> Result<Arc<View>> {
            let view = rooms::generate(scene_seed(Split::Train, seed, i as u64), look, SIZE.0, SIZE.1);
            write_atomic(&dir.join(name(i)), |w| w.write_all(&picture_png(&view)?))?;
            Ok(Arc::new(view))
        })
        .collect::<Result<_>>()?;
    let places: std::collections::HashMap<u64, usize> =
        (0..n).map(|i| (scene_seed(Split::Train, seed, i as u64), i)).collect();
    // Past the last picture the questions go on about others, which end them.
    let of = places.clone();
    let known = views.clone();
    let supply = move |scene: u64| match of.get(&scene) {
        Some(&i) => View::clone(&known[i]),
        None => rooms::generate(scene, look, SIZE.0, SIZE.1),
    };
    let queries: Vec<Value> = Questions::new(Split::Train, seed, supply)
        .map_while(|(view, q)| Some(json!({ "image": name(*places.get(&view.seed)?), "question": q.text })))
        .collect();
    let mut labels = LabelMap::default();
    let records: Vec<Record> =
        views.iter().enumerate().map(|(i, v)| truth(v, name(i), &mut labels)).collect();
    write_atomic(&dir.join("queries.jsonl"), |w| queries.iter().try_for_each(|q| writeln!(w, "{q}")))?;
    write_atomic(&dir.join("label_map.json"), |w| writeln!(w, "{}", labels.to_json()))?;
    write_atomic(&dir.join("odvg.jsonl"), |w| {
        records.iter().try_for_each(|r| writeln!(w, "{}", serde_json::to_string(r)?))
    })?;
    write_atomic(&done, |w| writeln!(w, "{stamp}"))?;
    Ok(())
}

/// What is really there: each clear thing by its kind, and once more with its colour.
fn truth(view: &View, filename: String, labels: &mut LabelMap) -> Record {
    let mut detection = Detected::default();
    for t in &view.things {
        if !t.is_clear() {
            detection.ignore.push(t.bbox);
            continue;
        }
        for category in [t.kind.to_string(), format!("{} {}", t.colour, t.kind)] {
            detection.instances.push(Instance {
                bbox: t.bbox,
                label: labels.id(&category),
                category,
                area: None,
            });
        }
    }
    Record { filename, height: view.height, width: view.width, detection }
}
