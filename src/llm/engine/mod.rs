//! Batched generation on the Qwen3 decoder, with or without pictures.
//!
//! Prompts are padded on the left and run in waves, as many rows at once as the bound on key-value memory
//! allows; a finished row leaves its wave. A wave whose replies grow long gets more room, and where there is none some of
//! its rows begin anew in a later one. Keys and values of a prefix that prompts share are computed
//! once and kept for later calls. Each row has its own sampler and no row sees another, so a
//! reply does not depend on its batch (up to the last bits of the logits, which matrix kernels may round
//! differently for other batch shapes).
//!
//! Not here: admitting new rows into a running wave, beam search, quantised caches.

mod prefixes;

use std::sync::{Mutex, MutexGuard, OnceLock};

use candle_core::{Device, Tensor};

pub use super::network::Network;
use super::sampler::{Sampler, SamplingOptions};
use super::tokenizer::{ReplyText, Tokenizer};
use super::{ChatError, Finish, TokenTrace};
use crate::models::qwen3::KvCache;
use crate::models::qwen3_vl::{Embedded, Features, Grid, Position};
use crate::nn::Mask;
use crate::nn::lanes::Lanes;
use prefixes::{Counted, Prefixes};

/// Called with the index of a job and the next piece of its text.
pub type OnToken<'a> = Option<&'a mut dyn FnMut(usize, &str)>;

type Result<T> = std::result::Result<T, ChatError>;

/// Tokens that one forward pass of a prompt takes in, over all rows: bounds the activations.
const PREFILL_TOKENS: usize = 8192;

#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bound on the memory of keys and values, kept prefixes included. A prompt that needs more has its wave to
    /// itself. `None`: what suits the device, asked at the first prompt, when all weights are where they will be.
    pub max_kv_bytes: Option<usize>,
    /// Room for so many new tokens is made at first; a wave of longer replies grows. Few replies come near to what
    /// they may be long, and room for that would leave room for few.
    pub first_room: usize,
    /// Rows of a wave at most.
    pub max_batch: usize,
    /// A shared prefix is kept if it is at least this many tokens longer than one already kept.
    pub min_prefix: usize,
    /// Prefixes kept; the one unused for longest goes.
    pub max_prefixes: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { max_kv_bytes: None, first_room: 1024, max_batch: 64, min_prefix: 32, max_prefixes: 4 }
    }
}

impl EngineOptions {
    /// With so many megabytes of keys and values, or where that is 0 as many as suit the device.
    pub fn with_kv_cache_mb(mb: usize) -> Self {
        Self { max_kv_bytes: (mb > 0).then_some(mb << 20), ..Self::default() }
    }
}

/// Of a processor, whose memory others share.
const KV_BYTES: usize = 2 << 30;

/// One prompt to be continued.
#[derive(Clone, Debug)]
pub struct Job {
    /// The prompt, with as many picture tokens as `features` has rows.
    pub ids: Vec<u32>,
    pub features: Option<Features>,
    pub grids: Vec<Grid>,
    pub seed: u64,
    pub max_new_tokens: usize,
    pub stop: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Generated {
    pub text: String,
    pub finish: Finish,
    pub trace: TokenTrace,
}

/// What the engine has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Prompt tokens that went through the network (those found in kept prefixes did not).
    pub prefilled: usize,
    /// Tokens generated.
    pub generated: usize,
    pub waves: usize,
    /// The most memory that keys and values took at once.
    pub peak_kv_bytes: usize,
}

/// Bytes of the machine's memory, where that can be asked.
fn physical_memory() -> Option<usize> {
    #[cfg(unix)]
    {
        // SAFETY: the calls take a number and touch no memory.
        let [pages, size] =
            [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
        usize::try_from(pages).ok()?.checked_mul(usize::try_from(size).ok()?)
    }
    #[cfg(not(unix))]
    None
}

/// A network with its kept prefixes.
pub struct Engine {
    network: Network,
    device: Device,
    /// Ids that end a reply.
    eos: Vec<u32>,
    options: EngineOptions,
    max_kv_bytes: OnceLock<usize>,
    prefixes: Mutex<Prefixes>,
}

/// A job in the making.
struct Row<'a> {
    job: usize,
    sampler: Sampler,
    text: ReplyText<'a>,
    trace: TokenTrace,
    next: u32,
    room: usize,
    finish: Option<Finish>,
}

