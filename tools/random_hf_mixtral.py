#!/usr/bin/env python3
"""Write a Hugging Face folder in Mixtral's shape with random BF16 weights: for speed and memory
measurements of `quantize` (docs/quantize.md), not for reading. Two layers of 8x7B are 6.3 GB.

  pip install numpy
  tools/random_hf_mixtral.py FOLDER --layers 2 --tokenizer tests/data/tokenizers/mixtral-8x7b.tokenizer.model

With --empty no weights are written (the files have holes, and need no numpy): enough for `quantize --dry-run`.
"""
import argparse
import json
import pathlib
import shutil
from math import prod

# d_model, d_ff, d_kv, vocabulary, layers, heads, context
SHAPES = {
    "8x7b": (4096, 14336, 1024, 32000, 32, 32, 32768),
    "8x22b": (6144, 16384, 1024, 32768, 56, 48, 65536),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=pathlib.Path)
    p.add_argument("--tokenizer", required=True, help="a SentencePiece model of 32000 pieces (8x22b: 32768)")
    p.add_argument("--shape", choices=SHAPES, default="8x7b")
    p.add_argument("--layers", type=int, help="fewer than the model has")
    p.add_argument("--empty", action="store_true", help="headers only")
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    if not a.empty:
        import numpy as np

        rng = np.random.default_rng(0)
    d, ff, kv, vocab, layers, heads, context = SHAPES[a.shape]
    layers, experts = a.layers or layers, 8
    config = {
        "architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": d,
        "intermediate_size": ff, "max_position_embeddings": context, "num_attention_heads": heads,
        "num_experts_per_tok": 2, "num_hidden_layers": layers, "num_key_value_heads": 8,
        "num_local_experts": experts, "rms_norm_eps": 1e-05, "rope_theta": 1e6, "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    (a.folder / "config.json").write_text(json.dumps(config))
    shutil.copy(a.tokenizer, a.folder / "tokenizer.model")
    shards = [[("model.embed_tokens.weight", (vocab, d)), ("model.norm.weight", (d,)), ("lm_head.weight", (vocab, d))]]
    for l in range(layers):
        b = f"model.layers.{l}."
        shard = [(b + "input_layernorm.weight", (d,)), (b + "post_attention_layernorm.weight", (d,)),
                 (b + "self_attn.q_proj.weight", (d, d)), (b + "self_attn.k_proj.weight", (kv, d)),
                 (b + "self_attn.v_proj.weight", (kv, d)), (b + "self_attn.o_proj.weight", (d, d)),
                 (b + "block_sparse_moe.gate.weight", (experts, d))]
        for e in range(experts):
            for w, shape in ("w1", (ff, d)), ("w2", (d, ff)), ("w3", (ff, d)):
                shard.append((b + f"block_sparse_moe.experts.{e}.{w}.weight", shape))
        shards.append(shard)
    where = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for tensor, shape in shard:
            size = 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            where[tensor] = name
            at += size
        header = json.dumps(header).encode()
        with open(a.folder / name, "wb") as f:
            f.write(len(header).to_bytes(8, "little") + header)
            if a.empty:
                f.truncate(f.tell() + at)
                continue
            for tensor, shape in shard:
                n = prod(shape)
                for at in range(0, n, 1 << 24):
                    x = rng.standard_normal(min(1 << 24, n - at), np.float32) * np.float32(0.02)
                    if len(shape) == 1:
                        x = np.ones(n, np.float32)
                    f.write((x.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    index = {"metadata": {}, "weight_map": where}
    (a.folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
