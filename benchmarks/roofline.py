"""What a training step has to move and multiply, counted without a GPU: `python -m benchmarks.roofline [CONFIG]`.

The LightningModule runs on the `meta` device, which has shapes and no numbers, and every operation that reaches a
kernel is counted: one launch, what it reads and what it writes. Of a compiled kernel are counted its arguments and
results, which is what it is compiled for. Counted are the micro-batches of one optimizer step, with M concepts on
target, their losses and statistics too; numbers are of one of them on average. Clipping and the optimizer are counted
apart. Beside them stand those of commit d598d5c, counted in the same way (`benchmarks/results/roofline_before.json`).

From bytes and FLOPs follows the time that they take at the rates of a GPU, printed with it, and the MFU that this
allows: an upper bound, since nothing waits and nothing is launched too late.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rows import synthetic_batch
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.flops import forward_flops, training_flops_per_token
from dlcm_lightning.model.dlcm import LanguageModel, assemble
from dlcm_lightning.ops import attention as attention_module
from dlcm_lightning.ops import cross_entropy, fused, linear, segments
from dlcm_lightning.ops.fused import EAGER, Kernels, UsesKernels
from dlcm_lightning.training.module import PretrainModule

RESULTS = Path("benchmarks/results/roofline.json")
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "_unsafe_view", "t", "transpose",
        "permute", "slice", "select", "split", "split_with_sizes", "expand", "unsqueeze", "squeeze", "as_strided",
        "alias", "unbind", "chunk", "unflatten", "lift_fresh", "_reshape_alias", "diagonal", "sym_size", "narrow"}
"""Operations that launch nothing."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", "dtype", "dtype_out"}


@dataclass(frozen=True)
class Card:
    """Rates of a GPU."""

    peak: float
    """FLOP/s of bf16 products, by its data sheet."""
    products: float
    """FLOP/s that products reach in a step."""
    tokens: tuple[float, float]
    """FLOP/s of attention over tokens, forward and backward (2.5 times the forward's), documents of 8,192 tokens."""
    concepts: tuple[float, float]
    """The same over concepts, documents of 2,048 of them."""
    bandwidth: float
    """Bytes/s that a copy reaches."""


MEASURED = Card(
    989.4e12,
    837e12,  # `step`: its products in its time, 639 TFLOP in 36.5 % of 2.09 s
    (316e12, 267e12),  # `flex`, blocks a and default; `attention`, 8192/24/24: 0.65 and 1.93 ms
    (122e12, 103e12),  # `attention`, 2048/48/24, varlen_det
    0.9 * 4.3e12,  # not measured by us: nine tenths of what copies are known to reach
)
"""An H200, by benchmarks/results/h200.json but for the last."""


def scaled(peak: float, bandwidth: float) -> Card:
    """Another card, by its data sheet. bandwidth: that a copy reaches, TB/s."""
    faster = peak / MEASURED.peak
    return Card(peak, faster * MEASURED.products, (faster * MEASURED.tokens[0], faster * MEASURED.tokens[1]),
                (faster * MEASURED.concepts[0], faster * MEASURED.concepts[1]), 0.9e12 * bandwidth)


CARDS = {"H200": MEASURED, "H100": scaled(989.4e12, 3.0), "B200": scaled(2250e12, 7.2)}
BEFORE = Path("benchmarks/results/roofline_before.json")


@dataclass
class Tally:
    """Of one thing."""

    launches: float = 0
    bytes: float = 0


@dataclass
class Count:
    """By part."""

    parts: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))

    def add(self, part: str, tensors: list[Any], launches: int = 1) -> None:
        tally = self.parts[part]
        tally.launches += launches
        tally.bytes += sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))

    def share(self, number: int) -> Count:
        """Of one of so many."""
        return Count({part: Tally(one.launches / number, one.bytes / number) for part, one in self.parts.items()})

    def total(self, *without: str) -> Tally:
        kept = [tally for part, tally in self.parts.items() if part not in without]
        return Tally(sum(one.launches for one in kept), sum(one.bytes for one in kept))


