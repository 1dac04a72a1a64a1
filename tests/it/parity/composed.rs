//! The networks once more with every fused op off: what runs on a device, or on a type, that an op has no
//! kernel for. Same fixtures, same tolerances.

use valor::nn::composed;

#[test]
fn moge() {
    composed(|| {
        super::moge::encoder_neck_and_heads();
        super::moge::antialiased_resize();
        super::moge::inference();
        super::moge::every_parameter_receives_a_gradient();
    });
}

#[test]
fn grounding_dino() {
    composed(|| {
        super::grounding_dino::hf_padded_batch_with_intermediates();
        super::grounding_dino::original_every_case();
        super::grounding_dino::original_intermediates();
    });
}

#[test]
fn grounding_dino_grad() {
    composed(|| {
        super::grounding_dino_grad::hf_gradients();
        super::grounding_dino_grad::original_gradients();
    });
}

#[test]
fn qwen3() {
    composed(|| {
        super::qwen3::forward_matches();
        super::qwen3::log_probs_and_gradients_match();
        super::qwen3::cached_generation_matches();
        super::qwen3::shared_prefix_matches_whole_prompts();
    });
}

#[test]
fn qwen3_vl() {
    composed(|| {
        super::qwen3_vl::the_vision_tower_matches();
        super::qwen3_vl::logits_match_with_and_without_pictures();
        super::qwen3_vl::cached_greedy_tokens_match();
        super::qwen3_vl::every_parameter_receives_a_gradient();
    });
}

#[test]
fn dinov2() {
    composed(|| {
        super::dinov2::hidden_states_and_outputs();
    });
}

#[test]
fn swin() {
    composed(|| {
        super::swin::feature_maps_of_every_size();
        super::swin::every_parameter_has_a_gradient();
    });
}

#[test]
fn bert() {
    composed(|| {
        super::bert::padding_mask();
        super::bert::phrase_mask_and_positions();
    });
}

#[test]
fn msda() {
    composed(|| {
        super::msda::output_and_gradients();
    });
}
