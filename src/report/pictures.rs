//! Pictures as files, the boxes of a trace, and depth as colours.

use serde_json::Value;
use std::io::Cursor;

use crate::sight::{BBox, Depth, Picture};

pub fn png(picture: &Picture) -> image::ImageResult<Vec<u8>> {
    let mut out = Cursor::new(Vec::new());
    picture.to_image().write_to(&mut out, image::ImageFormat::Png)?;
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
    use crate::tools::draw::{COLOURS, overlay};
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
