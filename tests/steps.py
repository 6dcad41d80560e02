"""Optimizer steps without Lightning around them, on rows that were not read from anywhere."""

from __future__ import annotations

import torch

from benchmarks.rows import synthetic_batch
from dlcm_lightning.batch import Batch
from dlcm_lightning.config import Config, DataConfig, ModelConfig, OptimConfig, SourceConfig, TrainConfig
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training.module import PretrainModule

MODEL = ModelConfig(vocab_size=1003, d_token=128, d_concept=256, encoder_layers=2, backbone_layers=2, decoder_layers=2,
                    heads_token=4, kv_heads_token=2, heads_concept=4, kv_heads_concept=2, head_dim=64, ffn_token=256,
                    ffn_concept=256)
CONFIG = Config(
    name="gpu", seed=1, model=MODEL, train=TrainConfig(devices=1, nodes=1),
    data=DataConfig(corpus="shards", root="nowhere", sequence_length=512, global_batch_size=4, micro_batch_size=2,
                    sources=[SourceConfig("a", "en", 1.0)]),
    optim=OptimConfig(total_tokens=10**6, warmup_tokens=0),
)


class Steps:
    """A module and its optimizer."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype, backend: str = "") -> None:
        """backend: of attention; what the machine has where none is named."""
        self.config, self.device = config, device
        backend = backend or choose_backend(config.model.attention, device, dtype, compiled=config.train.compile)
        self.module = PretrainModule(config, dtype, backend, torch.ones(config.model.vocab_size, dtype=torch.long))
        self.module.configure_model()
        self.module.to(device)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.copies = self.module.model.keep_low_copies()
        if config.train.compile or backend == "flex":
            self.module.model.prime(config.data.micro_batch_size * config.data.sequence_length, device)

    def batches(self, number: int) -> list[Batch]:
        """Of a step, on the device."""
        count = self.config.micro_batches
        made = [synthetic_batch(self.config, "sample", number * count + k) for k in range(count)]
        if self.device.type == "cuda":
            made = [batch.pin_memory().to(self.device, non_blocking=True) for batch in made]
        return made

    def compute(self, batches: list[Batch]) -> None:
        """An optimizer step."""
        for k, batch in enumerate(batches):
            (self.module.training_step(batch, k) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), 1.0)
        self.optimizer.step()
        if self.copies is not None:
            self.copies.refresh()
        self.optimizer.zero_grad()
        self.module.after_step()

    def step(self, number: int) -> torch.Tensor:
        """The loss of a step, before its update."""
        self.compute(self.batches(number))
        assert self.module.last_step is not None
        return self.module.last_step.total("nll") / self.module.last_step.total("targets")

    def state(self) -> list[torch.Tensor]:
        moments = [value for one in self.optimizer.state.values() for value in one.values()]
        return [*self.module.state_dict().values(), *moments]
