//! The embedded VLM: a small Qwen3-VL that answers what programs ask about crops and whole pictures.
//!
//! It starts from a vision tower that knows what it sees ([`super::vision`]), and saw both looks and
//! every wording of [`crate::rooms::vqa`]. Boxes are jittered as a detector's are, and crops grown as
//! the `vqa` tool does. A training sample is a conversation of several
//! questions about one crop, so that its picture is worked through once for all of them; programs ask
//! one, and so do the held-out samples. From it comes the verifier of boxes for mining, a network like it that
//! is asked [`crate::rooms::boxes`]' questions too, one at a time. (Asked of the VLM itself they cost it
//! 1.4 to 2 points of a hundred on crops.)

use super::super::{check_complete, start};
use super::tokenizer::{FILLER, PICTURE, VISION_END, VISION_START};
use super::{HELD_OUT, Options, id, spread_embeddings, stream, text_format, tokenizer_of};
use crate::files::write_atomic;
use crate::llm::Message;
use crate::llm::engine::Network;
use crate::llm::format::ChatFormat;
use crate::llm::tokenizer::Tokenizer;
use crate::models::qwen3;
use crate::models::qwen3_vl::{Config, Mrope, Processor, Qwen3Vl, TextConfig, VisionConfig};
use crate::nn::Params;
use crate::rooms::boxes::{BoxAsk, BoxSample, box_samples};
use crate::rooms::questions::{Split, scene_seed};
use crate::rooms::vqa::{CropAsk, VqaSample, parse_crop, vqa_samples};
use crate::rooms::{self, Kind, Look, View};
use crate::sight::{BBox, Picture};
use crate::tools::real::crop;
use crate::train::lm::{LmTrainee, Sample};
use crate::train::run::Metrics;
use crate::verify::boxes::{Question, show, worded};
use image::RgbImage;
use rand::Rng;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Rendered size.
pub(super) const WIDTH: u32 = 256;
pub(super) const HEIGHT: u32 = 192;

/// Pictures of a step, half of them of each look.
const PICTURES: u64 = 8;
/// Things of a picture that are asked about.
pub(super) const CROPS: usize = 8;
/// One in so many pictures is asked about as a whole too, this many questions at once at most. (A
/// program asks about the whole where nothing is detected, so what is not there hangs on these.)
const WHOLE: u64 = 1;
const WHOLE_TURNS: usize = 4;

/// Longest side to which small boxes are enlarged, as `configs/rooms.toml` says for mining.
pub const BOX_SIDE: u32 = 80;

/// Share of its size by which each side of a box is moved at most.
const JITTER: f64 = 0.08;
/// The `vqa` tool's own (method.md 7).
const GROWTH: f64 = 0.25;

/// Held-out scenes come from far up in the training split, so that test scenes stay untouched.
const HELD_OUT_SCENES: u64 = 1 << 40;

impl Options {
    /// The run that made the embedded VLM.
    pub fn vlm(dir: PathBuf) -> Self {
        Self {
            dir,
            seed: 1,
            from: None,
            steps: 1_000,
            batch: CROPS,
            boxes: 0,
            lr: 1.5e-3,
            muon: 6.,
            resume: false,
            eval_every: 200,
            held_out: 48,
        }
    }
}

impl Options {
    /// The run that made the embedded verifier of boxes, from the VLM: it goes on answering about crops,
    /// but less, and worse.
    pub fn box_verifier(dir: PathBuf) -> Self {
        Self { steps: 700, batch: CROPS / 2, boxes: 4, ..Self::vlm(dir) }
    }
}

