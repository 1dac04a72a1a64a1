//! Rooms as files: PNG pictures, depth, ODVG and COCO annotations, scene truth.
//!
//! [`VERSION`] stands in each of them but `label_map.json`, whose format has no place for it:
//! in PNGs as text chunk `rooms`, in JSON as `rooms_version`. Bounding boxes are those of the
//! visible pixels. Things that are not [`Thing::is_clear`] are ignore regions: `iscrowd` in COCO,
//! `ignore` in ODVG.

use std::io::{self, Cursor};

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageEncoder};
use serde_json::{Value, json};

use super::{Kind, Thing, VERSION, View};

/// The picture as 8-bit RGB PNG.
pub fn picture_png(view: &View) -> io::Result<Vec<u8>> {
    png(view, &view.rgb, ExtendedColorType::Rgb8)
}

/// Depth along the optical axis as 16-bit grey PNG, in millimetres.
pub fn depth_png(view: &View) -> io::Result<Vec<u8>> {
    let bytes: Vec<u8> =
        view.depth.iter().flat_map(|&z| ((z * 1000.).round() as u16).to_ne_bytes()).collect();
    png(view, &bytes, ExtendedColorType::L16)
}

fn png(view: &View, bytes: &[u8], colour: ExtendedColorType) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    PngEncoder::new(Cursor::new(&mut out))
        .write_image(bytes, view.width, view.height, colour)
        .map_err(io::Error::other)?;
    let look = serde_json::to_value(view.look)?;
    let note = format!("rooms\0version {VERSION}, look {}, scene {}", look.as_str().unwrap_or(""), view.seed);
    // The header chunk ends at byte 33; text may follow it.
    out.splice(33..33, text_chunk(note.as_bytes()));
    Ok(out)
}

fn text_chunk(text: &[u8]) -> Vec<u8> {
    let mut chunk = (text.len() as u32).to_be_bytes().to_vec();
    chunk.extend(b"tEXt");
    chunk.extend(text);
    let mut crc = u32::MAX;
    for byte in &chunk[4..] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    chunk.extend((!crc).to_be_bytes());
    chunk
}

/// What is exactly known of the scene, for a JSON line.
pub fn scene_json(view: &View, file: &str, depth: &str) -> Value {
    json!({
        "rooms_version": VERSION,
        "filename": file,
        "depth": depth,
        "scene": view.seed,
        "look": view.look,
        "width": view.width,
        "height": view.height,
        "camera": view.camera,
        "things": view.things,
    })
}

/// A record of object detection and visual grounding (method.md 5.5).
pub fn odvg_json(view: &View, file: &str) -> Value {
    let (clear, vague): (Vec<_>, Vec<_>) = view.things.iter().partition(|t| t.is_clear());
    let instances: Vec<Value> =
        clear.iter().map(|t| json!({"bbox": t.bbox, "label": label(t.kind), "category": t.kind})).collect();
    let ignore: Vec<_> = vague.iter().map(|t| t.bbox).collect();
    json!({
        "filename": file,
        "height": view.height,
        "width": view.width,
        "detection": {"instances": instances, "ignore": ignore},
        "rooms_version": VERSION,
    })
}

fn label(kind: Kind) -> usize {
    Kind::ALL.iter().position(|k| *k == kind).expect("ALL holds every kind")
}

pub fn label_map() -> Value {
    Kind::ALL
        .iter()
        .enumerate()
        .map(|(i, kind)| (i.to_string(), json!(kind)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// Gathers pictures into one COCO instances file. Category ids are the labels of ODVG.
#[derive(Debug, Default)]
pub struct Coco {
    images: Vec<Value>,
    annotations: Vec<Value>,
}

impl Coco {
    pub fn add(&mut self, view: &View, file: &str) {
        // pycocotools takes annotation 0 for "none".
        let image = self.images.len() + 1;
        self.images.push(json!({
            "id": image, "file_name": file, "width": view.width, "height": view.height,
        }));
        for thing in &view.things {
            let Thing { bbox: [x1, y1, x2, y2], kind, visible_pixels, .. } = *thing;
            self.annotations.push(json!({
                "id": self.annotations.len() + 1,
                "image_id": image,
                "category_id": label(kind),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": visible_pixels,
                "iscrowd": u8::from(!thing.is_clear()),
            }));
        }
    }

    pub fn finish(self) -> Value {
        let categories: Vec<Value> =
            Kind::ALL.iter().map(|k| json!({"id": label(*k), "name": k, "supercategory": "thing"})).collect();
        json!({
            "info": {"description": "valor rooms", "rooms_version": VERSION},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::{Look, generate};

    #[test]
    fn pictures_and_depth_come_back_from_their_files_with_the_version() {
        let view = generate(5, Look::LivedIn, 64, 48);
        let picture = picture_png(&view).unwrap();
        let read = image::load_from_memory(&picture).unwrap();
        assert_eq!(read.into_rgb8().into_raw(), view.rgb);
        let note = format!("rooms\0version {VERSION}, look lived-in, scene 5");
        assert!(picture.windows(note.len()).any(|w| w == note.as_bytes()));
        let depth = image::load_from_memory(&depth_png(&view).unwrap()).unwrap().into_luma16();
        for (mm, z) in depth.as_raw().iter().zip(&view.depth) {
            assert!((f32::from(*mm) / 1000. - z).abs() < 6e-4);
        }
        // The check value of CRC-32, over "tEXt" and a note, as zlib gives it.
        assert_eq!(text_chunk(b"a\0b")[11..], 0xdc49_a23bu32.to_be_bytes());
    }

    #[test]
    fn unclear_things_are_ignore_regions_everywhere() {
        let view = (0..)
            .map(|seed| generate(seed, Look::Studio, 128, 96))
            .find(|v| v.things.iter().any(|t| !t.is_clear()) && v.things.iter().any(Thing::is_clear));
        let view = view.expect("an endless supply");
        let clear = view.things.iter().filter(|t| t.is_clear()).count();
        let odvg = odvg_json(&view, "a.png");
        let count = |key: &str| odvg["detection"][key].as_array().unwrap().len();
        assert_eq!((count("instances"), count("ignore")), (clear, view.things.len() - clear));
        let mut coco = Coco::default();
        coco.add(&view, "a.png");
        let coco = coco.finish();
        for (annotation, thing) in coco["annotations"].as_array().unwrap().iter().zip(&view.things) {
            assert_eq!(annotation["iscrowd"] == 1, !thing.is_clear());
            let category = annotation["category_id"].as_u64().unwrap().to_string();
            assert_eq!(label_map()[&category], thing.kind.word());
            assert_eq!(annotation["bbox"][2], thing.bbox[2] - thing.bbox[0]);
        }
    }
}
