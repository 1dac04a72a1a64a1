#!/usr/bin/env python3
"""Parity fixtures: networks and losses of torch and transformers on random weights, fixed seeds.

  make_fixtures.py --seed 0 --out fixtures [--only qwen3,gdino,...] [--small]

tests/fixtures was made with --seed 3 --small (MoGe-2's folders and grounding-dino-original come from the official model
code and are kept as data). `VALOR_FIXTURES=fixtures cargo test --release parity` reads any other set.

Every model folder: model.safetensors (HF / official key names), config.json, inputs.safetensors, outputs.safetensors,
meta.json (tolerances hints, notes).  bool -> uint8.  All float tensors f32 unless noted.
"""
import argparse, hashlib, json, math, os, sys, warnings
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
import numpy as np, torch
import torch.nn.functional as F
from safetensors.torch import save_file
torch.set_num_threads(2)

def conv(d):
    o = {}
    for k, v in d.items():
        if v is None: continue
        if isinstance(v, (list, tuple)) and not torch.is_tensor(v): v = torch.tensor(v)
        v = v.detach().clone().contiguous()
        if v.dtype == torch.bool: v = v.to(torch.uint8)
        if v.dtype == torch.float64: v = v.float()
        o[k] = v
    return o

def add_hub_keys(p):
    """transformers 5 writes rope_parameters/dtype; hub checkpoints carry rope_theta/rope_scaling/torch_dtype. Write both."""
    c = json.load(open(p))
    for t in [c] + [c[k] for k in ("text_config",) if isinstance(c.get(k), dict)]:
        rp = t.get("rope_parameters")
        if rp and "rope_theta" in rp:
            t["rope_theta"] = rp["rope_theta"]
            if "mrope_section" in rp: t["rope_scaling"] = {k: v for k, v in rp.items() if k != "rope_theta"}
    c.setdefault("torch_dtype", c.get("dtype") or "float32"); json.dump(c, open(p, "w"), indent=2)

class Out:
    def __init__(s, root, name):
        s.d = os.path.join(root, name); os.makedirs(s.d, exist_ok=True); s.meta = {"name": name}
    def hf(s, model):
        model.save_pretrained(s.d)
        gc = os.path.join(s.d, "generation_config.json")
        if os.path.exists(gc): os.remove(gc)
        add_hub_keys(os.path.join(s.d, "config.json"))
    def save(s, inputs, outputs):
        save_file(conv(inputs), os.path.join(s.d, "inputs.safetensors"))
        save_file(conv(outputs), os.path.join(s.d, "outputs.safetensors"))
        s.meta["inputs"] = {k: list(v.shape) for k, v in conv(inputs).items()}
        s.meta["outputs"] = {k: list(v.shape) for k, v in conv(outputs).items()}
        json.dump(s.meta, open(os.path.join(s.d, "meta.json"), "w"), indent=1, default=str)
        print("ok", s.meta["name"], flush=True)
    def dump(s, name, obj):
        json.dump(obj, open(os.path.join(s.d, name), "w"), indent=1, default=float)

def rand_init(model, seed):
    """O(1)-signal random weights so that every parameter matters (HF default init leaves many at 0/1)."""
    g = torch.Generator().manual_seed(seed); seen = set()
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            if p.data_ptr() in seen or p.numel() == 0: continue
            seen.add(p.data_ptr())
            r = torch.randn(p.shape, generator=g)
            last = n.split(".")[-1]
            low = n.lower()
            if last in ("vision_param", "text_param", "gamma", "lambda1"): p.copy_(0.5 + 0.1 * r)
            elif p.ndim == 1 and last == "weight": p.copy_(1 + 0.15 * r)          # norms
            elif "sampling_offsets.bias" in n: p.add_(0.1 * r)
            elif "sampling_offsets.weight" in n: p.copy_(0.3 * r / math.sqrt(p.shape[1]))
            elif last == "bias": p.copy_(0.1 * r)
            elif "embed" in low and p.ndim == 2 and "proj" not in low and "bbox" not in low: p.copy_(0.7 * r)
            elif p.ndim == 2 and ("relative_position_bias_table" in n): p.copy_(0.5 * r)
            elif p.ndim >= 2 and last == "weight": p.copy_(r / math.sqrt(p[0].numel()))
            else: p.copy_(0.3 * r)                                                 # cls tokens, pos embeds, level_embed
            if "bbox_embed" in n and ".layers.2." in n: p.mul_(0.5)
    return model

SMALL = False
G = lambda seed: torch.Generator().manual_seed(seed)

