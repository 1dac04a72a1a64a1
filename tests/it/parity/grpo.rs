use super::Fixture;
use candle_core::{DType, Tensor};
use valor::train::grpo::{Objective, Tokens, advantages, loss};

fn rows(t: &Tensor) -> Vec<Vec<f64>> {
    t.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Computed in f64, stored in f32.
fn close(name: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let scale = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= 1e-6 * scale, "{name}: {g} is not {w}");
    }
}

#[test]
fn advantages_loss_and_gradient() {
    let f = Fixture::open("grpo");
    let rewards = values(&f.input("rewards"));
    let groups: Vec<i64> = f.input("group_ids").to_vec1().unwrap();
    let of = |normalise: bool| -> Vec<f64> {
        let mut all = Vec::new();
        for members in groups.chunk_by(|a, b| a == b) {
            let group: Vec<_> =
                rewards[all.len()..all.len() + members.len()].iter().map(|r| Some(*r)).collect();
            all.extend(advantages(&group, normalise).into_iter().flatten());
        }
        all
    };
    close("advantages_norm", &of(true), &values(&f.output("advantages_norm")));
    close("advantages_nostd", &of(false), &values(&f.output("advantages_nostd")));
    let [new, old, reference, mask] =
        ["logprobs", "old_logprobs", "ref_logprobs", "response_mask"].map(|n| rows(&f.input(n)));
    for (case, dual_clip) in [("noclipc", 0.), ("dualclip3", 3.)] {
        let o = Objective { dual_clip, ..Objective::default() };
        let tokens = mask.iter().flatten().sum::<f64>();
        let (mut policy, mut kl, mut clipped, mut drift, mut gradient) = (0., 0., 0., 0., Vec::new());
        for (i, &advantage) in of(true).iter().enumerate() {
            let n = mask[i].iter().sum::<f64>() as usize;
            let t = Tokens { new: &new[i][..n], old: &old[i][..n], reference: &reference[i][..n], advantage };
            let l = loss(t, &o);
            (policy, kl, clipped, drift) =
                (policy + l.policy, kl + l.kl, clipped + l.clipped, drift + l.drift);
            gradient.extend(l.gradient.iter().map(|g| g / tokens));
            gradient.extend(vec![0.; mask[i].len() - n]);
        }
        let of_case = |name: &str| values(&f.output(&format!("{case}.{name}")));
        close("pg_loss", &[policy / tokens], &of_case("pg_loss"));
        close("kl_loss", &[kl / tokens], &of_case("kl_loss"));
        close("total", &[(policy + o.kl * kl) / tokens], &of_case("total"));
        close("grad_logprobs", &gradient, &of_case("grad_logprobs"));
        close("clipfrac", &[clipped / tokens], &values(&f.output("clipfrac")));
        close("ppo_kl", &[drift / tokens], &values(&f.output("ppo_kl")));
    }
}
