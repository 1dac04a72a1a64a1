//! What a training changed in a checkpoint, at a byte a number: a quarter of the whole in f32, half of it in f16.
//!
//! For each tensor that changed, the difference to the base's is kept in 8 bits, with a scale for each slice of
//! the first dimension (one for all of a vector): `w = base + (q − 128) · scale`. A folder with
//! [`CONFIG`], which names the base, and [`WEIGHTS`] stands for the whole checkpoint, as an adapter's does.

use super::{Checkpoint, Source, WeightsError};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

pub const CONFIG: &str = "delta_config.json";
pub const WEIGHTS: &str = "delta_model.safetensors";

const SCALE: &str = ".scale";
/// What stands for no difference.
const ZERO: f64 = 128.;
const MOST: f64 = 127.;
/// Problems that are told one by one. Of another model's tensors none fits, and each would be one.
const TOLD: usize = 3;

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the base comes from, in the words of a configuration's `model`.
    pub base: String,
}

/// Slices that have a scale each, and their size.
fn slices(shape: &[usize]) -> (usize, usize) {
    let all: usize = shape.iter().product();
    match shape {
        [first, _, ..] if all > 0 => (*first, all / first),
        _ => (1, all),
    }
}

/// The difference of two checkpoints with the same names and shapes.
pub fn between(base: &Checkpoint, tuned: &Checkpoint) -> Result<HashMap<String, Tensor>, WeightsError> {
    let (before, after) = (base.shapes(), tuned.shapes());
    if before != after {
        let mut other: Vec<String> =
            after.iter().filter(|(n, s)| before.get(*n) != Some(s)).map(told).collect();
        other.extend(
            before.iter().filter(|(n, _)| !after.contains_key(*n)).map(|(n, _)| format!("{n} is missing")),
        );
        let problems = format!("not the tensors of {}: {}", base.name, super::summary_of(&other, TOLD));
        return Err(WeightsError::Unreadable { path: tuned.name.clone(), message: problems });
    }
    let fail = |source| WeightsError::Network { path: tuned.name.clone(), source };
    let mut out = HashMap::new();
    for (name, shape) in after {
        let of = |c: &Checkpoint| {
            c.source.load(&name, &Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
        };
        let (a, b): (Vec<f32>, Vec<f32>) = (of(base).map_err(fail)?, of(tuned).map_err(fail)?);
        let difference: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(*b) - f64::from(*a)).collect();
        if difference.iter().all(|d| *d == 0.) {
            continue;
        }
        if !difference.iter().all(|d| d.is_finite()) {
            let message = format!("{name} holds numbers that are not finite");
            return Err(WeightsError::Unreadable { path: tuned.name.clone(), message });
        }
        let (count, size) = slices(&shape);
        let scales: Vec<f32> = difference
            .chunks(size)
            .map(|row| (row.iter().fold(0f64, |m, d| m.max(d.abs())) / MOST) as f32)
            .collect();
        let byte = |(i, d): (usize, &f64)| match scales[i / size] {
            0. => ZERO as u8,
            scale => (d / f64::from(scale)).round().clamp(-MOST, MOST) as i16 as u8 ^ 0x80,
        };
        let bytes: Vec<u8> = difference.iter().enumerate().map(byte).collect();
        let tensors = || {
            let scales = Tensor::from_vec(scales, count, &Device::Cpu)?;
            Ok((Tensor::from_vec(bytes, shape, &Device::Cpu)?, scales))
        };
        let (bytes, scales) = tensors().map_err(fail)?;
        out.insert(format!("{name}{SCALE}"), scales);
        out.insert(name, bytes);
    }
    Ok(out)
}

fn told((name, shape): (&String, &Vec<usize>)) -> String {
    format!("{name} {shape:?}")
}

/// A base with differences to be added as its tensors are read.
pub(super) struct Changed {
    pub base: Arc<Source>,
    changes: Box<Source>,
    /// Shapes of the tensors that change.
    changed: BTreeMap<String, Vec<usize>>,
}