/// Jobs by the wave that they go in, and how many tokens each wave may hold, over all its rows.
struct Waves {
    rows: Vec<Vec<usize>>,
    room: usize,
}

/// How much a wave may hold, and how many new tokens of each row it makes room for at first.
#[derive(Clone, Copy)]
struct Wave {
    room: usize,
    first: usize,
}

struct Planned {
    positions: Vec<Position>,
    next: u32,
    room: usize,
}

impl Engine {
    pub fn new(network: Network, device: Device, eos: Vec<u32>, options: EngineOptions) -> Self {
        Self { network, device, eos, options, max_kv_bytes: OnceLock::new(), prefixes: Mutex::default() }
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn stats(&self) -> Stats {
        self.lock().stats
    }

    /// Continues all jobs; results are in their order.
    pub fn generate(
        &self,
        jobs: &[Job],
        sampling: &SamplingOptions,
        tokenizer: &Tokenizer,
        on_token: OnToken,
    ) -> Result<Vec<Generated>> {
        sampling.check()?;
        let planned: Vec<Planned> = jobs.iter().map(|j| self.plan(j)).collect::<Result<_>>()?;
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let prefix = self.shared_prefix(jobs)?;
        let shared = prefix.as_ref().map_or(0, |p| p.len());
        let mut out: Vec<Option<Generated>> = jobs.iter().map(|_| None).collect();
        let rows_of = |wave: &[usize]| -> Vec<Row> {
            wave.iter()
                .map(|&i| Row {
                    job: i,
                    sampler: Sampler::new(sampling.clone(), jobs[i].seed),
                    text: ReplyText::new(tokenizer, &jobs[i].stop),
                    trace: TokenTrace { prompt_ids: jobs[i].ids.clone(), ..TokenTrace::default() },
                    next: planned[i].next,
                    room: planned[i].room,
                    finish: None,
                })
                .collect()
        };
        let prefix = prefix.as_deref();
        let mut finished: Vec<Row> = Vec::with_capacity(jobs.len());
        match on_token {
            // Pieces of text come in one order, and none twice: each reply has all its room at once.
            Some(f) => {
                let mut f: OnToken = Some(f);
                let all: Vec<usize> = (0..jobs.len()).collect();
                let waves = self.waves(jobs, &planned, &all, shared, 1, usize::MAX);
                for rows in &waves.rows {
                    let wave = Wave { room: usize::MAX, first: usize::MAX };
                    finished.extend(self.run_wave(jobs, &planned, prefix, rows_of(rows), wave, &mut f)?);
                }
            }
            None => {
                let mut open: Vec<usize> = (0..jobs.len()).collect();
                let mut first = self.options.first_room.max(1);
                while !open.is_empty() {
                    let lanes = self.lanes(open.len());
                    let waves = self.waves(jobs, &planned, &open, shared, lanes, first);
                    let lanes = Lanes::new(lanes.min(waves.rows.len()))
                        .map_err(|e| ChatError::Request(e.to_string()))?;
                    let wave = Wave { room: waves.room, first };
                    let run =
                        |w: &Vec<usize>| self.run_wave(jobs, &planned, prefix, rows_of(w), wave, &mut None);
                    let (done, aside): (Vec<Row>, Vec<Row>) =
                        lanes.all(&waves.rows, run)?.into_iter().flatten().partition(|r| r.finish.is_some());
                    finished.extend(done);
                    // What there was no room for begins anew with all of it: it has its seed, and comes to the same.
                    open = aside.iter().map(|r| r.job).collect();
                    first = usize::MAX;
                }
            }
        }
        for row in finished {
            let finish = row.finish.unwrap_or(Finish::Length);
            out[row.job] = Some(Generated { text: row.text.text().into(), finish, trace: row.trace });
        }
        Ok(out.into_iter().flatten().collect())
    }

    /// Can this job be served at all?
    pub fn check(&self, job: &Job) -> Result<()> {
        self.plan(job).map(|_| ())
    }

    fn plan(&self, job: &Job) -> Result<Planned> {
        let context = self.network.config().max_position_embeddings;
        let n = job.ids.len();
        if n == 0 {
            return Err(ChatError::Request("the prompt is empty".into()));
        }
        if job.max_new_tokens == 0 {
            return Err(ChatError::Request("max_new_tokens is 0, it must be at least 1".into()));
        }
        if n >= context {
            let msg = format!(
                "the prompt has {n} tokens, the model's context holds {context}: shorten the question or the instructions"
            );
            return Err(ChatError::Request(msg));
        }
        let vocab = self.network.config().vocab_size as u32;
        if let Some(id) = job.ids.iter().find(|id| **id >= vocab) {
            let msg = format!(
                "token id {id} is beyond the model's vocabulary of {vocab}: the tokenizer belongs to another model"
            );
            return Err(ChatError::Request(msg));
        }
        let room = job.max_new_tokens.min(context - n);
        let bytes = (n + room).saturating_mul(self.kv_bytes_per_token());
        if let Some(most) = self.device.is_cpu().then(physical_memory).flatten()
            && bytes > most
        {
            let msg = format!(
                "a prompt of {n} tokens with up to {room} new ones needs {} MiB for keys and values, the machine has {}: \
                 lower max_new_tokens",
                bytes >> 20,
                most >> 20
            );
            return Err(ChatError::Request(msg));
        }
        let (positions, next) = self.network.positions(job)?;
        Ok(Planned { positions, next, room })
    }

    fn max_kv_bytes(&self) -> usize {
        let suits = || crate::nn::free_memory(&self.device).map_or(KV_BYTES, |free| free / 3);
        *self.max_kv_bytes.get_or_init(|| self.options.max_kv_bytes.unwrap_or_else(suits))
    }

    fn kv_bytes_per_token(&self) -> usize {
        let c = self.network.config();
        2 * c.num_hidden_layers
            * c.num_key_value_heads
            * c.head_dim
            * self.network.decoder().dtype().size_in_bytes()
    }

    /// Waves that run at once. On the processor the weights of a small network stay in its caches, and
    /// waves side by side do not wait for one another; a large one's are read from memory, once a step
    /// however many rows there are.
    fn lanes(&self, jobs: usize) -> usize {
        /// A wave of fewer rows is not worth its own.
        const ROWS: usize = 8;
        const SMALL: usize = 16 << 20;
        let small = self.device.is_cpu() && self.network.config().parameters() <= SMALL;
        if small { Lanes::good().min(jobs / ROWS).max(1) } else { 1 }
    }

    /// Groups of `open` jobs, longest first, so many of which at once are within the bound on memory, but at least
    /// one; with room for at most `first` new tokens each.
    fn waves(
        &self,
        jobs: &[Job],
        planned: &[Planned],
        open: &[usize],
        shared: usize,
        lanes: usize,
        first: usize,
    ) -> Waves {
        let most = self.max_kv_bytes() / self.kv_bytes_per_token() / lanes;
        let room = {
            let mut p = self.lock();
            let room =
                |held: usize| self.max_kv_bytes().saturating_sub(held) / self.kv_bytes_per_token() / lanes;
            let alone = open.iter().map(|&i| jobs[i].ids.len() + planned[i].room).max().unwrap_or(0);
            // What is kept goes where that lets the longest stay within the bound.
            if (room(p.bytes()) + 1..=most).contains(&alone) {
                p.forget();
            }
            room(p.bytes())
        };
        let most_rows = self.options.max_batch.min(open.len().div_ceil(lanes));
        let new = |i: usize| planned[i].room.min(first);
        let mut order = open.to_vec();
        order.sort_by_key(|&i| std::cmp::Reverse((jobs[i].ids.len() + new(i), i)));
        let mut rows: Vec<Vec<usize>> = Vec::new();
        let (mut longest, mut most) = (0, 0);
        for i in order {
            let prompt = jobs[i].ids.len() - shared;
            let (l, m) = (prompt.max(longest), new(i).max(most));
            match rows.last_mut() {
                Some(w) if w.len() < most_rows && (w.len() + 1) * (shared + l + m) <= room => {
                    w.push(i);
                    (longest, most) = (l, m);
                }
                _ => {
                    rows.push(vec![i]);
                    (longest, most) = (prompt, new(i));
                }
            }
        }
        Waves { rows, room }
    }

    /// Runs rows together. Those that come back unfinished found no room for longer replies, and were set aside.
    fn run_wave<'t>(
        &self,
        jobs: &[Job],
        planned: &[Planned],
        prefix: Option<&KvCache>,
        mut rows: Vec<Row<'t>>,
        wave: Wave,
        on_token: &mut OnToken,
    ) -> Result<Vec<Row<'t>>> {
        let shared = prefix.map_or(0, KvCache::len);
        let longest = rows.iter().map(|r| jobs[r.job].ids.len() - shared).max().unwrap_or(0);
        let most = rows.iter().map(|r| r.room).max().unwrap_or(0);
        let mut new = most.min(wave.first);
        let capacity = shared + longest + new;
        let mut cache = match prefix {
            Some(p) => KvCache::from_prefix(p, rows.len(), capacity)?,
            None => {
                let (cfg, dtype) = (self.network.config(), self.network.decoder().dtype());
                KvCache::new(cfg, rows.len(), capacity, dtype, &self.device)?
            }
        };
        let (mut ids, mut positions, mut pads) = (Vec::new(), Vec::new(), Vec::new());
        for row in &rows {
            let own = &jobs[row.job].ids[shared..];
            let pad = longest - own.len();
            ids.push([vec![self.pad_id(); pad], own.to_vec()].concat());
            positions.push([vec![[0; 3]; pad], planned[row.job].positions[shared..].to_vec()].concat());
            pads.push(pad);
        }
        let pictures: Vec<&Features> = rows.iter().filter_map(|r| jobs[r.job].features.as_ref()).collect();
        let features = if pictures.is_empty() { None } else { Some(Features::cat(&pictures)?) };
        let hidden = self.prefill(&ids, features.as_ref(), &positions, shared, &pads, &mut cache)?;
        let mut counted = Counted::new(self, cache.bytes());
        if let [job] = jobs {
            self.keep_last(&job.ids, shared, &cache)?;
        }
        {
            let mut p = self.lock();
            p.stats.waves += 1;
            p.stats.prefilled += pads.iter().map(|pad| longest - pad).sum::<usize>();
        }
        let mut logits = self.logits(&hidden)?;
        let mut finished = Vec::with_capacity(rows.len());
        loop {
            self.sample(&mut rows, &logits, on_token)?;
            self.lock().stats.generated += rows.len();
            let going: Vec<u32> =
                (0..rows.len() as u32).filter(|i| rows[*i as usize].finish.is_none()).collect();
            if going.len() < rows.len() {
                let (alive, done): (Vec<_>, Vec<_>) =
                    rows.into_iter().zip(pads).partition(|(r, _)| r.finish.is_none());
                finished.extend(done.into_iter().map(|(r, _)| r));
                (rows, pads) = alive.into_iter().unzip();
                if rows.is_empty() {
                    return Ok(finished);
                }
                cache.select(&going)?;
                counted.set(cache.bytes());
            }
            if cache.len() == cache.capacity() {
                let most = rows.iter().map(|r| r.room).max().unwrap_or(0);
                new = most.min(2 * new);
                let capacity = shared + longest + new;
                // Of the longest prompts, whose work it would be a pity to lose.
                let stay = (wave.room / capacity).clamp(1, rows.len());
                if stay < rows.len() {
                    finished.extend(rows.split_off(stay));
                    pads.truncate(stay);
                    cache.select(&(0..stay as u32).collect::<Vec<_>>())?;
                }
                counted.make_room(cache.bytes() / cache.capacity() * capacity);
                cache.grow(capacity)?;
                counted.set(cache.bytes());
            }
            let last: Vec<Vec<u32>> =
                rows.iter().map(|r| r.trace.ids.last().copied().into_iter().collect()).collect();
            let next: Vec<Vec<Position>> = rows
                .iter_mut()
                .map(|r| {
                    r.next += 1;
                    vec![[r.next - 1; 3]]
                })
                .collect();
            // A sampled picture token has no picture: its embedding is the table's.
            let (b, flat) = (last.len(), last.concat());
            let x = self.network.decoder().embed(&Tensor::from_vec(flat, (b, 1), &self.device)?)?;
            let step = Embedded { x, deepstack: Vec::new() };
            let rope =
                self.network.rope(&next.iter().map(Vec::as_slice).collect::<Vec<_>>(), &self.device)?;
            let hidden = self.network.forward(&step, &rope, &mask(shared, &pads), &mut cache)?;
            logits = self.logits(&hidden)?;
        }
    }

    /// Runs rows of one length into the cache, in pieces; returns the last token's hidden states
    /// `[batch, 1, hidden]`.
    fn prefill(
        &self,
        ids: &[Vec<u32>],
        features: Option<&Features>,
        positions: &[Vec<Position>],
        shared: usize,
        pads: &[usize],
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let n = ids[0].len();
        let all = self.network.embed(ids, features, &self.device)?;
        let piece = (PREFILL_TOKENS / ids.len()).max(1);
        let mut hidden = None;
        for from in (0..n).step_by(piece) {
            let len = piece.min(n - from);
            let cut = |t: &Tensor| t.narrow(1, from, len)?.contiguous();
            let rows = Embedded {
                x: cut(&all.x)?,
                deepstack: all.deepstack.iter().map(cut).collect::<candle_core::Result<_>>()?,
            };
            let pos: Vec<&[Position]> = positions.iter().map(|p| &p[from..from + len]).collect();
            let rope = self.network.rope(&pos, &self.device)?;
            let h = self.network.forward(&rows, &rope, &mask(shared, pads), cache)?;
            hidden = Some(h.narrow(1, len - 1, 1)?.contiguous()?);
        }
        hidden.ok_or_else(|| ChatError::Request("the prompt is empty".into()))
    }

    /// Hidden states `[batch, 1, hidden]` → each row's logits `[batch, vocab]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.network.decoder().logits(&hidden.squeeze(1)?)?)
    }

    fn sample(&self, rows: &mut [Row], logits: &Tensor, on_token: &mut OnToken) -> Result<()> {
        let mut samplers: Vec<&mut Sampler> = rows.iter_mut().map(|r| &mut r.sampler).collect();
        let drawn = Sampler::sample_rows(&mut samplers, logits)?;
        for (row, token) in rows.iter_mut().zip(drawn) {
            row.trace.ids.push(token.id);
            row.trace.log_probs.push(token.log_prob);
            if self.eos.contains(&token.id) {
                row.text.finish()?;
                row.finish = Some(Finish::Stop);
            } else if row.text.push(token.id)? {
                row.finish = Some(Finish::Stop);
            } else if row.trace.ids.len() >= row.room {
                let stopped = row.text.finish()?;
                row.finish = Some(if stopped { Finish::Stop } else { Finish::Length });
            }
            if let Some(f) = on_token {
                let piece = row.text.take(row.finish.is_some());
                if !piece.is_empty() {
                    f(row.job, piece);
                }
            }
        }
        Ok(())
    }

    /// Any id that is no picture token.
    fn pad_id(&self) -> u32 {
        match &self.network {
            Network::Vision(m) if m.config().image_token_id == 0 => 1,
            _ => 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Prefixes> {
        self.prefixes.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn mask(shared: usize, pads: &[usize]) -> Mask {
    if pads.iter().all(|p| *p == 0) {
        return Mask::causal();
    }
    Mask::Causal { prefix: shared, start: Some(pads.iter().map(|p| (shared + p) as u32).collect()) }
}
