//! How many calls go out at once, how often, and how long to wait after one that failed.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// So many calls at once, whoever makes them.
pub(super) struct Slots {
    free: Mutex<usize>,
    freed: Condvar,
}

pub(super) struct Slot<'a>(&'a Slots);

impl Slots {
    pub fn new(n: usize) -> Self {
        Self { free: Mutex::new(n), freed: Condvar::new() }
    }

    pub fn take(&self) -> Slot<'_> {
        let free = self.free.lock().expect("no holder panics");
        let mut free = self.freed.wait_while(free, |free| *free == 0).expect("no holder panics");
        *free -= 1;
        Slot(self)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().expect("no holder panics") += 1;
        self.0.freed.notify_one();
    }
}

/// Calls begin at even distances.
pub(super) struct Pace {
    apart: Option<Duration>,
    next: Mutex<Instant>,
}

impl Pace {
    /// 0: no limit.
    pub fn new(per_minute: usize) -> Self {
        let apart = (per_minute > 0).then(|| Duration::from_secs(60) / per_minute as u32);
        Self { apart, next: Mutex::new(Instant::now()) }
    }

    pub fn wait(&self) {
        let Some(apart) = self.apart else { return };
        let now = Instant::now();
        let mut next = self.next.lock().expect("no holder panics");
        let mine = (*next).max(now);
        *next = mine + apart;
        drop(next);
        std::thread::sleep(mine - now);
    }
}

/// Half a second, doubled with each try, a random share of it ("full jitter"), at most `longest`.
/// The share hangs on the request, so that requests that failed together do not return together.
pub(super) fn backoff(tried: usize, longest: Duration, key: &str) -> Duration {
    let most = Duration::from_millis(500 << (tried - 1).min(16)).min(longest);
    let bytes = key.bytes().chain(tried.to_le_bytes());
    // FNV-1a.
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    most.mul_f64((hash >> 11) as f64 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_differ_by_request() {
        let longest = Duration::from_secs(20);
        let waits = |tried| -> Vec<Duration> {
            (0..400).map(|i| backoff(tried, longest, &format!("request {i}"))).collect()
        };
        for (tried, most) in [(1, 0.5), (2, 1.), (4, 4.), (9, 20.), (60, 20.)] {
            let waits = waits(tried);
            let mean = waits.iter().map(Duration::as_secs_f64).sum::<f64>() / 400.;
            assert!(waits.iter().all(|w| w.as_secs_f64() <= most), "{tried}");
            assert!((mean - most / 2.).abs() < most / 10., "{tried}: {mean}");
        }
    }

    #[test]
    fn no_more_than_the_slots_are_taken() {
        let slots = Slots::new(2);
        let (now, most) = (Mutex::new(0), Mutex::new(0));
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    let _slot = slots.take();
                    let held = {
                        let mut now = now.lock().unwrap();
                        *now += 1;
                        *now
                    };
                    let mut most = most.lock().unwrap();
                    *most = held.max(*most);
                    drop(most);
                    std::thread::sleep(Duration::from_millis(5));
                    *now.lock().unwrap() -= 1;
                });
            }
        });
        assert_eq!(*most.lock().unwrap(), 2);
    }

    #[test]
    fn calls_keep_their_distance() {
        let pace = Pace::new(3000);
        let started = Instant::now();
        for _ in 0..4 {
            pace.wait();
        }
        assert!(started.elapsed() >= Duration::from_millis(60));
    }
}
