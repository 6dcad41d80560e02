"""The dense models that a DLCM is to be compared with.

There are two fair ones, and they differ by a factor: a DLCM computes with most of its parameters once a concept.

- *Equal FLOPs a token*: as many tokens for the same budget, fewer parameters.
- *Equal parameters*: outside the embeddings; each token costs more, so that the budget pays for fewer.

They have the shape of the DLCM's token stacks, its vocabulary and its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config import ConfigError, ModelConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.law.formula import FittedLaw, Prediction
from dlcm_lightning.scaling.plan.choice import predicted
from dlcm_lightning.scaling.shapes import dense_of_flops, dense_of_size


@dataclass(frozen=True)
class Partner:
    """A dense model, and what the budget gives it."""

    equal: str
    """What is equal, in words."""
    model: ModelConfig | None
    flops_per_token: float
    """Of training."""
    tokens: float
    """That the DLCM's budget pays for."""
    prediction: Prediction | None
    missing: str
    """Why there is no model, or no prediction by the dense law that there is."""


def partners_of(model: ModelConfig, flops: float, document_tokens: float, law: FittedLaw | None,
                extrapolation: float | None) -> tuple[Partner, Partner]:
    """flops: of the DLCM's whole training. law: of dense models, where there is one."""
    cost = training_flops_per_token(model, document_tokens)
    size = matrix_parameters(model).non_embedding
    makers = (("FLOPs a token", lambda: dense_of_flops(cost, model, document_tokens)),
              ("parameters", lambda: dense_of_size(size, model)))
    found = []
    for equal, make in makers:
        try:
            dense = make()
        except ConfigError as error:
            found.append(Partner(equal, None, 0.0, 0.0, None, str(error)))
            continue
        dense_cost = training_flops_per_token(dense, document_tokens)
        prediction, missing = _prediction(dense, flops / dense_cost, law, extrapolation)
        found.append(Partner(equal, dense, dense_cost, flops / dense_cost, prediction, missing))
    return found[0], found[1]


def _prediction(model: ModelConfig, tokens: float, law: FittedLaw | None, extrapolation: float | None
                ) -> tuple[Prediction | None, str]:
    if law is None:
        return None, ""
    try:
        return predicted(model, tokens, law, extrapolation), ""
    except ConfigError as error:
        return None, str(error)
