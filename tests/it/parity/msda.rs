use super::{Fixture, assert_close};
use candle_core::Var;
use valor::nn::msda::msda;

/// The fixture was computed in f64.
#[test]
pub fn output_and_gradients() {
    let f = Fixture::open("msda");
    let var = |name| Var::from_tensor(&f.input(name)).unwrap();
    let (value, at, weights) = (var("value"), var("sampling_locations"), var("attention_weights"));
    let shapes: Vec<Vec<i64>> = f.input("spatial_shapes").to_vec2().unwrap();
    let shapes: Vec<_> = shapes.iter().map(|s| (s[0] as usize, s[1] as usize)).collect();
    let y = msda(&value, &shapes, &at, &weights).unwrap();
    assert_close("output", &y, &f.output("output"), 1e-6);
    let grads = (y * f.input("grad_output")).unwrap().sum_all().unwrap().backward().unwrap();
    for (name, var) in [("value", value), ("sampling_locations", at), ("attention_weights", weights)] {
        let name = format!("grad_{name}");
        // Near a pixel's centre f32 and f64 may pick different cells for the location's gradient.
        assert_close(&name, grads.get(&var).unwrap(), &f.output(&name), 1e-5);
    }
}
