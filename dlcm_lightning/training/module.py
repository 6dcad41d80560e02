"""The LightningModule: the four-stage model, its objective, what happens at an optimizer step, and what is logged.

    module, data = PretrainModule(config), PretrainData(config)
    Trainer(**trainer_arguments(config)).fit(module, datamodule=data)

It is made of a configuration alone. What only the Trainer knows is asked when it has one: in `setup` whether it trains
what the configuration says (contract.py), in `configure_model` the device, and how a strategy of ours spreads a model.
The model is made there, so that its weights never lie where they are not wanted.

Nothing here draws random numbers, reads clocks or depends on how the batch was split: a step is a function of
(weights, optimizer state, buffers, batch). Beside the model's own state are kept: the boundaries and tokens of the
previous step, whose F serves where a step has several micro-batches; what the step under way has to be divided by; its
running sums; and the last whole one for whoever logs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from dlcm_lightning.batch import COUNTS, Batch, StepCounts
from dlcm_lightning.compose import config_from
from dlcm_lightning.config import BoundaryConfig, Config
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.model.dlcm import DLCM, LanguageModel, Output, assemble
from dlcm_lightning.ops.collectives import all_reduce_sum, world_size
from dlcm_lightning.ops.linear import LowCopies
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.arithmetic import choose_arithmetic, keep_arithmetic, saved_arithmetic
from dlcm_lightning.training.contract import check_rows, check_trainer
from dlcm_lightning.training.datamodule import PretrainData, follow
from dlcm_lightning.training.initial_weights import filling
from dlcm_lightning.training.lr_schedule import TokenSchedule
from dlcm_lightning.training.metrics.numbers import metric_tensors
from dlcm_lightning.training.metrics.sums import MetricSums, all_reduce_sums, count_lengths, counts_of, measure_batch
from dlcm_lightning.training.optimizer import GradNorms, build_optimizer
from dlcm_lightning.training.position import at_optimizer_step, check_has_begun
from dlcm_lightning.training.rate_loss import rate_loss_surrogate
from dlcm_lightning.training.run_lock import check_same_configuration
from dlcm_lightning.training.strategies.full_state import FullStateStrategy, whole, whole_model

EVERY_STEP = ("loss", "bits_per_byte", "R_sampled", "R_thresholded", "rate_loss")
"""What is logged of every optimizer step; the other numbers of `log_every_n_steps`-th ones."""


class PretrainModule(LightningModule):
    """Four stages, two losses, one optimizer.

    Logged under `train/`, over all ranks: of every optimizer step loss, bits_per_byte, R_sampled, R_thresholded,
    rate_loss and grad_norm; every `log_every_n_steps`-th also F, G, R_half, p_sd, p_near_half, concept_imbalance
    (metrics/numbers.py), lr_ROLE, and by domain as NAME/DOMAIN. Under `val/` and `test/` the same of all validation
    rows, with thresholded boundaries.
    """

    model: LanguageModel
    previous_counts: Tensor
    token_bytes: Tensor

    def __init__(self, config: Config | Mapping[str, Any], compute_dtype: torch.dtype | None = None,
                 backend: str | None = None, token_bytes: Tensor | None = None) -> None:
        """config: a Config, or its plain form, as checkpoints hold it.
        compute_dtype: of the matrix products; None: what `train.precision` means on the Trainer's device.
        backend: of attention; None: what `model.attention` means there.
        token_bytes: (V,) int64, UTF-8 bytes of every id of the tokenizer, the denominator of bits per byte; None: those
        of the PretrainData that it is trained with, and without one bits per byte are nan."""
        super().__init__()
        self.config = config if isinstance(config, Config) else config_from(config)
        self.save_hyperparameters({"config": asdict(self.config)})
        self._compute_dtype, self._backend = compute_dtype, backend
        self._wants_token_bytes = token_bytes is None
        if token_bytes is None:
            token_bytes = torch.zeros(self.config.model.vocab_size, dtype=torch.int64)
        self.register_buffer("previous_counts", torch.zeros(2, dtype=torch.int64))  # no engine casts whole numbers
        self.token_bytes = token_bytes  # no buffer: averages of weights average those, too
        self.steps_go_to_loggers = True
        """Whether every `log_every_n_steps`-th step is sent to loggers. `dlcm pretrain` sends means over all steps
        instead (callbacks/metrics.py), under the same names; callbacks can monitor them either way."""
        self.monitored = True
        """Whether somebody may look at the steps' numbers in `trainer.callback_metrics`; else none are put there."""
        self.begins: bool | None = None
        """Whether the run has no checkpoint yet, so that its weights come from `train.init_from` where that is set.
        None: the Trainer knows."""
        self.refused = ""
        """Why they do not; wrong unless the Trainer has a checkpoint."""
        self.counts: Tensor | None = None
        """(len(COUNTS),) what the optimizer step under way has, over all ranks; None before the first of this
        attempt."""
        self.step_sums: MetricSums | None = None
        """Sum over its micro-batches so far, of this rank; over all ranks from the last one's forward on."""
        self.next_counts: Tensor | None = None
        """Of the step after it, known from then on too."""
        self.last_step: MetricSums | None = None
        """The sums of the last whole optimizer step, over all ranks."""
        self.concept_lengths: Tensor | None = None
        """(LENGTHS,) int64: concepts of this rank's last micro-batch by the number of tokens they pool."""
        self.grad_norm: Tensor = torch.zeros(())
        """() Global norm before clipping, of the last optimizer step."""
        self.grad_norms = GradNorms()
        """Of the steps since somebody has looked."""
        self.learning_rates: dict[str, float] = {}
        """By role, of the last optimizer step."""
        self.low_copies: LowCopies | None = None
        """Of the matrices, while it trains."""
        self.evaluated: MetricSums | None = None
        """Of the validation or test that is under way, this rank's; when it has ended, over all ranks."""

    def setup(self, stage: str) -> None:
        """ConfigError: the Trainer would compute something else than the configuration says, or the datamodule is of
        another one."""
        self.config = check_trainer(self.trainer, self.config, fitting=stage == "fit")
        # Advice that is not for these: they are the same on every rank, and a mean over ranks would be another number.
        warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('(val|test)/")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, PretrainData):
            check_rows(self.config, data.config, fitting=stage == "fit")
        if self._wants_token_bytes and isinstance(data, PretrainData):
            self.token_bytes = torch.from_numpy(data.reader.token_bytes).clone()

    def configure_model(self) -> None:
        """Makes `model`, where the strategy wants it to be made. A second call does nothing."""
        if "model" in self._modules:
            return
        trainer, device = self._trainer, self._where
        dtype, backend = choose_arithmetic(self.config, device, trainer, self._compute_dtype, self._backend)
        train = self.config.train
        make = partial(assemble, self.config.model, dtype, backend, train.recompute, train.compile)
        fill, self.refused = filling(self.config, trainer, self.begins)
        strategy = trainer.strategy if trainer is not None else None
        self.model = (strategy.construct(make, fill) if isinstance(strategy, FullStateStrategy)
                      else whole_model(make, fill).to(device))

    def forward(self, tokens: Tensor, documents: Segments | None = None) -> Tensor:
        """tokens (T,) int64; documents: where each begins and ends, None for one of all tokens -> logits (T, V) of the
        token that comes next. Boundaries are thresholded, as at inference."""
        self.configure_model()
        if documents is None:
            documents = Segments.from_lengths([len(tokens)], tokens.device)
        return self.model.logits(self.model(tokens, documents).hidden)

    def finishes_step(self, batch_idx: int) -> bool:
        """Whether micro-batch `batch_idx` of the run is the last of its optimizer step."""
        return (batch_idx + 1) % self.config.micro_batches == 0

    @property
    def device(self) -> torch.device:
        """Where its buffers are. Lightning's own answer is not told of a model that ZeRO-3 has cut."""
        return self.previous_counts.device

    @property
    def _where(self) -> torch.device:
        """Where it will compute: Lightning moves what is not the model's own there later than it loads a checkpoint."""
        return self._trainer.strategy.root_device if self._trainer is not None else self.device

    @property
    def boundary(self) -> BoundaryConfig | None:
        """None for a dense model."""
        return self.config.model.boundary if self.config.model.kind == "dlcm" else None

    @property
    def consumed_tokens(self) -> int:
        """Tokens of all optimizer steps so far, over all ranks."""
        return self.trainer.global_step * self.config.data.tokens_per_step

    def measure(self, batch: Batch, noise: Tensor | None) -> tuple[MetricSums, Output]:
        """Forward: this rank's sums, and the model's output, whose loss carries the gradient."""
        output: Output = self.model(batch.tokens, batch.documents, noise, batch.targets)
        domains = len(self.config.data.domains)
        self.token_bytes = self.token_bytes.to(self.device)
        return measure_batch(output, batch, self.config.model.boundary, domains, self.token_bytes), output

    @property
    def previous_rate(self) -> Tensor:
        """() float64: F of the step before; negative where there was none."""
        sampled, tokens = self.previous_counts.double()
        return torch.where(tokens > 0, sampled / tokens.clamp(min=1), -1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss whose average over ranks and micro-batches has the gradient of the whole step's loss."""
        if self.counts is None:
            self.counts = all_reduce_sum(counts_of(batch.step, self.device))
        local, output = self.measure(batch, batch.noise)
        self.step_sums = local if self.step_sums is None else self.step_sums + local
        if self.finishes_step(batch_idx):
            self.step_sums.scalar("unreadable").fill_(len(batch.step.unreadable))
            self.step_sums, self.next_counts = all_reduce_sums(self.step_sums, batch.following)
        loss = output.nll_sum / self.counts[COUNTS.index("targets")].clamp(min=1).to(output.nll_sum.dtype)
        boundary = self.config.model.boundary
        if output.segmentation is not None and boundary.learned:  # with a weight of 0 too: engines miss gradients
            rate = self.previous_rate if self.config.uses_previous_rate else self.step_sums.rate
            loss = loss + boundary.rate_weight * rate_loss_surrogate(output, batch, self.counts, boundary, rate)
        if output.concepts is not None:
            self.concept_lengths = count_lengths(output.concepts, batch)
        if self._trainer is not None and self.finishes_step(batch_idx):
            self._log_step(self.step_sums)
        return loss * (world_size() * self.config.micro_batches)

    def _log_step(self, sums: MetricSums) -> None:
        """Of the whole step, known in its last forward; the gradient's norm follows when it is clipped. Each number
        costs Lightning a third of a millisecond, so most of them are logged only when loggers are due."""
        self.learning_rates = {group.get("name", str(number)): group["lr"]
                               for number, group in enumerate(self.trainer.optimizers[0].param_groups)}
        if not self.monitored:
            return
        metrics: dict[str, Any] = metric_tensors(sums, self.config.data.domains, self.boundary)
        metrics |= {f"lr_{role}": rate for role, rate in self.learning_rates.items()}
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and not (self.trainer.global_step + 1) % every:
            self.grad_norms.check(self.trainer.global_step)
        else:
            metrics = {name: value for name, value in metrics.items() if name in EVERY_STEP}
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, logger=self._to_loggers)

    def sum_of_nothing(self) -> Tensor:
        """Zero, whose backward gives every parameter a gradient of zeros, the last stage of the model first: as the
        backward of a step does."""
        stages = ("embedding", "encoder", "boundary", "pool", "backbone", "cross_attention", "decoder", "unembedding")
        found = dict(self.model.named_children())
        total = torch.zeros((), device=self.device)
        for stage in stages:
            for parameter in found[stage].parameters() if stage in found else ():
                total = total + (parameter * 0).sum()
        return total

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a group per muP role, and the schedule over consumed tokens."""
        optimizer = build_optimizer(self.model, self.config.model, self.config.optim)
        schedule = TokenSchedule(optimizer, self.config.optim, self.config.data.tokens_per_step)
        stepped: LRSchedulerConfigType = {"scheduler": schedule, "interval": "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": stepped}

    def configure_gradient_clipping(self, optimizer: Optimizer, gradient_clip_val: int | float | None = None,
                                    gradient_clip_algorithm: str | None = None) -> None:
        """By the global norm, to `optim.max_grad_norm`, whatever the Trainer was told or not told of it."""
        if self._own_grad_norm is None:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.config.optim.max_grad_norm or float("inf"))
            self.grad_norm = whole(norm).detach()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any,
                       optimizer_closure: Callable[[], Any] | None = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if not self.finishes_step(batch_idx):  # DeepSpeed is asked after every micro-batch
            return
        self._refresh_low_copies()
        if (norm := self._own_grad_norm) is not None:
            self.grad_norm = norm
        self.grad_norms.add(self.grad_norm)
        if self.monitored:
            self.log("train/grad_norm", self.grad_norm, logger=self._to_loggers)
        self.after_step()

    @property
    def _to_loggers(self) -> bool | None:
        """None: to whatever loggers there are."""
        return None if self.steps_go_to_loggers else False

    @property
    def _own_grad_norm(self) -> Tensor | None:
        strategy = self.trainer.strategy
        return strategy.own_grad_norm if isinstance(strategy, FullStateStrategy) else None

    def on_train_start(self) -> None:
        """Whatever an earlier fit has left of a step: this one begins with a whole one, perhaps with another."""
        self._check_begun()
        follow(self.trainer, self.config)
        self.refused = ""
        self.counts = self.next_counts = self.step_sums = None
        self.grad_norms = GradNorms()
        strategy = self.trainer.strategy
        uses = self.config.micro_batches > 1 or self.config.train.recompute != "none"  # more than one of each weight
        if uses and isinstance(strategy, FullStateStrategy) and strategy.weights_stay:
            self.low_copies = self.model.keep_low_copies()
        if self.config.train.compile or self.model.backend == "flex":
            self.model.prime(self.config.data.micro_batch_size * self.config.data.sequence_length, self.device)

    def on_train_end(self) -> None:
        self.grad_norms.check(self.trainer.global_step)
        self.low_copies = None
        self.model.drop_low_copies()

    def on_train_epoch_start(self) -> None:
        """Loaders may have been made anew."""
        follow(self.trainer, self.config)

    def on_train_epoch_end(self) -> None:
        """An epoch is what is left of the run; there is no other after it."""
        if self.trainer.global_step >= self.config.total_steps:
            self.trainer.should_stop = True

    def _check_begun(self) -> None:
        """CheckpointError: the weights should be those of `train.init_from`, or of a checkpoint, and are neither."""
        if self.refused and self.trainer.ckpt_path is None:
            raise CheckpointError(self.refused)

    def on_validation_epoch_start(self) -> None:
        self._check_begun()
        self.evaluated = None
        self._refresh_low_copies()

    def on_validation_end(self) -> None:
        self._refresh_low_copies()

    def _refresh_low_copies(self) -> None:
        """After a step; and a callback may have put other weights into the parameters for a validation, and back."""
        if self.low_copies is not None:
            self.low_copies.refresh()

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Boundaries thresholded, as at inference. The count of sampled ones uses the rows' noise and the same p."""
        sums = self.measure(batch, None)[0]
        self.evaluated = sums if self.evaluated is None else self.evaluated + sums

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation: no rows are kept apart from both."""
        self.validation_step(batch, batch_idx)

    def on_predict_epoch_start(self) -> None:
        self._check_begun()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Of each token (T,): `tokens`, `targets` (IGNORE_INDEX where there is none), `nll` in nats, and of a DLCM
        `probabilities` and thresholded `boundaries`; `samples` (B,) of the rows."""
        output = self.measure(batch, None)[1]
        found = {"samples": batch.samples, "tokens": batch.tokens, "targets": batch.targets, "nll": output.nll}
        if output.segmentation is not None:
            found |= {"probabilities": output.segmentation.probabilities, "boundaries": output.segmentation.boundaries}
        return found

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _log_evaluation(self, kind: str) -> None:
        mine = self.evaluated or MetricSums.nothing(len(self.config.data.domains), self.device)
        self.evaluated = all_reduce_sums(mine, StepCounts())[0]
        metrics = metric_tensors(self.evaluated, self.config.data.domains, self.boundary)
        self.log_dict({f"{kind}/{name}": value for name, value in metrics.items()}, logger=self._to_loggers,
                      batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's own checkpoint: as it stands at the last whole optimizer step, computed with what."""
        trainer = self.trainer
        check_has_begun(trainer, "model" in self._modules)
        self.grad_norms.check(trainer.global_step)
        checkpoint |= saved_arithmetic(self.model)
        if "loops" in checkpoint:
            micro_batches = self.config.micro_batches
            short = trainer.num_training_batches < self.config.total_steps * micro_batches
            at_optimizer_step(checkpoint["loops"]["fit_loop"], trainer.global_step, micro_batches, short)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, with the model made where it is not yet."""
        self.configure_model()
        return super().load_state_dict(state_dict, strict, assign)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """ConfigError: the checkpoint belongs to another run than the Trainer's. Precision and attention that it was
        trained with are kept, where the configuration leaves them open. `load_from_checkpoint(path, config=...)` may
        change what it likes: there is no run."""
        step = checkpoint["global_step"]
        if self._trainer is not None:
            before = config_from(checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["config"])
            check_same_configuration(before, self.config, step, f"the checkpoint of step {step}")
        keep_arithmetic(checkpoint, self.model, self.config, self._where, dtype_is_open=self._compute_dtype is None,
                        backend_is_open=self._backend is None,
                        continues=self._trainer is not None and self._trainer.state.fn is TrainerFn.FITTING)

    @torch.no_grad()
    def after_step(self) -> None:
        """Closes the step: F for the next one, the rate bias, the prior mean. All stay as they are after a step none
        of whose rows could be read."""
        assert self.step_sums is not None
        step, self.step_sums, self.counts = self.step_sums, None, self.next_counts
        self.last_step = step
        if isinstance(self.model, DLCM):
            tokens = step.total("tokens")
            buffers = [self.previous_counts, *self.model.boundary.buffers()]
            before = [buffer.clone() for buffer in buffers]
            self.previous_counts.copy_(torch.stack([step.total("sampled"), tokens]))
            each = tokens.clamp(min=1)
            self.model.boundary.after_step(step.rate, step.total("calibrated") / each, step.spread,
                                           step.features / each)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(tokens > 0, buffer, old))  # decided on the device
