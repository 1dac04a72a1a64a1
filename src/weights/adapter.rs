//! Low-rank adapters (LoRA) as PEFT writes them, on the checkpoint that they name as their base. The
//! products are added in as the base's tensors are read; nothing merged is written anywhere.
//!
//! Not here: DoRA, adapted embeddings, whole modules saved beside (`modules_to_save`), ranks or scales by
//! layer: each is refused by name.

use super::{Source, WeightsError};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";

/// What counts of an `adapter_config.json`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Config {
    peft_type: String,
    /// Where the base comes from, in the words of a configuration's `model`, or a repository on the hub.
    pub base_model_name_or_path: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    modules_to_save: Option<Value>,
    #[serde(default)]
    rank_pattern: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, Value>>,
}

impl Config {
    pub fn parse(text: &str) -> Result<Self, String> {
        let c: Self = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let some = |v: &Option<BTreeMap<String, Value>>| v.as_ref().is_some_and(|v| !v.is_empty());
        let refused = [
            (c.peft_type != "LORA", format!("peft_type {}; LORA is", c.peft_type)),
            (c.use_dora, "use_dora".into()),
            (c.fan_in_fan_out, "fan_in_fan_out".into()),
            (c.bias.as_ref().is_some_and(|b| b != "none"), "bias other than none".into()),
            (c.modules_to_save.as_ref().is_some_and(|m| !m.is_null()), "modules_to_save".into()),
            (some(&c.rank_pattern), "rank_pattern".into()),
            (some(&c.alpha_pattern), "alpha_pattern".into()),
        ];
        if let Some((_, what)) = refused.into_iter().find(|(refused, _)| *refused) {
            return Err(format!("is not read: {what}; merge the adapter into its base first"));
        }
        if c.r == 0 {
            return Err("r is 0".into());
        }
        Ok(c)
    }

    fn scale(&self) -> f64 {
        self.lora_alpha / if self.use_rslora { (self.r as f64).sqrt() } else { self.r as f64 }
    }
}

/// A base with products to be added.
pub(super) struct Adapted {
    pub base: Arc<Source>,
    adapter: Box<Source>,
    scale: f64,
    /// By the name of the weight that they change: the names of A and B.
    pairs: BTreeMap<String, (String, String)>,
}

impl Adapted {
    pub fn new(
        path: &str,
        base: Arc<Source>,
        adapter: Source,
        config: &Config,
    ) -> Result<Self, WeightsError> {
        let shapes = adapter.shapes();
        let (mut pairs, mut problems) = (BTreeMap::new(), Vec::new());
        let base_shapes = base.shapes();
        let mut told = BTreeSet::new();
        for (name, a) in &shapes {
            let Some(layer) = name.strip_suffix(".lora_A.weight") else { continue };
            let weight = format!("{}.weight", layer.strip_prefix("base_model.model.").unwrap_or(layer));
            let other = format!("{layer}.lora_B.weight");
            told.extend([name.clone(), other.clone()]);
            match (
                base_shapes.get(&weight).map(Vec::as_slice),
                a.as_slice(),
                shapes.get(&other).map(Vec::as_slice),
            ) {
                (None, ..) => problems.push(format!("{name} belongs to {weight}, which the base has not")),
                (_, _, None) => problems.push(format!("{other} is missing")),
                (Some([out, inp]), [r, n], Some([m, s]))
                    if n == inp && m == out && r == s && *r == config.r =>
                {
                    pairs.insert(weight, (name.clone(), other));
                }
                (Some(w), a, Some(b)) => problems.push(format!(
                    "{weight} of shape {w:?} has an adapter of {a:?} and {b:?}, expected a rank of {}",
                    config.r
                )),
            }
        }
        problems
            .extend(shapes.keys().filter(|n| !told.contains(*n)).map(|n| format!("{n} is no part of LoRA")));
        if pairs.is_empty() && problems.is_empty() {
            problems.push("it holds no lora_A and lora_B".into());
        }
        if !problems.is_empty() {
            let problems = super::summary(&problems);
            return Err(WeightsError::Mismatch { path: path.into(), problems });
        }
        Ok(Self { base, adapter: adapter.into(), scale: config.scale(), pairs })
    }

