//! The generation engine against transformers' `generate`.

use super::{Fixture, assert_close};
use candle_core::{DType, IndexOp, Tensor};
use valor::llm::SamplingOptions;
use valor::llm::bpe::{self, BpeOptions};
use valor::llm::engine::{Engine, EngineOptions, Job, Network};
use valor::llm::sampler::log_prob;
use valor::llm::tokenizer::Tokenizer;
use valor::models::qwen3::{Config, Qwen3};
use valor::models::qwen3_vl::{self, Pictures, Qwen3Vl};

const TOL: f64 = 1e-4;

fn ids(t: &Tensor) -> Vec<Vec<u32>> {
    t.to_dtype(DType::U32).unwrap().to_vec2().unwrap()
}

/// The fixtures have no tokenizer; what the ids mean does not matter here.
fn any_tokenizer() -> Tokenizer {
    let opts = BpeOptions { vocab_size: 256, special_tokens: vec![] };
    Tokenizer::from_bytes(bpe::train([""], &opts).unwrap().as_bytes()).unwrap()
}

fn job(ids: &[u32], max_new_tokens: usize) -> Job {
    Job { ids: ids.to_vec(), features: None, grids: vec![], seed: 0, max_new_tokens, stop: vec![] }
}

#[test]
fn a_greedy_batch_of_different_lengths_matches() {
    for name in ["qwen3-tiny", "qwen3-tiny-tied"] {
        let f = Fixture::open(name);
        let cfg: Config = f.json("config.json");
        let model = Qwen3::new(&cfg, f.weights()).unwrap();
        let (prompts, real) = (ids(&f.input("input_ids")), ids(&f.input("attention_mask")));
        let want = ids(&f.output("generated"));
        let (s, new) = (prompts[0].len(), want[0].len() - prompts[0].len());
        let jobs: Vec<Job> = prompts
            .iter()
            .zip(&real)
            .map(|(p, m)| job(&p[s - m.iter().sum::<u32>() as usize..], new))
            .collect();
        let engine =
            Engine::new(Network::Text { model, cfg }, super::device(), vec![], EngineOptions::default());
        let got = engine.generate(&jobs, &SamplingOptions::greedy(), &any_tokenizer(), None).unwrap();
        let log_probs = f.output("generated_logprobs");
        for (b, g) in got.iter().enumerate() {
            assert_eq!(g.trace.ids, want[b][s..], "{name}, row {b}");
            let lp = Tensor::new(g.trace.log_probs.as_slice(), &super::device()).unwrap();
            assert_close("log-probabilities", &lp, &log_probs.i(b).unwrap(), TOL);
        }
        assert_eq!(engine.stats().waves, 1);
    }
}

#[test]
fn tempered_log_probs_match() {
    let f = Fixture::open("qwen3-tiny");
    let logits = (f.output("generated_step_logits") / 0.7).unwrap().to_vec3::<f32>().unwrap();
    let s = f.input("input_ids").dim(1).unwrap();
    let got: Vec<Vec<f32>> = ids(&f.output("generated"))
        .iter()
        .zip(&logits)
        .map(|(row, steps)| {
            steps.iter().zip(&row[s..]).map(|(l, id)| log_prob(l, *id as usize) as f32).collect()
        })
        .collect();
    let got = Tensor::new(got, &super::device()).unwrap();
    assert_close("log-probabilities at 0.7", &got, &f.output("generated_logprobs_temp0.7"), TOL);
}

#[test]
fn pictures_and_text_in_one_batch_match() {
    let f = Fixture::open("qwen3-vl-tiny");
    let model = Qwen3Vl::new(&f.json::<qwen3_vl::Config>("config.json"), f.weights()).unwrap();
    let grids: Vec<_> = ids(&f.input("image_grid_thw"))
        .iter()
        .map(|g| [g[0] as usize, g[1] as usize, g[2] as usize])
        .collect();
    let pictures = Pictures { patches: f.input("pixel_values"), grids: grids.clone() };
    let features = model.vision(&pictures).unwrap();
    let (prompt, want) = (ids(&f.input("input_ids")).remove(0), ids(&f.output("generated")).remove(0));
    let text = ids(&f.input("text_only_input_ids")).remove(0);
    let new = want.len() - prompt.len();
    let with = Job { features: Some(features), grids, ..job(&prompt, new) };
    let jobs = [job(&text, 3), with.clone(), with, job(&prompt[..4], 5)];
    let engine = Engine::new(Network::Vision(model), super::device(), vec![], EngineOptions::default());
    let greedy = SamplingOptions::greedy();
    let got = engine.generate(&jobs, &greedy, &any_tokenizer(), None).unwrap();
    assert_eq!(got[1].trace.ids, want[prompt.len()..]);
    assert_eq!(got[2].trace.ids, want[prompt.len()..]);
    for i in [0, 3] {
        let alone = engine.generate(&jobs[i..=i], &greedy, &any_tokenizer(), None).unwrap();
        assert_eq!(got[i].trace.ids, alone[0].trace.ids);
    }
}