# ------------------------------------------------------------------ qwen3
def fx_qwen3(a):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    for tie in (False, True):
        o = Out(a.out, "qwen3-tiny" + ("-tied" if tie else ""))
        cfg = Qwen3Config(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, rms_norm_eps=1e-6,
                          rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, tie_word_embeddings=tie,
                          bos_token_id=1, eos_token_id=511, pad_token_id=0)
        for sub in range(50):
            m = rand_init(Qwen3ForCausalLM(cfg).float().eval(), a.seed * 100 + 1 + sub)
            m.generation_config.eos_token_id = None
            g = G(a.seed * 100 + 2 + sub); B, T, pads = 3, 21, [0, 6, 13]
            ids = torch.randint(1, 511, (B, T), generator=g); am = torch.ones_like(ids)
            for b, p in enumerate(pads): ids[b, :p] = 0; am[b, :p] = 0
            pos = (am.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                gen = m.generate(ids, attention_mask=am, max_new_tokens=16, do_sample=False, pad_token_id=0,
                                 output_logits=True, return_dict_in_generate=True, use_cache=True)
            lg = torch.stack(gen.logits, 1); top = lg.topk(2, -1).values; gap = (top[..., 0] - top[..., 1]).min().item()
            if gap > 5e-3: break
        o.meta.update(generation_min_top1_gap=gap, pads=pads, sub=sub)
        r = m(ids, attention_mask=am, position_ids=pos, output_hidden_states=True)
        # per-token logprob of token t+1 given <=t ; valid only where both real
        lp = r.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        vm = (am[:, 1:] * am[:, :-1]).float()
        nll = -(lp * vm).sum() / vm.sum()
        nll.backward()
        P = dict(m.named_parameters())
        gr = {f"grad.{n}": P[n].grad for n in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight",
              "model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.k_norm.weight", "model.embed_tokens.weight")}
        o.dump("grad_norms.json", {n: p.grad.norm().item() for n, p in P.items() if p.grad is not None})
        seq = gen.sequences; sam = torch.cat([am, torch.ones(B, 16, dtype=am.dtype)], 1)
        with torch.no_grad():
            l2 = m(seq, attention_mask=sam, position_ids=(sam.cumsum(-1) - 1).clamp(min=0)).logits
            glp = l2[:, T - 1:-1].log_softmax(-1).gather(-1, seq[:, T:, None])[..., 0]
            ent = torch.distributions.Categorical(logits=l2[:, T - 1:-1]).entropy()
            lt = (l2[:, T - 1:-1] / 0.7).log_softmax(-1).gather(-1, seq[:, T:, None])[..., 0]
        o.hf(m)
        o.save({"input_ids": ids, "attention_mask": am, "position_ids": pos},
               {"logits": r.logits, "hidden_0_embed": r.hidden_states[0], "hidden_1": r.hidden_states[1],
                "hidden_last_normed": r.hidden_states[-1], "logprobs_shifted": lp, "logprob_valid_mask": vm, "mean_nll": nll[None],
                "generated": seq, "generated_step_logits": lg, "generated_logprobs": glp, "generated_logprobs_temp0.7": lt,
                "generated_entropy": ent, **gr})

# ------------------------------------------------------------------ bert
WORDS = ("chair coffee table red sofa lamp person tv book door window plant blue small the a on of in left right front wooden "
         "un play cat dog remote control light ##s ##ing ##ed ##able ##er ##aff ##ly").split()
def write_vocab(d):
    v = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?", 1010: ",", 1011: "-", 1013: "/", 999: "!"}
    i = 110
    for c in "abcdefghijklmnopqrstuvwxyz0123456789": v[i] = c; v[i + 40] = "##" + c; i += 1
    i = 200
    for w in WORDS: v[i] = w; i += 1
    for w in ["é", "中", "国"]: v[i] = w; i += 1
    lines = [v.get(k, f"[unused{k}]") for k in range(1040)]
    p = os.path.join(d, "vocab.txt"); open(p, "w").write("\n".join(lines) + "\n"); return p, {w: k for k, w in enumerate(lines)}

def tokenizer(d):
    from transformers import BertTokenizer
    p, vocab = write_vocab(d)
    t = BertTokenizer(vocab=vocab, do_lower_case=True)
    return t

TOKCASES = ["chair . coffee table .", "chair. coffee table.", "Red SOFAS . lamp .", "unaffable", "tv-stand . left/right", "", " . ", "chair?",
            "café table", "naïve résumé", "xyzzy 42", "中国 table", "the person's book , on the door !", "chair...table", "a" * 120,
            "chairs\ttables\nlamps", "\u200bchair\u00a0table", "☃ chair", "[SEP] chair [MASK]", "playing played player playable"]