/// About 2 million parameters.
pub fn config(tokenizer: &Tokenizer) -> anyhow::Result<Config> {
    let hidden = 128;
    Ok(Config {
        text_config: TextConfig {
            decoder: qwen3::Config {
                vocab_size: tokenizer.vocab_size(),
                hidden_size: hidden,
                intermediate_size: 352,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 32,
                max_position_embeddings: 1_024,
                rms_norm_eps: 1e-6,
                rope_theta: 1e4,
                tie_word_embeddings: false,
                attention_bias: false,
            },
            rope_scaling: Mrope {
                mrope_section: [6, 5, 5],
                mrope_interleaved: true,
                rope_type: "default".into(),
            },
        },
        vision_config: VisionConfig {
            depth: 4,
            hidden_size: 96,
            intermediate_size: 256,
            num_heads: 4,
            in_channels: 3,
            patch_size: 8,
            temporal_patch_size: 2,
            spatial_merge_size: 2,
            out_hidden_size: hidden,
            num_position_embeddings: 144,
            deepstack_visual_indexes: vec![1, 2],
            hidden_act: "gelu_pytorch_tanh".into(),
        },
        image_token_id: id(tokenizer, PICTURE)?,
        vision_start_token_id: id(tokenizer, VISION_START)?,
        vision_end_token_id: id(tokenizer, VISION_END)?,
        tie_word_embeddings: false,
    })
}

/// Crops become 16 tokens or more, the whole picture 88.
pub fn processor() -> Processor {
    Processor {
        patch_size: 8,
        temporal_patch_size: 2,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.5; 3],
        min_pixels: 64 * 64,
        max_pixels: 192 * 128,
    }
}

fn format(tokenizer: &str) -> anyhow::Result<ChatFormat> {
    let format = text_format(tokenizer)?;
    let token = id(&format.tokenizer, PICTURE)?;
    Ok(format.with_pictures(processor(), token))
}

/// What the VLM is shown of a box.
fn shown(picture: &Picture, bbox: Option<BBox>) -> RgbImage {
    crop(picture, bbox, GROWTH).to_image()
}

/// What the VLM is shown of a thing's box as a detector would find it.
pub(super) fn shown_thing(picture: &Picture, bbox: BBox, rng: &mut impl Rng) -> RgbImage {
    shown(picture, Some(jittered(bbox, rng)))
}

fn jittered([x1, y1, x2, y2]: BBox, rng: &mut impl Rng) -> BBox {
    let (w, h) = (x2 - x1, y2 - y1);
    let mut by = |side: f64| rng.random_range(-JITTER..=JITTER) * side;
    [x1 + by(w), y1 + by(h), x2 + by(w), y2 + by(h)]
}

/// The training scene `index`; every other one is lived-in.
fn scene(seed: u64, index: u64) -> View {
    let look = if index.is_multiple_of(2) { Look::Studio } else { Look::LivedIn };
    rooms::generate(scene_seed(Split::Train, seed, index), look, WIDTH, HEIGHT)
}

/// Picture and questions of a training scene.
pub fn questions(seed: u64, index: u64, rng: &mut impl Rng) -> (Picture, Vec<VqaSample>) {
    let view = scene(seed, index);
    let samples = vqa_samples(&view, rng);
    (Picture::new(view.width, view.height, view.rgb), samples)
}

/// A question about boxes, as mining asks it.
fn about_boxes(format: &ChatFormat, picture: &Picture, s: &BoxSample) -> anyhow::Result<Sample> {
    let (question, image) = match s.ask {
        BoxAsk::Shows(b) => (Question::Shows, show::alone(picture, b, BOX_SIDE)),
        BoxAsk::Frames(b) => (Question::Frames, show::alone(picture, b, BOX_SIDE)),
        BoxAsk::Same(a, b) => (Question::Same, show::pair(picture, a, b, BOX_SIDE)),
    };
    let text = worded(question.default_prompt(), &s.noun.to_string());
    let message = Message::user(text).with_images(vec![image]);
    Ok(Sample::conversation(format, &[(message, if s.yes { "yes" } else { "no" })])?)
}

/// A conversation about one box, or about the whole picture.
fn conversation(
    format: &ChatFormat,
    picture: &Picture,
    bbox: Option<BBox>,
    turns: &[&VqaSample],
    rng: &mut impl Rng,
) -> anyhow::Result<Sample> {
    let mut images = vec![shown(picture, bbox.map(|b| jittered(b, rng)))];
    let turn = |(_, question, answer): &&VqaSample| {
        let message = Message::user(question.clone()).with_images(std::mem::take(&mut images));
        (message, answer.clone())
    };
    let turns: Vec<(Message, String)> = turns.iter().map(turn).collect();
    let turns: Vec<(Message, &str)> = turns.iter().map(|(m, a)| (m.clone(), a.as_str())).collect();
    Ok(Sample::conversation(format, &turns)?)
}

