//! Phrases of a prompt: which tokens may see each other, and where positions restart.

use candle_core::{Device, Result, Tensor};

/// Ids of \[CLS\], \[SEP\], "." and "?" in BERT's vocabulary: each ends a phrase.
pub const SPECIAL_TOKENS: [u32; 4] = [101, 102, 1012, 1029];

/// `input_ids` u32 `[batch, t]` → mask u8 `[batch, t, t]` (1 where a token may attend to another)
/// and position ids u32 `[batch, t]`.
///
/// A phrase is the tokens up to and including the next special one; it sees itself only, and
/// positions count from its start. Where that special token is the first or last column, or there
/// is none, each token sees itself only and has position 0.
pub fn text_masks(input_ids: &Tensor, special: &[u32]) -> Result<(Tensor, Tensor)> {
    let ids = input_ids.to_vec2::<u32>()?;
    let (b, t) = input_ids.dims2()?;
    let mut mask = vec![0u8; b * t * t];
    let mut positions = vec![0u32; b * t];
    for (row, ids) in ids.iter().enumerate() {
        let mask = &mut mask[row * t * t..][..t * t];
        for i in 0..t {
            mask[i * t + i] = 1;
        }
        let mut start = 0;
        for end in (0..t).filter(|&i| special.contains(&ids[i])) {
            if end != 0 && end != t - 1 {
                for i in start..=end {
                    mask[i * t + start..=i * t + end].fill(1);
                    positions[row * t + i] = (i - start) as u32;
                }
            }
            start = end + 1;
        }
    }
    let dev = input_ids.device();
    Ok((
        Tensor::from_vec(mask, (b, t, t), &Device::Cpu)?.to_device(dev)?,
        Tensor::from_vec(positions, (b, t), &Device::Cpu)?.to_device(dev)?,
    ))
}