class Counting(TorchDispatchMode):
    """Counts what reaches a kernel, unless something that was counted as a whole is under way."""

    def __init__(self, weights: set[torch.Size]) -> None:
        super().__init__()
        self.count, self.weights = Count(), weights
        self.inside = ""
        """The part that everything belongs to."""
        self.silent = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        out = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if self.silent or name in FREE or function.is_view:
            return out
        read, written = tree_leaves((arguments, keywords)), tree_leaves(out)
        tensors = [one for one in [*read, *written] if isinstance(one, Tensor)]
        if name.endswith("_") or name in ("copy_",):  # writes what it reads from
            tensors = [one for one in read if isinstance(one, Tensor)]
            tensors += tensors[:1] if name not in ("copy_", "fill_", "zero_") else []
        if not tensors:
            return out
        if name in PRODUCTS:
            part = "products"
        elif name.startswith(("_foreach", "_fused")):
            part = "optimizer"
        elif any(one.shape in self.weights for one in tensors) and name not in ("embedding", "rms_norm"):
            part = self.inside or "weights"
        else:
            part = self.inside or "rest"
        self.count.add(part, tensors)
        return out

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        before, self.silent = self.silent, True
        yield
        self.silent = before


class _Whole(torch.autograd.Function):
    """A function counted by its arguments and results, forward and backward."""

    @staticmethod
    def forward(ctx: Any, counting: Counting, part: str, launches: int, function: Callable[..., Any], *arguments: Any
                ) -> Any:
        ctx.save_for_backward(*(one for one in arguments if isinstance(one, Tensor)))
        ctx.rest = counting, part, launches, function, [None if isinstance(one, Tensor) else one for one in arguments]
        with counting.quiet():
            out = function(*arguments)
        counting.count.add(part, [*arguments, *tree_leaves(out)])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        counting, part, launches, function, rest = ctx.rest
        tensors = ctx.saved_tensors  # asked for once: what is recomputed is given once
        saved = iter(tensors)
        arguments = [next(saved).detach().requires_grad_() if one is None else one for one in rest]
        with counting.quiet(), torch.enable_grad():
            floating = [one for one in arguments if isinstance(one, Tensor) and one.is_floating_point()]
            found = dict(zip(map(id, floating), torch.autograd.grad(
                function(*arguments), floating, grads, allow_unused=True), strict=True))
        given = [found.get(id(one)) for one in arguments]
        counting.count.add(part, [*([*grads, *tensors] * launches), *given], launches)  # each reads everything
        return None, None, None, None, *given


