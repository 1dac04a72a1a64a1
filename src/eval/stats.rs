//! Intervals for reported figures.

use serde::Serialize;
use std::collections::BTreeMap;

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
    /// about one picture are one cluster.
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
        let deff =
            if independent > 0. && c > 1. { (between * c / (c - 1.) / independent).max(1.) } else { 1. };
        let (low, high) = wilson(p, n / deff);
        Self { hits: hits as usize, n: n as usize, value: p, low, high }
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
    fn copies_of_a_sample_do_not_narrow_the_interval() {
        let hit = |i: u64| i.is_multiple_of(3);
        let once = Share::clustered((0..300).map(|i| (i, hit(i))));
        let thrice = Share::clustered((0..900).map(|i| (i / 3, hit(i / 3))));
        assert!((once.low - thrice.low).abs() < 2e-3 && (once.high - thrice.high).abs() < 2e-3);
    }
}
