"""Tokens per concept by type of content, on short texts that come with the package (the paper's Table 5).

content/*.txt hold ten passages of each type, some 80 words, 130 Chinese characters or 15 lines of code long, written
for this purpose. Each passage is a document of its own (begin of text, text, end of text); its first boundary and its
control tokens count as in training's R.

    tokens per concept = tokens of all passages of a type / boundaries in them

It is a small sample: the interval is what remains of it when passages are drawn anew with replacement. Which tokens
there are depends on the tokenizer, so that numbers of models with different tokenizers do not compare; nor do they
compare with the paper's, whose texts are not public, but for the order of the types.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch

from dlcm_lightning.evaluation.analysis.clustered import bootstrap_ratio
from dlcm_lightning.evaluation.analysis.subject import Subject
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.progress import progress_bar

TYPES = {"casual_en": "casual English", "casual_zh": "casual Chinese", "technical_en": "technical English",
         "technical_zh": "technical Chinese", "code": "code", "math": "math and science"}
"""By file."""
PAPER = {"casual_en": (7.47, 3.53, 1.76), "casual_zh": (8.38, 4.36, 1.76), "technical_en": (10.58, 3.85, 1.92),
         "technical_zh": (6.09, 3.27, 1.76), "code": (6.14, 3.66, 1.98), "math": (7.42, 4.41, 1.91)}
"""Table 5 at the targets TARGETS."""
TARGETS = (8, 4, 2)
SEPARATOR = "%%"


def passages(name: str) -> list[str]:
    """Of a type."""
    content = files("dlcm_lightning.evaluation.analysis").joinpath(f"content/{name}.txt").read_text(encoding="utf-8")
    return [one.strip("\n") for one in content.split(f"\n{SEPARATOR}\n")]


@torch.no_grad()
def content_types(subject: Subject) -> dict[str, Any]:
    """Of every type: our number with its interval, the paper's three, and of how much text."""
    tokenizer, found = subject.trained.tokenizer, {}
    for name, title in TYPES.items():
        tokens, concepts = [], []
        for ids in progress_bar(tokenizer.encode_documents(passages(name)), desc=title, unit="passage"):
            given = torch.as_tensor(ids.astype("int64"), device=subject.model.where)
            output = subject.model(given, Segments.from_lengths([len(ids)], given.device))
            assert output.segmentation is not None
            tokens.append(len(ids))
            concepts.append(int(output.segmentation.boundaries.sum()))
        low, high = bootstrap_ratio(tokens, concepts)
        found[name] = {"title": title, "passages": len(tokens), "tokens": sum(tokens), "concepts": sum(concepts),
                       "tokens_per_concept": sum(tokens) / sum(concepts), "low": low, "high": high,
                       "paper": dict(zip(map(str, TARGETS), PAPER[name], strict=True))}
    return {"target": subject.trained.config.model.boundary.target_ratio, "types": found}
