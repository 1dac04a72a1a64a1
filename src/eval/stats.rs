//! Intervals for reported figures.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A share with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    pub hits: usize,
    pub n: usize,
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Share {
    /// From `(cluster, hit)` pairs: Wilson's score interval (1927), which stays inside 0…1 and does
    /// not collapse at 0 or n hits, on the effective sample size n / deff (Kish 1965). Questions
    /// about one picture are one cluster; where they say nothing of how clusters differ, all hits or none, or
    /// but one cluster, each cluster is one trial.
    pub fn clustered(samples: impl IntoIterator<Item = (u64, bool)>) -> Self {
        let mut clusters: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
        for (cluster, hit) in samples {
            let (hits, n) = clusters.entry(cluster).or_default();
            *hits += hit as u8 as f64;
            *n += 1.;
        }
        let (hits, n) = clusters.values().fold((0., 0.), |(h, n), c| (h + c.0, n + c.1));
        if n == 0. {
            return Self { hits: 0, n: 0, value: f64::NAN, low: 0., high: 1. };
        }
        let (p, c) = (hits / n, clusters.len() as f64);
        let independent = p * (1. - p) / n;
        let between: f64 = clusters.values().map(|(h, m)| (h - p * m).powi(2)).sum::<f64>() / (n * n);
        let deff = match independent > 0. && c > 1. {
            true => (between * c / (c - 1.) / independent).max(1.),
            false => n / c,
        };
        let (low, high) = wilson(p, n / deff);
        Self { hits: hits as usize, n: n as usize, value: p, low, high }
    }

    /// 95 % interval of the mean of two shares, from their own (MOVER: Zou and Donner 2008), as of cases that know
    /// nothing of one another: that one cluster may have cases of both is left out of account.
    pub fn mean_interval(&self, other: &Self) -> [f64; 2] {
        let mean = (self.value + other.value) / 2.;
        let off = |end: fn(&Self) -> f64| (self.value - end(self)).hypot(other.value - end(other)) / 2.;
        [mean - off(|s| s.low), mean + off(|s| s.high)]
    }
}

/// Resamples of a bootstrap, and its seed: the same scores have the same interval.
const RESAMPLES: usize = 2000;
const SEED: u64 = 20_261_126;

/// 95 % interval of a figure of `n` clusters, from how often each is drawn in a resample. `None` of fewer
/// than two.
pub fn percentiles(n: usize, mut figure: impl FnMut(&[usize]) -> f64) -> Option<[f64; 2]> {
    /// The figure may be dear.
    const RESAMPLES: usize = 400;
    if n < 2 {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut times = vec![0; n];
    let mut all: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            times.fill(0);
            (0..n).for_each(|_| times[rng.random_range(0..n)] += 1);
            figure(&times)
        })
        .filter(|x| !x.is_nan())
        .collect();
    all.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| all.get((share * (all.len().max(1) - 1) as f64).round() as usize).copied();
    Some([at(0.025)?, at(0.975)?])
}

/// Clusters of which a bootstrap's percentiles are too near to one another.
const FEW: usize = 10;

/// A mean with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    pub n: usize,
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

impl Mean {
    /// Of scores from 0 to 1. Where all are 0 or all are 1 a bootstrap has no width, and of a few clusters it has
    /// too little: it is Wilson's interval then, each cluster one trial.
    pub fn accuracy<'a>(samples: impl IntoIterator<Item = (&'a str, f64)>) -> Option<Self> {
        let samples: Vec<(&str, f64)> = samples.into_iter().collect();
        let mean = Self::bootstrap(samples.iter().copied())?;
        let clusters = samples.iter().map(|s| s.0).collect::<BTreeSet<_>>().len();
        let uniform = mean.low == mean.high && (mean.value == 0. || mean.value == 1.);
        if clusters == 1 || (clusters >= FEW && !uniform) {
            return Some(mean);
        }
        let (low, high) = wilson(mean.value, clusters as f64);
        Some(Self { low, high, ..mean })
    }

    /// Of `(cluster, value)` pairs: percentiles of the means of resampled clusters (Efron 1979; clusters
    /// as in Field and Welsh 2007). `None` of nothing. Of one cluster there is no interval: its ends are
    /// NaN.
    pub fn bootstrap<'a>(samples: impl IntoIterator<Item = (&'a str, f64)>) -> Option<Self> {
        let mut clusters: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for (cluster, value) in samples {
            let (sum, n) = clusters.entry(cluster).or_default();
            *sum += value;
            *n += 1.;
            (least, most) = (least.min(value), most.max(value));
        }
        let clusters: Vec<(f64, f64)> = clusters.into_values().collect();
        let (sum, n) = clusters.iter().fold((0., 0.), |(s, n), c| (s + c.0, n + c.1));
        if n == 0. {
            return None;
        }
        let mean = Self { n: n as usize, value: sum / n, low: least, high: most };
        if clusters.len() == 1 {
            return Some(Self { low: f64::NAN, high: f64::NAN, ..mean });
        }
        if least == most {
            return Some(mean);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut means: Vec<f64> = (0..RESAMPLES)
            .map(|_| {
                let drawn = (0..clusters.len()).map(|_| clusters[rng.random_range(0..clusters.len())]);
                let (s, n) = drawn.fold((0., 0.), |(s, n), c| (s + c.0, n + c.1));
                s / n
            })
            .collect();
        means.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| means[(share * (RESAMPLES - 1) as f64).round() as usize];
        Some(Self { low: at(0.025), high: at(0.975), ..mean })
    }
}

