//! Every preset's network against what is published (`tests/fixtures/presets`, made by
//! `scripts/make_preset_files.py`), both ways and at full size; and the same on files of that size, which
//! are holes and take no room.

use super::*;
use crate::models::grounding_dino::{Config, names};
use crate::weights::presets;
use candle_core::Tensor;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

type Shapes = BTreeMap<String, Vec<usize>>;

fn table(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/presets/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))).unwrap()
}

/// `a.{0-2}.b` for `a.0.b`, `a.1.b`, `a.2.b`.
fn unfold(name: &str) -> Vec<String> {
    let Some((head, rest)) = name.split_once('{') else { return vec![name.to_owned()] };
    let (run, tail) = rest.split_once('}').unwrap();
    let (first, last) = run.split_once('-').unwrap();
    let numbers = first.parse::<usize>().unwrap()..=last.parse().unwrap();
    numbers.flat_map(|i| unfold(tail).into_iter().map(move |t| format!("{head}{i}{t}"))).collect()
}

fn shapes(table: &Value) -> Shapes {
    let mut shapes = Shapes::new();
    for (name, shape) in table["shapes"].as_object().unwrap() {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).unwrap();
        for name in unfold(name) {
            assert!(shapes.insert(name.clone(), shape.clone()).is_none(), "{name} twice");
        }
    }
    let sizes: usize = shapes.values().map(|s| s.iter().product::<usize>()).sum();
    let said = (table["tensors"].as_u64().unwrap() as usize, table["numbers"].as_u64().unwrap() as usize);
    assert_eq!((shapes.len(), sizes), said);
    shapes
}

/// A folder with a preset's configuration, and enough of a vocabulary for a detector.
fn folder(table: &Value) -> (tempfile::TempDir, ModelFiles) {
    let dir = tempfile::tempdir().unwrap();
    if !table["config"].is_null() {
        std::fs::write(dir.path().join("config.json"), table["config"].to_string()).unwrap();
    }
    std::fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\n.\n?\n").unwrap();
    let files = ModelFiles::Folder(dir.path().into());
    (dir, files)
}

/// What the shapes say, without files.
fn of_shapes(table: &Value, shapes: Shapes) -> Result<Fit, LoadError> {
    let (_dir, files) = folder(table);
    of_weights(&files, &Checkpoint::from_shapes("it", shapes).unwrap())
}

