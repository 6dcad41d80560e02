"""What a study file holds, typed and checked; `study_file.py` reads one.

    name: ladder
    base: quickstart
    sizes: [2.0e5, 6.0e5]
    backbone_shares: [0.5, 0.7]
    ratios: [2, 4, 8]
    kinds: [dlcm, dense]
    tokens: 2_000_000
    validate_every: 100_000
    decays: {at: [0.5, 1], over: 0.2}

What is a list is an axis of the grid, and the grid is the product of all axes. An axis that is left out stays as the
base has it. Names of runs follow from the values on the axes that are given, so that a value that is added later
renames none of the runs that are there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from dlcm_lightning.config.checks import (
    LARGEST_COUNT,
    local_path,
    require,
    require_member,
    require_name,
    require_positive,
    require_range,
)

Kind = Literal["dlcm", "dense"]
Partner = Literal["parameters", "flops"]
TableFormat = Literal["csv", "parquet"]
RATES = ("lr_token", "lr_concept", "lr_other", "lr_boundary")
"""Base learning rates, fields of `optim`."""
SET_BY_STUDY = {
    "name": "name", "seed": "seeds", "train.output_dir": "output_dir", "optim.total_tokens": "tokens",
    "train.validate_every_steps": "validate_every"}
"""Fields of a run that an override must not set, and the field of a study that does."""
SET_BY_DECAYS = ("optim.decay_fraction", "train.keep_every_tokens")
"""Fields of a run that `decays` sets, and that an override must not set beside it."""
MOST_PARAMETERS = 1e15


def _check_overrides(name: str, overrides: tuple[str, ...]) -> None:
    for one in overrides:
        field_name, equals, _ = one.partition("=")
        require(bool(equals and field_name), name, one, "write field=value, such as optim.weight_decay=0")
        require(field_name not in SET_BY_STUDY, name, one,
                f"a study sets this field itself: write {SET_BY_STUDY.get(field_name)}")


def _check_distinct(name: str, values: tuple[object, ...]) -> None:
    require(len(set(values)) == len(values), name, list(values), "name each value once")


@dataclass(frozen=True)
class Size:
    """A size of the ladder: a number of parameters, or fields of a run that give a shape."""

    name: str = ""
    """Empty: follows from the number, such as 600k."""
    parameters: float = 0.0
    """N, parameters outside of the embeddings; the shape is that of the base, scaled. 0: the shape is that of the base
    with the overrides."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_range("sizes[].parameters", self.parameters, 0, MOST_PARAMETERS)
        require(bool(self.parameters or self.overrides), "sizes[]", self.name,
                "give a number of parameters, or name and overrides")
        if self.name or not self.parameters:
            require_name("sizes[].name", self.name)
        _check_overrides("sizes[].overrides", self.overrides)

    @property
    def label(self) -> str:
        return self.name or number(self.parameters)


@dataclass(frozen=True)
class Rates:
    """Base learning rates of a run; what is left out stays as the base has it."""

    base: float = 0.0
    """lr_token, lr_concept and lr_boundary, where they are not given; 0 where the base gives them."""
    lr_token: float = 0.0
    lr_concept: float = 0.0
    lr_other: float = 0.0
    lr_boundary: float = 0.0

    def __post_init__(self) -> None:
        require(any((self.base, *(getattr(self, name) for name in RATES))), "learning_rates[]", self.base,
                "give a rate, such as 1.8e-3, or fields such as {lr_token: 1.8e-3}")
        for name in ("base", *RATES):
            require_range(f"learning_rates[].{name}", getattr(self, name), 0, 10**3)

    @property
    def given(self) -> dict[str, float]:
        """By field of `optim`."""
        base = {name: self.base for name in RATES if name != "lr_other" and self.base}
        return base | {name: value for name in RATES if (value := getattr(self, name))}

    @property
    def label(self) -> str:
        """lr0.0018, or lr0.0018-concept0.0036."""
        own = [f"{name.removeprefix('lr_')}{getattr(self, name):g}" for name in RATES if getattr(self, name)]
        return "-".join([f"lr{self.base:g}" if self.base else "lr", *own])


@dataclass(frozen=True)
class Variant:
    """A named list of overrides."""

    name: str = ""
    overrides: tuple[str, ...] = ()
    by_width: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """In a sweep: further ones at the width of this name."""

    def __post_init__(self) -> None:
        require_name("variants[].name", self.name)
        for overrides in (self.overrides, *self.by_width.values()):
            _check_overrides(f"variants[{self.name}].overrides", overrides)