impl std::fmt::Display for Mean {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.low.is_nan() {
            return write!(f, "{:5.1} % [one picture]", 100. * self.value);
        }
        write!(f, "{:5.1} % [{:.1}, {:.1}]", 100. * self.value, 100. * self.low, 100. * self.high)
    }
}

fn wilson(p: f64, n: f64) -> (f64, f64) {
    const Z: f64 = 1.959_963_984_540_054;
    let denominator = 1. + Z * Z / n;
    let centre = (p + Z * Z / (2. * n)) / denominator;
    let half = Z * (p * (1. - p) / n + Z * Z / (4. * n * n)).sqrt() / denominator;
    ((centre - half).max(0.), (centre + half).min(1.))
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.n == 0 {
            return f.write_str("–");
        }
        write!(f, "{:5.1} % [{:.1}, {:.1}]", 100. * self.value, 100. * self.low, 100. * self.high)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn independent_samples_match_published_values() {
        // Newcombe 1998, table I: 81 of 263 is 0.2553 … 0.3662; 0 of 20 is 0 … 0.1611.
        let (low, high) = wilson(81. / 263., 263.);
        assert!((low - 0.2553).abs() < 1e-4 && (high - 0.3662).abs() < 1e-4, "{low} {high}");
        let s = Share::clustered((0..20).map(|i| (i, false)));
        assert!(s.low == 0. && (s.high - 0.1611).abs() < 1e-4, "{s:?}");
    }

    #[test]
    fn where_clusters_cannot_differ_each_is_one_trial() {
        // Twenty of twenty about five rooms, none of 600 about sixty, and one room alone.
        for (n, clusters, hit) in [(20, 5, true), (600, 60, false)] {
            let share = Share::clustered((0..n).map(|i| (i % clusters, hit)));
            let one_each = Share::clustered((0..clusters).map(|i| (i, hit)));
            assert_eq!((share.low, share.high), (one_each.low, one_each.high));
        }
        let one = Share::clustered((0..20).map(|i| (7, i < 10)));
        assert_eq!((one.low, one.high), wilson(0.5, 1.));
    }

    #[test]
    fn copies_of_a_sample_do_not_narrow_the_interval() {
        let hit = |i: u64| i.is_multiple_of(3);
        let once = Share::clustered((0..300).map(|i| (i, hit(i))));
        let thrice = Share::clustered((0..900).map(|i| (i / 3, hit(i / 3))));
        assert!((once.low - thrice.low).abs() < 2e-3 && (once.high - thrice.high).abs() < 2e-3);
    }

    #[test]
    fn a_mean_of_two_shares_is_known_as_well_as_both() {
        let share = |hits: u64, n: u64| Share::clustered((0..n).map(move |i| (i, i < hits)));
        // As by theory, where the shares are far from 0 and 1: 1.96 √(p q / n) each.
        let (a, b) = (share(400, 1000), share(1800, 3000));
        let half = 1.96 * (0.24f64 / 1000. + 0.24 / 3000.).sqrt() / 2.;
        let [low, high] = a.mean_interval(&b);
        assert!((low - (0.5 - half)).abs() < 1e-3 && (high - (0.5 + half)).abs() < 1e-3, "{low} {high}");
        // Few cases of one, all right: what is not known of it shows.
        let [low, high] = share(990, 1000).mean_interval(&share(6, 6));
        assert!(low < 0.81 && high < 1.0 && high > 0.995, "{low} {high}");
    }

    #[test]
    fn the_bootstrap_is_repeatable_agrees_with_theory_and_follows_the_clusters() {
        let names: Vec<String> = (0..400).map(|i| format!("picture {i}")).collect();
        let hit = |i: usize| f64::from(u8::from(i.is_multiple_of(4)));
        let once = Mean::bootstrap((0..400).map(|i| (&*names[i], hit(i)))).unwrap();
        assert_eq!(Mean::bootstrap((0..400).map(|i| (&*names[i], hit(i)))), Some(once));
        // Of independent values: 1.96 standard errors on each side.
        let half = 1.96 * (0.25f64 * 0.75 / 400.).sqrt();
        assert!((once.value - 0.25).abs() < 1e-12);
        assert!(
            (once.low - (0.25 - half)).abs() < 5e-3 && (once.high - (0.25 + half)).abs() < 5e-3,
            "{once:?}"
        );
        // Four questions about one picture that stand and fall together are one.
        let together = Mean::bootstrap((0..1600).map(|i| (&*names[i / 4], hit(i / 4)))).unwrap();
        assert!((together.low - once.low).abs() < 1e-12 && (together.high - once.high).abs() < 1e-12);
        assert_eq!(Mean::bootstrap([]), None);
        let one = Mean::bootstrap([("a", 1.), ("a", 0.)]).unwrap();
        assert!(one.value == 0.5 && one.low.is_nan() && one.high.is_nan());
        let none = Mean::bootstrap((0..20).map(|i| (&*names[i], 0.))).unwrap();
        assert_eq!((none.low, none.high), (0., 0.), "as of differences that are none");
        let sure = Mean::accuracy((0..20).map(|i| (&*names[i], 0.))).unwrap();
        assert!(sure.low == 0. && (sure.high - 0.1611).abs() < 1e-4, "as Wilson's: {sure:?}");
        // One of four right, about two pictures: as little is known as of one trial in two at least.
        let few = Mean::accuracy([("a", 1.), ("a", 0.), ("b", 0.), ("b", 0.)]).unwrap();
        assert!(few.low < 0.05 && few.high > 0.8 && few.value == 0.25, "{few:?}");
    }
}
