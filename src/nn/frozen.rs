//! Parameters as constants.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

struct Frozen<'a>(VarBuilder<'a>);

/// A builder whose tensors share storage with `vb`'s but are not variables: what is built on it
/// keeps no graph and costs no backward.
pub fn frozen(vb: VarBuilder<'_>) -> VarBuilder<'_> {
    let (dtype, dev) = (vb.dtype(), vb.device().clone());
    VarBuilder::from_backend(Box::new(Frozen(vb)), dtype, dev)
}

impl SimpleBackend for Frozen<'_> {
    fn get(&self, s: Shape, name: &str, init: Init, dtype: DType, _: &Device) -> Result<Tensor> {
        Ok(self.0.get_with_hints_dtype(s, name, init, dtype)?.detach())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        Ok(self.0.get_unchecked_dtype(name, dtype)?.detach())
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}
