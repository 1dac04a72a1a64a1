use std::collections::HashSet;
use std::path::{Path, PathBuf};

use candle_core::Device;

use super::*;
use crate::llm::engine::EngineOptions;
use crate::llm::local::LocalChat;
use crate::llm::{ChatModel, ChatRequest, Message, SamplingOptions};
use crate::rooms::demos::verifier_sample;
use crate::rooms::frames::skeleton;
use crate::rooms::mistakes::Head;
use crate::rooms::questions::{Question, sample_questions};
use crate::rooms::spec::Form;
use crate::rooms::{Look, Split};
use crate::verify::parse_verdict;

fn short(o: fn(PathBuf) -> Options, dir: &Path) -> Options {
    Options { steps: 6, batch: 2, eval_every: 0, held_out: 3, ..o(dir.into()) }
}

fn reply(model: &Path, message: Message) -> String {
    let model = LocalChat::open(model, &Device::Cpu, EngineOptions::default()).unwrap();
    let request = ChatRequest { messages: vec![message], seed: 1, max_new_tokens: 5, stop: Vec::new() };
    let replies = model.chat(&[request], &SamplingOptions::greedy(), None).unwrap();
    assert!(replies[0].new_tokens > 0);
    replies[0].text.clone()
}

#[test]
fn held_out_sentences_are_in_no_text_of_planner_and_verifier() {
    let mut rng = stream(3, 0);
    let (mut lines, mut whole) = (HashSet::new(), 0);
    for _ in 0..4_000 {
        let case = verifier_sample(&mut rng);
        for (user, reply) in [planner::text(&mut rng), verifier::text(&case)] {
            lines.extend(user.lines().chain(reply.lines()).map(skeleton));
            whole += 1;
        }
    }
    assert_eq!(whole, 8_000);
    let questions = sample_questions(300, 17, Look::Studio, Split::Test, (160, 120));
    let (held, seen): (Vec<Question>, Vec<Question>) = questions.map(|(_, q)| q).partition(|q| q.held_out);
    let occurs = |q: &Question| {
        let skeleton = skeleton(&q.text);
        lines.iter().any(|l| l.contains(&skeleton))
    };
    assert!(held.iter().any(|q| q.form == Form::HELD_OUT));
    for q in &held {
        assert!(!occurs(q), "{}", q.text);
    }
    // Or the comparison would show nothing.
    assert!(seen.iter().filter(|q| occurs(q)).count() * 10 > seen.len() * 9);
}

#[test]
fn the_tokenizer_repeats_and_knows_the_words() {
    let json = tokenizer::train(5).unwrap();
    assert_eq!(json, tokenizer::train(5).unwrap());
    let t = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    assert!(t.vocab_size() <= 2_048);
    for word in [" chair", " gd_detect", "final_answer", " farthest", "Question", "<|image_pad|>"] {
        assert_eq!(t.encode(word).unwrap().len(), 1, "{word}");
    }
    let mut rng = stream(5, 9);
    for _ in 0..20 {
        let text = planner::text(&mut rng).1;
        assert_eq!(t.decode(&t.encode(&text).unwrap()).unwrap(), text);
    }
}

#[test]
fn a_verdict_ends_every_reply_and_says_what_the_sample_says() {
    let mut rng = stream(4, 0);
    let mut reasons = HashSet::new();
    for _ in 0..2_000 {
        let case = verifier_sample(&mut rng);
        let (_, reply) = verifier::text(&case);
        assert_eq!(parse_verdict(&reply), Some(case.verdict), "{reply}");
        if case.head == Head::Adherence {
            // The reason and the verdict never disagree.
            assert_eq!(reply.starts_with("It strays nowhere."), case.verdict, "{case:?}\n{reply}");
            reasons.insert(reply.lines().next().unwrap().to_owned());
        }
    }
    assert!(reasons.len() >= 3, "{reasons:?}");
}