def fx_bert(a):
    from transformers import BertConfig, BertModel
    o = Out(a.out, "bert-tiny")
    cfg = BertConfig(vocab_size=1040, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
    m = rand_init(BertModel(cfg, add_pooling_layer=False).eval(), a.seed * 100 + 11)
    t = tokenizer(o.d)
    o.dump("tokenizer_cases.json", [{"text": s, "ids": t(s)["input_ids"], "tokens": t.convert_ids_to_tokens(t(s)["input_ids"])} for s in TOKCASES])
    e = t(["chair . coffee table .", "red sofas . lamp . person ?"], padding=True, return_tensors="pt")
    from transformers.models.grounding_dino.modeling_grounding_dino import generate_masks_with_special_tokens_and_transfer_map as gm
    m4, pid = gm(e["input_ids"], torch.tensor([101, 102, 1012, 1029]))
    with torch.no_grad():
        r = m(e["input_ids"], attention_mask=e["attention_mask"], output_hidden_states=True)
        r4 = m(e["input_ids"], m4[:, None], torch.zeros_like(pid), pid)
        me = BertModel(cfg, add_pooling_layer=False).eval(); me.load_state_dict(m.state_dict()); me.set_attn_implementation("eager")
        re = me(e["input_ids"], m4[:, None], torch.zeros_like(pid), pid)
    o.meta["eager_vs_sdpa_4d_bool_mask_maxdiff"] = (re[0] - r4[0]).abs().max().item()
    o.hf(m)
    o.save({"input_ids": e["input_ids"], "attention_mask": e["attention_mask"], "mask4d": m4, "position_ids_4d": pid},
           {"last_hidden_state": r[0], "hidden_0": r.hidden_states[0], "hidden_1": r.hidden_states[1], "last_hidden_state_mask4d": r4[0]})

# ------------------------------------------------------------------ swin
def swin_cfg(**k):
    from transformers import SwinConfig
    d = dict(embed_dim=8 if SMALL else 16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=3, image_size=64, out_indices=[2, 3, 4]); d.update(k)
    return SwinConfig(**d)

def fx_swin(a):
    from transformers import SwinBackbone
    o = Out(a.out, "swin-tiny")
    m = rand_init(SwinBackbone(swin_cfg()).eval(), a.seed * 100 + 21)
    g = G(a.seed * 100 + 22); xa = torch.randn(2, 3, 112, 144, generator=g); xb = torch.randn(1, 3, 97, 123, generator=g); xc = torch.randn(1, 3, 75, 101, generator=g)
    import copy
    with torch.no_grad():
        ra = copy.deepcopy(m)(xa, output_hidden_states=True); rb = copy.deepcopy(m)(xb); rc = copy.deepcopy(m)(xc)
    outs = {f"a_stage{i+2}": t for i, t in enumerate(ra.feature_maps)}
    outs.update({f"b_stage{i+2}": t for i, t in enumerate(rb.feature_maps)}); outs.update({f"c_quirk_stage{i+2}": t for i, t in enumerate(rc.feature_maps)})
    outs["a_patch_embed"] = ra.hidden_states[0]
    if len(ra.hidden_states) > 1: outs["a_hidden_1"] = ra.hidden_states[1]
    o.meta["note"] = ("c_quirk: 75x101 -> stage-4 map 3x4 with window 3: HF sets shift=0 when min(res)<=window; original detection Swin keeps shift+mask. "
                      "HF also makes that change permanent on the module (fresh copy used per input here).")
    o.hf(m); o.save({"a": xa, "b": xb, "c_quirk": xc}, outs)

# ------------------------------------------------------------------ dinov2
def fx_dinov2(a):
    from transformers import Dinov2Config, Dinov2Model
    o = Out(a.out, "dinov2-tiny")
    cfg = Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=4, image_size=112, patch_size=14, layerscale_value=1.0)
    m = rand_init(Dinov2Model(cfg).eval(), a.seed * 100 + 31)
    x = torch.randn(2, 3, 98, 126, generator=G(a.seed * 100 + 32)); x2 = torch.randn(1, 3, 112, 112, generator=G(a.seed * 100 + 33))
    with torch.no_grad():
        r = m(x, output_hidden_states=True); r2 = m(x2)
        emb = m.embeddings
        pe = emb.interpolate_pos_encoding(torch.zeros(1, 7 * 9 + 1, 48), 98, 126)
        # official dinov2 variant: scale_factor = (n+0.1)/M
        M = 8; pp = emb.position_embeddings[:, 1:].reshape(1, M, M, 48).permute(0, 3, 1, 2)
        off = F.interpolate(pp, scale_factor=((7 + .1) / M, (9 + .1) / M), mode="bicubic", antialias=False).permute(0, 2, 3, 1).flatten(1, 2)
    o.hf(m)
    o.save({"pixel_values": x, "pixel_values_native": x2},
           {"last_hidden_state": r.last_hidden_state, "pooler_output": r.pooler_output, "hidden_0": r.hidden_states[0], "hidden_1": r.hidden_states[1],
            "hidden_3_prenorm": r.hidden_states[3], "interp_pos_hf_size": pe, "interp_pos_official_offset0.1_patches": off, "native_last_hidden_state": r2.last_hidden_state})

# ------------------------------------------------------------------ grounding dino
def gd_cfg(**k):
    from transformers import GroundingDinoConfig, BertConfig
    d = dict(backbone_config=swin_cfg(), text_config=BertConfig(vocab_size=1040, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             intermediate_size=64, max_position_embeddings=64), num_queries=30, encoder_layers=2, decoder_layers=2, d_model=64, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_feature_levels=4, two_stage=True, max_text_len=256, auxiliary_loss=True)
    if SMALL: d.update(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64)
    d.update(k); return GroundingDinoConfig(**d)

