//! Tokenizer, phrase spans and phrase post-processing against HF's and the original's.

use super::Fixture;
use serde::Deserialize;
use std::path::Path;
use valor::models::grounding_dino::caption::{TextTokenizer, tokenizer_json};
use valor::models::grounding_dino::postprocess::{Thresholds, phrases};

fn tokenizer(dir: &Path) -> TextTokenizer {
    TextTokenizer::from_file(&dir.join("vocab.txt")).unwrap()
}

#[test]
fn word_pieces_are_hfs_from_either_file() {
    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }
    let fx = Fixture::open("bert-tiny");
    let vocab = std::fs::read_to_string(fx.dir.join("vocab.txt")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let json = out.path().join("tokenizer.json");
    std::fs::write(&json, tokenizer_json(vocab.lines()).to_string()).unwrap();
    for t in [tokenizer(&fx.dir), TextTokenizer::from_file(&json).unwrap()] {
        for case in fx.json::<Vec<Case>>("tokenizer_cases.json") {
            assert_eq!(t.encode(&case.text).unwrap(), case.ids, "{:?}", case.text);
        }
    }
}

#[test]
fn phrases_are_found_by_token_spans() {
    #[derive(Deserialize)]
    struct Case {
        caption: String,
        cat_list: Vec<String>,
        #[serde(default)]
        input_ids: Vec<u32>,
        /// The original's, by first substring; absent where it raises.
        positive_token_columns: Option<Vec<Vec<usize>>>,
    }
    let fx = Fixture::open("grounding-dino-original");
    let t = tokenizer(&fx.dir);
    let mut differs = 0;
    for case in fx.json::<Vec<Case>>("label_map_cases.json") {
        let caption = t.caption(&case.caption).unwrap();
        let found: Vec<_> = case.cat_list.iter().map(|c| t.find(&caption, c).unwrap()).collect();
        let Some(original) = case.positive_token_columns else {
            assert!(found.iter().any(Option::is_none), "{:?}", case.caption);
            continue;
        };
        assert_eq!(caption.ids, case.input_ids, "{:?}", case.caption);
        for (i, columns) in original.iter().enumerate() {
            let span = found[i].clone().unwrap_or_else(|| panic!("{:?} not found", case.cat_list[i]));
            assert_eq!(
                span, caption.phrases[i],
                "{:?}: phrases stand in the order of the list",
                case.caption
            );
            // An earlier phrase that contains this one's text misleads the original's search.
            let misled = case.cat_list[..i].iter().any(|c| c.contains(&case.cat_list[i]));
            if misled {
                assert_ne!(span.clone().collect::<Vec<_>>(), *columns);
                differs += 1;
            } else {
                assert_eq!(span.collect::<Vec<_>>(), *columns, "{:?}", case.caption);
            }
        }
    }
    assert!(differs > 0, "no case shows the original's mistake");
}

#[test]
fn boxes_are_named_as_hf_names_them_cleaned() {
    #[derive(Deserialize)]
    struct Picture {
        scores: Vec<f64>,
        boxes_xyxy: Vec<[f64; 4]>,
        labels: Vec<String>,
    }
    #[derive(Deserialize)]
    struct File {
        threshold: f32,
        text_threshold: f32,
        target_sizes_hw: Vec<(u32, u32)>,
        results: Vec<Picture>,
    }
    let fx = Fixture::open("grounding-dino-tiny");
    let t = tokenizer(&fx.dir);
    let file: File = fx.json("postprocess.json");
    let ids = fx.input("input_ids").to_vec2::<i64>().unwrap();
    let thresholds = Thresholds { boxes: file.threshold, text: file.text_threshold, nms: None };
    for (i, want) in file.results.iter().enumerate() {
        let ids: Vec<u32> = ids[i].iter().map(|&v| v as u32).filter(|&v| v != t.pad_id()).collect();
        let (logits, boxes) = (fx.output("logits").get(i).unwrap(), fx.output("pred_boxes").get(i).unwrap());
        let size = file.target_sizes_hw[i];
        let got = phrases(&t, &ids, &logits, &boxes, size, thresholds).unwrap();
        assert_eq!(got.len(), want.labels.len());
        for (k, b) in got.iter().enumerate() {
            let clean = want.labels[k].replace("[SEP]", " ").replace('.', " ");
            assert_eq!(b.phrase, clean.split_whitespace().collect::<Vec<_>>().join(" "));
            assert!((b.score as f64 - want.scores[k]).abs() < 1e-5);
            let scale = size.0.max(size.1) as f64;
            for (a, w) in b.bbox.iter().zip(&want.boxes_xyxy[k]) {
                assert!((a - w).abs() < 1e-5 * scale, "{a} instead of {w}");
            }
        }
    }
}
