"""A training step of litgpt's dense model of dense_1b's shape: `python -m benchmarks.peers.litgpt_step`.

litgpt's `GPT`, compiled, under bf16 autocast with weights in fp32, its chunked cross-entropy, fused AdamW and clipping,
as `litgpt pretrain` puts them together; attention over whole rows, since it knows no documents, and not in torch's
deterministic mode, since it asks for none. To be run beside `python -m benchmarks.step configs/run/dense_1b_1t.yaml`
on the same card; needs `pip install litgpt` and a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from litgpt.config import Config as LitConfig
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from dlcm_lightning.compose import load_config
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.training.device import peak_flops

WARMUP, STEPS = 3, 6
PADDED = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/run/dense_1b_1t.yaml")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.config, [])
    model, length = config.model, config.data.sequence_length
    device = torch.device("cuda", 0)
    vocabulary = model.vocab_size + -model.vocab_size % PADDED
    with device:
        network = GPT(LitConfig(
            block_size=length, padded_vocab_size=vocabulary, vocab_size=model.vocab_size, n_layer=model.decoder_layers,
            n_embd=model.d_token, n_head=model.heads_token, n_query_groups=model.kv_heads_token,
            head_size=model.head_dim, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=model.ffn_token))
    network.max_seq_length = length
    compiled = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(0, model.vocab_size, (arguments.rows, length + 1), device=device)

    def step() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(arguments.micro_batches):
            with torch.autocast("cuda", torch.bfloat16):
                loss = chunked_cross_entropy(compiled(rows[:, :-1]), rows[:, 1:])
            (loss / arguments.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds = statistics.median([step() for _ in range(WARMUP + STEPS)][WARMUP:])
    tokens = arguments.rows * length * arguments.micro_batches
    rate = tokens / seconds * training_flops_per_token(model, length)
    peak = peak_flops(torch.bfloat16, device)
    found = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": arguments.rows,
             "sequence_length": length, "step_seconds": seconds, "tokens_per_second": tokens / seconds,
             "mfu": rate / peak if peak else None, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    print(json.dumps(found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
