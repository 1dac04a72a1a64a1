//! Where a long run stands, for a log that no progress bar is drawn into.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

/// Says now and then what a bar would show, where there is no terminal to draw it on.
pub struct Pulse {
    last: Instant,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { last: Instant::now() }
    }
}

impl Pulse {
    const EVERY: Duration = Duration::from_secs(60);

    pub fn beat(&mut self, bar: &ProgressBar) {
        if bar.is_hidden() && self.last.elapsed() >= Self::EVERY {
            self.last = Instant::now();
            notice!("{}", line(bar));
        }
    }
}

/// Of bars without a name, the program's.
fn line(bar: &ProgressBar) -> String {
    let (prefix, message) = (bar.prefix(), bar.message());
    let name = if prefix.is_empty() { "valor:" } else { prefix.as_str() };
    let (at, of) = (bar.position(), bar.length().unwrap_or(0));
    let left = bar.eta().as_secs().div_ceil(60);
    let comma = if message.is_empty() { "" } else { ", " };
    format!("{name} {at}/{of}, about {left} min left{comma}{message}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_whose_it_is_and_where_it_stands() {
        let bar = ProgressBar::hidden();
        bar.set_length(10);
        bar.set_position(3);
        let said = line(&bar);
        assert!(said.starts_with("valor: 3/10, about ") && said.ends_with(" min left"), "{said}");
        bar.set_prefix("depth");
        bar.set_message("loss 0.5");
        let said = line(&bar);
        assert!(said.starts_with("depth 3/10, ") && said.ends_with(" min left, loss 0.5"), "{said}");
    }

    /// Short work, and tests that read all that is said, hear nothing.
    #[test]
    fn a_new_pulse_is_silent() {
        let mut pulse = Pulse::default();
        let begun = pulse.last;
        pulse.beat(&ProgressBar::hidden());
        assert_eq!(pulse.last, begun);
    }
}
