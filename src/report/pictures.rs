//! Boxes on a picture, and depth as colours.

use font8x8::UnicodeFonts;
use serde_json::Value;
use std::io::Cursor;

use crate::models::moge::Depth;
use crate::tools::{BBox, Picture};

/// For labels, in turn; told apart by most colour-blind people (Okabe and Ito 2008).
pub const COLOURS: [[u8; 3]; 7] = [
    [230, 159, 0],
    [86, 180, 233],
    [0, 158, 115],
    [240, 228, 66],
    [0, 114, 178],
    [213, 94, 0],
    [204, 121, 167],
];

pub fn png(picture: &Picture) -> image::ImageResult<Vec<u8>> {
    let image = image::RgbImage::from_raw(picture.width(), picture.height(), picture.rgb().to_vec());
    let mut out = Cursor::new(Vec::new());
    image.expect("three bytes a pixel").write_to(&mut out, image::ImageFormat::Png)?;
    Ok(out.into_inner())
}

/// Every box that a trace's detector calls gave, each once, with its label.
pub fn boxes_of(trace: &Value) -> Vec<(BBox, String)> {
    let mut all: Vec<(BBox, String)> = Vec::new();
    let calls = trace["calls"].as_array().into_iter().flatten().filter(|c| c["tool"] == "gd_detect");
    for found in calls.flat_map(|c| c["value"].as_array().into_iter().flatten()) {
        let corners: Vec<f64> =
            found["bbox"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
        let (Ok(bbox), Some(label)) = (BBox::try_from(corners), found["label"].as_str()) else { continue };
        if bbox.iter().all(|v| v.is_finite()) && !all.iter().any(|(b, l)| *b == bbox && l == label) {
            all.push((bbox, label.to_owned()));
        }
    }
    all
}

/// The picture with labelled boxes drawn into it.
pub fn overlay(picture: &Picture, boxes: &[(BBox, String)]) -> Picture {
    let (w, h) = (picture.width() as i64, picture.height() as i64);
    let mut rgb = picture.rgb().to_vec();
    let mut set = |x: i64, y: i64, colour: [u8; 3]| {
        if (0..w).contains(&x) && (0..h).contains(&y) {
            let at = ((y * w + x) * 3) as usize;
            rgb[at..at + 3].copy_from_slice(&colour);
        }
    };
    let mut labels: Vec<&str> = boxes.iter().map(|b| b.1.as_str()).collect();
    labels.sort_unstable();
    labels.dedup();
    let thick = (w.max(h) / 300).max(1);
    let scale = (w.max(h) / 500).max(1);
    for (bbox, label) in boxes {
        let colour = COLOURS[labels.iter().position(|l| l == label).unwrap_or(0) % COLOURS.len()];
        // A stranger's box may be anywhere.
        let edge = |v: f64, n: i64| v.round().clamp(-1., n as f64) as i64;
        let (x1, y1, x2, y2) = (edge(bbox[0], w), edge(bbox[1], h), edge(bbox[2], w), edge(bbox[3], h));
        for t in 0..thick {
            for x in x1..x2 {
                set(x, y1 + t, colour);
                set(x, y2 - 1 - t, colour);
            }
            for y in y1..y2 {
                set(x1 + t, y, colour);
                set(x2 - 1 - t, y, colour);
            }
        }
        for (i, c) in label.chars().take(40).enumerate() {
            let rows =
                font8x8::BASIC_FONTS.get(c).or_else(|| font8x8::BASIC_FONTS.get('?')).unwrap_or_default();
            for (row, bits) in (0i64..).zip(rows) {
                for column in 0..8 {
                    let ink = bits >> column & 1 == 1;
                    for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                        let x = x1 + thick + (i as i64 * 8 + column) * scale + dx;
                        let y = y1 + thick + row * scale + dy;
                        set(x, y, if ink { [255; 3] } else { colour.map(|v| v / 3) });
                    }
                }
            }
        }
    }
    Picture::new(picture.width(), picture.height(), rgb)
}

/// Depth in colours, near to far, with the metres at both ends: the 2nd and 98th percentile, so that one
/// stray pixel does not take all colours. Grey where there is none.
pub fn depth_picture(depth: &Depth) -> (Picture, [f64; 2]) {
    let mut known: Vec<f32> =
        depth.metres.iter().zip(&depth.valid).filter(|(_, ok)| **ok).map(|(z, _)| *z).collect();
    known.sort_unstable_by(f32::total_cmp);
    let at = |share: f64| {
        known.get(((known.len().max(1) - 1) as f64 * share) as usize).map_or(0., |z| f64::from(*z))
    };
    let [near, far] = [at(0.02), at(0.98)];
    let colour = |(z, ok): (&f32, &bool)| match ok {
        true => ramp((f64::from(*z) - near) / (far - near).max(1e-9)),
        false => [128; 3],
    };
    let rgb = depth.metres.iter().zip(&depth.valid).flat_map(colour).collect();
    (Picture::new(depth.width as u32, depth.height as u32, rgb), [near, far])
}

/// From near (0, light) to far (1, dark); lightness falls evenly, so it reads in grey too.
pub fn ramp(x: f64) -> [u8; 3] {
    const STOPS: [[f64; 3]; 5] =
        [[253., 231., 37.], [94., 201., 98.], [33., 145., 140.], [59., 82., 139.], [68., 1., 84.]];
    let at = x.clamp(0., 1.) * (STOPS.len() - 1) as f64;
    let (i, t) = ((at as usize).min(STOPS.len() - 2), at - (at as usize).min(STOPS.len() - 2) as f64);
    std::array::from_fn(|c| (STOPS[i][c] * (1. - t) + STOPS[i + 1][c] * t).round() as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn boxes_are_taken_from_the_trace_once_and_drawn_where_they_are() {
        let found = json!([{ "bbox": [2., 3., 12., 9.], "label": "tv" }, { "bbox": [1e300, 0., 2., 3.], "label": "x" }]);
        let trace = json!({ "calls": [
            { "tool": "gd_detect", "value": found }, { "tool": "gd_detect", "value": found },
            { "tool": "gd_detect", "error": "none" }, { "tool": "depth", "value": 1.0 },
        ]});
        let boxes = boxes_of(&trace);
        assert_eq!(boxes.len(), 2);
        let picture = Picture::new(20, 12, vec![7; 20 * 12 * 3]);
        let drawn = overlay(&picture, &boxes);
        let at = |x: usize, y: usize| drawn.rgb()[(y * 20 + x) * 3];
        assert_eq!(at(5, 3), COLOURS[0][0], "its upper side");
        assert_eq!((at(0, 0), at(1, 10)), (7, 7), "outside");
    }

    #[test]
    fn depth_is_light_when_near_and_grey_where_unknown() {
        let depth = Depth::new(3, 1, vec![1., 3., f32::NAN], None);
        let (picture, [near, far]) = depth_picture(&depth);
        assert_eq!((near, far), (1., 1.), "the 98th percentile of two is the first");
        let grey: Vec<u32> = picture.rgb().chunks(3).map(|p| p.iter().map(|v| u32::from(*v)).sum()).collect();
        assert!(grey[0] > grey[1] && grey[2] == 3 * 128, "{grey:?}");
    }
}