/// The questions about one thing, in a random order, without those whose answer was told before.
pub(super) fn untold<'a>(asks: &[&'a VqaSample], rng: &mut impl Rng) -> Vec<&'a VqaSample> {
    let answer_to = |ask: CropAsk| asks.iter().find(|q| parse_crop(&q.1) == Some(ask.clone())).map(|q| &q.2);
    let (colour, kind) = (answer_to(CropAsk::Colour), answer_to(CropAsk::Kind));
    let mut order = asks.to_vec();
    order.shuffle(rng);
    let mut told = String::new();
    order.retain(|(_, question, answer)| {
        let secret = match parse_crop(question) {
            Some(CropAsk::Kind | CropAsk::IsKind(_)) => kind,
            _ => colour,
        };
        let fresh = secret.is_some_and(|word| !told.split(|c: char| !c.is_alphabetic()).any(|w| w == word));
        if fresh {
            told += &format!(" {question} {answer}");
        }
        fresh
    });
    order
}

/// The first few questions about a whole picture that have no kind of thing in common, so that none
/// gives away another's answer.
pub(super) fn unrelated<'a>(asks: &[&'a VqaSample]) -> Vec<&'a VqaSample> {
    let mut named: Vec<Kind> = Vec::new();
    let mut kept = asks.to_vec();
    kept.retain(|(_, question, _)| {
        let question = question.to_lowercase();
        let kinds: Vec<Kind> = Kind::ALL.iter().copied().filter(|k| question.contains(k.word())).collect();
        let fresh = !kinds.iter().any(|k| named.contains(k));
        if fresh {
            named.extend(kinds);
        }
        fresh
    });
    kept.truncate(WHOLE_TURNS);
    kept
}

/// Conversations about a training scene: `crops` of its clear things, and now and then the whole.
fn samples(format: &ChatFormat, o: &Options, index: u64, crops: usize) -> anyhow::Result<Vec<Sample>> {
    let mut rng = stream(o.seed, index);
    let view = scene(o.seed, index);
    let questions = vqa_samples(&view, &mut rng);
    let boxes = box_samples(&view, o.boxes, &mut rng);
    let picture = Picture::new(view.width, view.height, view.rgb);
    let (mut whole, of_crops): (Vec<_>, Vec<_>) = questions.iter().partition(|q| q.0.is_none());
    // The questions about a thing stand together.
    let mut things: Vec<&[&VqaSample]> = of_crops.chunk_by(|a, b| a.0 == b.0).collect();
    things.shuffle(&mut rng);
    let mut out = Vec::with_capacity(crops + 1);
    for asks in things.into_iter().take(crops) {
        let turns = untold(asks, &mut rng);
        out.push(conversation(format, &picture, asks[0].0, &turns, &mut rng)?);
    }
    // Looks alternate; of each, one in `WHOLE`.
    if (index / 2).is_multiple_of(WHOLE) && !whole.is_empty() {
        whole.shuffle(&mut rng);
        let whole = unrelated(&whole);
        out.push(conversation(format, &picture, None, &whole, &mut rng)?);
    }
    for sample in &boxes {
        out.push(about_boxes(format, &picture, sample)?);
    }
    Ok(out)
}

/// What a question is about, as figures name it.
fn name_of((bbox, question, _): &VqaSample) -> &'static str {
    match bbox {
        None => "whole",
        Some(_) => parse_crop(question).map_or("other", |ask| ask.name()),
    }
}

