#!/usr/bin/env python3
"""What the presets' published checkpoints look like: names, shapes and dtypes of their tensors, and files of that form.

  make_preset_files.py tables [--only NAME,…] [--out tests/fixtures/presets]
  make_preset_files.py files --out DIR [--only NAME,…]

`tables` writes one small JSON a preset, which the tests of src/fit.rs hold the networks against: configuration, shapes by
name (`{0-27}` stands for each of these numbers) and the published files with their sizes. Names come from transformers'
networks on the meta device, MoGe's and the original GroundingDINO's from the rules below; what the published files hold
beyond or short of that is in PRESETS. A safetensors file's header follows from its tensors, so a size that equals the
published one to the byte speaks for all names, shapes and dtypes at once; `tables` says where it does not. PyTorch's own
files do not follow from their tensors so closely: there the number of parameters is held against the known one.

`files` writes a folder a preset that `valor models verify DIR` can look at: headers are exact, shards as published, and
the numbers are a hole that takes no disk. Random numbers of full size, with what PyTorch makes of them, come from
benches/peers/bench_peers.py.

Needs torch and transformers (>= 4.57).
"""
import argparse, json, os, re, struct, sys
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = os.path.join(HERE, "..", "tests", "fixtures")
BYTES = {"F32": 4, "BF16": 2, "I64": 8}


def qwen3(hidden, mlp, layers, heads, tied, dtype="bfloat16"):
    return dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
                eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=hidden, initializer_range=0.02,
                intermediate_size=mlp, max_position_embeddings=40960, max_window_layers=layers, model_type="qwen3",
                num_attention_heads=heads, num_hidden_layers=layers, num_key_value_heads=8, rms_norm_eps=1e-6,
                rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=tied, torch_dtype=dtype,
                transformers_version="4.51.0", use_cache=True, use_sliding_window=False, vocab_size=151936)


def qwen3_vl(hidden, mlp, layers, heads, tied, depth, width, vision_mlp, deepstack):
    text = dict(attention_bias=False, attention_dropout=0.0, bos_token_id=151643, dtype="bfloat16", eos_token_id=151645,
                head_dim=128, hidden_act="silu", hidden_size=hidden, initializer_range=0.02, intermediate_size=mlp,
                max_position_embeddings=262144, model_type="qwen3_vl_text", num_attention_heads=heads,
                num_hidden_layers=layers, num_key_value_heads=8, rms_norm_eps=1e-6,
                rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
                rope_theta=5000000, use_cache=True, vocab_size=151936)
    if tied: text["tie_word_embeddings"] = True
    vision = dict(deepstack_visual_indexes=deepstack, depth=depth, hidden_act="gelu_pytorch_tanh", hidden_size=width,
                  in_channels=3, initializer_range=0.02, intermediate_size=vision_mlp, model_type="qwen3_vl", num_heads=16,
                  num_position_embeddings=2304, out_hidden_size=hidden, patch_size=16, spatial_merge_size=2,
                  temporal_patch_size=2)
    return dict(architectures=["Qwen3VLForConditionalGeneration"], image_token_id=151655, model_type="qwen3_vl",
                text_config=text, tie_word_embeddings=tied, transformers_version="4.57.0.dev0", video_token_id=151656,
                vision_config=vision, vision_end_token_id=151653, vision_start_token_id=151652)


def grounding_dino(embed, depths, heads, window, image):
    swin = dict(model_type="swin", embed_dim=embed, depths=depths, num_heads=heads, window_size=window, image_size=image,
                out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
                stage_names=["stem", "stage1", "stage2", "stage3", "stage4"])
    bert = dict(model_type="bert", vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                intermediate_size=3072, max_position_embeddings=512, layer_norm_eps=1e-12)
    return dict(architectures=["GroundingDinoForObjectDetection"], model_type="grounding-dino", backbone_config=swin,
                text_config=bert, torch_dtype="float32", transformers_version="4.40.0.dev0", auxiliary_loss=False,
                d_model=256, num_queries=900, encoder_layers=6, encoder_ffn_dim=2048, encoder_attention_heads=8,
                encoder_n_points=4, decoder_layers=6, decoder_ffn_dim=2048, decoder_attention_heads=8, decoder_n_points=4,
                num_feature_levels=4, max_text_len=256, activation_function="relu", layer_norm_eps=1e-5,
                positional_embedding_temperature=20, position_embedding_type="sine", two_stage=True,
                embedding_init_target=True, two_stage_bbox_embed_share=False, decoder_bbox_embed_share=True, query_dim=4,
                dropout=0.1, attention_dropout=0.0, activation_dropout=0.0, text_enhancer_dropout=0.0, fusion_dropout=0.0,
                fusion_droppath=0.1)


