//! Intervals for reported figures.

use serde::Serialize;

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
    /// Wilson's score interval (1927): it stays inside 0…1 and does not collapse at 0 or n hits.
    /// Samples must be independent: one question a picture.
    pub fn wilson(hits: usize, n: usize) -> Self {
        if n == 0 {
            return Self { hits, n, value: f64::NAN, low: 0., high: 1. };
        }
        const Z: f64 = 1.959_963_984_540_054;
        let (n_, p) = (n as f64, hits as f64 / n as f64);
        let denominator = 1. + Z * Z / n_;
        let centre = (p + Z * Z / (2. * n_)) / denominator;
        let half = Z * (p * (1. - p) / n_ + Z * Z / (4. * n_ * n_)).sqrt() / denominator;
        Self { hits, n, value: p, low: (centre - half).max(0.), high: (centre + half).min(1.) }
    }
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
    fn wilson_matches_published_values() {
        // Newcombe 1998, table I: 81 of 263 is 0.2553 … 0.3662; 0 of 20 is 0 … 0.1611.
        let s = Share::wilson(81, 263);
        assert!((s.low - 0.2553).abs() < 1e-4 && (s.high - 0.3662).abs() < 1e-4, "{s:?}");
        let s = Share::wilson(0, 20);
        assert!(s.low == 0. && (s.high - 0.1611).abs() < 1e-4, "{s:?}");
    }
}
