//! Parts of a batch side by side, each with threads of its own.
//!
//! A small network's step is thousands of short operations, and threads that share each of them spend
//! as long waiting for one another as working: on two cores a training step of the depth model took as
//! long as on one. Parts that do not meet before the step's end use both.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;

/// Lanes on a processor of many cores; each then has several.
const MOST: usize = 4;

/// Who works on the parts of a batch.
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

    /// As many as are good for this processor.
    pub fn of_cores() -> anyhow::Result<Self> {
        Self::new(Self::good())
    }

    /// As many as are good for this device: a GPU does one part at a time, with all it has.
    pub fn of_device(device: &candle_core::Device) -> anyhow::Result<Self> {
        if device.is_cpu() { Self::of_cores() } else { Self::new(1) }
    }

    /// As many as the processor has cores, and a few at most: each holds activations of its own.
    pub fn good() -> usize {
        rayon::current_num_threads().min(MOST)
    }

    pub fn count(&self) -> usize {
        self.pools.len().max(1)
    }

    /// `f` of all items, each lane taking the next one that nobody has; results in the items' order.
    pub fn all<I: Sync, T: Send, E: Send>(
        &self,
        items: &[I],
        f: impl Fn(&I) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        if self.pools.is_empty() {
            return items.iter().map(f).collect();
        }
        let next = AtomicUsize::new(0);
        let (next, f) = (&next, &f);
        let work = move || -> Vec<(usize, Result<T, E>)> {
            let mine =
                || items.get(next.load(Ordering::Relaxed)).map(|_| next.fetch_add(1, Ordering::Relaxed));
            std::iter::from_fn(mine).filter_map(|i| Some((i, f(items.get(i)?)))).collect()
        };
        let mut done: Vec<(usize, Result<T, E>)> = std::thread::scope(|scope| {
            let running: Vec<_> =
                self.pools.iter().map(|pool| scope.spawn(move || pool.install(work))).collect();
            running.into_iter().flat_map(joined).collect()
        });
        done.sort_by_key(|(i, _)| *i);
        done.into_iter().map(|(_, result)| result).collect()
    }

    /// `f` of each item, as many at once as there are lanes; `take` has the results in the items' order,
    /// so what it makes of them does not depend on how many lanes there are.
    pub fn each<I: Sync, T: Send>(
        &self,
        items: &[I],
        f: impl Fn(&I) -> anyhow::Result<T> + Sync,
        mut take: impl FnMut(T) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for wave in items.chunks(self.count()) {
            let done = self.map(wave, |_, share| share.iter().map(&f).collect::<anyhow::Result<Vec<T>>>())?;
            done.into_iter().flatten().try_for_each(&mut take)?;
        }
        Ok(())
    }

    /// `f` of each lane's number and share of the items (shares differ by one item at most), in order. What is summed
    /// over shares depends on how many there are, which then belongs to a run's settings.
    pub fn map<I: Sync, T: Send>(
        &self,
        items: &[I],
        f: impl Fn(usize, &[I]) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let shares = shares(items.len(), self.count());
        if self.pools.is_empty() {
            return shares.map(|s| f(0, &items[s])).collect();
        }
        let f = &f;
        std::thread::scope(|scope| {
            let running: Vec<_> = shares
                .zip(&self.pools)
                .enumerate()
                .map(|(lane, (share, pool))| scope.spawn(move || pool.install(|| f(lane, &items[share]))))
                .collect();
            running.into_iter().map(joined).collect()
        })
    }
}

/// What a thread returned; its panic is the caller's.
fn joined<T>(thread: ScopedJoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
            let got = lanes.map(&items, |_, share| Ok(share.to_vec())).unwrap();
            assert!(got.iter().all(|share| !share.is_empty()) && got.len() == count.min(n));
            assert_eq!(got.concat(), items);
        }
    }

    #[test]
    fn results_come_in_the_items_order() {
        for count in 1..4 {
            let (lanes, mut got) = (Lanes::new(count).unwrap(), Vec::new());
            let items: Vec<usize> = (0..7).collect();
            let take = |x| {
                got.push(x);
                Ok(())
            };
            lanes.each(&items, |i| Ok(i * i), take).unwrap();
            assert_eq!(got, [0, 1, 4, 9, 16, 25, 36]);
            assert_eq!(lanes.all(&items, |i| Ok::<_, ()>(i * i)), Ok(got));
            assert_eq!(lanes.all(&items, |&i| if i % 3 == 1 { Err(i) } else { Ok(()) }), Err(1));
        }
    }

    #[test]
    fn a_lane_that_fails_is_heard() {
        let lanes = Lanes::new(2).unwrap();
        let e = lanes.map(&[1, 2], |_, share| match share {
            [2] => anyhow::bail!("the second"),
            _ => Ok(()),
        });
        assert_eq!(e.unwrap_err().to_string(), "the second");
    }
}
