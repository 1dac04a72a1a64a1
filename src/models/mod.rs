//! One network per file or folder; weight names are the checkpoints' names.

pub mod bert;
pub mod dinov2;
pub mod grounding_dino;
pub mod moge;
pub mod qwen3;
pub mod qwen3_vl;
pub mod swin;

/// More layers than any network has. Building one asks for its weights by name, layer by layer: a number from a
/// stranger's file must not decide how long that takes.
const MOST_LAYERS: usize = 1024;

fn check_layers(of: &str, layers: usize) -> candle_core::Result<()> {
    if layers > MOST_LAYERS {
        candle_core::bail!("{of}: {layers} layers in its config, at most {MOST_LAYERS} are supported")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Params;

    #[test]
    fn numbers_in_a_strangers_config_neither_panic_nor_take_all_memory() {
        let refused = |e: candle_core::Result<()>, word: &str| {
            let e = e.unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        };
        let vb = || Params::new(0).builder();
        let many = 1_000_000;
        let bert = bert::Config { num_hidden_layers: many, ..Default::default() };
        refused(bert::Bert::new(&bert, vb()).map(drop), "1000000 layers");
        let dino = grounding_dino::Config { decoder_layers: many, ..Default::default() };
        refused(grounding_dino::GroundingDino::new(&dino, vb()).map(drop), "1000000 layers");
        let mut blind = grounding_dino::Config::default();
        blind.backbone_config.out_indices.clear();
        refused(grounding_dino::GroundingDino::new(&blind, vb()).map(drop), "out_indices");
        let vits = dinov2::OfficialConfig::released("dinov2_vits14").expect("released");
        let deep = dinov2::OfficialConfig { depth: many, ..vits.clone() };
        refused(dinov2::Dinov2::new(&deep.into(), vb()).map(drop), "1000000 layers");
        let none = dinov2::OfficialConfig { patch_size: 0, ..vits };
        refused(dinov2::Dinov2::new(&none.into(), vb()).map(drop), "patches of 0");
        let swin = swin::Config { depths: vec![many, 2, 6, 2], ..Default::default() };
        refused(swin::Swin::new(&swin, vb()).map(drop), "layers");
    }
}
