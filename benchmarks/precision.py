"""What bf16 changes in a trained model, whole and cached: `python -m benchmarks.precision runs/quickstart`.

Boundaries of validation rows by four computations: fp32 and bf16, one packed forward and a token at a time. Shares of
decisions that differ from the fp32 forward's; and, where boundaries are the same up to a token, the largest difference
of logits there, as a share of the largest logit. Everything is thresholded, as at inference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.export.portable import model_of, open_trained
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.segments import Segments

RESULTS = Path("benchmarks/results/precision.json")


def documents_of(batches: ValidationBatches, most: int) -> list[Tensor]:
    """Token ids of the first documents."""
    found: list[Tensor] = []
    for batch in batches:
        found += list(batch.tokens.long().split(batch.documents.lengths().tolist()))
        if len(found) >= most:
            break
    return found[:most]


def whole(model: LanguageModel, documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(T,) bool boundaries and (T, V) logits of one packed forward."""
    output = model(torch.cat(documents), Segments.from_lengths([len(one) for one in documents]))
    assert output.segmentation is not None, "a dense model has no boundaries"
    return output.segmentation.boundaries, model.logits(output.hidden).float()


def stepwise(model: LanguageModel, documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same, a token of every document at a time."""
    state = model.new_state(len(documents), max(map(len, documents)))
    boundaries: list[list[Tensor]] = [[] for _ in documents]
    logits: list[list[Tensor]] = [[] for _ in documents]
    for place in range(max(map(len, documents))):
        rows = [row for row, one in enumerate(documents) if place < len(one)]
        out = model.step(torch.stack([documents[row][place] for row in rows]), rows, state)
        assert out.segmentation is not None
        scores = model.logits(out.hidden).float()
        for number, row in enumerate(rows):
            boundaries[row].append(out.segmentation.boundaries[number])
            logits[row].append(scores[number])
    first, second = (torch.stack([one for row in kept for one in row]) for kept in (boundaries, logits))
    return first, second


def compared(documents: list[Tensor], expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
             ) -> dict[str, float]:
    """What the module says."""
    flipped = expected[0] != found[0]
    lengths = [len(one) for one in documents]
    same = torch.cat([part.long().cumsum(0) == 0 for part in flipped.split(lengths)])
    error = ((expected[1] - found[1]).abs().amax(-1) / expected[1].abs().amax())[same]
    return {"flipped": flipped.float().mean().item(), "tokens_before_a_flip": same.float().mean().item(),
            "largest_error": error.max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="directory of a run, or an export")
    parser.add_argument("--documents", type=int, default=32)
    arguments = parser.parse_args()
    trained = open_trained(arguments.run)
    config = trained.config
    documents = documents_of(ValidationBatches(Reader(config.data, config.seed, config.model.vocab_size)),
                             arguments.documents)
    found: dict[str, Any] = {"tokens": sum(map(len, documents)), "documents": len(documents)}
    with torch.inference_mode():
        expected = None
        for dtype in tqdm((torch.float32, torch.bfloat16), desc="precision", disable=None):
            model = model_of(config, trained.state, dtype, torch.device("cpu"), str(trained.place))
            for how in (whole, stepwise):
                now = how(model, documents)
                if expected is None:
                    expected = now
                found[f"{dtype} {how.__name__}".removeprefix("torch.")] = compared(documents, expected, now)
    for name, one in found.items():
        print(f"{name:20s} {one}" if not isinstance(one, dict) else
              f"{name:20s} {one['flipped']:.3%} of decisions differ, logits by {one['largest_error']:.1e} at most")
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "step": trained.step, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
