//! The parts of a batch side by side, each with threads of its own.
//!
//! A small network's step is thousands of short operations, and threads that share each of them spend
//! as long waiting for one another as working: on two cores a step of the depth model took as long as
//! on one. Parts that never meet before the optimiser use both.

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Who works on the parts of a batch. How many there are decides how gradients are summed, so it belongs
/// to a run's settings; how many threads each has does not.
pub struct Lanes {
    pools: Vec<ThreadPool>,
}

impl Lanes {
    /// `count` lanes that share the processor's cores.
    pub fn new(count: usize) -> anyhow::Result<Self> {
        let threads = (rayon::current_num_threads() / count.max(1)).max(1);
        let pool = |_| ThreadPoolBuilder::new().num_threads(threads).build();
        // One lane is everybody.
        let pools = if count < 2 { vec![] } else { (0..count).map(pool).collect::<Result<_, _>>()? };
        Ok(Self { pools })
    }

    pub fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// `f` of each lane's share of the items, which differ by one item at most, in order.
    pub fn map<I: Sync, T: Send>(
        &self,
        items: &[I],
        f: impl Fn(&[I]) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let shares = shares(items.len(), self.count());
        if self.pools.is_empty() {
            return shares.map(|s| f(&items[s])).collect();
        }
        let f = &f;
        std::thread::scope(|scope| {
            let running: Vec<_> = shares
                .zip(&self.pools)
                .map(|(share, pool)| scope.spawn(move || pool.install(|| f(&items[share]))))
                .collect();
            running
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }
}

/// Up to `count` ranges of `0..n`, none of them empty.
fn shares(n: usize, count: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..count).map(move |i| n * i / count..n * (i + 1) / count).filter(|share| !share.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_goes_to_one_lane_in_order() {
        for (n, count) in [(0, 2), (1, 2), (5, 2), (7, 3), (8, 1)] {
            let items: Vec<usize> = (0..n).collect();
            let lanes = Lanes::new(count).unwrap();
            let got = lanes.map(&items, |share| Ok(share.to_vec())).unwrap();
            assert!(got.iter().all(|share| !share.is_empty()) && got.len() == count.min(n));
            assert_eq!(got.concat(), items);
        }
    }

    #[test]
    fn a_lane_that_fails_is_heard() {
        let lanes = Lanes::new(2).unwrap();
        let e = lanes.map(&[1, 2], |share| match share {
            [2] => anyhow::bail!("the second"),
            _ => Ok(()),
        });
        assert_eq!(e.unwrap_err().to_string(), "the second");
    }
}
