"""Decoupled muP (section 6.1) as a table from role to (initialisation, learning rate, weight decay, epsilon).

Modules say what they are, a `Role`; initialisation, optimizer and forward read the same table, so that a width can
change without any of the three falling behind. With s_token = D / d_base and s_concept = E / d_base:

    role                       init variance                           learning rate     decay        epsilon
    hidden matrix              sigma^2 / s                             lr / s            wd * s       eps / s
    bridge, s_in -> s_out      sigma^2 / s_in * min(1, s_out / s_in)   lr / s_in         wd * s_in    eps / s_in
    boundary W_q, W_k          identity                                lr_b / s_token    none         eps / s_token
    embedding, unembedding     sigma_emb^2                             lr_other          wd           eps / s_token
    norm                       ones                                    lr_other          none         eps / s

A hidden matrix is a bridge from a width to itself. s is the multiplier of the width a matrix *reads*: FFN widths and
heads x head width grow with it, so it is each matrix's own fan-in over its fan-in at the base. Learning rates fall
with 1/width (Eq. 19-20), not with its square root. Logits are multiplied by 1 / s_token. Decay times rate does not
depend on width. The spectral rule for bridges and everything about boundary and unembedding is our reading; the paper
is silent there.

Depth is no part of the paper's rules. Where `depth_exponent` a > 0, every residual branch of a block is multiplied by
m^-a, m = (layers on its residual stream) / base_layers, and what stands in blocks (hidden matrices and norms) learns at
rate m^(a-1) and with epsilon m^-a times as much: the rules of CompleteP (arXiv 2505.01618), which is a = 1; a = 1/2 is
the older choice. Decay is m^(1-a) times as much, so that decay times rate stays as it is (ours). Bridges and the
boundary stand once in a model of any depth, and stay as they are; so do queries and output of the cross-attention and
the norms around the stacks, but these have the role, hence the rates, of the blocks beside them.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from dlcm_lightning.config import ModelConfig, OptimConfig
from dlcm_lightning.ops.linear import LowCopies, mixed_linear

MOST_THREADS = 8
"""That draw weights at once; each holds two whole tensors."""


class Role(Enum):
    """What a parameter is."""

    EMBEDDING = "embedding"
    UNEMBEDDING = "unembedding"
    NORM_TOKEN = "norm_token"
    NORM_CONCEPT = "norm_concept"
    TOKEN = "token"
    CONCEPT = "concept"
    TOKEN_TO_CONCEPT = "token_to_concept"
    CONCEPT_TO_TOKEN = "concept_to_token"
    BOUNDARY = "boundary"


class RoleModule(nn.Module):
    """A module that holds exactly one parameter, `weight`, and knows its role."""

    def __init__(self, role: Role, *shape: int) -> None:
        super().__init__()
        self.role, self.shape = role, torch.Size(shape)
        self.weight = nn.Parameter(torch.empty(shape))
        """An engine may cut it or take it away; `shape` remains."""


class MupLinear(RoleModule):
    """y = x W^T without bias, in the dtype of x. The stored weight keeps its own (fp32 when training)."""

    def __init__(self, role: Role, fan_in: int, fan_out: int) -> None:
        super().__init__(role, fan_out, fan_in)

        self.copies: tuple[LowCopies, int] | None = None
        """Where there is a copy of the weight in the dtype of x, and its number there."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., fan_in) -> (..., fan_out)."""
        return mixed_linear(x, self.weight, self.low(x.dtype))

    def low(self, dtype: torch.dtype) -> Tensor | None:
        """The weight in a dtype, where it lies ready."""
        if self.copies is None or dtype == self.weight.dtype:
            return None
        copies, number = self.copies
        return copies.of(number)


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    deviation: float | None
    """Standard deviation of the normal initialisation; None for ones (norms) or the identity (boundary)."""
    learning_rate: float
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: float
    epsilon: float


def _reads(role: Role, model: ModelConfig) -> float:
    """Width multiplier of what a parameter of this role reads."""
    concept = role in (Role.CONCEPT, Role.CONCEPT_TO_TOKEN, Role.NORM_CONCEPT)
    return model.s_concept if concept else model.s_token


def _depth(role: Role, model: ModelConfig) -> float:
    """Depth multiplier of the residual stream that a role's blocks stand on; 1 for what stands once."""
    if role in (Role.CONCEPT, Role.NORM_CONCEPT):
        return model.m_concept
    return model.m_token if role in (Role.TOKEN, Role.NORM_TOKEN) else 1.0


