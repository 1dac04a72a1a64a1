//! Geometry that no gradient flows through: sine embeddings, padding masks on each level,
//! reference points, encoder proposals.
//!
//! Without a pixel mask nothing depends on the picture, and tensors here have batch 1.

use crate::nn::stochastic::additive;
use candle_core::{D, DType, Device, Result, Tensor};
use std::collections::HashMap;
use std::f32::consts::TAU;

/// 1 / temperature^(2⌊i/2⌋/n) for the pairs (sin, cos) of `n` features.
fn frequencies(n: usize, temperature: f64) -> Vec<f32> {
    (0..n / 2).map(|i| (temperature as f32).powf(-((2 * i) as f32) / n as f32)).collect()
}

/// Interleaved sine and cosine of each coordinate times 2π: `[.., coords]` in 0..1 →
/// `[.., coords · features]`. Of two or more coordinates, y comes before x (DETR's order).
/// Temperature 10,000. Constant.
pub fn sine_embedding(coords: &Tensor, features: usize) -> Result<Tensor> {
    let mut dims = coords.dims().to_vec();
    let n = dims.pop().unwrap_or(0);
    let coords = coords.detach().contiguous()?;
    let coords = if n >= 2 {
        let order: Vec<u32> = [1, 0].into_iter().chain(2..n as u32).collect();
        coords.index_select(&Tensor::from_vec(order, n, coords.device())?, D::Minus1)?
    } else {
        coords
    };
    let f = Tensor::from_vec(frequencies(features, 10_000.), features / 2, coords.device())?;
    let angle = (coords.unsqueeze(D::Minus1)? * TAU as f64)?.broadcast_mul(&f.to_dtype(coords.dtype())?)?;
    dims.push(n * features);
    Tensor::stack(&[angle.sin()?, angle.cos()?], angle.rank())?.reshape(dims)
}

/// The feature levels of one batch.
pub struct Levels {
    pub shapes: Vec<(usize, usize)>,
    /// 1 where real, `[batch, tokens, 1]`; none if nothing is padded.
    pub real: Option<Tensor>,
    /// For attention over vision tokens: `[batch, 1, 1, tokens]`, −∞ in padding.
    pub key_mask: Option<Tensor>,
    /// Share of each level that is real, (width, height): `[batch or 1, levels, 2]`.
    pub valid_ratios: Tensor,
    /// Where each token looks from, on each level: `[batch or 1, tokens, levels, 2]`.
    pub reference: Tensor,
    /// Sine embedding of each token's place in the real part: `[batch or 1, tokens, d]`.
    pub sine: Tensor,
    /// Logits of the boxes that each token proposes, `[batch or 1, tokens, 4]`; +∞ in padding and
    /// at the picture's edge.
    pub proposals: Tensor,
    /// 1 where the proposal is finite, `[batch or 1, tokens, 1]`.
    pub proposable: Tensor,
}

/// One level's mask for one picture.
struct Plane {
    real: Vec<bool>,
    h: usize,
    w: usize,
}

impl Plane {
    /// Nearest neighbour, as `torch.nn.functional.interpolate` picks it.
    fn resize(mask: &[u8], (ph, pw): (usize, usize), (h, w): (usize, usize)) -> Self {
        let pick = |i: usize, from: usize, to: usize| {
            ((i as f32 * (from as f32 / to as f32)) as usize).min(from - 1)
        };
        let real = (0..h * w).map(|i| mask[pick(i / w, ph, h) * pw + pick(i % w, pw, w)] != 0).collect();
        Self { real, h, w }
    }

    fn full((h, w): (usize, usize)) -> Self {
        Self { real: vec![true; h * w], h, w }
    }

    fn valid_width(&self) -> usize {
        (0..self.w).filter(|x| self.real[*x]).count()
    }

    fn valid_height(&self) -> usize {
        (0..self.h).filter(|y| self.real[y * self.w]).count()
    }

    /// Rank of each token among the real ones of its column (y) and row (x), over their number.
    fn relative(&self) -> Vec<[f32; 2]> {
        let mut out = vec![[0f32; 2]; self.h * self.w];
        let mut run = |indices: &mut dyn Iterator<Item = usize>, axis: usize| {
            let indices: Vec<usize> = indices.collect();
            let mut count = 0f32;
            for &i in &indices {
                count += self.real[i] as u8 as f32;
                out[i][axis] = count;
            }
            indices.iter().for_each(|&i| out[i][axis] = out[i][axis] / (count + 1e-6) * TAU);
        };
        for x in 0..self.w {
            run(&mut (0..self.h).map(|y| y * self.w + x), 0);
        }
        for y in 0..self.h {
            run(&mut (0..self.w).map(|x| y * self.w + x), 1);
        }
        out
    }
}

