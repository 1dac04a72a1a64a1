//! Arithmetic of boxes, `[x1, y1, x2, y2]`. A box whose sides are the wrong way round is empty.

use super::BBox;

pub fn area([x1, y1, x2, y2]: BBox) -> f64 {
    (x2 - x1).max(0.) * (y2 - y1).max(0.)
}

/// Area of what two boxes share.
pub fn intersection(a: BBox, b: BBox) -> f64 {
    area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])])
}

/// Intersection over union; 0 where both are empty.
pub fn iou(a: BBox, b: BBox) -> f64 {
    let both = intersection(a, b);
    if both > 0. { both / (area(a) + area(b) - both) } else { 0. }
}

/// How much of the smaller box lies in the other one, 0…1.
pub fn nesting(a: BBox, b: BBox) -> f64 {
    let both = intersection(a, b);
    if both > 0. { both / area(a).min(area(b)) } else { 0. }
}

/// The smallest box around both.
pub fn hull(a: BBox, b: BBox) -> BBox {
    [a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])]
}

/// The part of a box within a picture.
pub fn clipped([x1, y1, x2, y2]: BBox, width: f64, height: f64) -> BBox {
    [x1.clamp(0., width), y1.clamp(0., height), x2.clamp(0., width), y2.clamp(0., height)]
}

/// Grown by `share` of its width and height on each side.
pub fn grown([x1, y1, x2, y2]: BBox, share: f64) -> BBox {
    let (dx, dy) = (share * (x2 - x1), share * (y2 - y1));
    [x1 - dx, y1 - dy, x2 + dx, y2 + dy]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps() {
        let (a, b, away) = ([0., 0., 4., 2.], [2., 0., 6., 2.], [9., 9., 8., 8.]);
        assert_eq!((area(a), intersection(a, b), area(away)), (8., 4., 0.));
        assert!((iou(a, b) - 4. / 12.).abs() < 1e-12);
        assert_eq!((iou(a, away), iou(away, away), nesting(a, away)), (0., 0., 0.));
        assert_eq!(nesting([1., 0., 2., 1.], a), 1.);
        assert_eq!((hull(a, b), grown(a, 0.5)), ([0., 0., 6., 2.], [-2., -1., 6., 3.]));
        assert_eq!(clipped([-1., 1., 9., 9.], 5., 4.), [0., 1., 5., 4.]);
    }
}