impl Changed {
    pub fn new(path: &str, base: Arc<Source>, changes: Source) -> Result<Self, WeightsError> {
        let (shapes, held) = (base.shapes(), changes.shapes());
        let (mut changed, mut problems) = (BTreeMap::new(), Vec::new());
        for (name, shape) in &held {
            if name.strip_suffix(SCALE).is_some_and(|n| held.contains_key(n)) {
                continue;
            }
            let scales = held.get(&format!("{name}{SCALE}")).map(Vec::as_slice);
            match shapes.get(name) {
                None => problems.push(format!("{name} is none of the base's")),
                Some(s) if s != shape => problems.push(format!("{name} is {shape:?}, the base's {s:?}")),
                Some(_) if scales != Some(&[slices(shape).0][..]) => {
                    problems.push(format!("{name}{SCALE} is {scales:?}, expected [{}]", slices(shape).0));
                }
                Some(_) => {
                    changed.insert(name.clone(), shape.clone());
                }
            }
        }
        if !problems.is_empty() {
            let problems = super::summary_of(&problems, TOLD);
            return Err(WeightsError::Mismatch { path: path.into(), problems });
        }
        Ok(Self { base, changes: changes.into(), changed })
    }

    pub fn load(&self, name: &str, device: &Device) -> candle_core::Result<Tensor> {
        let weight = self.base.load(name, device)?;
        let Some(shape) = self.changed.get(name) else { return Ok(weight) };
        let bytes = self.changes.load(name, device)?;
        if bytes.dtype() != DType::U8 {
            candle_core::bail!("{name}: a difference of type {:?}, expected bytes", bytes.dtype())
        }
        let scales = self.changes.load(&format!("{name}{SCALE}"), device)?.to_dtype(DType::F32)?;
        let (count, size) = slices(shape);
        let steps = (bytes.reshape((count, size))?.to_dtype(DType::F32)? - ZERO)?;
        let difference = steps.broadcast_mul(&scales.reshape((count, 1))?)?.reshape(shape.as_slice())?;
        weight.to_dtype(DType::F32)? + difference
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::ModelFiles;
    use std::path::Path;

    fn checkpoint(name: &str, numbers: &[(&str, Tensor)]) -> Checkpoint {
        Checkpoint::from_tensors(name, numbers.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect())
    }

    fn numbers(shape: &[usize], seed: f32) -> Tensor {
        let values = (0..shape.iter().product()).map(|i: usize| ((i as f32 + seed) * 0.7).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn most(t: &Tensor) -> f32 {
        t.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    /// The base, and what it became: one tensor as it was, the others changed, one in one row only.
    fn pair() -> [Vec<(&'static str, Tensor)>; 2] {
        let base = vec![
            ("a.weight", numbers(&[4, 3, 2], 0.)),
            ("a.bias", numbers(&[5], 1.)),
            ("b.weight", numbers(&[2, 3], 2.)),
        ];
        let mut tuned = base.clone();
        let row = Tensor::cat(
            &[numbers(&[1, 3, 2], 5.), Tensor::zeros((3, 3, 2), DType::F32, &Device::Cpu).unwrap()],
            0,
        );
        tuned[0].1 = (&base[0].1 + (row.unwrap() * 0.01).unwrap()).unwrap();
        tuned[1].1 = (&base[1].1 + (numbers(&[5], 7.) * 3.).unwrap()).unwrap();
        [base, tuned]
    }

    fn folders(dir: &Path, changes: &HashMap<String, Tensor>) -> Result<Checkpoint, String> {
        let [base, _] = pair();
        let (on, own) = (dir.join("base"), dir.join("delta"));
        std::fs::create_dir_all(&on).unwrap();
        std::fs::create_dir_all(&own).unwrap();
        let base: HashMap<&str, Tensor> = base.into_iter().collect();
        candle_core::safetensors::save(&base, on.join("model.safetensors")).unwrap();
        std::fs::write(on.join("config.json"), "{\"of\": \"base\"}").unwrap();
        candle_core::safetensors::save(changes, own.join(WEIGHTS)).unwrap();
        let config = Config { base: on.display().to_string() };
        std::fs::write(own.join(CONFIG), serde_json::to_string(&config).unwrap()).unwrap();
        let files = ModelFiles::open(&own.display().to_string(), "detector").map_err(|e| e.to_string())?;
        assert_eq!(files.required("config.json").unwrap(), "{\"of\": \"base\"}");
        files.checkpoint().map_err(|e| e.to_string())
    }

    #[test]
    fn a_base_and_what_changed_are_the_whole() {
        let [base, tuned] = pair().map(|t| checkpoint("it", &t));
        let changes = between(&base, &tuned).unwrap();
        let mut names: Vec<&str> = changes.keys().map(String::as_str).collect();
        names.sort();
        assert_eq!(names, ["a.bias", "a.bias.scale", "a.weight", "a.weight.scale"], "b.weight is as it was");
        let dir = tempfile::tempdir().unwrap();
        let read = folders(dir.path(), &changes).unwrap().tensors().unwrap();
        for (name, want) in tuned.tensors().unwrap() {
            let change = most(&(&want - &base.tensors().unwrap()[&name]).unwrap());
            let error = most(&(&read[&name] - &want).unwrap());
            assert!(error <= change / 254. + 1e-6, "{name}: {error} of {change}");
            assert_eq!(change == 0., name == "b.weight");
        }
        // Rows that did not change are the base's to the bit.
        let rows = |t: &Tensor| t.narrow(0, 1, 3).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(rows(&read["a.weight"]), rows(&base.tensors().unwrap()["a.weight"]));
    }

    #[test]
    fn what_does_not_fit_its_base_is_refused_by_name() {
        let [base, tuned] = pair();
        let changes = || between(&checkpoint("base", &base), &checkpoint("tuned", &tuned)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for (name, tensor, wanted) in [
            ("c.weight", numbers(&[2], 0.), "c.weight is none of the base's"),
            ("a.bias", numbers(&[6], 0.), "a.bias is [6], the base's [5]"),
            ("a.weight.scale", numbers(&[3], 0.), "a.weight.scale is Some([3]), expected [4]"),
        ] {
            let mut wrong = changes();
            wrong.insert(name.into(), tensor);
            let e = folders(dir.path(), &wrong).err().unwrap();
            assert!(e.contains(wanted), "{e}");
        }
        let mut wrong = changes();
        wrong.extend((0..9).map(|i| (format!("d.{i}"), numbers(&[2], 0.))));
        let e = folders(dir.path(), &wrong).err().unwrap();
        assert!(e.matches("none of the base's").count() == 3 && e.ends_with("; and 6 more"), "{e}");
        let mut wrong = changes();
        wrong.insert("a.bias".into(), numbers(&[5], 0.));
        let e = folders(dir.path(), &wrong).unwrap().tensors().err().unwrap().to_string();
        assert!(e.contains("expected bytes"), "{e}");
        // And what can have no difference.
        let other = [("a.weight", numbers(&[4, 3, 2], 0.)), ("a.bias", numbers(&[6], 0.))];
        let e = between(&checkpoint("base", &base), &checkpoint("tuned", &other)).err().unwrap().to_string();
        assert!(e.contains("a.bias [6]") && e.contains("b.weight is missing"), "{e}");
        let mut broken = tuned.clone();
        broken[1].1 = (&broken[1].1 / 0.).unwrap();
        let e = between(&checkpoint("base", &base), &checkpoint("tuned", &broken)).err().unwrap().to_string();
        assert!(e.contains("a.bias holds numbers that are not finite"), "{e}");
    }
}
