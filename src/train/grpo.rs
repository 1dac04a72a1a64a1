//! Group-relative policy optimisation (Shao et al. 2024), as VALOR runs it (method.md 4): the maths.
//!
//! Everything here is plain f64 on the log-probabilities of sampled tokens. [`loss`] gives the
//! derivative by each log-probability beside the value, so a trainer's backward pass starts from
//! `Σ derivative · log p`, whatever computed the log-probabilities. Not here: sampling, rewards, the
//! network, the optimiser ([`super::reasoner`]).

pub use crate::config::Objective;

/// Each reward's advantage over its group's mean, in units of the group's standard deviation (n − 1)
/// where asked for. A missing reward has none and leaves the statistics; so does a group's only one.
pub fn advantages(group: &[Option<f64>], normalise: bool) -> Vec<Option<f64>> {
    let known: Vec<f64> = group.iter().flatten().copied().collect();
    let n = known.len() as f64;
    if n < 2. {
        return vec![None; group.len()];
    }
    // What sums of the same weights differ by in their last bits is no difference.
    let (least, most) = known.iter().fold((f64::MAX, f64::MIN), |(l, m), r| (l.min(*r), m.max(*r)));
    if most - least < 1e-9 {
        return group.iter().map(|r| r.map(|_| 0.)).collect();
    }
    let mean = known.iter().sum::<f64>() / n;
    let deviation = (known.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.)).sqrt();
    let unit = if normalise { deviation + 1e-6 } else { 1. };
    group.iter().map(|r| r.map(|r| (r - mean) / unit)).collect()
}

/// Log-probabilities of one reply's tokens under three policies, and the reply's advantage.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// Under the policy being trained.
    pub new: &'a [f64],
    /// Under the policy that sampled.
    pub old: &'a [f64],
    pub reference: &'a [f64],
    pub advantage: f64,
}

/// Sums over a reply's tokens; divide by the tokens of the whole batch for its token mean.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loss {
    /// The clipped surrogate, negated: to be minimised.
    pub policy: f64,
    /// The k3 estimate of KL(new ‖ reference) (Schulman 2020).
    pub kl: f64,
    /// `old − new`: the k1 estimate of KL(old ‖ new).
    pub drift: f64,
    /// Tokens whose ratio was clipped.
    pub clipped: f64,
    /// Derivative of `policy + objective.kl · kl` by each of `new`.
    pub gradient: Vec<f64>,
}

/// Differences of log-probabilities count up to here, so that one freak token is not infinite.
const MOST: f64 = 20.;
/// A token's divergence counts up to here.
const MOST_KL: f64 = 10.;

