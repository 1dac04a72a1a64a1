//! Keys and values that outlive a call: of prefixes that prompts share, and of what the last prompt may
//! turn out to share with the next. With what the running waves hold they keep to one bound.

use super::{Engine, Job, Result, Stats};
use crate::models::qwen3::KvCache;
use crate::models::qwen3_vl::Position;
use std::sync::Arc;

struct Prefix {
    ids: Vec<u32>,
    cache: Arc<KvCache>,
}

#[derive(Default)]
pub(super) struct Prefixes {
    /// The last used one comes last.
    kept: Vec<Prefix>,
    /// The text part of the last call's first prompt: what the next one shares with it is worth keeping.
    last: Vec<u32>,
    /// Its keys and values, where it came alone and was mostly new: what is shared need not be computed again.
    last_cache: Option<Arc<KvCache>>,
    pub stats: Stats,
    /// Bytes of the waves that are running.
    running: usize,
}

impl Prefixes {
    /// Gives back what [`Self::bytes`] counts.
    pub fn forget(&mut self) {
        self.kept.clear();
        self.last_cache = None;
    }

    /// Memory of all that is kept from call to call.
    pub fn bytes(&self) -> usize {
        self.kept.iter().map(|k| &k.cache).chain(&self.last_cache).map(|c| c.bytes()).sum()
    }
}

/// A running wave's keys and values, counted while it runs.
pub(super) struct Counted<'a> {
    engine: &'a Engine,
    bytes: usize,
}

impl<'a> Counted<'a> {
    pub fn new(engine: &'a Engine, bytes: usize) -> Self {
        let mut p = engine.lock();
        p.running += bytes;
        p.stats.peak_kv_bytes = p.stats.peak_kv_bytes.max(p.bytes() + p.running);
        Self { engine, bytes }
    }
}

impl Counted<'_> {
    /// What was kept for the next prompt alone goes where that many bytes want its place.
    pub fn make_room(&self, bytes: usize) {
        let mut p = self.engine.lock();
        if p.bytes() + p.running - self.bytes + bytes > self.engine.max_kv_bytes() {
            p.last_cache = None;
        }
    }

    pub fn set(&mut self, bytes: usize) {
        let mut p = self.engine.lock();
        p.running = p.running - self.bytes + bytes;
        p.stats.peak_kv_bytes = p.stats.peak_kv_bytes.max(p.bytes() + p.running);
        self.bytes = bytes;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.engine.lock().running -= self.bytes;
    }
}

impl Engine {
    /// Forgets kept prefixes; to be called whenever the network's weights have changed.
    pub fn forget_prefixes(&self) {
        let mut p = self.lock();
        p.forget();
        p.last.clear();
    }

    /// The longest kept prefix of all jobs, after keeping a new one where that is worth it.
    pub(super) fn shared_prefix(&self, jobs: &[Job]) -> Result<Option<Arc<KvCache>>> {
        let first = &jobs[0].ids[..self.network.text_len(&jobs[0].ids)];
        // At least one token stays, to have logits from.
        let fits = |j: &Job| common(first, &j.ids).min(self.network.text_len(&j.ids)).min(j.ids.len() - 1);
        let all = jobs.iter().map(fits).min().unwrap_or(0);
        let mut p = self.lock();
        let as_last = common(first, &p.last);
        let wanted = if jobs.len() > 1 { all } else { as_last.min(all) };
        p.last = first.to_vec();
        let last = p.last_cache.take().filter(|c| wanted <= as_last.min(c.len()));
        let kept = |p: &Prefixes| {
            let usable = p.kept.iter().enumerate().filter(|(_, k)| first[..all].starts_with(&k.ids));
            usable.max_by_key(|(_, k)| k.ids.len()).map(|(i, _)| i)
        };
        let mut base = None;
        if let Some(i) = kept(&p) {
            let used = p.kept.remove(i);
            base = Some(used.cache.clone());
            p.kept.push(used);
        }
        let have = base.as_ref().map_or(0, |c| c.len());
        // No more than half of the memory, so that there is always room to generate.
        let bytes = wanted * self.kv_bytes_per_token();
        if wanted < have + self.options.min_prefix.max(1) || bytes > self.max_kv_bytes() / 2 {
            return Ok(base);
        }
        while !p.kept.is_empty()
            && (p.kept.len() >= self.options.max_prefixes.max(1)
                || p.bytes() + bytes > self.max_kv_bytes() / 2)
        {
            p.kept.remove(0);
        }
        let cache = match (last, &base) {
            (Some(last), _) => last.head(wanted)?,
            (None, base) => {
                let mut cache = match base {
                    Some(b) => KvCache::from_prefix(b, 1, wanted)?,
                    None => {
                        let (cfg, dtype) = (self.network.config(), self.network.decoder().dtype());
                        KvCache::new(cfg, 1, wanted, dtype, &self.device)?
                    }
                };
                let positions: Vec<Position> = (have as u32..wanted as u32).map(|p| [p; 3]).collect();
                let new = vec![first[have..wanted].to_vec()];
                self.prefill(&new, None, &[positions], 0, &[0], &mut cache)?;
                p.stats.prefilled += wanted - have;
                cache
            }
        };
        let cache = Arc::new(cache);
        p.kept.push(Prefix { ids: first[..wanted].to_vec(), cache: cache.clone() });
        Ok(Some(cache))
    }

    /// Keeps what a prompt that came alone put into its cache, for the next one that begins like it. Not of a
    /// prompt that mostly is a kept prefix: there the shared part is known.
    pub(super) fn keep_last(&self, ids: &[u32], shared: usize, cache: &KvCache) -> Result<()> {
        let text = self.network.text_len(ids).min(cache.len());
        let new = text.saturating_sub(shared);
        if new < self.options.min_prefix.max(1) || 2 * new < text {
            return Ok(());
        }
        let mut p = self.lock();
        let (held, max) = (p.bytes() + text * self.kv_bytes_per_token(), self.max_kv_bytes());
        if p.last.get(..text) == ids.get(..text) && held <= max / 2 && held + p.running <= max {
            p.last_cache = Some(Arc::new(cache.head(text)?));
            p.stats.peak_kv_bytes = p.stats.peak_kv_bytes.max(held + p.running);
        }
        Ok(())
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}
