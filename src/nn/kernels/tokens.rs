//! Drawing tokens, and their log-probabilities.

use super::*;

/// A token and its log-probability for each row of logits `[rows, vocab]`, chosen by `drawn` (a number in 0..1 a row) under
/// `temperature`, or the most likely one where that is 0; [`u32::MAX`] where no logit is a number. Waits for the GPU.
pub(in crate::nn) fn sample(logits: &Tensor, drawn: &[f64], temperature: f64) -> Result<Vec<(u32, f32)>> {
    let (logits, (rows, vocab)) = (logits.contiguous()?, logits.dims2()?);
    if drawn.len() != rows {
        candle_core::bail!("sample: {rows} rows, {} numbers", drawn.len())
    }
    let drawn = Tensor::new(drawn, logits.device())?;
    let (hl, hd) = (Held::new(&logits)?, Held::new(&drawn)?);
    let ml = hl.get()?;
    let mut out = ml.beside(DType::F64, 2 * rows)?;
    let args = [ml.arg()?, hd.get()?.arg()?, out.arg()?, unsigned(vocab)?, Arg::Double(temperature)];
    ml.launch("sample", logits.dtype(), (rows, 1), 1024, &args)?;
    let out = out.tensor((rows, 2)).to_vec2::<f64>()?;
    Ok(out.into_iter().map(|r| (if r[0] < 0. { u32::MAX } else { r[0] as u32 }, r[1] as f32)).collect())
}

/// f32 `[rows]` twice: `log softmax(x)[target]` of each row and the log of its sum of exponentials; `target`
/// is u32 `[rows]`, below `vocab`.
pub(in crate::nn) fn log_prob(
    x: Memory,
    target: &Tensor,
    rows: usize,
    vocab: usize,
) -> Result<(Owned, Owned)> {
    let target = Held::new(target)?;
    let (mut y, mut normaliser) = (x.beside(DType::F32, rows)?, x.beside(DType::F32, rows)?);
    let args = [x.arg()?, target.get()?.arg()?, y.arg()?, normaliser.arg()?, unsigned(vocab)?];
    x.launch("log_prob", x.dtype(), (rows, 1), threads(vocab), &args)?;
    Ok((y, normaliser))
}

/// The gradient of [`log_prob`] at `x` `[rows, vocab]`; `g` is f32 `[rows]`.
pub(in crate::nn) fn log_prob_back(x: &Tensor, target: &Tensor, g: &Tensor) -> Result<Tensor> {
    let ((rows, vocab), g) = (x.dims2()?, g.contiguous()?);
    let (hx, ht, hg) = (Held::new(x)?, Held::new(target)?, Held::new(&g)?);
    let mx = hx.get()?;
    let (_, normaliser) = log_prob(mx, target, rows, vocab)?;
    let mut dx = mx.beside(x.dtype(), rows * vocab)?;
    let args = [
        mx.arg()?,
        ht.get()?.arg()?,
        normaliser.read().arg()?,
        hg.get()?.arg()?,
        dx.arg()?,
        unsigned(vocab)?,
    ];
    mx.launch("log_prob_back", x.dtype(), (rows, 1), threads(vocab), &args)?;
    Ok(dx.tensor(x.shape()))
}