#[test]
fn planner_and_verifier_learn_and_their_exports_reply() {
    let dir = tempfile::tempdir().unwrap();
    let (planner, verifier) = (dir.path().join("planner"), dir.path().join("verifier"));
    let alone = verifier::train(&short(Options::verifier, &verifier), &planner).unwrap_err();
    assert!(alone.to_string().contains("make the planner first"), "{alone}");

    let o = short(Options::planner, &planner);
    let before = planner::train(&Options { steps: 0, ..o.clone() }).unwrap();
    std::fs::remove_file(planner.join("checkpoint.safetensors")).ok();
    let after = planner::train(&o).unwrap();
    let loss = |m: &Metrics| m["held_out_loss"].as_f64().unwrap();
    assert!(loss(&after) < loss(&before) - 0.1, "{before:?} {after:?}");

    let judged = verifier::train(&short(Options::verifier, &verifier), &planner).unwrap();
    assert!(judged.contains_key("unreadable"), "{judged:?}");
    assert!(loss(&judged) < loss(&before) - 0.1, "it starts from the planner: {judged:?}");
    for (run, export) in [(&planner, planner::export as fn(&Path, &Path) -> _), (&verifier, verifier::export)]
    {
        let out = run.join("out");
        export(run, &out).unwrap();
        reply(&out, Message::user("How many chairs are there?"));
    }
    let ids = |run: &Path| std::fs::read(run.join("tokenizer.json")).unwrap();
    assert_eq!(ids(&planner), ids(&verifier));
}

#[test]
fn the_vlm_learns_and_its_export_replies_about_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let (run, out) = (dir.path().join("vlm"), dir.path().join("out"));
    let o = Options { batch: 4, ..short(Options::vlm, &run) };
    let before = vlm::train(&Options { steps: 0, ..o.clone() }).unwrap();
    std::fs::remove_file(run.join("checkpoint.safetensors")).ok();
    let after = vlm::train(&o).unwrap();
    for name in ["whole", "crop_colour", "crop_colour_from", "crop_kind", "crop_is_colour", "crop_is_kind"] {
        let loss = |m: &Metrics| m[&format!("{name}_loss")].as_f64().unwrap();
        assert!(loss(&after) < loss(&before) - 0.1, "{name}: {before:?} {after:?}");
    }
    vlm::export(&run, &out).unwrap();
    for (w, h) in [(40, 30), (256, 192), (9, 60)] {
        let picture = image::RgbImage::from_pixel(w, h, image::Rgb([200, 20, 20]));
        reply(&out, Message::user("What color is it?").with_images(vec![picture]));
    }
}

/// Ops work in blocks and chunks: what small shapes show need not hold at a training step's size.
#[test]
fn gradients_hold_at_the_size_of_a_training_step() {
    let format = text_format(&tokenizer::train(5).unwrap()).unwrap();
    let vocab = format.tokenizer.vocab_size();
    let params = crate::nn::Params::new(3);
    let network = planner::network(&params, vocab).unwrap();
    spread_embeddings(&params).unwrap();
    let mut rng = stream(6, 0);
    let samples: Vec<_> =
        (0..6).map(|_| planner::sample(&format, planner::text(&mut rng)).unwrap()).collect();
    let of: Vec<_> = samples.iter().collect();
    let loss = || crate::train::lm::reply_log_probs(&network, &of).unwrap().mean_all().unwrap();
    let grads = loss().backward().unwrap();
    for (name, var) in params.named() {
        let g = grads.get(&var).unwrap();
        let norm = g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt() as f64;
        let start = var.as_tensor().copy().unwrap();
        let size = start.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt() as f64;
        let step = 0.002 * size;
        let at = |by: f64| -> f64 {
            var.set(&(&start + (g * (by / norm)).unwrap()).unwrap()).unwrap();
            loss().to_dtype(candle_core::DType::F64).unwrap().to_scalar::<f64>().unwrap()
        };
        let slope = (at(step) - at(-step)) / (2. * step);
        var.set(&start).unwrap();
        // A fiftieth for curvature, and what f32 cannot tell of a loss of about 8.
        let tolerance = 0.02 * norm + 4e-6 / step;
        assert!((slope - norm).abs() < tolerance, "{name}: slope {slope} norm {norm}");
    }
}