/// safetensors files with these names and shapes, `per_file` tensors in each; the numbers are a hole.
fn write(dir: &Path, shapes: &Shapes, dtype: &str, per_file: usize) {
    let bytes = |shape: &[usize]| shape.iter().product::<usize>() * if dtype == "BF16" { 2 } else { 4 };
    let all: Vec<_> = shapes.iter().collect();
    let parts = all.len().div_ceil(per_file);
    let mut index = serde_json::Map::new();
    for (i, part) in all.chunks(per_file).enumerate() {
        let file = match parts {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        let (mut at, mut header) = (0, serde_json::Map::new());
        for (name, shape) in part {
            let end = at + bytes(shape);
            header
                .insert((*name).clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
            index.insert((*name).clone(), json!(file));
            at = end;
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut f = std::fs::File::create(dir.join(file)).unwrap();
        f.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        f.write_all(&header).unwrap();
        f.set_len((8 + header.len() + at) as u64).unwrap();
    }
    if parts > 1 {
        let index = json!({"metadata": {}, "weight_map": index}).to_string();
        std::fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    }
}

/// The networks' own numbers: those of the files less a second copy of a tied head, tables and buffers.
const PARAMETERS: [(&str, u64); 16] = [
    ("qwen3-0.6b", 596_049_920),
    ("qwen3-1.7b", 1_720_574_976),
    ("qwen3-4b", 4_022_468_096),
    ("qwen3-8b", 8_190_735_360),
    ("qwen3-14b", 14_768_307_200),
    ("qwen3-32b", 32_762_123_264),
    ("valor-8b", 8_190_735_360),
    ("grounding-dino-tiny", 172_249_090),
    ("grounding-dino-base", 232_313_216),
    ("valor-grounding-dino", 172_249_090),
    ("moge-2-vits", 35_103_278),
    ("moge-2-vitb", 104_742_830),
    ("moge-2-vitl", 330_900_526),
    ("qwen3-vl-2b", 2_127_532_032),
    ("qwen3-vl-4b", 4_437_815_808),
    ("qwen3-vl-8b", 8_767_123_696),
];

#[test]
fn presets_have_the_published_names_and_shapes() {
    for preset in presets::ALL {
        let table = table(preset.name);
        let fit = of_shapes(&table, shapes(&table)).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        let parameters = PARAMETERS.iter().find(|p| p.0 == preset.name).expect(preset.name).1;
        assert_eq!((fit.part, fit.parameters), (preset.part, parameters), "{}", preset.name);
        assert_eq!(fit.tensors as u64, table["tensors"].as_u64().unwrap(), "{}", preset.name);
    }
}

#[test]
fn presets_that_lack_a_tensor_or_have_one_too_many_do_not_fit() {
    for preset in presets::ALL {
        let table = table(preset.name);
        let whole = shapes(&table);
        let refused = |what: &str, shapes: Shapes, name: &str| {
            let e = of_shapes(&table, shapes).expect_err(&format!("{}: {what}", preset.name)).to_string();
            assert!(e.contains(name) && !e.contains('\n'), "{}, {what}: {e}", preset.name);
        };
        // The biggest is no buffer, no copy and not fused.
        let name =
            whole.iter().max_by_key(|(n, s)| (s.iter().product::<usize>(), !n.contains("head"))).unwrap().0;
        let here = match name.as_str() {
            // Under HF's name.
            "bert.embeddings.word_embeddings.weight" => {
                "model.text_backbone.embeddings.word_embeddings.weight"
            }
            name => name,
        };
        let mut less = whole.clone();
        less.remove(name);
        refused("less", less, &format!("{here} is missing"));
        let mut other = whole.clone();
        other.get_mut(name).unwrap()[0] += 1;
        refused("other", other, &format!("{here} has shape"));
        let mut more = whole.clone();
        more.insert("strange.weight".into(), vec![2]);
        refused("more", more, "strange.weight");
    }
}

/// `groundingdino_swinb_cogcoor.pth` comes as bare as the tuned Swin-T: here the shapes of HF's conversion,
/// under the original's names.
#[test]
fn the_originals_larger_detector_is_told_from_its_patch_embedding() {
    let table = table("grounding-dino-base");
    let config = Config::from_json(&table["config"].to_string()).unwrap();
    let mut hf: Vec<(String, Vec<usize>)> = shapes(&table).into_iter().collect();
    hf.retain(|(name, _)| !is_unused(name, &detector::unused(&config)));
    // A tensor is the number of its shape; of fused ones there are three.
    let number = |i: usize| Tensor::new(&[i as u32], &Device::Cpu).unwrap();
    let numbered = hf.iter().enumerate().map(|(i, (name, _))| (name.clone(), number(i))).collect();
    let original = names::to_original(numbered, config.decoder_layers).unwrap();
    let shape = |numbers: &Tensor| {
        let numbers: Vec<u32> = numbers.to_vec1().unwrap();
        let mut shape = hf[numbers[0] as usize].1.clone();
        shape[0] *= numbers.len();
        shape
    };
    let mut whole: Shapes = original.iter().map(|(name, t)| (name.clone(), shape(t))).collect();
    let bare = json!({ "config": null });
    let fit = of_shapes(&bare, whole.clone()).unwrap();
    let parameters = PARAMETERS.iter().find(|p| p.0 == "grounding-dino-base").unwrap().1;
    assert_eq!((fit.part, fit.parameters), (Part::Detector, parameters));
    whole.get_mut("backbone.0.patch_embed.proj.weight").unwrap()[0] = 192;
    let e = of_shapes(&bare, whole).unwrap_err().to_string();
    assert!(e.contains("192 channels") && e.contains("config.json"), "{e}");
}

#[test]
fn presets_of_any_size_are_checked_from_the_headers_of_their_shards() {
    // 65 GB, 17.5 GB and 0.7 GB in files that take a few hundred kB.
    for name in ["qwen3-32b", "qwen3-vl-8b", "grounding-dino-tiny"] {
        let table = table(name);
        let mut shapes = shapes(&table);
        // Written as floats here; by the hub as whole numbers.
        shapes.retain(|n, _| !n.ends_with("relative_position_index"));
        let (dir, files) = folder(&table);
        write(dir.path(), &shapes, table["dtype"].as_str().unwrap(), shapes.len().div_ceil(4));
        let parameters = PARAMETERS.iter().find(|p| p.0 == name).unwrap().1;
        assert_eq!(check(&files).unwrap().parameters, parameters);
        std::fs::remove_file(dir.path().join("model-00003-of-00004.safetensors")).unwrap();
        let e = check(&files).unwrap_err().to_string();
        assert!(e.contains("model-00003-of-00004.safetensors is missing"), "{e}");
    }
}

#[test]
fn embedded_models_fit() {
    let parts = [
        ("planner", Part::Language),
        ("detector", Part::Detector),
        ("depth", Part::Depth),
        ("vlm", Part::Vlm),
    ];
    for (name, part) in parts {
        let files = ModelFiles::open(crate::weights::source::EMBEDDED, name).unwrap();
        assert_eq!(check(&files).unwrap().part, part);
    }
}
