//! Seconds per training step (forward, backward, AdamW) of a small Qwen3.
//!
//! Beside it `benches/peers/train_step.py` does the same work in PyTorch; `benches/peers/train_step.sh`
//! alternates the two. Prints one JSON line. `QWEN3_STEPS` sets the number of timed steps.

use candle_core::{Device, Tensor};
use std::time::Instant;
use valor::models::qwen3::{Config, Qwen3, Rope};
use valor::nn::optim::Group;
use valor::nn::{AdamW, AdamWConfig, Mask, Params};

const CONFIG: &str = include_str!("peers/qwen3-5m.json");

fn cpu_seconds() -> f64 {
    // SAFETY: an all-zero `rusage` is valid and the call fills it.
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `rusage`.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    let s = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    s(u.ru_utime) + s(u.ru_stime)
}

fn main() -> anyhow::Result<()> {
    // As the program itself does.
    valor::nn::keep_freed_memory();
    let (b, s) = (16, 384);
    let steps = std::env::var("QWEN3_STEPS").ok().and_then(|v| v.parse().ok()).unwrap_or(3);
    let cfg: Config = serde_json::from_str(CONFIG)?;
    let params = Params::new(0);
    let model = Qwen3::new(&cfg, params.builder())?;
    let mut opt = AdamW::new(params.named(), AdamWConfig::default(), |_, v| Some(Group::usual(v)))?;
    let rope = Rope::from_positions(&cfg, &[(0..s as u32).collect()], &Device::Cpu)?;
    let mut times = vec![];
    let mut last = f32::NAN;
    for step in 0..steps + 1 {
        let ids: Vec<u32> = (0..b * (s + 1))
            .map(|i| ((i * 7919 + step * 31 + i * i % 977) % cfg.vocab_size) as u32)
            .collect();
        let ids = Tensor::from_vec(ids, (b, s + 1), &Device::Cpu)?;
        let (x, y) = (ids.narrow(1, 0, s)?.contiguous()?, ids.narrow(1, 1, s)?.contiguous()?);
        let (wall, cpu) = (Instant::now(), cpu_seconds());
        let h = model.forward(&x, &rope, &Mask::causal(), None)?.flatten(0, 1)?;
        let loss = model.token_log_probs(&h, &y.flatten_all()?)?.mean_all()?.neg()?;
        let forward = wall.elapsed().as_secs_f64();
        let grads = loss.backward()?;
        let backward = wall.elapsed().as_secs_f64();
        opt.accumulate(&grads, 1.)?;
        opt.step(3e-4)?;
        last = loss.to_scalar()?;
        let t = (wall.elapsed().as_secs_f64(), cpu_seconds() - cpu, forward, backward - forward);
        // The first step warms caches and allocators.
        if step > 0 {
            times.push(t);
        }
    }
    times.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (wall, cpu, forward, backward) = times[times.len() / 2];
    println!(
        "{{\"who\": \"valor\", \"params\": {}, \"wall_s\": {wall:.3}, \"cpu_s\": {cpu:.3}, \
         \"forward_s\": {forward:.3}, \"backward_s\": {backward:.3}, \"loss\": {last:.4}}}",
        params.count()
    );
    Ok(())
}
