//! Metric depth from exact depth: the losses that train MoGe-2 from nothing.
//!
//! As in MoGe-2 the point map and the metric scale are learnt apart: the map is compared after
//! aligning its scale to the truth, picture by picture, and the scale head learns that alignment. Beside
//! that, both learn what comes of them together: a small encoder's class token alone knows the scale less
//! well than all its patches do.
//! Distances are relative to the true depth, as MoGe weights an L1 distance by 1/z, and so is the
//! distance that the aligning scale makes least. Unlike MoGe, the map's shift is not left free: the
//! truth here comes from known pinhole cameras, so the rays are supervised as they are and the released
//! solver finds a shift near 0.
//!
//! Points and scale only: a model with mask or normal head is refused, for want of a loss.

use crate::models::moge::{MoGe, Raw, Remap};
use candle_core::{Device, Result, Tensor};

/// Pictures with their truth.
#[derive(Clone, Debug)]
pub struct DepthBatch {
    /// `[batch, 3, h, w]` in 0..1.
    pub image: Tensor,
    /// Natural logarithm of metres along the axis `[batch, h, w]`; 0 where not valid.
    pub log_depth: Tensor,
    /// x/z and y/z of each pixel `[batch, 2, h, w]`.
    pub rays: Tensor,
    /// 1 where the depth is known, else 0 `[batch, h, w]`.
    pub valid: Tensor,
}

/// One picture with its truth: rows from the top, `fov_x` in degrees, square pixels.
#[derive(Clone, Debug)]
pub struct DepthSample<'a> {
    pub rgb: &'a [u8],
    pub metres: &'a [f32],
    pub fov_x: f64,
}

impl DepthBatch {
    /// Depth that is not finite or not positive is left out of the loss.
    pub fn new(samples: &[DepthSample<'_>], width: usize, height: usize) -> Result<Self> {
        let (b, n) = (samples.len(), width * height);
        let mut image = vec![0f32; b * 3 * n];
        let (mut log_depth, mut valid) = (vec![0f32; b * n], vec![0f32; b * n]);
        let mut rays = vec![0f32; b * 2 * n];
        for (i, s) in samples.iter().enumerate() {
            if s.rgb.len() != 3 * n || s.metres.len() != n {
                candle_core::bail!("depth batch: sample {i} is not {width}×{height}")
            }
            let pixel = 2. * (s.fov_x.to_radians() / 2.).tan() / width as f64;
            for p in 0..n {
                for c in 0..3 {
                    image[(3 * i + c) * n + p] = s.rgb[3 * p + c] as f32 / 255.;
                }
                let z = s.metres[p];
                if z.is_finite() && z > 0. {
                    log_depth[i * n + p] = z.ln();
                    valid[i * n + p] = 1.;
                }
                let centred = |at: usize, side: usize| (at as f64 + 0.5 - side as f64 / 2.) * pixel;
                rays[2 * i * n + p] = centred(p % width, width) as f32;
                rays[(2 * i + 1) * n + p] = centred(p / width, height) as f32;
            }
        }
        let dev = Device::Cpu;
        Ok(Self {
            image: Tensor::from_vec(image, (b, 3, height, width), &dev)?,
            log_depth: Tensor::from_vec(log_depth, (b, height, width), &dev)?,
            rays: Tensor::from_vec(rays, (b, 2, height, width), &dev)?,
            valid: Tensor::from_vec(valid, (b, height, width), &dev)?,
        })
    }
}

/// Weights of the parts of the loss.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DepthLossWeights {
    pub depth: f64,
    /// Differences of log depth between neighbours, at strides 1, 2, 4: edges and flat surfaces.
    pub gradient: f64,
    pub rays: f64,
    pub scale: f64,
    /// The relative error of metric depth, of map and scale together.
    pub metric: f64,
}

impl Default for DepthLossWeights {
    fn default() -> Self {
        Self { depth: 1., gradient: 0.5, rays: 4., scale: 1., metric: 1. }
    }
}

