use super::{Fixture, assert_close};
use candle_core::DType;
use valor::models::bert::{Bert, Config};

fn ids(f: &Fixture, name: &str) -> candle_core::Tensor {
    f.input(name).to_dtype(DType::U32).unwrap()
}

#[test]
pub fn padding_mask() {
    let f = Fixture::open("bert-tiny");
    let bert = Bert::new(&f.json::<Config>("config.json"), f.weights()).unwrap();
    let states =
        bert.hidden_states(&ids(&f, "input_ids"), None, None, &f.input("attention_mask"), None).unwrap();
    assert_close("hidden_0", &states[0], &f.output("hidden_0"), 1e-5);
    assert_close("hidden_1", &states[1], &f.output("hidden_1"), 1e-5);
    assert_close("last", states.last().unwrap(), &f.output("last_hidden_state"), 1e-5);
}

#[test]
pub fn phrase_mask_and_positions() {
    let f = Fixture::open("bert-tiny");
    let bert = Bert::new(&f.json::<Config>("config.json"), f.weights()).unwrap();
    let positions = ids(&f, "position_ids_4d");
    let types = positions.zeros_like().unwrap();
    let y = bert
        .forward(&ids(&f, "input_ids"), Some(&types), Some(&positions), &f.input("mask4d"), None)
        .unwrap();
    assert_close("last", &y, &f.output("last_hidden_state_mask4d"), 1e-5);
}