def as_on_a_gpu(counting: Counting) -> Kernels:
    """Kernels as they run op by op on a GPU, whose norm is one kernel; on meta it is several."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, wide: Tensor, gain: Tensor, epsilon: float) -> Tensor:
            ctx.save_for_backward(wide, gain)
            counting.count.add("norms", [wide, wide])
            with counting.quiet():
                return torch.empty_like(wide)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
            wide, gain = ctx.saved_tensors
            counting.count.add("norms", [wide, wide, wide], 2)
            with counting.quiet():
                return torch.empty_like(wide), torch.empty_like(gain), None

    def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        out: Tensor = Norm.apply(x.float(), gain, epsilon)
        return out.to(x.dtype)

    return replace(EAGER, rms_norm=rms_norm,
                   add_norm=lambda x, delta, gain, epsilon: (total := x + delta, rms_norm(total, gain, epsilon)))


def as_compiled(counting: Counting) -> Kernels:
    """Kernels that are counted as if they were compiled."""

    def whole(part: str, launches: int, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: _Whole.apply(counting, part, launches, function, *arguments)

    def softmax_gradient(logits: Tensor, targets: Tensor, scale: float, differentiate: bool) -> Tensor:
        counting.count.add("head", [targets, targets, targets, targets], 2)  # each one's own logit
        counting.count.add("head", [logits, targets])  # maximum and sum
        counting.count.add("head", [logits, logits])  # read, and overwritten by the gradient
        with counting.quiet():
            return EAGER.softmax_gradient(logits, targets, scale, differentiate)

    return Kernels(whole("norms", 2, fused.rms_norm), whole("norms", 2, fused.add_norm),
                   whole("SwiGLU", 1, fused.swiglu), whole("rotary", 1, fused.rotate_split), softmax_gradient)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counting: Counting, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.counting = counting
        with counting.quiet():
            out = torch.empty_like(query)
        counting.count.add("attention", [query, key, value, out])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = ctx.saved_tensors
        with ctx.counting.quiet():
            found = [torch.empty_like(one) for one in tensors]
        ctx.counting.count.add("attention", [*grads, *grads, *tensors, *found], 3)
        return None, *found


def count_step(config: Config, compiled: bool, documents: str) -> tuple[Count, Count]:
    """Of a micro-batch, forward and backward, on average over an optimizer step; and of clipping and optimizer."""
    batches = [synthetic_batch(config, documents, number) for number in range(config.micro_batches)]
    tokens = batches[0].stream.shape[0] * batches[0].sequence_length
    model: LanguageModel = assemble(config.model, torch.bfloat16, "meta", config.train.recompute).to("meta")
    module = PretrainModule(config, torch.bfloat16, "meta", torch.ones(config.model.vocab_size, dtype=torch.int64))
    module.model = model
    module.to("meta")
    counting = Counting({one.shape for one in model.parameters() if one.dim() == 2})
    kernels = as_compiled(counting) if compiled else as_on_a_gpu(counting)
    for part in model.modules():
        if isinstance(part, UsesKernels):
            part.kernels = kernels
    copies = model.keep_low_copies()
    concepts = round(tokens / config.model.boundary.target_ratio)
    there = [batch.to("meta") for batch in batches]
    head = cross_entropy._LinearCrossEntropy.forward

    def headed(*arguments: Any) -> Any:
        counting.inside = "head"
        out = head(*arguments)
        counting.inside = ""
        return out

    attend = {"meta": lambda query, key, value, _: _Attention.apply(counting, query, key, value)}
    def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
        counting.count.add("products", [total, left, right, total])

    with contextlib.ExitStack() as stack:
        # What a shape cannot say is put in: the number of concepts, and what kernels and tables know of a GPU.
        stack.enter_context(patch.dict(attention_module.BACKENDS, attend))
        stack.enter_context(patch.object(segments.HostNumber, "__int__", lambda _: concepts))
        stack.enter_context(patch.dict(cross_entropy.CHUNK_ELEMENTS, meta=cross_entropy.CHUNK_ELEMENTS["cuda"]))
        stack.enter_context(patch.dict(cross_entropy.VOCABULARY_MULTIPLE,
                                       meta=cross_entropy.VOCABULARY_MULTIPLE["cuda"]))
        stack.enter_context(patch.object(linear, "WIDENING", {"meta"}))
        stack.enter_context(patch.object(cross_entropy, "add_product", add_product))  # torch 2.12 has none on meta
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()))  # knows no meta
        stack.enter_context(patch.object(cross_entropy._LinearCrossEntropy, "forward", staticmethod(headed)))
        stack.enter_context(counting)
        for number in range(config.micro_batches):
            module.training_step(there[number], number).backward()
        micro_batch, counting.count = counting.count.share(config.micro_batches), Count()
        parameters = [one for one in model.parameters() if one.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for one in parameters:  # the fused kernel reads and writes weight and moments, and reads the gradient
            counting.count.add("optimizer", [one] * 7, 0)
        counting.count.add("optimizer", [], 10)
        if copies is not None:
            copies.refresh()
        module.after_step()
    return micro_batch, counting.count


def seconds(config: Config, card: Card, micro_batch: Count, step: Count, document_tokens: float) -> dict[str, float]:
    """Of one micro-batch, by what causes it."""
    model, tokens = config.model, config.data.micro_batch_size * config.data.sequence_length
    flops = forward_flops(model, document_tokens)
    feed_forward = 6 * model.decoder_layers * model.d_token * model.ffn_token
    if model.kind == "dlcm":
        feed_forward += 6 * model.encoder_layers * model.d_token * model.ffn_token
        feed_forward += 6 * model.backbone_layers * model.d_concept * model.ffn_concept / model.boundary.target_ratio
    again = {"none": 0.0, "selective": feed_forward, "full": flops.body}[config.train.recompute]
    products = (3 * (flops.total - flops.attention_maps) + again) * tokens
    layers = model.decoder_layers + (model.encoder_layers + 1 if model.kind == "dlcm" else 0)  # 1: the cross-attention
    of_tokens = replace(model, kind="dense", encoder_layers=0, backbone_layers=0, decoder_layers=layers)
    over_tokens = forward_flops(of_tokens, document_tokens).attention_maps * tokens
    over_concepts = flops.attention_maps * tokens - over_tokens
    forwards = 1 + (config.train.recompute == "full")
    moved = micro_batch.total("products", "attention").bytes
    return {"products": products / card.products,
            "attention over tokens": over_tokens * (forwards / card.tokens[0] + 2.5 / card.tokens[1]),
            "attention over concepts": over_concepts * (forwards / card.concepts[0] + 2.5 / card.concepts[1]),
            "moving bytes": moved / card.bandwidth,
            "optimizer and clipping": step.total().bytes / card.bandwidth / config.micro_batches}


def report(config: Config, documents: str) -> dict[str, Any]:
    """All numbers of a configuration."""
    document = float(documents)
    tokens = config.data.micro_batch_size * config.data.sequence_length
    useful = training_flops_per_token(config.model, document) * tokens
    found: dict[str, Any] = {"name": config.name, "rows": config.data.micro_batch_size, "documents": documents,
                             "recompute": config.train.recompute, "micro_batches": config.micro_batches,
                             "useful_flops": useful}
    forward = forward_flops(config.model, document)
    parts = ("body", "connections", "unembedding", "attention_maps")
    found["flops"] = {part: 3 * tokens * getattr(forward, part) for part in parts}
    for mode in ("eager", "compiled"):
        micro_batch, step = count_step(config, mode == "compiled", documents)
        elementwise = micro_batch.total("products", "attention")
        one: dict[str, Any] = {
            "launches": micro_batch.total().launches, "elementwise_gigabytes": elementwise.bytes / 1e9,
            "parts": {part: {"launches": tally.launches, "gigabytes": tally.bytes / 1e9}
                      for part, tally in sorted(micro_batch.parts.items(), key=lambda item: -item[1].bytes)},
            "optimizer_gigabytes": step.total().bytes / 1e9, "cards": {}}
        for name, card in CARDS.items():
            spent = seconds(config, card, micro_batch, step, document)
            one["cards"][name] = {"milliseconds": {part: 1e3 * value for part, value in spent.items()},
                                  "mfu": useful / sum(spent.values()) / card.peak}
        found[mode] = one
    return found


def before(found: dict[str, Any]) -> dict[str, Any] | None:
    """The same at commit d598d5c, where it was counted: that configuration, in steps of four micro-batches."""
    counted: dict[str, Any] | None = json.loads(BEFORE.read_text())["rows"].get(str(found["rows"]))
    same = ("documents", "recompute", "micro_batches", "useful_flops")
    return counted if counted is not None and all(counted[name] == found[name] for name in same) else None


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['name']}, {found['rows']} rows a micro-batch, documents of {found['documents']}, recompute "
          f"{found['recompute']}: {found['useful_flops'] / 1e12:.1f} TFLOP")
    print("    " + ", ".join(f"{part} {flops / 1e12:.2f} TFLOP" for part, flops in found["flops"].items()))
    if (old := before(found)) is not None:
        print(f"  d598d5c: {old['launches']:.0f} launches, {old['elementwise_gigabytes']:.0f} GB beside products and "
              "attention")
    for mode in ("eager", "compiled"):
        one = found[mode]
        if old is not None:
            print(f"  {mode}: {100 * one['launches'] / old['launches']:.0f} % of its launches, "
                  f"{100 * one['elementwise_gigabytes'] / old['elementwise_gigabytes']:.0f} % of its bytes")
        print(f"  {mode}: {one['launches']:.0f} launches, {one['elementwise_gigabytes']:.0f} GB beside products and "
              f"attention; the optimizer {one['optimizer_gigabytes']:.0f} GB a step")
        print("    " + ", ".join(f"{part} {tally['gigabytes']:.1f} GB ({tally['launches']:.0f})"
                                 for part, tally in one["parts"].items()))
        for name, card in one["cards"].items():
            print(f"    {name}: " + ", ".join(f"{part} {value:.0f} ms" for part, value in card["milliseconds"].items())
                  + f": at most {100 * card['mfu']:.0f} % MFU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/run/dlcm_2b_1t.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--documents", default="8192", help="tokens of each")
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2], help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of an optimizer step")
    arguments = parser.parse_args()
    found = []
    for rows in arguments.rows:
        config = load_config(arguments.config, [f"data.micro_batch_size={rows}", "train.devices=1", "train.nodes=1",
                                                f"data.global_batch_size={rows * arguments.micro_batches}",
                                                *arguments.overrides])
        found.append(report(config, arguments.documents))
        show(found[-1])
    print("\nAssumed: " + "; ".join(
        f"{name}: peak {card.peak / 1e12:.0f}, products {card.products / 1e12:.0f}, attention forward and backward "
        f"{card.tokens[0] / 1e12:.0f} and {card.tokens[1] / 1e12:.0f} over tokens, {card.concepts[0] / 1e12:.0f} and "
        f"{card.concepts[1] / 1e12:.0f} TFLOP/s over concepts, {card.bandwidth / 1e12:.2f} TB/s"
        for name, card in CARDS.items()))
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "configurations": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
