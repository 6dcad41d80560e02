"""A LLaMA of the hub in float64, as its equations are printed: the slow reference, a head and a position at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


def plain_llama(folder: Path, tokens: Tensor) -> Tensor:
    """(T,) -> (T, V)."""
    about = json.loads((folder / "config.json").read_text())
    state = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, kv_heads, epsilon = (about[name] for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps"))
    width = about.get("head_dim") or about["hidden_size"] // heads
    base = (about.get("rope_parameters") or about)["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * state[name]

    def turned(x: Tensor) -> Tensor:
        """One head (T, d)."""
        half = width // 2
        angle = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(half).double() / half)
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = state["model.embed_tokens.weight"][tokens]
    hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(about["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm.weight")
        query, key, value = (y @ state[f"{at}.self_attn.{one}_proj.weight"].T for one in "qkv")
        outs = []
        for head in range(heads):
            mine, shared = (slice(number * width, (number + 1) * width)
                            for number in (head, head // (heads // kv_heads)))
            scores = turned(query[:, mine]) @ turned(key[:, shared]).T / width**0.5
            outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, shared])
        x = x + torch.cat(outs, -1) @ state[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (y @ state[f"{at}.mlp.{one}_proj.weight"].T for one in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ state[f"{at}.mlp.down_proj.weight"].T
    table = state["model.embed_tokens.weight" if about.get("tie_word_embeddings") else "lm_head.weight"]
    return norm(x, "model.norm.weight") @ table.T
