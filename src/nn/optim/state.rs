//! What a run needs of its optimiser to go on exactly.
//!
//! Of large networks the state is several times their weights: it goes to its file and back parameter by
//! parameter, and never is in memory twice.

use crate::files::{Lazy, write_tensors};

use super::{AdamW, Kept, Part, Slot};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use safetensors::Dtype;
use std::collections::HashMap;
use std::path::Path;

impl Part {
    const ALL: [Self; 3] = [Self::Mean, Self::Square, Self::Master];

    fn of(self, slot: &Slot) -> String {
        let part = match self {
            Self::Mean => "exp_avg",
            Self::Square => "exp_avg_sq",
            Self::Master => "master",
        };
        format!("{}.{part}", slot.name)
    }

    /// Does the state of such a parameter have it?
    fn is_of(self, slot: &Slot) -> bool {
        match self {
            Self::Mean => true,
            Self::Square => !slot.group.muon,
            Self::Master => slot.var.dtype() != DType::F32,
        }
    }
}

const STEP: &str = "step";

/// Where a state is read from.
trait Source {
    /// Type and shape of what stands there.
    fn form(&self, name: &str) -> Option<(Dtype, Shape)>;
    fn read(&self, name: &str) -> Result<Tensor>;
}

impl Source for HashMap<String, Tensor> {
    fn form(&self, name: &str) -> Option<(Dtype, Shape)> {
        let t = self.get(name)?;
        Some((t.dtype().into(), t.shape().clone()))
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        self.get(name).cloned().ok_or_else(|| Error::Msg(format!("tensor {name} is missing")))
    }
}

impl Source for MmapedSafetensors {
    fn form(&self, name: &str) -> Option<(Dtype, Shape)> {
        let t = self.get(name).ok()?;
        Some((t.dtype(), t.shape().into()))
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        self.load(name, &Device::Cpu)
    }
}

impl AdamW {
    fn parts(&self) -> impl Iterator<Item = (&Slot, Part)> {
        self.slots.iter().flat_map(|s| Part::ALL.into_iter().filter(move |p| p.is_of(s)).map(move |p| (s, p)))
    }

    /// Moments as `NAME.exp_avg` and, of AdamW, `NAME.exp_avg_sq`, the weights in full of parameters in half
    /// precision as `NAME.master`, and `step`, for exact resumption between steps.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut out = HashMap::new();
        for (slot, part) in self.parts() {
            let values = slot.part(part)?.into_owned();
            out.insert(part.of(slot), Tensor::from_vec(values, slot.var.shape(), &Device::Cpu)?);
        }
        out.insert(STEP.into(), Tensor::new(&[self.steps as i64], &Device::Cpu)?);
        Ok(out)
    }

    /// Takes over a [`AdamW::state`]; every trained parameter must be in it with its shape. One that does not fit
    /// changes nothing.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        self.restore_from(state)
    }

    fn restore_from(&mut self, state: &impl Source) -> Result<()> {
        let missing = |name: &str| Error::Msg(format!("optimiser state: tensor {name} is missing"));
        let steps = state.read(STEP).map_err(|_| missing(STEP))?.to_vec1::<i64>()?;
        let [steps] = steps[..] else { candle_core::bail!("optimiser state: step must be one number") };
        // All of it is looked at before any of it is taken over. A run may go on where parameters are of another
        // type than they were: a master copy may be there or not.
        for (slot, part) in self.slots.iter().flat_map(|s| Part::ALL.map(|part| (s, part))) {
            if part == Part::Square && slot.group.muon {
                continue;
            }
            let (name, want) = (part.of(slot), slot.var.shape());
            match state.form(&name) {
                None if part == Part::Master => {}
                None => return Err(missing(&name)),
                Some((dtype, got)) if dtype != Dtype::F32 || got != *want => candle_core::bail!(
                    "optimiser state: {name} is {dtype:?} of shape {got:?}, expected F32 of shape {want:?}"
                ),
                Some(_) => {}
            }
        }
        for s in &mut self.slots {
            let read = |part: Part| -> Result<Vec<f32>> {
                state.read(&part.of(s))?.reshape(s.var.shape())?.flatten_all()?.to_vec1()
            };
            let v = if Part::Square.is_of(s) { read(Part::Square)? } else { vec![] };
            let mut kept = Kept { m: read(Part::Mean)?, v, master: vec![] };
            if state.form(&Part::Master.of(s)).is_some() {
                kept.master = read(Part::Master)?;
            }
            match (s.var.dtype() == DType::F32, kept.master.is_empty()) {
                (true, false) => {
                    let master = std::mem::take(&mut kept.master);
                    let t = Tensor::from_vec(master, s.var.shape(), &Device::Cpu)?;
                    s.var.set(&t.to_device(s.var.device())?)?;
                }
                (false, true) => kept.master = s.var.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?,
                _ => {}
            }
            s.keep(kept)?;
        }
        self.steps = steps.max(0) as u64;
        Ok(())
    }

    /// Writes [`AdamW::state`] as safetensors.
    pub fn save(&self, path: &Path) -> Result<()> {
        let parts = self.parts().map(|(slot, part)| {
            let shape = slot.var.shape();
            let read = move || Tensor::from_vec(slot.part(part)?.into_owned(), shape, &Device::Cpu);
            (part.of(slot), Lazy::new(DType::F32, shape, read))
        });
        let steps = self.steps as i64;
        let step = (STEP.to_owned(), Lazy::new(DType::I64, 1, move || Tensor::new(&[steps], &Device::Cpu)));
        write_tensors(path, parts.chain([step]), None)
    }

    /// Reads what [`AdamW::save`] wrote.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        // SAFETY: a checkpoint of this run's own, which nobody changes while it is read.
        let state = unsafe { MmapedSafetensors::new(path)? };
        self.restore_from(&state).map_err(|e| Error::Msg(format!("{}: {e}", path.display())))
    }
}