/// The loss of one reply.
///
/// With ratio r = exp(new − old) and advantage A, a token's policy loss is
/// max(−A r, −A clip(r)), for A < 0 at most −A · `dual_clip`; its divergence, with
/// d = reference − new, is exp(d) − d − 1.
pub fn loss(t: Tokens, o: &Objective) -> Loss {
    let n = t.new.len();
    let within = |x: f64| x.abs() <= MOST;
    let differences: Vec<f64> = t.new.iter().zip(t.old).map(|(new, old)| new - old).collect();
    let whole = differences.iter().sum::<f64>() / n as f64;
    let mut out = Loss { gradient: Vec::with_capacity(n), ..Loss::default() };
    for ((&difference, new), reference) in differences.iter().zip(t.new).zip(t.reference) {
        let log_ratio = if o.sequence_ratio { whole } else { difference };
        let ratio = log_ratio.clamp(-MOST, MOST).exp();
        let bounded = ratio.clamp(1. - o.clip_low, 1. + o.clip_high);
        let (free, clipped) = (-t.advantage * ratio, -t.advantage * bounded);
        let mut policy = free.max(clipped);
        // Under a whole reply's ratio each token moves it by 1/n, and n tokens are moved: the same.
        let mut slope = if free >= clipped && within(log_ratio) { free } else { 0. };
        let most = -t.advantage * o.dual_clip;
        if o.dual_clip > 0. && t.advantage < 0. && most < policy {
            (policy, slope) = (most, 0.);
        }
        let d = reference - new;
        let k3 = d.clamp(-MOST, MOST).exp() - d.clamp(-MOST, MOST) - 1.;
        let kl_slope = if within(d) && k3 <= MOST_KL { 1. - d.exp() } else { 0. };
        out.policy += policy;
        out.kl += k3.min(MOST_KL);
        out.drift -= difference;
        out.clipped += f64::from(clipped > free);
        out.gradient.push(slope + o.kl * kl_slope);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantages_are_relative_to_their_group() {
        // Mean 0.5, standard deviation (n − 1) 0.5.
        let a = advantages(&[Some(0.), Some(0.5), Some(1.)], true);
        for (got, want) in a.iter().zip([-1., 0., 1.]) {
            assert!((got.unwrap() - want).abs() < 1e-5, "{a:?}");
        }
        assert_eq!(advantages(&[Some(0.), Some(1.)], false), [Some(-0.5), Some(0.5)]);
        assert_eq!(advantages(&[Some(0.7); 5], true), [Some(0.); 5], "no spread, nothing to learn");
        // Whose mean is not it.
        for r in [0.1, 0.2, 0.4, 0.7, 0.8, 0.9, 0.8999999999999999] {
            for n in [5, 8] {
                assert!(advantages(&vec![Some(r); n], true).iter().all(|a| *a == Some(0.)), "{r}");
            }
        }
    }

    #[test]
    fn a_missing_reward_is_not_a_zero() {
        let a = advantages(&[Some(0.25), None, Some(0.75)], false);
        assert_eq!(a, [Some(-0.25), None, Some(0.25)]);
        assert_eq!(advantages(&[None, Some(1.)], true), [None, None], "one reward says nothing");
    }

    fn one(new: f64, old: f64, reference: f64, advantage: f64, o: &Objective) -> Loss {
        loss(Tokens { new: &[new], old: &[old], reference: &[reference], advantage }, o)
    }

    #[test]
    fn by_hand() {
        let o = Objective::default();
        // On policy: the loss is −A, its slope −A, and there is no divergence.
        let l = one(-1., -1., -1., 0.5, &o);
        assert_eq!((l.policy, l.kl, l.clipped, l.gradient[0]), (-0.5, 0., 0., -0.5));
        // Ratio 2, a good reply: clipped at 1.2, and pushed no further.
        let l = one(-1., -1. - 2f64.ln(), -1., 1., &o);
        assert!((l.policy + 1.2).abs() < 1e-12 && l.gradient[0] == 0. && l.clipped == 1.);
        // Ratio 2, a bad reply: not clipped, pushed down.
        let l = one(-1., -1. - 2f64.ln(), -1., -1., &o);
        assert!((l.policy - 2.).abs() < 1e-12 && (l.gradient[0] - 2.).abs() < 1e-12 && l.clipped == 0.);
        // Ratio 8, a bad reply: the dual clip holds it at 3.
        let l = one(-1., -1. - 8f64.ln(), -1., -1., &o);
        assert!((l.policy - 3.).abs() < 1e-12 && l.gradient[0] == 0.);
        // Half as likely as under the reference: k3 = 2 − ln 2 − 1, slope 1 − 2.
        let l = one(-1., -1., -1. + 2f64.ln(), 0., &o);
        assert!((l.kl - (1. - 2f64.ln())).abs() < 1e-12 && (l.gradient[0] + 0.01).abs() < 1e-12);
    }

    #[test]
    fn derivatives_are_those_of_the_value() {
        let (old, reference) = ([-0.5, -2., -1., -0.1], [-0.7, -1.5, -1.4, -0.3]);
        let new = [-0.45, -2.1, -1.05, -0.4];
        for sequence_ratio in [false, true] {
            for advantage in [-0.8, 0.6] {
                let o = Objective { sequence_ratio, kl: 0.3, ..Objective::default() };
                let at = |new: &[f64]| {
                    let l = loss(Tokens { new, old: &old, reference: &reference, advantage }, &o);
                    (l.policy + o.kl * l.kl, l.gradient)
                };
                let (_, gradient) = at(&new);
                for i in 0..new.len() {
                    let moved = |by: f64| {
                        let mut new = new;
                        new[i] += by;
                        at(&new).0
                    };
                    let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    assert!(
                        (slope - gradient[i]).abs() < 1e-6,
                        "{sequence_ratio} {advantage} {i}: {slope} {gradient:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_wider_upper_clip_lets_rare_tokens_grow() {
        let o = Objective { clip_high: 0.28, ..Objective::default() };
        let old = -3.;
        assert!(one(old + 1.25f64.ln(), old, old, 1., &o).gradient[0] < 0.);
        assert_eq!(
            one(old + 1.25f64.ln(), old, old + 1.25f64.ln(), 1., &Objective::default()).gradient[0],
            0.
        );
    }
}