def fx_gdino(a):
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor
    from transformers.models.grounding_dino import modeling_grounding_dino as M
    from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher
    o = Out(a.out, "grounding-dino-tiny"); t = tokenizer(o.d)
    prompts = ["chair . coffee table .", "red sofas . wooden lamp . "]
    e = t(prompts, padding=True, return_tensors="pt")
    H, W = 128, 160; sizes = [(128, 144), (112, 160)]
    for sub in range(200):
        m = rand_init(GroundingDinoForObjectDetection(gd_cfg()).float().eval(), a.seed * 1000 + 41 + sub)
        with torch.no_grad():   # keep the contrastive logits moderate (no sigmoid saturation)
            for q in (m.model.decoder.layer_norm, m.model.enc_output_norm): q.weight.mul_(0.25); q.bias.mul_(0.25)
        g = G(a.seed * 1000 + 42 + sub); px = torch.zeros(2, 3, H, W); pm = torch.zeros(2, H, W, dtype=torch.long)
        for b, (h, w) in enumerate(sizes): px[b, :, :h, :w] = torch.randn(3, h, w, generator=g); pm[b, :h, :w] = 1
        wide = torch.randn(1, 3, 128, 448, generator=g)
        x = dict(pixel_values=px, pixel_mask=pm, input_ids=e["input_ids"], attention_mask=e["attention_mask"], token_type_ids=e["token_type_ids"])
        with torch.no_grad():
            r = m(**x, output_hidden_states=True); rw = m(pixel_values=wide, input_ids=e["input_ids"][:1, :7], attention_mask=e["attention_mask"][:1, :7])
        def gap(rr):
            s = rr.enc_outputs_class.max(-1)[0]; ts = s.topk(31, dim=1).values
            ti = s.topk(31, dim=1).indices; fin = torch.isfinite(rr.enc_outputs_coord_logits.gather(1, ti[..., None].repeat(1, 1, 4))).all()
            return ((ts[:, :-1] - ts[:, 1:]).min().item() if fin else -1.0)
        gp = min(gap(r), gap(rw))
        if gp > 4e-4: break
    mb = GroundingDinoForObjectDetection
    o.meta.update(prompts=prompts, valid_sizes_hw=sizes, topk_min_gap=gp, sub=sub, spatial_shapes=[[16, 20], [8, 10], [4, 5], [2, 3]],
                  sizes_note="pixel_values are already normalised noise; padded area is exactly 0")
    # intermediates through hooks
    cap = {}
    def hook(name):
        def f(mod, i, out): cap[name] = out
        return f
    mm = m.model; hs = [mm.text_backbone.register_forward_hook(hook("text_bb")), mm.text_projection.register_forward_hook(hook("text_proj")),
          mm.backbone.register_forward_hook(hook("bb")), mm.encoder.layers[0].register_forward_hook(hook("enc0")),
          mm.encoder.layers[0].fusion_layer.register_forward_hook(hook("fus0")), mm.encoder.layers[0].text_enhancer_layer.register_forward_hook(hook("te0")),
          mm.decoder.layers[0].register_forward_hook(hook("dec0")), mm.decoder.reference_points_head.register_forward_hook(hook("rph")),
          mm.enc_output_norm.register_forward_hook(hook("encout"))]
    for i in range(4): hs.append(mm.input_proj_vision[i].register_forward_hook(hook(f"ip{i}")))
    enc_in = {}
    hs.append(mm.encoder.register_forward_pre_hook(lambda mod, ar, kw: enc_in.update(kw), with_kwargs=True))
    with torch.no_grad(): r = m(**x, output_hidden_states=True)
    for h in hs: h.remove()
    sm, pid = M.generate_masks_with_special_tokens_and_transfer_map(e["input_ids"], torch.tensor(M.SPECIAL_TOKENS))
    topi = r.enc_outputs_class.max(-1)[0].topk(30, dim=1).indices
    outs = dict(text_self_attention_masks=sm, text_position_ids=pid, bert_last_hidden=cap["text_bb"][0], text_projected=cap["text_proj"],
                vision_flat_in=enc_in["vision_features"], vision_pos_embed_plus_level=enc_in["vision_position_embedding"],
                vision_padding_mask=enc_in["vision_attention_mask"], valid_ratios=enc_in["valid_ratios"],
                enc0_fused_vision=cap["fus0"][0][0], enc0_fused_text=cap["fus0"][1][0], enc0_text_enhanced=cap["te0"][0],
                enc0_vision=cap["enc0"][0][0], enc0_text=cap["enc0"][0][1],
                encoder_last_hidden_state_vision=r.encoder_last_hidden_state_vision, encoder_last_hidden_state_text=r.encoder_last_hidden_state_text,
                enc_object_query=cap["encout"], enc_outputs_class=r.enc_outputs_class[..., :e["input_ids"].shape[1]], enc_outputs_coord_logits=r.enc_outputs_coord_logits,
                topk_indices=topi, init_reference_points=r.init_reference_points, dec_query_pos_last=cap["rph"], dec0_hidden=cap["dec0"][0],
                intermediate_hidden_states=r.intermediate_hidden_states, intermediate_reference_points=r.intermediate_reference_points,
                last_hidden_state=r.last_hidden_state, logits=r.logits[..., :16], pred_boxes=r.pred_boxes, encoder_logits_hf=r.encoder_logits[..., :16],
                encoder_pred_boxes=r.encoder_pred_boxes, wide_logits=rw.logits[..., :16], wide_pred_boxes=rw.pred_boxes, wide_init_reference_points=rw.init_reference_points)
    for i, (fm, mk) in enumerate(cap["bb"][0]): outs[f"backbone_{i}"] = fm; outs[f"backbone_mask_{i}"] = mk
    # backbone sine pos-embed of level 0
    outs["sine_pos_level0"] = cap["bb"][1][0]
    # post-processing (thresholds chosen so that something remains)
    sc = r.logits.sigmoid().max(-1)[0]; so = sc.sort(dim=1, descending=True).values; thr = float(so[:, 5:7].mean(1).min())
    pr = r.logits.sigmoid()[..., :16]; tthr = float(torch.quantile(pr[torch.isfinite(r.logits[..., :16])], 0.6)) 
    class P: 
        def batch_decode(self, ids): return t.batch_decode(ids)
    res = GroundingDinoProcessor.post_process_grounded_object_detection(P(), r, input_ids=e["input_ids"], threshold=thr, text_threshold=tthr, target_sizes=[(480, 540), (333, 500)])
    o.dump("postprocess.json", {"threshold": thr, "text_threshold": tthr, "target_sizes_hw": [[480, 540], [333, 500]],
           "results": [{"scores": q["scores"].tolist(), "boxes_xyxy": q["boxes"].tolist(), "labels": q["text_labels"]} for q in res]})
    # attention masks sanity for several prompts
    pm_cases = []
    for s in TOKCASES[:6] + ["chair . coffee table", "chair ? lamp . tv", ". . chair .", "chair coffee"]:
        i = torch.tensor([t(s)["input_ids"]]); mk, pp = M.generate_masks_with_special_tokens_and_transfer_map(i, torch.tensor(M.SPECIAL_TOKENS))
        pm_cases.append({"text": s, "ids": i[0].tolist(), "mask": mk[0].int().tolist(), "position_ids": pp[0].tolist()})
    o.dump("text_mask_cases.json", pm_cases)
    o.hf(m)
    m2 = GroundingDinoForObjectDetection.from_pretrained(o.d).eval()
    with torch.no_grad(): r2 = m2(**x)
    o.meta["reload_maxdiff"] = (r2.pred_boxes - r.pred_boxes).abs().max().item()
    md = GroundingDinoForObjectDetection.from_pretrained(o.d, dtype=torch.float64).eval()
    try:
        with torch.no_grad(): rd = md(**{k: (v.double() if v.is_floating_point() else v) for k, v in x.items()})
        o.meta["f32_vs_f64_pred_boxes_maxdiff"] = (rd.pred_boxes.float() - r.pred_boxes).abs().max().item()
        fin = torch.isfinite(r.logits); o.meta["f32_vs_f64_logits_maxdiff"] = (rd.logits[fin].float() - r.logits[fin]).abs().max().item()
    except Exception as ex: o.meta["f64_error"] = str(ex)[:200]
    o.save(x | {"wide_pixel_values": wide, "wide_input_ids": e["input_ids"][:1, :7]}, outs)

    # ---------------- loss fixture (same weights/inputs)
    ol = Out(a.out, "grounding-dino-loss")
    g = G(a.seed * 100 + 55)
    labels = []
    for n in (3, 2):
        c = torch.rand(n, 2, generator=g) * .6 + .2; wh = torch.rand(n, 2, generator=g) * .25 + .05
        labels.append({"class_labels": torch.randint(0, 2, (n,), generator=g), "boxes": torch.cat([c, wh], 1)})
    m.eval(); m.zero_grad()
    rl = m(**x, labels=labels, output_hidden_states=False); rl.loss.backward()
    P_ = dict(m.named_parameters())
    al = lambda n: n.replace("model.decoder.bbox_embed.", "bbox_embed.")   # stored key of the shared head
    gn = {al(n): p.grad.norm().item() for n, p in P_.items() if p.grad is not None}
    ol.dump("grad_norms.json", gn)
    ol.dump("no_grad_params.json", [al(n) for n, p in P_.items() if p.grad is None or p.grad.abs().max() == 0])
    ol.dump("loss_dict.json", {k: v.item() for k, v in rl.loss_dict.items()} | {"loss": rl.loss.item()})
    mt = GroundingDinoHungarianMatcher(class_cost=1.0, bbox_cost=5.0, giou_cost=2.0)
    lm = M.build_label_maps(rl.logits, e["input_ids"]); tm = M.build_text_mask(rl.logits, e["attention_mask"])
    asg = {}
    for nm, lg, bx in [("final", rl.logits, rl.pred_boxes), ("aux0", rl.auxiliary_outputs[0]["logits"], rl.auxiliary_outputs[0]["pred_boxes"]),
                       ("enc_hf", rl.encoder_logits, rl.encoder_pred_boxes)]:
        asg[nm] = [[i.tolist(), j.tolist()] for i, j in mt({"logits": lg, "pred_boxes": bx, "label_maps": lm}, labels)]
    ol.dump("assignment.json", {"pairs_[pred_idx],[target_idx]_per_image": asg})
    # standalone loss on given (logits, boxes): gradients wrt both -> lets the loss be tested without the model
    lg = rl.logits.detach().clone().requires_grad_(); bx = rl.pred_boxes.detach().clone().requires_grad_()
    from transformers.loss.loss_grounding_dino import GroundingDinoImageLoss
    crit = GroundingDinoImageLoss(matcher=mt, focal_alpha=0.25, losses=["labels", "boxes", "cardinality"])
    ld = crit({"logits": lg, "pred_boxes": bx, "label_maps": lm, "text_mask": tm}, labels)
    tot = 2 * ld["loss_ce"] + 5 * ld["loss_bbox"] + 2 * ld["loss_giou"]; tot.backward()
    ol.dump("standalone.json", {k: v.item() for k, v in ld.items()} | {"total_2ce_5l1_2giou": tot.item()})
    from transformers.loss.loss_for_object_detection import generalized_box_iou
    from transformers.image_transforms import center_to_corners_format as c2c
    keep = ["model.encoder.layers.0.deformable_layer.self_attn.sampling_offsets.weight", "model.decoder.layers.0.encoder_attn.value_proj.weight",
            "bbox_embed.0.layers.2.weight", "model.level_embed", "model.query_position_embeddings.weight", "model.input_proj_vision.0.0.weight",
            "model.encoder.layers.1.fusion_layer.attn.vision_proj.weight", "model.text_projection.weight", "model.decoder.reference_points_head.layers.0.weight",
            "model.encoder.layers.0.fusion_layer.vision_param"]
    ol.meta.update(model="../grounding-dino-tiny", note="eval() mode (no dropout); auxiliary_loss=True; HF loss weights ce 2, l1 5, giou 2, same for _enc and _0 (aux); num_boxes=sum targets=5")
    ol.save({**x, **{f"labels{i}.{k}": v for i, l in enumerate(labels) for k, v in l.items()}},
            {"loss": rl.loss[None], "logits": rl.logits[..., :16], "pred_boxes": rl.pred_boxes, "aux0_logits": rl.auxiliary_outputs[0]["logits"][..., :16],
             "aux0_pred_boxes": rl.auxiliary_outputs[0]["pred_boxes"], "label_map_0": lm[0][:, :16], "label_map_1": lm[1][:, :16], "text_mask": tm[..., :16],
             "standalone_grad_logits": torch.nan_to_num(lg.grad[..., :16]), "standalone_grad_boxes": bx.grad,
             "giou_matrix_img0": generalized_box_iou(c2c(rl.pred_boxes[0].detach()), c2c(labels[0]["boxes"])), **{f"grad.{k}": m.get_parameter(k).grad for k in keep}})

