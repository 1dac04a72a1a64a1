//! Boxes drawn into pictures, for people and for models that look at them.

use font8x8::UnicodeFonts;

use crate::sight::{BBox, Picture};

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

/// A picture that is drawn into.
pub struct Canvas {
    width: i64,
    height: i64,
    rgb: Vec<u8>,
}

impl Canvas {
    pub fn new(picture: &Picture) -> Self {
        Self { width: picture.width().into(), height: picture.height().into(), rgb: picture.rgb().to_vec() }
    }

    fn set(&mut self, x: i64, y: i64, colour: [u8; 3]) {
        if (0..self.width).contains(&x) && (0..self.height).contains(&y) {
            let at = ((y * self.width + x) * 3) as usize;
            self.rgb[at..at + 3].copy_from_slice(&colour);
        }
    }

    /// Whole pixels of a stranger's box, which may be anywhere.
    fn corners(&self, bbox: BBox) -> [i64; 4] {
        let edge = |v: f64, n: i64| v.round().clamp(-1., n as f64) as i64;
        let (w, h) = (self.width, self.height);
        [edge(bbox[0], w), edge(bbox[1], h), edge(bbox[2], w), edge(bbox[3], h)]
    }

    /// The outline of a box, `thick` pixels wide, inside of it.
    pub fn outline(&mut self, bbox: BBox, colour: [u8; 3], thick: i64) {
        let [x1, y1, x2, y2] = self.corners(bbox);
        for t in 0..thick {
            for x in x1..x2 {
                self.set(x, y1 + t, colour);
                self.set(x, y2 - 1 - t, colour);
            }
            for y in y1..y2 {
                self.set(x1 + t, y, colour);
                self.set(x2 - 1 - t, y, colour);
            }
        }
    }

    /// A line of text at a box's upper left corner, 8·`scale` pixels high.
    pub fn label(&mut self, bbox: BBox, text: &str, colour: [u8; 3], thick: i64, scale: i64) {
        let [x1, y1, ..] = self.corners(bbox);
        for (i, c) in text.chars().take(40).enumerate() {
            let rows =
                font8x8::BASIC_FONTS.get(c).or_else(|| font8x8::BASIC_FONTS.get('?')).unwrap_or_default();
            for (row, bits) in (0i64..).zip(rows) {
                for column in 0..8 {
                    let ink = bits >> column & 1 == 1;
                    for (dx, dy) in (0..scale).flat_map(|dx| (0..scale).map(move |dy| (dx, dy))) {
                        let x = x1 + thick + (i as i64 * 8 + column) * scale + dx;
                        let y = y1 + thick + row * scale + dy;
                        self.set(x, y, if ink { [255; 3] } else { colour.map(|v| v / 3) });
                    }
                }
            }
        }
    }

    pub fn finish(self) -> Picture {
        Picture::new(self.width as u32, self.height as u32, self.rgb)
    }
}

/// The picture with labelled boxes drawn into it, one colour a label.
pub fn overlay(picture: &Picture, boxes: &[(BBox, String)]) -> Picture {
    let mut labels: Vec<&str> = boxes.iter().map(|b| b.1.as_str()).collect();
    labels.sort_unstable();
    labels.dedup();
    let side = i64::from(picture.width().max(picture.height()));
    let (thick, scale) = ((side / 300).max(1), (side / 500).max(1));
    let mut canvas = Canvas::new(picture);
    for (bbox, label) in boxes {
        let colour = COLOURS[labels.iter().position(|l| l == label).unwrap_or(0) % COLOURS.len()];
        canvas.outline(*bbox, colour, thick);
        canvas.label(*bbox, label, colour, thick, scale);
    }
    canvas.finish()
}