    /// The weights that are changed, each with the name of its A.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(weight, (a, _))| (weight.as_str(), a.as_str()))
    }

    pub fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        let weight = self.base.load(name, device)?;
        let Some((a, b)) = self.pairs.get(name) else { return Ok(weight) };
        let of = |name: &str| self.adapter.load(name, device)?.to_dtype(DType::F32);
        let product = (of(b)?.matmul(&of(a)?)? * self.scale)?;
        weight.to_dtype(DType::F32)? + product
    }
}

#[cfg(test)]
mod tests {
    use crate::nn::Params;
    use crate::nn::lora::{LoraConfig, merged, peft_config, peft_tensors};
    use crate::weights::{Checkpoint, ModelFiles};
    use candle_core::{DType, Device, Tensor};
    use std::collections::HashMap;
    use std::path::Path;

    fn numbers(shape: (usize, usize), seed: f32) -> Tensor {
        let values = (0..shape.0 * shape.1).map(|i| ((i as f32 + seed) * 0.7).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn write(dir: &Path, name: &str, tensors: &HashMap<String, Tensor>) {
        std::fs::create_dir_all(dir).unwrap();
        candle_core::safetensors::save(tensors, dir.join(name)).unwrap();
    }

    /// A base of two layers in `base/`, and an adapter of one of them in `adapter/`.
    fn folders(dir: &Path) -> (HashMap<String, Tensor>, HashMap<String, Tensor>) {
        let cfg = LoraConfig { rank: 2, alpha: 3., targets: vec!["q_proj".into()] };
        let base = HashMap::from([
            ("a.q_proj.weight".to_owned(), numbers((4, 3), 0.)),
            ("a.k_proj.weight".to_owned(), numbers((2, 3), 1.)),
        ]);
        let pair = [("lora_A", numbers((2, 3), 2.)), ("lora_B", numbers((4, 2), 3.))];
        let pair = pair.map(|(n, t)| (format!("a.q_proj.{n}.weight"), t));
        let adapter = Params::from_tensors(0, HashMap::from(pair)).unwrap();
        write(&dir.join("base"), "model.safetensors", &base);
        std::fs::write(dir.join("base/config.json"), "{\"of\": \"base\"}").unwrap();
        write(&dir.join("adapter"), "adapter_model.safetensors", &peft_tensors(&adapter));
        let config = peft_config(&dir.join("base").display().to_string(), &cfg);
        std::fs::write(dir.join("adapter/adapter_config.json"), config.to_string()).unwrap();
        let merged = |(name, w): (&String, &Tensor)| (name.clone(), merged(name, w, &adapter, &cfg).unwrap());
        let merged = base.iter().map(merged).collect();
        (base, merged)
    }

    fn open(dir: &Path) -> Result<ModelFiles, String> {
        ModelFiles::open(&dir.join("adapter").display().to_string(), "planner").map_err(|e| e.to_string())
    }

    #[test]
    fn an_adapter_is_its_base_with_the_products_added() {
        let dir = tempfile::tempdir().unwrap();
        let (base, merged) = folders(dir.path());
        let files = open(dir.path()).unwrap();
        assert_eq!(files.required("config.json").unwrap(), "{\"of\": \"base\"}");
        let read = files.checkpoint().unwrap().tensors().unwrap();
        assert_eq!(read.len(), base.len());
        let off = |a: &Tensor, b: &Tensor| -> f32 {
            (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
        };
        for (name, t) in &read {
            assert!(off(t, &merged[name]) < 1e-6, "{name}");
        }
        assert!(off(&read["a.q_proj.weight"], &base["a.q_proj.weight"]) > 0.1);
        // Its file of weights says the same.
        let file = dir.path().join("adapter/adapter_model.safetensors").display().to_string();
        let read = ModelFiles::open(&file, "planner").unwrap().checkpoint().unwrap().tensors().unwrap();
        assert!(off(&read["a.q_proj.weight"], &merged["a.q_proj.weight"]) < 1e-6);
    }

    /// As of a head that is tied to the embedding and stored all the same.
    #[test]
    fn a_pair_that_no_layer_takes_is_named_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        folders(dir.path());
        let checkpoint = open(dir.path()).unwrap().checkpoint().unwrap();
        let build = |c: &Checkpoint, layers: &[(&str, usize)]| {
            let built = c.build(DType::F32, &Device::Cpu, &["a.q_proj."], |vb| {
                layers.iter().try_for_each(|(layer, rows)| vb.pp(layer).get((*rows, 3), "weight").map(drop))
            });
            built.map_err(|e| e.to_string())
        };
        for c in [checkpoint.outline().unwrap(), checkpoint] {
            let e = build(&c, &[("a.k_proj", 2)]).unwrap_err();
            assert!(
                e.contains("a.q_proj.lora_A.weight changes a.q_proj.weight") && e.contains("tied"),
                "{e}"
            );
            build(&c, &[("a.k_proj", 2), ("a.q_proj", 4)]).unwrap();
        }
    }

    /// As axolotl leaves it.
    #[test]
    fn a_bases_configuration_beside_an_adapter_makes_it_no_whole_model() {
        let dir = tempfile::tempdir().unwrap();
        folders(dir.path());
        let write =
            |name: &str, text: &str| std::fs::write(dir.path().join("adapter").join(name), text).unwrap();
        write("config.json", "{\"of\": \"the adapter\"}");
        let files = open(dir.path()).unwrap();
        assert!(matches!(files, ModelFiles::Adapted { .. }));
        assert_eq!(files.required("config.json").unwrap(), "{\"of\": \"base\"}");
        assert_eq!(files.checkpoint().unwrap().names().len(), 2);
        let file = dir.path().join("adapter/adapter_model.safetensors").display().to_string();
        assert!(matches!(ModelFiles::open(&file, "planner"), Ok(ModelFiles::Adapted { .. })));
        // With whole weights it is a model, merged or with nothing to do with the adapter.
        write("model.safetensors", "");
        assert!(matches!(open(dir.path()), Ok(ModelFiles::Folder(_))));
    }

    #[test]
    fn what_is_no_plain_adapter_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter/adapter_config.json");
        folders(dir.path());
        let good: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let own = dir.path().join("adapter").display().to_string();
        for (key, value, wanted) in [
            ("use_dora", serde_json::json!(true), "use_dora"),
            ("peft_type", "IA3".into(), "IA3"),
            ("modules_to_save", serde_json::json!(["lm_head"]), "modules_to_save"),
            ("rank_pattern", serde_json::json!({"q_proj": 3}), "rank_pattern"),
            ("r", 3.into(), "expected a rank of 3"),
            ("r", 0.into(), "r is 0"),
            ("base_model_name_or_path", "no/such/folder/here".into(), "neither a folder"),
            // No base of its own.
            ("base_model_name_or_path", own.clone().into(), "or on itself"),
        ] {
            let mut config = good.clone();
            config[key] = value;
            std::fs::write(&path, config.to_string()).unwrap();
            let read = open(dir.path()).and_then(|f| f.checkpoint().map(|_| ()).map_err(|e| e.to_string()));
            let e = read.unwrap_err();
            assert!(e.contains(wanted), "{key}: {e}");
        }
        std::fs::write(&path, good.to_string()).unwrap();
        for (name, t, wanted) in [
            ("a.q_proj.lora_A.weight", numbers((2, 4), 0.), "has an adapter of [2, 4]"),
            ("b.q_proj.lora_A.weight", numbers((2, 3), 0.), "which the base has not"),
            ("a.embed.weight", numbers((2, 3), 0.), "no part of LoRA"),
        ] {
            folders(dir.path());
            let file = dir.path().join("adapter/adapter_model.safetensors");
            let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
            tensors.insert(format!("base_model.model.{name}"), t);
            write(&dir.path().join("adapter"), "adapter_model.safetensors", &tensors);
            let e = open(dir.path()).unwrap().checkpoint().err().unwrap().to_string();
            assert!(e.contains(wanted), "{name}: {e}");
        }
    }
}