# ------------------------------------------------------------------ msda
def fx_msda(a):
    from transformers.models.grounding_dino.modeling_grounding_dino import MultiScaleDeformableAttention
    o = Out(a.out, "msda"); g = G(a.seed * 100 + 61); dt = torch.float64
    sh = [(9, 13), (5, 7), (3, 4), (2, 2)]; S = sum(h * w for h, w in sh); B, Q, Hd, D, L, Pn = 2, 19, 4, 8, 4, 4
    f32 = lambda t: t.float().to(dt)   # make inputs exactly representable in f32
    v = f32(torch.randn(B, S, Hd, D, generator=g, dtype=dt)).requires_grad_()
    loc = f32(torch.rand(B, Q, Hd, L, Pn, 2, generator=g, dtype=dt) * 1.3 - 0.15).requires_grad_()
    w = f32(torch.randn(B, Q, Hd, L * Pn, generator=g, dtype=dt).softmax(-1).view(B, Q, Hd, L, Pn)).requires_grad_()
    st = torch.tensor(sh); ls = torch.cat((st.new_zeros(1), st.prod(1).cumsum(0)[:-1]))
    y = MultiScaleDeformableAttention()(v, st, sh, ls, loc, w, 64); go = f32(torch.randn(y.shape, generator=g, dtype=dt)); y.backward(go)
    o.meta["note"] = "computed in f64 and stored f32; loc in [-0.15,1.15] (zeros padding, align_corners=False); value [B,S,H,D]; loc (x,y) normalised"
    o.save({"value": v, "spatial_shapes": st, "level_start_index": ls, "sampling_locations": loc, "attention_weights": w, "grad_output": go},
           {"output": y, "grad_value": v.grad, "grad_sampling_locations": loc.grad, "grad_attention_weights": w.grad})