def branch_scale(role: Role, model: ModelConfig) -> float:
    """What the residual branches of blocks of this role are multiplied by."""
    return _depth(role, model) ** -model.mup.depth_exponent


def _deviation(role: Role, model: ModelConfig) -> float | None:
    if role in (Role.NORM_TOKEN, Role.NORM_CONCEPT, Role.BOUNDARY):
        return None
    if role in (Role.EMBEDDING, Role.UNEMBEDDING):
        return model.mup.sigma_embedding
    s_in = _reads(role, model)
    s_out = model.s_concept if role in (Role.CONCEPT, Role.TOKEN_TO_CONCEPT) else model.s_token
    return model.mup.sigma * (min(1.0, s_out / s_in) / s_in) ** 0.5


def hyperparameters_of(role: Role, model: ModelConfig, optim: OptimConfig) -> Rule:
    """The line of the table for one role at one size."""
    s, scale = _reads(role, model), branch_scale(role, model)
    slower = _depth(role, model) * scale if model.mup.depth_exponent else 1.0
    epsilon = optim.epsilon / s * scale
    deviation = _deviation(role, model)
    if role in (Role.NORM_TOKEN, Role.NORM_CONCEPT):
        return Rule(deviation, optim.lr_other / slower, 0.0, epsilon)
    if role in (Role.EMBEDDING, Role.UNEMBEDDING):
        return Rule(deviation, optim.lr_other, optim.weight_decay, epsilon)
    if role is Role.BOUNDARY:
        return Rule(deviation, optim.lr_boundary / s, 0.0, epsilon)
    eta = optim.lr_concept if role in (Role.CONCEPT, Role.CONCEPT_TO_TOKEN) else optim.lr_token
    return Rule(deviation, eta / s / slower, optim.weight_decay * s * slower, epsilon)


def logit_scale(model: ModelConfig) -> float:
    """What logits are multiplied by, 1 / s_token."""
    return 1 / model.s_token


def role_parameters(module: nn.Module) -> Iterator[tuple[str, RoleModule]]:
    """Every parameter's name and the module that holds it.

    Raises ValueError for a parameter outside a RoleModule module: it would train at nobody's learning rate.
    """
    owners = {f"{name}.weight": child for name, child in module.named_modules() if isinstance(child, RoleModule)}
    for name, _ in module.named_parameters():
        if name not in owners:
            raise ValueError(f"parameter {name} has no role: hold it in a RoleModule module")
        yield name, owners[name]


def initial_value(owner: RoleModule, model: ModelConfig, generator: torch.Generator | None = None) -> Tensor:
    """What a parameter begins as, fp32 on the host. generator: draws it; torch's own where there is none."""
    host = torch.device("cpu")
    deviation = _deviation(owner.role, model)
    if deviation is not None:
        drawn = torch.randn(owner.shape, generator=generator, dtype=torch.float32, device=host)
        return drawn.mul_(deviation)
    if owner.role is Role.BOUNDARY:
        return torch.eye(*owner.shape, device=host)
    return torch.ones(owner.shape, device=host)


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.copy_(value)


@torch.no_grad()
def initialise(module: nn.Module, model: ModelConfig, seed: int,
               place: Callable[[nn.Parameter, Tensor], None] = _copy) -> None:
    """Fills every parameter by its role. Each draws on the host from a generator of its own, keyed by (seed, name), so
    that neither the order of construction, nor the device, nor the split over ranks, nor the threads that draw enter.
    place: writes a whole tensor into a parameter of which this process may hold a part."""

    @torch.no_grad()
    def draw(name: str, owner: RoleModule) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
        return initial_value(owner, model, generator)

    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))  # of this process; OMP_NUM_THREADS is often 1 in jobs
    with ThreadPoolExecutor(threads) as pool:
        coming: deque[tuple[RoleModule, Future[Tensor]]] = deque()  # in the order in which all ranks place
        for name, owner in role_parameters(module):
            coming.append((owner, pool.submit(draw, name, owner)))
            if len(coming) > 2 * threads:  # no more than so many whole tensors at a time
                first, value = coming.popleft()
                place(first.weight, value.result())
        for owner, value in coming:
            place(owner.weight, value.result())