/// Scalars; all but `total` are for the log.
#[derive(Clone, Debug)]
pub struct DepthLoss {
    pub total: Tensor,
    pub depth: f32,
    pub gradient: f32,
    pub rays: f32,
    pub scale: f32,
    pub metric: f32,
}

/// That a model can be trained by [`depth_loss`].
pub fn check_trainable(net: &MoGe) -> Result<()> {
    let c = net.config();
    if c.points_head.is_none() || c.scale_head.is_none() {
        candle_core::bail!("depth training needs a model with points_head and scale_head")
    }
    if c.mask_head.is_some() || c.normal_head.is_some() {
        candle_core::bail!(
            "depth training has no loss for mask_head or normal_head: remove them from the config"
        )
    }
    if c.remap_output != Remap::Exp {
        candle_core::bail!("depth training needs remap_output = \"exp\", not {:?}", c.remap_output)
    }
    Ok(())
}

/// The loss of a batch, the mean over its valid pixels; see the module's head.
pub fn depth_loss(raw: &Raw, truth: &DepthBatch, weights: &DepthLossWeights) -> Result<DepthLoss> {
    let (Some(points), Some(log_scale)) = (&raw.points, &raw.log_scale) else {
        candle_core::bail!("depth training needs points and a metric scale")
    };
    let b = points.dim(0)?;
    let count = truth.valid.sum_all()?.to_scalar::<f32>()?.max(1.) as f64;
    let mean = |x: Tensor, m: &Tensor| x.abs()?.broadcast_mul(m)?.sum_all()? / count;
    // Log of truth over prediction, and the picture's scale with the least relative error.
    let ratio = (&truth.log_depth - points.narrow(1, 2, 1)?.squeeze(1)?)?;
    let aligned = best_scales(&ratio.detach(), &truth.valid)?;
    let off = ratio.broadcast_sub(&aligned.reshape((b, 1, 1))?)?;
    let relative = |off: &Tensor| {
        let over = off.neg()?;
        let bent = over.minimum(MOST_OVER)?;
        (bent.exp()? - 1.)? + ((over - bent)? * MOST_OVER.exp())?
    };
    let depth = mean(relative(&off)?, &truth.valid)?;
    let metric = mean(relative(&ratio.broadcast_sub(&log_scale.reshape((b, 1, 1))?)?)?, &truth.valid)?;
    let rays = (mean((points.narrow(1, 0, 2)? - &truth.rays)?, &truth.valid.unsqueeze(1)?)? * 0.5)?;
    let scale = (log_scale - &aligned)?.abs()?.mean_all()?;
    let mut gradient = depth.zeros_like()?;
    for stride in [1, 2, 4] {
        for dim in [1, 2] {
            let n = off.dim(dim)?;
            if n <= stride {
                continue;
            }
            let pair = |t: &Tensor| {
                Ok::<_, candle_core::Error>((
                    t.narrow(dim, stride, n - stride)?,
                    t.narrow(dim, 0, n - stride)?,
                ))
            };
            let ((a, b), (ma, mb)) = (pair(&off)?, pair(&truth.valid)?);
            gradient = (gradient + mean((a - b)?, &(ma * mb)?)?)?;
        }
    }
    let gradient = (gradient / 3.)?;
    let total = ((&depth * weights.depth)? + (&gradient * weights.gradient)?)?;
    let total = ((total + (&rays * weights.rays)?)? + (&scale * weights.scale)?)?;
    let total = (total + (&metric * weights.metric)?)?;
    let [depth, gradient, rays, scale, metric] =
        [depth, gradient, rays, scale, metric].map(|t| t.to_scalar::<f32>());
    Ok(DepthLoss { total, depth: depth?, gradient: gradient?, rays: rays?, scale: scale?, metric: metric? })
}

/// Log of how much too far a pixel is before it is pulled no harder: from there the loss is straight.
const MOST_OVER: f64 = 3.;