# ------------------------------------------------------------------ grpo
def fx_grpo(a):
    o = Out(a.out, "grpo"); g = G(a.seed * 100 + 71); dt = torch.float64
    n_prompt, n, T = 3, 5, 12; B = n_prompt * n
    f32 = lambda t: t.float().to(dt)
    old = f32(-torch.rand(B, T, generator=g, dtype=dt) * 4); lp = f32(old + torch.randn(B, T, generator=g, dtype=dt) * .35).clamp(max=-1e-3)
    ref = f32(old + torch.randn(B, T, generator=g, dtype=dt) * .5).clamp(max=-1e-3)
    lens = torch.randint(1, T + 1, (B,), generator=g); mask = (torch.arange(T)[None] < lens[:, None]).to(dt)
    rew = (torch.rand(B, generator=g, dtype=dt) * 4).round() / 4; rew[n:2 * n] = 0.5   # group 1: zero variance
    lp[0, 0] = old[0, 0] + 3.0                                                          # triggers clipping / dual clip
    rew = f32(rew); grp = torch.arange(B) // n
    def adv(norm):
        A = torch.zeros(B, dtype=dt)
        for k in range(n_prompt):
            s = rew[grp == k]; A[grp == k] = (s - s.mean()) / (s.std() + 1e-6) if norm else s - s.mean()   # torch.std is unbiased (n-1)
        return A
    A = adv(True); At = A[:, None] * mask
    def loss(lp_, dual):
        neg = (lp_ - old).clamp(-20, 20); r = neg.exp()
        l1 = -At * r; l2 = -At * r.clamp(1 - .2, 1 + .2); c1 = torch.maximum(l1, l2)
        pg = torch.where(At < 0, torch.minimum(-At * 3.0, c1), c1) if dual else c1
        kl = (ref - lp_).clamp(-20, 20); kld = (kl.exp() - kl - 1).clamp(-10, 10)
        tm = lambda x: (x * mask).sum() / mask.sum()
        return tm(pg), tm(kld), pg, kld, tm((l2 > l1).to(dt)), tm(-(lp_ - old))
    outs = {"advantages_norm": A, "advantages_nostd": adv(False), "advantages_token": At}
    for nm, dual in (("noclipc", False), ("dualclip3", True)):
        x = lp.clone().requires_grad_(); pgl, kll, pg, kld, cf, ppk = loss(x, dual); tot = pgl + 0.01 * kll; tot.backward()
        outs.update({f"{nm}.pg_loss": pgl[None], f"{nm}.kl_loss": kll[None], f"{nm}.total": tot[None], f"{nm}.grad_logprobs": x.grad,
                     f"{nm}.pg_per_token": pg, "kl_per_token": kld, "clipfrac": cf[None], "ppo_kl": ppk[None]})
    o.meta["formula"] = dict(adv="(r-mean_g)/(std_g[unbiased]+1e-6)", clip=[0.2, 0.2], clip_ratio_c=3.0, kl="low_var_kl: clamp(exp(d)-d-1,-10,10), d=clamp(ref-lp,-20,20)",
                             kl_coef=0.01, agg="token-mean: sum(x*mask)/sum(mask)", note="groups contiguous of 5; group 1 has zero variance; f64 stored f32")
    o.save({"logprobs": lp, "old_logprobs": old, "ref_logprobs": ref, "rewards": rew, "group_ids": grp, "response_mask": mask}, outs)

