"""Writes a source's weights into a model of ours, as placement.py says, and tells what became of each part."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dlcm_lightning.model import mup
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.upcycling.placement import Placement
from dlcm_lightning.upcycling.source import EMBEDDING, NORM, PIECES, UNEMBEDDING, DenseSource, layer_name
from dlcm_lightning.upcycling.widening import rows_of, widen

OUT, UP = "cross_attention.out.weight", "pool.up.weight"


class Filling:
    """Of a model that the muP table has filled."""

    def __init__(self, model: LanguageModel, source: DenseSource, placement: Placement, seed: int) -> None:
        """seed: of the noise of widening."""
        self.source, self.placement, self.seed = source, placement, seed
        self.config = model.config
        self.owners = dict(mup.role_parameters(model))
        self.filled: set[str] = set()

    def report(self) -> Iterator[str]:
        """Does it; a line for each part."""
        source, placement, config = self.source, self.placement, self.config
        yield _line("embedding", self._write(EMBEDDING, source.get(EMBEDDING)), "copied")
        if config.kind == "dlcm":
            yield _line("encoder", self._stack("encoder", placement.encoder),
                        f"copied from {_numbers(placement.encoder)}")
            yield from self._concepts()
        yield _line("decoder", self._stack("decoder", placement.decoder) + self._write(NORM, source.get(NORM)),
                    f"copied from {_numbers(placement.decoder)}, and the final norm")
        count = self._write(UNEMBEDDING, source.get(UNEMBEDDING) / mup.logit_scale(config))
        yield _line("unembedding", count, ("a copy of the embedding, tied in the source" if source.tied else "copied")
                    + f", times s_token = {config.s_token:g}")
        yield from self._made()
        if skipped := placement.skipped(source.shape.layers):
            yield _line("left out", 0, f"{_numbers(tuple(skipped))} at token rate: the first loss is not the source's")

    def _concepts(self) -> Iterator[str]:
        """What stands between encoder and decoder."""
        placement = self.placement
        if placement.backbone:
            copied = placement.times * placement.units == 1
            how = "copied" if copied else f"widened (width x {placement.times}, units x {placement.units})"
            yield _line("backbone", self._stack("backbone", placement.backbone, placement.times, placement.units),
                        f"{how} from {_numbers(placement.backbone)}")
            stacked = ", stacked" if placement.times > 1 else ""
            identity = rows_of(torch.eye(self.config.d_token), placement.times)
            yield _line("pool", self._write(UP, identity), f"W_up: the identity{stacked}")
        else:
            yield _line("backbone", 0, f"nothing is taken over: {placement.why_made}")
        yield _line("cross-attention", self._write(OUT, torch.zeros(self.owners[OUT].shape)),
                    "out: zero, so that it adds nothing at first")

    def _made(self) -> Iterator[str]:
        """What the muP table has left there."""
        made = {name: self.owners[name].shape.numel() for name in self.owners if name not in self.filled}
        for part in dict.fromkeys(name.partition(".")[0] for name in made):
            words = ("made: identities" if part == "boundary" else
                     "made: the final norm, ones" if part == "backbone" and self.placement.backbone else
                     "made, drawn by the muP table")
            yield _line(part.replace("_", "-"),
                        sum(count for name, count in made.items() if name.startswith(f"{part}.")), words)

    def _stack(self, stack: str, layers: tuple[int, ...], times: int = 1, units: int = 1) -> int:
        """Writes layers of the source; how many numbers that is."""
        count = 0
        for place, layer in enumerate(layers):
            for within in PIECES:
                target, value = layer_name(stack, place, within), self.source.get(layer_name("decoder", layer, within))
                if times * units > 1:
                    seed = self.seed + zlib.crc32(target.encode())
                    value = widen(within, value, self.source.shape, times, units, seed)
                count += self._write(target, value)
        return count

    @torch.no_grad()
    def _write(self, name: str, value: Tensor) -> int:
        self.owners[name].weight.copy_(value)
        self.filled.add(name)
        return value.numel()


def _line(part: str, parameters: int, words: str) -> str:
    return f"{part:<16}{parameters:>14,}  {words}"


def _numbers(layers: tuple[int, ...]) -> str:
    """layers 0-14, or layers 3, 7, 11."""
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