def moge2(backbone, dim, layers, neck_blocks):
    widths, growing = [dim, 256, 128, 64, 32], ["conv_transpose", "conv_transpose", "conv_transpose", "bilinear"]
    stack = lambda dim_in, dim_out, blocks: dict(
        dim_in=dim_in, dim_out=dim_out, dim_res_blocks=widths, num_res_blocks=blocks, res_block_in_norm="none",
        res_block_hidden_norm="none", resamplers=growing)
    head = lambda out: stack(widths, [None] * 4 + [out], [0, 1, 1, 1, 0])
    return dict(encoder=dict(backbone=backbone, intermediate_layers=layers, dim_out=dim),
                neck=stack([dim + 2, 2, 2, 2, 2], None, neck_blocks), points_head=head(3), normal_head=head(3),
                mask_head=head(1), scale_head=dict(dims=[dim, dim, dim, 1]), remap_output="exp",
                num_tokens_range=[1200, 3600])


# name: (kind, configuration, published files with their bytes (None: unknown), how they were cut, notes)
# Sizes as the hub lists them; 4e9 and 5e9 are the shard limits that give these sizes.
ST = "model-{:05}-of-{:05}.safetensors"
shards = lambda *sizes: [(ST.format(i + 1, len(sizes)), s) for i, s in enumerate(sizes)]
one = lambda size: [("model.safetensors", size)]
HEAD = "Holds a copy of the embedding as lm_head.weight, although the head is tied."
INDEX = "Holds Swin's relative_position_index buffers, as transformers wrote them up to 4.x."
PRESETS = {
    "qwen3-0.6b": ("qwen3", qwen3(1024, 3072, 28, 16, True), one(1503300328), None, HEAD),
    "qwen3-1.7b": ("qwen3", qwen3(2048, 6144, 28, 16, True), shards(3441185608, 622329984), 4e9, HEAD),
    "qwen3-4b": ("qwen3", qwen3(2560, 9728, 36, 32, True), shards(3957900840, 3987450520, 99630640), 4e9, ""),
    "qwen3-8b": ("qwen3", qwen3(4096, 12288, 36, 32, False),
                 shards(3996250744, 3993160032, 3959604768, 3187841392, 1244659840), 4e9, ""),
    "qwen3-14b": ("qwen3", qwen3(5120, 17408, 40, 40, False), shards(*[None] * 8), 4e9,
                  "Sizes of the shards are not known here; the number of tensors and of their bytes (29536614400) is."),
    "qwen3-32b": ("qwen3", qwen3(5120, 25600, 64, 64, False),
                  shards(3957109648, *[3900791760] * 2, *[3900791800] * 13, 3055341992), 4e9, ""),
    "valor-8b": ("qwen3", qwen3(4096, 12288, 36, 32, False), shards(*[None] * 4), 5e9,
                 "Not seen: Qwen3-8B tuned (VALOR 4), so its names and shapes; shards and dtype are a guess."),
    "grounding-dino-tiny": ("grounding-dino", grounding_dino(96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224), one(689359096),
                            None, INDEX),
    "grounding-dino-base": ("grounding-dino", grounding_dino(128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 384),
                            one(933400872), None,
                            INDEX + " The published file has 96 bytes more than these tensors make: not explained."),
    "valor-grounding-dino": ("original", grounding_dino(96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224),
                             [("VALOR-GroundingDINO.pth", None)], None,
                             "Not seen: the original's Swin-T (groundingdino_swint_ogc) tuned, under its names."),
    "moge-2-vits": ("moge", moge2("dinov2_vits14", 384, [5, 11], [0, 1, 1, 1, 0]), [("model.pt", 140550416)], None, ""),
    "moge-2-vitb": ("moge", moge2("dinov2_vitb14", 768, [5, 11], [0, 1, 1, 1, 0]), [("model.pt", 419110160)], None, ""),
    "moge-2-vitl": ("moge", moge2("dinov2_vitl14", 1024, [5, 11, 17, 23], [0, 2, 2, 2, 0]), [("model.pt", 1323815904)],
                    None, ""),
    "qwen3-vl-2b": ("qwen3-vl", qwen3_vl(2048, 6144, 28, 16, True, 24, 1024, 4096, [5, 11, 17]), one(4255140312), None, ""),
    "qwen3-vl-4b": ("qwen3-vl", qwen3_vl(2560, 9728, 36, 32, True, 24, 1024, 4096, [5, 11, 17]),
                    shards(4967229296, 3908490048), 5e9, ""),
    "qwen3-vl-8b": ("qwen3-vl", qwen3_vl(4096, 12288, 36, 32, False, 27, 1152, 4304, [8, 16, 24]),
                    shards(4902275944, 4915962496, 4999831048, 2716270024), 5e9, ""),
}
# Tensors and numbers in all, where the publishers or readers of the files give them.
KNOWN = {"qwen3-0.6b": (311, 751632384), "qwen3-8b": (399, 8190735360), "qwen3-14b": (443, 14768307200),
         "qwen3-vl-4b": (713, 4437815808), "qwen3-vl-8b": (None, 8767123696),
         # 35103656 parameters, and the mean and deviation of pictures.
         "moge-2-vits": (None, 35103662)}