def draw(seed, w, h, mode="RGB"):
    from PIL import Image, ImageDraw
    rs = np.random.RandomState(seed); yy, xx = np.mgrid[0:h, 0:w]
    im = Image.fromarray(np.stack([xx * 255 / w, yy * 255 / h, (xx + yy) % 256], -1).astype(np.uint8)); d = ImageDraw.Draw(im)
    for _ in range(6):
        x0, y0 = rs.randint(0, w - 8), rs.randint(0, h - 8); x1, y1 = x0 + rs.randint(4, w // 2), y0 + rs.randint(4, h // 2); c = tuple(int(v) for v in rs.randint(0, 255, 3))
        (d.ellipse if rs.rand() < .5 else d.rectangle)([x0, y0, x1, y1], fill=c)
    for i in range(0, w, 7): d.line([i, 0, i + 3, h], fill=(i % 255, 0, 255 - i % 255))
    if mode == "L": return im.convert("L")
    if mode == "RGBA": im = im.convert("RGBA"); im.putalpha(Image.fromarray((xx * 255 // w).astype(np.uint8))); return im
    return im

def fx_qwen3vl(a):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    try: from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as PP
    except Exception: PP = None
    from PIL import Image
    o = Out(a.out, "qwen3-vl-tiny")
    cfg = Qwen3VLConfig(text_config=dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              max_position_embeddings=1024, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}, tie_word_embeddings=False),
          vision_config=dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=16, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
          image_token_id=500, video_token_id=503, vision_start_token_id=501, vision_end_token_id=502, tie_word_embeddings=False)
    m = rand_init(Qwen3VLForConditionalGeneration(cfg).float().eval(), a.seed * 100 + 91)
    kw = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[.5] * 3, image_std=[.5] * 3, size={"shortest_edge": 4096, "longest_edge": 16384})
    im1, im2 = draw(a.seed + 1, 130, 90), draw(a.seed + 2, 64, 101); im1.save(os.path.join(o.d, "img1.png")); im2.save(os.path.join(o.d, "img2.png"))
    pv = Qwen2VLImageProcessor(**kw)(images=[im1, im2], return_tensors="pt"); outs = {}
    px, thw = pv["pixel_values"], pv["image_grid_thw"]
    if PP is not None:
        try: pp = PP(**kw)(images=[im1, im2], return_tensors="pt"); o.meta["pil_vs_torchvision_maxdiff"] = (pp["pixel_values"] - px).abs().max().item(); o.meta["pil_grid"] = pp["image_grid_thw"].tolist(); outs["pixel_values_pil_img1"] = pp["pixel_values"][:thw[0].prod()].half()
        except Exception as ex: o.meta["pil_error"] = str(ex)[:200]
    n = [int(t.prod()) // 4 for t in thw]; g = G(a.seed * 100 + 92); R = lambda k: torch.randint(1, 490, (k,), generator=g).tolist()
    seq = R(4) + [501] + [500] * n[0] + [502] + R(5) + [501] + [500] * n[1] + [502] + R(7); ids = torch.tensor([seq]); mmt = (ids == 500).int(); am = torch.ones_like(ids)
    pos, delta = m.model.get_rope_index(ids, mm_token_type_ids=mmt, image_grid_thw=thw, attention_mask=am)
    with torch.no_grad():
        v = m.model.visual(px, grid_thw=thw)
        r = m(input_ids=ids, attention_mask=am, pixel_values=px, image_grid_thw=thw, mm_token_type_ids=mmt, output_hidden_states=True)
        gen = m.generate(input_ids=ids, attention_mask=am, pixel_values=px, image_grid_thw=thw, mm_token_type_ids=mmt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        tids = torch.tensor([R(9)]); tonly = m(input_ids=tids, attention_mask=torch.ones_like(tids))
        emb = m.model.visual.patch_embed(px)
    top = torch.stack(gen.logits, 1).topk(2, -1).values; o.meta["generation_min_top1_gap"] = (top[..., 0] - top[..., 1]).min().item()
    o.meta.update(processor=kw, image_token_counts=n, files=["img1.png", "img2.png"])
    outs.update({"vision_last_hidden": v.last_hidden_state, "vision_merged": v.pooler_output, "patch_embed": emb, "position_ids_3d": pos, "rope_delta": delta, "logits": r.logits,
                 "hidden_1": r.hidden_states[1], "generated": gen.sequences, "text_only_logits": tonly.logits, **{f"deepstack_{i}": d for i, d in enumerate(v.deepstack_features)}})
    o.hf(m)
    o.save({"input_ids": ids, "attention_mask": am, "pixel_values": px, "image_grid_thw": thw, "text_only_input_ids": tids}, outs)

# ------------------------------------------------------------------ preprocessing
def fx_pre(a):
    from PIL import Image, ImageOps
    from transformers.models.grounding_dino.image_processing_grounding_dino import GroundingDinoImageProcessor
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
    o = Out(a.out, "preprocess"); s = a.seed + 10
    specs = {"rgb_317x211.png": draw(s, 317, 211), "wide_640x97.png": draw(s + 1, 640, 97), "gray_101x150.png": draw(s + 2, 101, 150, "L"), "rgba_203x133.png": draw(s + 3, 203, 133, "RGBA")}
    for k, im in specs.items(): im.save(os.path.join(o.d, k))
    ej = draw(s + 4, 160, 121); ex = Image.Exif(); ex[0x0112] = 6; ej.save(os.path.join(o.d, "exif6_160x121.png"), exif=ex); specs["exif6_160x121.png"] = None
    def orig_size(w, h, size=800, mx=1333):   # GroundingDINO/datasets/transforms.py get_size_with_aspect_ratio
        mn, M = float(min(w, h)), float(max(w, h))
        if M / mn * size > mx: size = int(round(mx * mn / M))
        if (w <= h and w == size) or (h <= w and h == size): return h, w
        return (int(size * h / w), size) if w < h else (size, int(size * w / h))
    mean, std = torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    info, outs = {}, {}
    ip, ipp = GroundingDinoImageProcessor(), GroundingDinoImageProcessorPil()
    for k in specs:
        raw = Image.open(os.path.join(o.d, k)); rec = {"pil_mode": raw.mode, "pil_size_wh": raw.size, "exif_orientation": raw.getexif().get(0x0112)}
        for tag, im in (("noexif", raw.convert("RGB")), ("exif", ImageOps.exif_transpose(raw).convert("RGB"))):
            if tag == "exif" and not rec["exif_orientation"]: continue
            w, h = im.size; oh, ow = orig_size(w, h)
            rz = im.resize((ow, oh), Image.BILINEAR); u8 = np.asarray(rz); t = (torch.from_numpy(u8.copy()).permute(2, 0, 1).float() / 255 - mean) / std
            hf = ip(images=im, return_tensors="pt"); hp = ipp(images=im, return_tensors="pt"); hfp, hpp = hf["pixel_values"][0], hp["pixel_values"][0]
            st = lambda x: dict(shape=list(x.shape), mean=[float(v) for v in x.double().mean((1, 2))], std=[float(v) for v in x.double().std((1, 2))], sum=float(x.double().sum()), abs_sum=float(x.double().abs().sum()))
            rec[tag] = {"rgb_sha256": hashlib.sha256(np.asarray(im).tobytes()).hexdigest(), "orig_resized_u8_sha256": hashlib.sha256(u8.tobytes()).hexdigest(), "orig": st(t), "hf_torchvision": st(hfp), "hf_pil": st(hpp),
                        "hf_tv_vs_hf_pil_maxdiff": (hfp - hpp).abs().max().item() if hfp.shape == hpp.shape else None, "orig_vs_hf_pil_maxdiff": (t - hpp).abs().max().item() if t.shape == hpp.shape else "shape differs",
                        "pixel_mask_sum": int(hf["pixel_mask"].sum())}
            ds = lambda x: x[:, 5::23, 7::23]
            outs[f"{k}.{tag}.orig_u8_ds"] = torch.from_numpy(u8.copy()).permute(2, 0, 1)[:, 5::23, 7::23]; outs[f"{k}.{tag}.orig_norm_ds"] = ds(t); outs[f"{k}.{tag}.hf_tv_ds"] = ds(hfp); outs[f"{k}.{tag}.hf_pil_ds"] = ds(hpp)
            sm = im.resize((max(1, w // 3), max(1, h // 3)), Image.BILINEAR); outs[f"{k}.{tag}.pil_bilinear_down3_u8"] = torch.from_numpy(np.asarray(sm).copy()); sb = im.resize((max(1, w // 3), max(1, h // 3)), Image.BICUBIC); outs[f"{k}.{tag}.pil_bicubic_down3_u8"] = torch.from_numpy(np.asarray(sb).copy())
        info[k] = rec
    from transformers.image_transforms import get_size_with_aspect_ratio
    grid = [(480, 640), (640, 480), (97, 640), (333, 500), (800, 1333), (799, 1400), (1000, 1000), (1080, 1920), (427, 640), (3024, 4032), (613, 1021)]
    info["size_table_hw"] = [{"in": [h, w], "orig": list(orig_size(w, h)), "hf": list(get_size_with_aspect_ratio((h, w), 800, 1333))} for h, w in grid]
    b = ip(images=[Image.open(os.path.join(o.d, "rgb_317x211.png")), Image.open(os.path.join(o.d, "wide_640x97.png"))], return_tensors="pt")
    info["batch_pad"] = {"pixel_values": list(b["pixel_values"].shape), "mask_sums": b["pixel_mask"].sum((1, 2)).tolist(), "pad_is_zero_after_norm": bool((b["pixel_values"][1][:, -1, :] == 0).all())}
    o.dump("info.json", info); o.meta["note"] = "ds = x[:,5::23,7::23]"; o.save({"dummy": torch.zeros(1)}, outs)

ALL = dict(qwen3=fx_qwen3, bert=fx_bert, swin=fx_swin, dinov2=fx_dinov2, gdino=fx_gdino, msda=fx_msda, grpo=fx_grpo, qwen3vl=fx_qwen3vl, preprocess=fx_pre)
if __name__ == "__main__":
    ap = argparse.ArgumentParser(); ap.add_argument("--seed", type=int, default=0); ap.add_argument("--out", required=True); ap.add_argument("--only")
    ap.add_argument("--small", action="store_true", help="narrower Swin and GroundingDINO, to be kept in git")
    a = ap.parse_args(); SMALL = a.small; os.makedirs(a.out, exist_ok=True)
    bad = []
    for k in (a.only.split(",") if a.only else ALL):
        try: ALL[k](a)
        except Exception:
            import traceback; traceback.print_exc(); bad.append(k); print("FAIL", k, flush=True)
    sys.exit(1 if bad else 0)
