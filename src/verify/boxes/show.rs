//! What a verifier of boxes is shown.

use image::RgbImage;

use crate::nn::resample::{Filter, resize_u8};
use crate::sight::{BBox, Detection, Picture, bbox};
use crate::tools::draw::{COLOURS, Canvas};
use crate::tools::real::crop;

/// Growth of a box that is looked at alone: share of its size on each side (method.md 5.3).
pub const MARGIN: f64 = 0.1;

/// Of a pair, in the order that prompts name them.
const RED: [u8; 3] = [230, 20, 20];
const BLUE: [u8; 3] = [20, 60, 230];

/// Enlarged, never made smaller, until the long side is `side`.
fn enlarged(picture: Picture, side: u32) -> (Picture, f64) {
    if picture.width().max(picture.height()) >= side {
        return (picture, 1.);
    }
    scaled(picture, side)
}

/// Enlarged or made smaller until the long side is `side`.
fn scaled(picture: Picture, side: u32) -> (Picture, f64) {
    let (w, h) = (picture.width(), picture.height());
    let scale = f64::from(side) / f64::from(w.max(h));
    let to = |n: u32| ((f64::from(n) * scale).round() as usize).max(1);
    let rgb = resize_u8(picture.rgb(), (h as usize, w as usize), 3, (to(h), to(w)), Filter::Bicubic);
    (Picture::new(to(w) as u32, to(h) as u32, rgb), scale)
}

/// A box alone, its long side of `side` pixels whatever it was before, as the released code shows it.
pub fn framed(picture: &Picture, b: BBox, side: u32) -> RgbImage {
    scaled(crop(picture, Some(b), MARGIN), side).0.to_image()
}

/// A box alone.
pub fn alone(picture: &Picture, b: BBox, side: u32) -> RgbImage {
    enlarged(crop(picture, Some(b), MARGIN), side).0.to_image()
}

/// Two boxes, the first outlined in red, the second in blue, and what lies around them.
pub fn pair(picture: &Picture, a: BBox, b: BBox, side: u32) -> RgbImage {
    let around = bbox::grown(bbox::hull(a, b), MARGIN);
    // The crop starts on a whole pixel.
    let (x0, y0) = (around[0].floor().max(0.), around[1].floor().max(0.));
    let (seen, scale) = enlarged(crop(picture, Some(around), 0.), side);
    let thick = i64::from(seen.width().max(seen.height()) / 80).max(1);
    let within =
        |b: BBox| [(b[0] - x0) * scale, (b[1] - y0) * scale, (b[2] - x0) * scale, (b[3] - y0) * scale];
    let mut canvas = Canvas::new(&seen);
    canvas.outline(within(a), RED, thick);
    canvas.outline(within(b), BLUE, thick);
    canvas.finish().to_image()
}

/// The whole picture, clean and with numbered, labelled boxes.
pub fn numbered(picture: &Picture, boxes: &[(usize, &Detection)]) -> [RgbImage; 2] {
    let side = i64::from(picture.width().max(picture.height()));
    let (thick, scale) = ((side / 300).max(1), (side / 500).max(1));
    let mut canvas = Canvas::new(picture);
    for (i, d) in boxes {
        let colour = COLOURS[i % COLOURS.len()];
        canvas.outline(d.bbox, colour, thick);
        canvas.label(d.bbox, &format!("{i} {}", d.label), colour, thick, scale);
    }
    [picture.to_image(), canvas.finish().to_image()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_boxes_keep_their_size_alone_and_lose_it_framed() {
        let picture = Picture::new(200, 100, vec![90; 200 * 100 * 3]);
        let sizes = |b: BBox| [alone(&picture, b, 80).dimensions(), framed(&picture, b, 80).dimensions()];
        // Each side grows by a tenth.
        assert_eq!(sizes([50., 20., 150., 70.]), [(120, 60), (80, 40)]);
        assert_eq!(sizes([50., 20., 70., 30.]), [(80, 40), (80, 40)]);
    }
}