@dataclass(frozen=True)
class Decays:
    """Branches of a run whose learning rate is held: each begins with a checkpoint of it and decays the rate."""

    at: tuple[float, ...] = ()
    """Where they begin: a share of the run up to 1, or a number of tokens; rounded to the nearest row of the table."""
    over: float = 0.2
    """How long they are: a share of what was trained before it, below 1, or a number of tokens; in whole steps."""

    def __post_init__(self) -> None:
        require(bool(self.at), "decays.at", list(self.at), "give at least one place, such as 1 for the end of the run")
        for value in (*self.at, self.over):
            require_positive("decays.at, decays.over", value, LARGEST_COUNT)
        _check_distinct("decays.at", self.at)


@dataclass(frozen=True)
class Width:
    """A model of a sweep."""

    name: str = ""
    times: float = 1.0
    """Its width, as a multiple of the first one's."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_name("widths[].name", self.name)
        require_positive(f"widths[{self.name}].times", self.times, 10**6)
        _check_overrides(f"widths[{self.name}].overrides", self.overrides)


@dataclass(frozen=True)
class Sweep:
    """The loss over learning rates at several widths, for each of some variants."""

    name: str = ""
    widths: tuple[Width, ...] = ()
    """The narrowest first."""
    variants: tuple[Variant, ...] = (Variant("muP"),)
    rates: tuple[str, ...] = RATES
    """Base rates that the factors multiply."""

    def __post_init__(self) -> None:
        require_name("transfer.sweeps[].name", self.name)
        at = f"transfer.sweeps[{self.name}]"
        require(bool(self.widths), f"{at}.widths", [], "name at least one width")
        require(bool(self.variants), f"{at}.variants", [], "name at least one variant, or leave the field out")
        _check_distinct(f"{at}.widths", tuple(one.name for one in self.widths))
        _check_distinct(f"{at}.variants", tuple(one.name for one in self.variants))
        times = [one.times for one in self.widths]
        require(times == sorted(set(times)), f"{at}.widths[].times", times, "put the widths in ascending order")
        _check_rates(f"{at}.rates", self.rates)
        for variant in self.variants:
            for name in variant.by_width:
                require(name in {one.name for one in self.widths}, f"{at}.variants[{variant.name}].by_width", name,
                        f"the widths are {', '.join(one.name for one in self.widths)}")


def _check_rates(name: str, rates: tuple[str, ...]) -> None:
    require(bool(rates), name, list(rates), f"name some of {', '.join(RATES)}")
    _check_distinct(name, rates)
    for one in rates:
        require(one in RATES, name, one, f"choose among {', '.join(RATES)}")


@dataclass(frozen=True)
class Transfer:
    """The section `transfer:` of a study: whether the best learning rates of one width are those of another."""

    proxy: Size | None = None
    """The small model on which rates are searched; none: the rates of the base are taken for the best."""
    fields: tuple[str, ...] = RATES
    """Rates that are searched on the proxy, one after another."""
    factor: float = 2.0
    """Between two neighbouring rates of the search."""
    rounds: int = 3
    """Times that the search goes through all fields, at most."""
    factors: tuple[float, ...] = (0.5, 0.7, 1.0, 1.4, 2.0)
    """What the best rates are multiplied by at every width."""
    sweeps: tuple[Sweep, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.proxy or self.sweeps), "transfer", "", "give a proxy, or sweeps, or both")
        _check_rates("transfer.fields", self.fields)
        require(1 < self.factor <= 100, "transfer.factor", self.factor, "must lie above 1, and be at most 100")
        require_range("transfer.rounds", self.rounds, 1, 100)
        require(len(self.factors) >= 3, "transfer.factors", list(self.factors),
                "three at least: a minimum needs a neighbour on either side")
        for one in self.factors:
            require_positive("transfer.factors", one, 10**6)
        require(list(self.factors) == sorted(set(self.factors)), "transfer.factors", list(self.factors),
                "put them in ascending order, each once")
        _check_distinct("transfer.sweeps", tuple(one.name for one in self.sweeps))

    @property
    def grid_step(self) -> float:
        """Ratio of neighbouring factors, their geometric mean."""
        return float((self.factors[-1] / self.factors[0]) ** (1 / (len(self.factors) - 1)))


@dataclass(frozen=True)
class Study:
    """A study file."""

    name: str = ""
    """Names the folder <output_dir>/<name>, and begins the name of every run."""
    base: str = ""
    """Run file that all runs begin with, by its path or by the name of a shipped one."""
    output_dir: str = "runs"
    """Folder of the runs, each <output_dir>/<name of the run>."""
    overrides: tuple[str, ...] = ()
    """Of the base, for all runs."""
    sizes: tuple[Size, ...] = ()
    backbone_shares: tuple[float, ...] = ()
    """P, the backbone's share of the three stacks, of sizes that are numbers."""
    ratios: tuple[float, ...] = ()
    """R, tokens per concept that runs aim at."""
    kinds: tuple[Kind, ...] = ("dlcm",)
    """dense: the partners of every size, too; alone, without DLCMs."""
    dense: tuple[Partner, ...] = ("parameters",)
    """Dense partners that there are. parameters: one a size, of equal N. flops: one a size, P and R, of equal training
    FLOPs a token."""
    learning_rates: tuple[Rates, ...] = ()
    seeds: tuple[int, ...] = (0,)
    variants: tuple[Variant, ...] = ()
    tokens: int = 0
    """Of every run; rounded up to a whole row of the table."""
    tokens_per_parameter: float = 0.0
    """In place of `tokens`: times N of the size, as it was asked for. Dense partners get the tokens of the DLCM that
    they are partners of."""
    validate_every: int = 0
    """Tokens between two rows of the table, rounded up to whole steps; 0 measures the end of a run only."""
    decays: Decays | None = None
    """None: runs end as the schedule of the base says."""
    document_tokens: float = 0.0
    """Mean length of documents, weighted by tokens, for FLOPs of attention; 0: as long as a row."""
    table: TableFormat = "csv"
    transfer: Transfer | None = None

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require(bool(self.base.strip()), "base", self.base, "name a run file, such as quickstart")
        object.__setattr__(self, "output_dir", local_path("output_dir", self.output_dir))
        _check_overrides("overrides", self.overrides)
        require_member("table", self.table, TableFormat)
        self._check_axes()
        require(bool(self.tokens) != bool(self.tokens_per_parameter), "tokens", self.tokens,
                "give tokens or tokens_per_parameter, one of the two")
        require_range("tokens", self.tokens, 0, LARGEST_COUNT)
        require_range("tokens_per_parameter", self.tokens_per_parameter, 0, 10**6)
        require_range("validate_every", self.validate_every, 0, LARGEST_COUNT)
        require(self.decays is None or self.validate_every > 0, "validate_every", self.validate_every,
                "decays begin at rows of the table: give the tokens between two")
        if self.decays is not None:
            self._check_no_decay_of_its_own()
        if self.document_tokens:
            require_range("document_tokens", self.document_tokens, 1, 2**24)

    def _check_no_decay_of_its_own(self) -> None:
        by_name = {"overrides": self.overrides}
        by_name |= {f"sizes[{one.label}].overrides": one.overrides for one in self.sizes}
        by_name |= {f"variants[{one.name}].overrides": one.overrides for one in self.variants}
        for name, overrides in by_name.items():
            for one in overrides:
                require(one.partition("=")[0] not in SET_BY_DECAYS, name, one,
                        "decays sets this field itself; leave the override out, or decays")

    def _check_axes(self) -> None:
        for kind in self.kinds:
            require_member("kinds[]", kind, Kind)
        for partner in self.dense:
            require_member("dense[]", partner, Partner)
        for share in self.backbone_shares:
            require(0 < share < 1, "backbone_shares[]", share, "a share between 0 and 1, both excluded")
        for ratio in self.ratios:
            require_range("ratios[]", ratio, 1, 2**20)
        for seed in self.seeds:
            require_range("seeds[]", seed, 0, 2**63 - 1)
        for name in ("kinds", "dense", "seeds"):
            require(bool(getattr(self, name)), name, [], "name at least one, or leave the field out")
        for name in ("backbone_shares", "ratios", "kinds", "dense", "seeds"):
            _check_distinct(name, getattr(self, name))
        for name in ("sizes", "learning_rates"):
            _check_distinct(name, tuple(one.label for one in getattr(self, name)))
        _check_distinct("variants", tuple(one.name for one in self.variants))
        shaped = [one.label for one in self.sizes if not one.parameters]
        require(not (shaped and self.backbone_shares), "backbone_shares", list(self.backbone_shares),
                f"size {shaped[:1]} gives its shape by overrides, P included; leave the field out, or give "
                "parameters")
        require(not self.backbone_shares or bool(self.sizes), "backbone_shares", list(self.backbone_shares),
                "goes with sizes; give them as numbers of parameters")
        wide = [one.name for one in self.variants if one.by_width]
        require(not wide, "variants[].by_width", wide, "is of the variants of a sweep; use overrides")


def number(value: float) -> str:
    """600k, 1.5M, 87M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit * (1 - 1e-9):
            digits = max(3, 1 + math.floor(math.log10(value / unit)))
            return f"{value / unit:.{digits}g}{letter}"
    return f"{value:g}"