def network(kind, config, device="meta"):
    """transformers' network of a configuration."""
    import torch, transformers as t
    config = json.loads(json.dumps(config))
    parts = {"qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM),
             "qwen3-vl": (t.Qwen3VLConfig, t.Qwen3VLForConditionalGeneration),
             "grounding-dino": (t.GroundingDinoConfig, t.GroundingDinoForObjectDetection)}[kind]
    if kind == "grounding-dino":
        config["backbone_config"] = t.SwinConfig(**config["backbone_config"])
        config["text_config"] = t.BertConfig(**config["text_config"])
    for c in [config, config.get("text_config")]:
        # transformers 5 reads rope_parameters; the hub's files have these two.
        if isinstance(c, dict) and c.get("rope_theta") and int(t.__version__.split(".")[0]) >= 5:
            c["rope_parameters"] = {**(c.get("rope_scaling") or {"rope_type": "default"}), "rope_theta": c["rope_theta"]}
    with torch.device(device):
        return parts[1](parts[0](**{k: v for k, v in config.items() if k not in ("model_type", "architectures")}))


def of_transformers(kind, config):
    """(name, shape) in the state dict's order, a tensor that two names share once."""
    net = network(kind, config)
    tied = set(getattr(net, "_tied_weights_keys", None) or ())
    tied = [re.compile(p) for p in tied]
    drop = lambda n: any(p.search(n) for p in tied) and (kind != "qwen3" and kind != "qwen3-vl")
    if kind in ("qwen3", "qwen3-vl"):
        drop = lambda n: n == "lm_head.weight" and config["tie_word_embeddings"]
    return [(n, list(t.shape)) for n, t in net.state_dict().items() if not drop(n)]


