"""What a configuration refuses, and that each refusal names the field, the value and the remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from dlcm_lightning.config import (
    BoundaryConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    MupConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)

ONE_SOURCE = [SourceConfig(name="a", domain="web-en", weight=1.0)]


def data(**changes: Any) -> DataConfig:
    return DataConfig(**{"sources": ONE_SOURCE, **changes})


def run(**changes: Any) -> Config:
    return Config(**{"name": "run", "data": data(), **changes})


@pytest.mark.parametrize(("make", "named", "remedy"), [
    (lambda: BoundaryConfig(form="papr"), "model.boundary.form = 'papr'", "choose one of paper, centred"),  # type: ignore[arg-type]
    (lambda: BoundaryConfig(target_ratio=1.0), "model.boundary.target_ratio = 1.0", "above 1"),
    (lambda: BoundaryConfig(form="fixed", target_ratio=3.5), "model.boundary.target_ratio = 3.5", "whole number"),
    (lambda: BoundaryConfig(rule_threshold=2.0), "model.boundary.rule_threshold = 2.0", "between -1 and 1"),
    (lambda: MupConfig(d_base=0), "model.mup.d_base = 0", "positive"),
    (lambda: ModelConfig(heads_token=24, kv_heads_token=10), "model.kv_heads_token = 10", "model.heads_token = 24"),
    (lambda: ModelConfig(head_dim=63), "model.head_dim = 63", "even"),
    (lambda: ModelConfig(backbone_layers=0), "model.backbone_layers = 0", "must be positive"),
    (lambda: ModelConfig(vocab_size=0), "model.vocab_size = 0", "positive"),
    (lambda: SourceConfig(name="a/b", domain="code", weight=1.0), "data.sources[].name = 'a/b'", "letters, digits"),
    (lambda: SourceConfig(name="a", domain="code", weight=1.5), "data.sources[a].weight = 1.5", "[0, 1]"),
    (lambda: DataConfig(), "data.sources = []", "at least one source"),
    (lambda: data(sources=ONE_SOURCE * 2), "data.sources = ['a', 'a']", "its own name"),
    (lambda: data(sources=[replace(ONE_SOURCE[0], weight=0.5)]), "data.sources[].weight = [0.5]", "sum to 0.5"),
    (lambda: data(global_batch_size=6, micro_batch_size=8), "data.micro_batch_size = 8", "data.global_batch_size = 6"),
    (lambda: OptimConfig(total_tokens=10, warmup_tokens=11), "optim.warmup_tokens = 11", "optim.total_tokens = 10"),
    (lambda: OptimConfig(total_tokens=10, warmup_tokens=9), "optim.decay_fraction = 0.2", "longer than"),
    (lambda: OptimConfig(beta1=1.0), "optim.beta1 = 1.0", "[0, 1)"),
    (lambda: TrainConfig(keep_last=1), "train.keep_last = 1", "at least 2"),
    (lambda: run(name=""), "name = ''", "give a name"),
    (lambda: run(model=ModelConfig(vocab_size=1024), data=data(corpus="sample")), "model.vocab_size = 1024", "bpe"),
])
def test_refusal_names_field_value_and_remedy(make: Any, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        make()
    before, _, after = str(refusal.value).partition(": ")
    assert before == named
    assert remedy in after


def test_sections_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        run().seed = 1  # type: ignore[misc]


def test_steps_and_micro_batches_follow_from_tokens_rows_and_ranks() -> None:
    config = run(
        data=data(sequence_length=100, global_batch_size=8, micro_batch_size=2),
        optim=OptimConfig(total_tokens=1_601, warmup_tokens=0),
        train=TrainConfig(devices=2),
    )
    assert config.data.tokens_per_step == 800
    assert config.total_steps == 3  # the last step passes the end by less than one step
    assert config.micro_batches == 2


def test_domains_keep_the_order_of_their_first_source() -> None:
    names = [("a", "math"), ("b", "code"), ("c", "math"), ("d", "web-en")]
    sources = [SourceConfig(name=name, domain=domain, weight=0.25) for name, domain in names]
    assert data(sources=sources).domains == ["math", "code", "web-en"]


def test_every_field_has_a_type_that_yaml_can_hold() -> None:
    def check(section: type) -> None:
        for name, expected in get_type_hints(section).items():
            if get_origin(expected) is list:
                expected = get_args(expected)[0]
            if is_dataclass(expected):
                assert isinstance(expected, type) and fields(expected)
                check(expected)
            else:
                assert expected in (int, float, bool, str) or get_args(expected), f"{section.__name__}.{name}"

    check(Config)