/// Numbers, each once.
#[derive(Default)]
struct Places {
    distinct: Vec<f32>,
    index: HashMap<u32, u32>,
}

impl Places {
    fn index(&mut self, place: f32) -> u32 {
        *self.index.entry(place.to_bits()).or_insert_with(|| {
            self.distinct.push(place);
            self.distinct.len() as u32 - 1
        })
    }
}

impl Levels {
    /// `mask` is not zero where the canvas is real, `[batch, height, width]`.
    pub fn new(
        shapes: Vec<(usize, usize)>,
        mask: Option<&Tensor>,
        d_model: usize,
        temperature: f64,
        dev: &Device,
    ) -> Result<Self> {
        let pictures: Vec<Vec<Plane>> = match mask {
            None => vec![shapes.iter().map(|&s| Plane::full(s)).collect()],
            Some(m) => {
                let (b, h, w) = m.dims3()?;
                let m = m.ne(0u8)?.flatten_all()?.to_vec1::<u8>()?;
                (0..b)
                    .map(|i| &m[i * h * w..][..h * w])
                    .map(|m| shapes.iter().map(|&s| Plane::resize(m, (h, w), s)).collect())
                    .collect()
            }
        };
        let b = pictures.len();
        let tokens: usize = shapes.iter().map(|(h, w)| h * w).sum();
        let n = shapes.len();
        let half = d_model / 2;
        let freq = frequencies(half, temperature);
        // Places differ by row and by column alone, so their sines are few, and are spread where they are used.
        let (mut places, mut place_of) = (Places::default(), Vec::with_capacity(b * tokens * 2));
        let (mut ratios, mut reference) = (Vec::new(), Vec::with_capacity(b * tokens * n * 2));
        let (mut proposals, mut proposable) = (Vec::new(), Vec::new());
        let mut real = Vec::with_capacity(b * tokens);
        for planes in &pictures {
            let ratio: Vec<[f32; 2]> = planes
                .iter()
                .map(|p| [p.valid_width() as f32 / p.w as f32, p.valid_height() as f32 / p.h as f32])
                .collect();
            for (level, p) in planes.iter().enumerate() {
                let (vw, vh) = (p.valid_width() as f32, p.valid_height() as f32);
                let size = 0.05 * 2f32.powi(level as i32);
                for (i, at) in p.relative().into_iter().enumerate() {
                    place_of.extend(at.map(|place| places.index(place)));
                    let (x, y) = ((i % p.w) as f32 + 0.5, (i / p.w) as f32 + 0.5);
                    let own = [x / (ratio[level][0] * p.w as f32), y / (ratio[level][1] * p.h as f32)];
                    reference.extend(ratio.iter().flat_map(|r| [own[0] * r[0], own[1] * r[1]]));
                    let bx = [x / vw, y / vh, size, size];
                    let ok = p.real[i] && bx.iter().all(|v| *v > 0.01 && *v < 0.99);
                    proposals.extend(bx.map(|v| if ok { (v / (1. - v)).ln() } else { f32::INFINITY }));
                    proposable.push(ok as u8 as f32);
                }
                real.extend(p.real.iter().map(|r| *r as u8));
            }
            ratios.extend(ratio.into_iter().flatten());
        }
        let sine: Vec<f32> = places
            .distinct
            .iter()
            .flat_map(|p| freq.iter().flat_map(move |f| [(p * f).sin(), (p * f).cos()]))
            .collect();
        let sine = Tensor::from_vec(sine, (places.distinct.len(), half), dev)?;
        let place_of = Tensor::from_vec(place_of, b * tokens * 2, dev)?;
        let padded = real.contains(&0);
        let real = Tensor::from_vec(real, (b, tokens), dev)?;
        Ok(Self {
            real: if padded { Some(real.to_dtype(DType::F32)?.unsqueeze(2)?) } else { None },
            key_mask: if padded { Some(additive(&real)?.reshape((b, 1, 1, tokens))?) } else { None },
            valid_ratios: Tensor::from_vec(ratios, (b, n, 2), dev)?,
            reference: Tensor::from_vec(reference, (b, tokens, n, 2), dev)?,
            sine: sine.index_select(&place_of, 0)?.reshape((b, tokens, d_model))?,
            proposals: Tensor::from_vec(proposals, (b, tokens, 4), dev)?,
            proposable: Tensor::from_vec(proposable, (b, tokens, 1), dev)?,
            shapes,
        })
    }

    /// Boxes `[batch, q, 4]` relative to the real part → on each level's full extent,
    /// `[batch, q, levels, 4]`.
    pub fn project(&self, boxes: &Tensor) -> Result<Tensor> {
        let ratios = Tensor::cat(&[&self.valid_ratios, &self.valid_ratios], 2)?.unsqueeze(1)?;
        boxes.unsqueeze(2)?.broadcast_mul(&ratios)
    }
}
