//! Three-part positions and interleaved M-RoPE (Qwen3-VL technical report; HF `get_rope_index`).

use super::config::TextConfig;
use super::vision::Grid;
use crate::models::qwen3::Rope;
use candle_core::{Device, Result, Tensor};

/// Time, height, width.
pub type Position = [u32; 3];

/// Positions of one row's tokens and the position that the next token would have.
///
/// Text advances all three together. A picture's tokens share its start in time and run over
/// their place in height and width; what follows starts after the largest of the three.
pub fn token_positions(
    ids: &[u32],
    image_token: u32,
    merge: usize,
    grids: &mut dyn Iterator<Item = Grid>,
) -> Result<(Vec<Position>, u32)> {
    let mut out: Vec<Position> = Vec::with_capacity(ids.len());
    let mut next = 0u32;
    while out.len() < ids.len() {
        let at = out.len();
        if ids[at] != image_token {
            out.push([next; 3]);
            next += 1;
            continue;
        }
        let Some([t, h, w]) = grids.next() else {
            candle_core::bail!("qwen3-vl: more pictures in the prompt than given")
        };
        let (h, w) = (h / merge, w / merge);
        let n = t * h * w;
        if n == 0 || ids.len() - at < n || ids[at..at + n].iter().any(|id| *id != image_token) {
            candle_core::bail!("qwen3-vl: a picture of {n} tokens has fewer picture tokens at token {at}")
        }
        let start = next;
        for i in 0..n {
            let (frame, row, col) = (i / (h * w), i / w % h, i % w);
            out.push([start + frame as u32, start + row as u32, start + col as u32]);
        }
        next = start + t.max(h).max(w) as u32;
    }
    Ok((out, next))
}

/// Rotary angles `[batch, seq, head_dim / 2]`: frequency i turns by height where `i % 3 == 1` and by
/// width where `i % 3 == 2`, up to three times their section, else by time.
pub(super) fn mrope(cfg: &TextConfig, positions: &[Vec<Position>], device: &Device) -> Result<Rope> {
    let (b, s) = (positions.len(), positions.first().map_or(0, Vec::len));
    if let Some(p) = positions.iter().find(|p| p.len() != s) {
        candle_core::bail!("rope: rows of {s} and of {} positions in one batch", p.len())
    }
    let freq = Rope::inverse_frequencies(&cfg.decoder);
    let section = cfg.rope_scaling.mrope_section;
    let axis = |i: usize| match i % 3 {
        a @ 1..=2 if i < 3 * section[a] => a,
        _ => 0,
    };
    let mut angles = Vec::with_capacity(b * s * freq.len());
    for p in positions.iter().flatten() {
        angles.extend(freq.iter().enumerate().map(|(i, f)| p[axis(i)] as f32 * f));
    }
    Rope::from_angles(&Tensor::from_vec(angles, (b, s, freq.len()), device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIC: u32 = 9;

    #[test]
    fn text_after_a_picture_starts_after_its_longest_side() {
        let ids = [1, 2, PIC, PIC, PIC, PIC, PIC, PIC, 3, 4];
        let (p, next) = token_positions(&ids, PIC, 2, &mut [[1, 4, 6]].into_iter()).unwrap();
        assert_eq!(p[..2], [[0; 3], [1; 3]]);
        assert_eq!(p[2..8], [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]);
        assert_eq!((p[8], p[9], next), ([5; 3], [6; 3], 7));
    }

    #[test]
    fn wrong_numbers_of_picture_tokens_are_errors() {
        let run = |ids: &[u32], grids: &[Grid]| token_positions(ids, PIC, 2, &mut grids.iter().copied());
        assert!(run(&[1, PIC], &[]).is_err());
        assert!(run(&[1, PIC, 2], &[[1, 4, 2]]).is_err());
        assert!(run(&[1, PIC], &[[1, 4, 2]]).is_err());
    }

    #[test]
    fn two_pictures_may_touch() {
        let (p, _) =
            token_positions(&[PIC, PIC, PIC], PIC, 2, &mut [[1, 2, 4], [1, 2, 2]].into_iter()).unwrap();
        assert_eq!(p, [[0, 0, 0], [0, 0, 1], [2, 2, 2]]);
    }
}