/// The logarithm of each picture's scale `s` that makes the mean of `|s·predicted/true − 1|` least
/// `[batch]`, from the logarithms of true over predicted; 0 for a picture without a valid pixel. It is the
/// median of those ratios with weights of predicted over true.
fn best_scales(log_ratio: &Tensor, valid: &Tensor) -> Result<Tensor> {
    let (x, valid) = (log_ratio.flatten_from(1)?.to_vec2::<f32>()?, valid.flatten_from(1)?.to_vec2::<f32>()?);
    let median = |(x, valid): (Vec<f32>, Vec<f32>)| {
        let mut x: Vec<f32> = x.into_iter().zip(valid).filter(|(_, v)| *v > 0.).map(|(x, _)| x).collect();
        x.sort_unstable_by(f32::total_cmp);
        let Some(least) = x.first().copied() else { return 0. };
        // Weights up to a factor of their own, so that none overflows.
        let weight = |x: f32| f64::from(least - x).exp();
        let half = x.iter().map(|x| weight(*x)).sum::<f64>() / 2.;
        let mut sum = 0.;
        let middle = x.iter().find(|x| {
            sum += weight(**x);
            sum >= half
        });
        middle.copied().unwrap_or(least)
    };
    let m: Vec<f32> = x.into_iter().zip(valid).map(median).collect();
    let n = m.len();
    Tensor::from_vec(m, n, &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn truth(width: usize, height: usize) -> DepthBatch {
        let n = width * height;
        let (near, mut far): (Vec<f32>, Vec<f32>) =
            (0..n).map(|i| (1. + i as f32 * 0.1, 4. + (i as f32).sin())).unzip();
        far[3] = f32::INFINITY;
        let rgb = vec![100u8; 3 * n];
        let sample = |metres, fov_x| DepthSample { rgb: &rgb, metres, fov_x };
        DepthBatch::new(&[sample(&near, 60.), sample(&far, 80.)], width, height).unwrap()
    }

    /// A prediction that is exact up to the scale, which the scale head knows.
    fn perfect(t: &DepthBatch, scales: [f32; 2]) -> Raw {
        let s = Tensor::new(&scales, &Device::Cpu).unwrap();
        let z = t.log_depth.broadcast_sub(&s.reshape((2, 1, 1)).unwrap()).unwrap().unsqueeze(1).unwrap();
        let points = Tensor::cat(&[&t.rays, &z], 1).unwrap();
        Raw { points: Some(points), normal: None, mask: None, log_scale: Some(s) }
    }

    #[test]
    fn a_map_that_is_right_up_to_its_known_scale_costs_nothing() {
        let t = truth(8, 6);
        let loss = depth_loss(&perfect(&t, [0.4, -1.1]), &t, &DepthLossWeights::default()).unwrap();
        assert!(loss.total.to_scalar::<f32>().unwrap() < 1e-5, "{loss:?}");
        let mut wrong = perfect(&t, [0.4, -1.1]);
        wrong.log_scale = Some(Tensor::new(&[0.4f32, -0.9], &Device::Cpu).unwrap());
        let loss = depth_loss(&wrong, &t, &DepthLossWeights::default()).unwrap();
        assert!((loss.scale - 0.1).abs() < 1e-5 && loss.depth < 1e-5, "{loss:?}");
        // One of the two pictures is a fifth too far.
        assert!((loss.metric - (0.2f32.exp() - 1.) / 2.).abs() < 0.01, "{loss:?}");
    }

    #[test]
    fn a_map_is_aligned_by_the_scale_of_least_relative_error() {
        let truth = [1f32, 2., 3., 5., 7., 9.];
        let got = [0.5f32, 2.2, 1., 4., 9., f32::NAN];
        let ratio: Vec<f32> = truth.iter().zip(got).map(|(t, p)| (t / p).ln()).collect();
        let shape = (1, 2, 3);
        let ratio = Tensor::from_vec(ratio, shape, &Device::Cpu).unwrap();
        let valid = Tensor::from_slice(&[1f32, 1., 1., 1., 1., 0.], shape, &Device::Cpu).unwrap();
        let scale = best_scales(&ratio, &valid).unwrap().to_vec1::<f32>().unwrap()[0].exp();
        let error = |s: f32| truth.iter().zip(got).take(5).map(|(t, p)| (s * p / t - 1.).abs()).sum::<f32>();
        let least = (1..5_000).map(|i| error(i as f32 / 1e3)).min_by(f32::total_cmp).unwrap();
        assert!(error(scale) <= least + 1e-6, "{} at {scale}, {least} elsewhere", error(scale));
        let nowhere = best_scales(&ratio, &valid.zeros_like().unwrap()).unwrap();
        assert_eq!(nowhere.to_vec1::<f32>().unwrap(), [0.]);
    }

    #[test]
    fn a_scale_that_is_far_off_is_still_pulled() {
        let t = truth(8, 6);
        for (off, pull) in [(-4., -1.), (2., 2f64.exp()), (4., MOST_OVER.exp()), (9., MOST_OVER.exp())] {
            let mut raw = perfect(&t, [0., 0.]);
            let s = candle_core::Var::from_vec(vec![off as f32, 0.], 2, &Device::Cpu).unwrap();
            raw.log_scale = Some(s.as_tensor().clone());
            let only = DepthLossWeights { depth: 0., gradient: 0., rays: 0., scale: 0., metric: 1. };
            let g = depth_loss(&raw, &t, &only).unwrap().total.backward().unwrap();
            let got = f64::from(g.get(&s).unwrap().to_vec1::<f32>().unwrap()[0]);
            // Of 48 pixels in the first picture and 47 in the second.
            let want = pull * if off < 0. { f64::exp(off) } else { 1. } * 48. / 95.;
            assert!((got / want - 1.).abs() < 1e-3, "{got} for {want} at {off}");
        }
    }

    #[test]
    fn rays_are_those_of_the_camera() {
        let t = truth(8, 6);
        let rays = t.rays.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let half = (30f32).to_radians().tan();
        assert!((rays[7] - half * 7. / 8.).abs() < 1e-6 && (rays[0] + half * 7. / 8.).abs() < 1e-6);
        assert!((rays[48] + half * 5. / 8.).abs() < 1e-6, "square pixels");
    }

    #[test]
    fn gradients_stop_at_the_alignment_and_reach_both_heads() {
        let t = truth(8, 6);
        let p =
            candle_core::Var::from_tensor(&perfect(&t, [0., 0.]).points.unwrap().affine(0.9, 0.1).unwrap())
                .unwrap();
        let s = candle_core::Var::zeros(2, candle_core::DType::F32, &Device::Cpu).unwrap();
        let raw = Raw {
            points: Some(p.as_tensor().clone()),
            normal: None,
            mask: None,
            log_scale: Some(s.as_tensor().clone()),
        };
        let only_scale = DepthLossWeights { depth: 0., gradient: 0., rays: 0., scale: 1., metric: 0. };
        let g = depth_loss(&raw, &t, &only_scale).unwrap().total.backward().unwrap();
        let norm = |g: &candle_core::Tensor| g.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(norm(g.get(&s).unwrap()) > 0. && g.get(&p).is_none_or(|g| norm(g) == 0.));
        let only_metric = DepthLossWeights { scale: 0., metric: 1., ..only_scale };
        let g = depth_loss(&raw, &t, &only_metric).unwrap().total.backward().unwrap();
        assert!(norm(g.get(&s).unwrap()) > 0. && norm(g.get(&p).unwrap()) > 0., "both learn what they make");
        let g = depth_loss(&raw, &t, &DepthLossWeights::default()).unwrap().total.backward().unwrap();
        let g = g.get(&p).unwrap();
        assert!(g.dim(candle_core::D::Minus1).unwrap() == 8 && norm(g).is_finite() && norm(g) > 0.);
        // The unknown pixel of the second picture has no say.
        let at =
            |c: usize| g.get(1).unwrap().get(c).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[3];
        assert_eq!([at(0), at(1), at(2)], [0.; 3]);
    }
}