/// Held-out samples by what they ask, `o.held_out` of each where the scenes give as many.
fn held_out(format: &ChatFormat, o: &Options) -> anyhow::Result<BTreeMap<&'static str, Vec<Sample>>> {
    let mut rng = stream(o.seed, HELD_OUT);
    let mut by_name: BTreeMap<&'static str, Vec<Sample>> = BTreeMap::new();
    // A scene gives several samples of each name; a few of each, so that scenes are many.
    let each = 4;
    for i in 0..o.held_out.div_ceil(each) as u64 {
        let view = scene(o.seed, HELD_OUT_SCENES + i);
        let mut questions = vqa_samples(&view, &mut rng);
        questions.shuffle(&mut rng);
        let boxes = box_samples(&view, if o.boxes == 0 { 0 } else { each }, &mut rng);
        let picture = Picture::new(view.width, view.height, view.rgb);
        for sample in &boxes {
            by_name.entry(sample.ask.name()).or_default().push(about_boxes(format, &picture, sample)?);
        }
        let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
        for q in &questions {
            let taken = taken.entry(name_of(q)).or_default();
            if *taken < each {
                *taken += 1;
                let sample = conversation(format, &picture, q.0, &[q], &mut rng)?;
                by_name.entry(name_of(q)).or_default().push(sample);
            }
        }
    }
    Ok(by_name)
}

/// Trains (or continues) from the tower's run in `vision`, or from the model that the options name.
/// `NAME_replies_right` is the share of held-out questions that are answered rightly, by what they
/// ask.
pub fn train(o: &Options, vision: &Path) -> anyhow::Result<Metrics> {
    let params = match &o.from {
        Some(dir) => start(o.seed, Some(dir))?,
        None => Params::from_tensors(o.seed, super::vision::tower(vision)?)?,
    };
    // The tower's run may have gone on from a whole VLM, whose decoder knows that one's ids.
    let tokenizer = tokenizer_of(&o.dir, Some(o.from.as_deref().unwrap_or(vision)))?;
    let format = format(&tokenizer)?;
    let cfg = config(&format.tokenizer)?;
    let fresh = params.get("model.language_model.embed_tokens.weight").is_none();
    let network = Network::Vision(Qwen3Vl::new(&cfg, params.builder())?);
    check_complete(&params, o.from.as_deref(), None)?;
    if fresh {
        spread_embeddings(&params)?;
    }
    let held_out = held_out(&format, o)?;
    let source = Box::new(|step| {
        let first = step * PICTURES;
        let made: Vec<Vec<Sample>> = (first..first + PICTURES)
            .into_par_iter()
            .map(|i| samples(&format, o, i, o.batch))
            .collect::<anyhow::Result<_>>()?;
        Ok(made.into_iter().flatten().collect())
    });
    let mut trainee =
        LmTrainee::new(network, params, o.lm(), super::super::group(o.muon), source, Vec::new())?;
    for (name, samples) in held_out {
        trainee = trainee.also_held_out(name, samples);
    }
    let recipe = json!({
        "model": cfg, "processor": processor(), "starts_from": "vision", "pictures": PICTURES,
        "one_in_whole": WHOLE, "whole_turns": WHOLE_TURNS, "boxes": o.boxes, "box_side": BOX_SIDE,
    });
    o.train(&mut trainee, "vlm", recipe)
}

/// Writes a run's network as a model folder.
pub fn export(run: &Path, out: &Path) -> anyhow::Result<()> {
    let tokenizer = Tokenizer::from_bytes(tokenizer_of(run, None)?.as_bytes())?;
    let filler = id(&tokenizer, FILLER)?;
    let mut cfg = serde_json::to_value(config(&tokenizer)?)?;
    cfg["text_config"]["model_type"] = json!("qwen3_vl_text");
    cfg["text_config"]["pad_token_id"] = json!(filler);
    cfg["vision_config"]["model_type"] = json!("qwen3_vl");
    let mut preprocessor = serde_json::to_value(processor())?;
    preprocessor["image_processor_type"] = json!("Qwen2VLImageProcessorFast");
    write_atomic(&out.join("preprocessor_config.json"), |w| writeln!(w, "{preprocessor:#}"))?;
    super::export(run, out, cfg, "qwen3_vl")
}