SWIN = [("attention.q_proj", "attention.self.query"), ("attention.k_proj", "attention.self.key"),
        ("attention.v_proj", "attention.self.value"), ("attention.o_proj", "attention.output.dense"),
        ("attention.relative_position_bias.", "attention.self."), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense")]


def of_grounding_dino(config):
    """As of_transformers; and with what the published files hold besides."""
    swin, out = config["backbone_config"], []
    at = "model.backbone.conv_encoder.model."
    for name, shape in of_transformers("grounding-dino", config):
        name = name.replace(at + "swin.", at)
        if ".blocks." in name:
            # transformers 5 renames in memory; the files have the names from before.
            for new, old in SWIN: name = name.replace(new, old)
        # transformers 4's backbone had no last norm; the shared box head is stored once.
        if name.startswith((at + "layernorm.", "model.decoder.bbox_embed.")) or re.match(r"bbox_embed\.[1-9]", name): continue
        if name.endswith("relative_position_index"): continue
        out.append((name, shape))
        if name.endswith("relative_position_bias_table"):
            out.append((name.replace("bias_table", "index"), [swin["window_size"] ** 2] * 2))
    return out


def of_original(config):
    """The original project's names: the map that came with its parity fixture, at this size."""
    names = json.load(open(os.path.join(FIXTURES, "grounding-dino-original", "names_original_to_hf.json")))["map"]
    # The 0 of backbone.0 counts nothing.
    holes = lambda n: re.sub(r"(?<=\.)\d+(?=\.)", "{}", n.replace("backbone.0.", "backbone.#.")).replace("#", "0")
    rules = {}
    for original, rule in names.items():
        if rule["op"] == "copy": rules[holes(rule["hf"])] = (holes(original), 1)
        if rule["op"] == "split3_dim0": rules[holes(rule["hf"][0])] = (holes(original), 3)
    out, window, layers = [], config["backbone_config"]["window_size"], config["decoder_layers"]
    for name, shape in of_grounding_dino(config):
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if name.startswith("bbox_embed.0."):
            rest = name[len("bbox_embed.0."):]
            for i in range(layers):
                out += [(f"transformer.decoder.bbox_embed.{i}.{rest}", shape), (f"bbox_embed.{i}.{rest}", shape)]
        elif name.endswith("relative_position_index"):
            out.append(("backbone.0.layers.{}.blocks.{}.attn.relative_position_index".format(*numbers), shape))
        elif holes(name) in rules:
            to, parts = rules[holes(name)]
            out.append((to.format(*numbers), [shape[0] * parts, *shape[1:]]))
        elif not re.search(r"\.(key|value)\.(weight|bias)$", name):
            sys.exit(f"{name}: no original name")
    d = config["text_config"]["hidden_size"]
    # Read by nobody: labels of the denoising that was not trained, BERT's pooler and stored positions.
    return out + [("label_enc.weight", [2001, config["d_model"]]), ("bert.embeddings.position_ids", [1, 512]),
                  ("bert.pooler.dense.weight", [d, d]), ("bert.pooler.dense.bias", [d])]


def of_moge(config):
    """MoGe-2's state dict for the settings that its released models use."""
    out = []
    def put(name, *shape): out.append((name, list(shape)))
    def layer(name, o, i, *kernel): put(name + ".weight", o, i, *kernel); put(name + ".bias", o)
    def norm(name, d): put(name + ".weight", d); put(name + ".bias", d)
    enc = config["encoder"]
    dim, blocks = {"dinov2_vits14": (384, 12), "dinov2_vitb14": (768, 12), "dinov2_vitl14": (1024, 24)}[enc["backbone"]]
    put("encoder.image_mean", 1, 3, 1, 1); put("encoder.image_std", 1, 3, 1, 1)
    b = "encoder.backbone."
    put(b + "cls_token", 1, 1, dim); put(b + "pos_embed", 1, 37 * 37 + 1, dim); put(b + "mask_token", 1, dim)
    layer(b + "patch_embed.proj", dim, 3, 14, 14)
    for i in range(blocks):
        p = f"{b}blocks.{i}."
        norm(p + "norm1", dim); layer(p + "attn.qkv", 3 * dim, dim); layer(p + "attn.proj", dim, dim); put(p + "ls1.gamma", dim)
        norm(p + "norm2", dim); layer(p + "mlp.fc1", 4 * dim, dim); layer(p + "mlp.fc2", dim, 4 * dim); put(p + "ls2.gamma", dim)
    norm(b + "norm", dim)
    for i in range(len(enc["intermediate_layers"])): layer(f"encoder.output_projections.{i}", enc["dim_out"], dim, 1, 1)
    for part in ("neck", "points_head", "normal_head", "mask_head"):
        s = config[part]; w = s["dim_res_blocks"]
        for i, d in enumerate(s["dim_in"]):
            if d is not None: layer(f"{part}.input_blocks.{i}", w[i], d, 1, 1)
        for i, kind in enumerate(s["resamplers"]):
            p = f"{part}.resamplers.{i}."
            if kind == "conv_transpose":
                put(p + "0.weight", w[i], w[i + 1], 2, 2); put(p + "0.bias", w[i + 1]); layer(p + "1", w[i + 1], w[i + 1], 3, 3)
            else: layer(p + "1", w[i + 1], w[i], 3, 3)
        for i, n in enumerate(s["num_res_blocks"]):
            for j in range(n):
                for k in (2, 5): layer(f"{part}.res_blocks.{i}.{j}.layers.{k}", w[i], w[i], 3, 3)
        for i, d in enumerate(s["dim_out"] or []):
            if d is not None: layer(f"{part}.output_blocks.{i}", d, w[i], 1, 1)
    dims = config["scale_head"]["dims"]
    for i in range(len(dims) - 1): layer(f"scale_head.{2 * i}", dims[i + 1], dims[i])
    return out


def place_in_qwen3_vl(name):
    """Where the published shards have a tensor: text, then vision, then the head. Their sizes say so."""
    if name == "lm_head.weight": return (3,)
    if ".visual." in name: return (2,)
    layer = re.search(r"layers\.(\d+)\.(self_attn\.)?(\w+)", name)
    if not layer: return (0,) if "embed_tokens" in name else (1, 1 << 20)
    order = ["o_proj", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "mlp"]
    return 1, int(layer[1]), order.index(layer[3])


def tensors_of(name):
    """(name, shape, dtype) in the order in which the file's writer met them."""
    kind, config, _, _, note = PRESETS[name]
    if kind == "moge": found = of_moge(config)
    elif kind == "original": found = of_original(config)
    elif kind == "grounding-dino": found = of_grounding_dino(config)
    else:
        found = of_transformers(kind, config)
        if kind == "qwen3-vl": found.sort(key=lambda t: place_in_qwen3_vl(t[0]))
        if note == HEAD: found.append(("lm_head.weight", dict(found)["model.embed_tokens.weight"]))
    float_type = "BF16" if kind.startswith("qwen3") else "F32"
    whole = ("relative_position_index", "position_ids")
    return [(n, s, "I64" if n.endswith(whole) else float_type) for n, s in found]


def product(shape):
    n = 1
    for d in shape: n *= d
    return n

size = lambda tensor: product(tensor[1]) * BYTES[tensor[2]]


def cut(tensors, files, limit):
    """The tensors of each file: in order, a new file where the next tensor would go beyond the limit."""
    if len(files) == 1: return [tensors]
    out, held = [[]], 0
    for t in tensors:
        if held + size(t) > limit: out.append([]); held = 0
        out[-1].append(t); held += size(t)
    return out


def header(tensors):
    """safetensors' header: by width of the type, widest first, then by name; padded to 8 bytes."""
    rank, at, h = {"I64": 0, "F32": 1, "BF16": 2}, 0, {"__metadata__": {"format": "pt"}}
    for t in sorted(tensors, key=lambda t: (rank[t[2]], t[0])):
        h[t[0]] = {"dtype": t[2], "shape": t[1], "data_offsets": [at, at + size(t)]}; at += size(t)
    text = json.dumps(h, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, at


def fold(shapes):
    """Runs of numbers in names to `{first-last}`, the last number of a name first."""
    for place in range(3, -1, -1):
        groups, rest = {}, {}
        for name, shape in shapes.items():
            parts = name.split(".")
            at = [i for i, p in enumerate(parts) if p.isdigit() or p.startswith("{")]
            if len(at) <= place or not parts[at[place]].isdigit(): rest[name] = shape; continue
            i = at[place]
            groups.setdefault((".".join(parts[:i]), ".".join(parts[i + 1:]), tuple(shape)), []).append(int(parts[i]))
        for (head, tail, shape), numbers in groups.items():
            numbers.sort()
            while numbers:
                n = 1
                while n < len(numbers) and numbers[n] == numbers[0] + n: n += 1
                run = f"{{{numbers[0]}-{numbers[n - 1]}}}" if n > 1 else str(numbers[0])
                rest[".".join(p for p in (head, run, tail) if p)] = list(shape)
                numbers = numbers[n:]
        shapes = rest
    return dict(sorted(shapes.items()))


def write_tables(a):
    os.makedirs(a.out, exist_ok=True)
    for name in a.only:
        kind, config, files, limit, note = PRESETS[name]
        tensors = tensors_of(name)
        shapes = {n: s for n, s, _ in tensors}
        assert len(shapes) == len(tensors), f"{name}: a name twice"
        numbers = sum(product(s) for s in shapes.values())
        parts = cut(tensors, files, limit)
        assert len(parts) == len(files), f"{name}: {len(parts)} shards, published are {len(files)}"
        seen, exact = 0, kind != "moge" and all(s is not None for _, s in files)
        for (file, published), held in zip(files, parts):
            head, data = header(held)
            seen += len(head) + data
            if file.endswith(".safetensors") and published is not None and len(head) + data != published:
                print(f"{name}/{file}: {len(head) + data} bytes, published are {published}", flush=True); exact = False
        for want, have in zip(KNOWN.get(name, (None, None)), (len(tensors), numbers)):
            assert want in (None, have), f"{name}: {have}, known are {want}"
        table = dict(preset=name, note=note, config={"model_config": config} if kind == "moge" else config,
                     files=[list(f) for f in files], tensors=len(tensors), numbers=numbers,
                     dtype=tensors[0][2] if kind.startswith("qwen3") else "F32", shapes=fold(shapes))
        if kind == "original": table["config"] = None
        text = json.dumps(table, indent=1)
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
        open(os.path.join(a.out, name + ".json"), "w").write(text + "\n")
        print(f"{name:<22} {len(tensors):>5} tensors {numbers:>14,} numbers {seen:>15,} bytes"
              f"  {'as published, to the byte' if exact else ''}", flush=True)


class Holes:
    """A file whose blocks of zeros are not written."""
    def __init__(self, path): self.f = open(path, "wb")
    def write(self, b):
        b = bytes(b)
        for i in range(0, len(b), 1 << 16):
            block = b[i:i + (1 << 16)]
            if block.count(0) == len(block): self.f.seek(len(block), 1)
            else: self.f.write(block)
        return len(b)
    def flush(self): self.f.flush()
    def close(self): self.f.truncate(self.f.tell()); self.f.close()


def pickled(name, path):
    """As torch.save writes MoGe's and the original GroundingDINO's checkpoints."""
    import torch
    kind, config = PRESETS[name][:2]
    types = {"F32": torch.float32, "I64": torch.int64}
    state = {n: torch.zeros(s, dtype=types[d]) for n, s, d in tensors_of(name)}
    file = Holes(path)
    torch.save({"model": state, **({"model_config": config} if kind == "moge" else {})}, file)
    file.close()


def write_files(a):
    for name in a.only:
        kind, config, files, limit, _ = PRESETS[name]
        folder = os.path.join(a.out, name)
        os.makedirs(folder, exist_ok=True)
        if kind in ("qwen3", "qwen3-vl", "grounding-dino"):
            json.dump(config, open(os.path.join(folder, "config.json"), "w"), indent=2)
        if files[0][0].endswith((".pt", ".pth")):
            pickled(name, os.path.join(folder, files[0][0]))
            print(folder, flush=True); continue
        index, total = {}, 0
        for (file, _), held in zip(files, cut(tensors_of(name), files, limit)):
            head, data = header(held)
            with open(os.path.join(folder, file), "wb") as f: f.write(head); f.truncate(len(head) + data)
            index.update({t[0]: file for t in held}); total += data
        if len(files) > 1:
            json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
                      open(os.path.join(folder, "model.safetensors.index.json"), "w"), indent=2)
        print(folder, flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["tables", "files"])
    p.add_argument("--out"); p.add_argument("--only", default="")
    a = p.parse_args()
    a.only = [n for n in a.only.split(",") if n] or list(PRESETS)
    unknown = [n for n in a.only if n not in PRESETS]
    if unknown: sys.exit(f"{unknown[0]}: no preset; there are {', '.join(PRESETS)}")
    if a.what == "files" and not a.out: sys.exit("files needs --out DIR")
    a.out = a.out or os.path.join(FIXTURES, "presets")
    (write_tables if a.what == "tables" else write_files)(a)
