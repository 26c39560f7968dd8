"""LocalTrainer: one client's local steps, from a received adapter to a delta.

The one interpreter of `TrainPlan` on the client. It knows no Flower, no files and no other clients; chance comes in as
a seed and the global random state is left as it was.

* The loss is the mean of per-sample losses over an optimizer step, however many forward passes it is made of.
* Trainable tensors are float32 while they train, whatever the adapter's dtype; ``delta = after - before`` in float32.
* The frozen base stays in eval mode: the one dropout is the adapter's own.
* Under ``privacy.example`` the gradient is `federated.privacy.dp_sgd`'s: Poisson batches, clipped examples, noise. What
  the next lines add, and ``train.max_grad_norm``, comes after the noise and costs no privacy.
* FedProx: ``mu * (w - w_received)`` is added to the gradient, and so are a plan's penalty (`federated.penalties`) and a
  constant shift that comes with the state (`federated.corrections`: SCAFFOLD, FedDyn); the reported loss is without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters import AdapterModel
from federated.config import PrivacyConfig, TrainConfig
from federated.corrections import SHIFT
from federated.delta import subtract
from federated.errors import ConfigError, DataError, FederatedError, ModelError, PrivacyError
from federated.local_steps import Steps, make_optimizer, make_scheduler
from federated.manifest import TrainPlan, digest_of
from federated.penalties import tail_penalty
from federated.privacy.chance import noise_source
from federated.privacy.dp_sgd import (
    Observed,
    PrivateGradients,
    check_private_training,
    micro_batches,
    private_schedule,
)
from federated.privacy.per_sample import per_sample
from federated.state import AdapterState, Tensors, group_of
from federated.tasks import Batch, Evaluation, Features, Task
from federated.tasks.batching import step_groups

__all__ = ["LocalData", "LocalResult", "LocalTrainer", "PrivateTask", "client_seed", "private_schedule", "step_groups"]


def client_seed(seed: int, round_number: int, client_id: str) -> int:
    """The seed of one client's round: unrelated for other rounds and clients, at most 63 bits."""
    return int(digest_of([seed, round_number, client_id])[:16], 16) >> 1


@dataclass(frozen=True)
class LocalData:
    """One client's encoded examples; ``test`` may be empty (then nothing is measured).

    Under ``privacy.example``, ``rows`` are the training rows as they were read: each of them is one example.

    Privacy: never leaves the process that made it.
    """

    train: Sequence[Features]
    test: Sequence[Features] = ()
    rows: Sequence[Any] = ()


@dataclass(frozen=True)
class LocalResult:
    """What local training gives.

    Args:
        delta: canonical name to float32 tensor of the trained groups, ``after - before``; empty when only evaluated.
        num_examples: training examples behind it.
        metrics: ``train_loss`` (mean over the steps), ``steps``, ``seconds``, ``grad_clipped_share``, and
            ``eval_before_*`` and ``eval_after_*`` where asked for. Under ``privacy.example`` without ``train_loss`` and
            ``seconds``, which tell of the data, and with ``dp_steps``, ``dp_sampling`` and ``dp_noise_multiplier``:
            what was drawn and is to be accounted. Measurements on held-out examples are not protected.
    """

    delta: Mapping[str, Tensor]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrivateTask:
    """What one run under ``privacy.example`` is told besides its configuration.

    Args:
        noise_multiplier: solved for by the caller, who accounts it; 0 takes the configured one.
        observer: is shown each step from inside, for tests and audits; what it sees is private.
    """

    noise_multiplier: float = 0.0
    observer: Callable[[Observed], None] | None = None


class LocalTrainer:
    """Trains one adapter model on one client's data; may be used again for the next client or round.

    Args:
        adapter: written to before each run, and moved to the training device.
        task: batches, losses, metrics.
        config: optimizer, schedule, precision, device.
        privacy: with ``example`` enabled, all training is private; None is without.

    Raises:
        ConfigError: if the scheduler, the device or the precision cannot be used here.
        PrivacyError: if they would let data past the noise.
    """

    def __init__(
        self, adapter: AdapterModel, task: Task, config: TrainConfig, privacy: PrivacyConfig | None = None
    ) -> None:
        self.task = task
        self.config = config
        self.privacy = privacy or PrivacyConfig()
        if self.privacy.example.enabled:
            check_private_training(config)
            if adapter.has_dropout:
                raise PrivacyError(
                    "the adapter has dropout, whose masks depend on who else is in a batch; attach it with "
                    "adapter.dropout=0 under privacy.example"
                )
        self.device = _device(config.device)
        self.autocast_dtype = _autocast_dtype(config.precision, self.device)
        probe = make_optimizer([nn.Parameter(torch.zeros(1))], config)
        make_scheduler(probe, config, total=10)  # a fault in its arguments shows now, not in the middle of a round
        self.adapter = adapter.to(self.device)

    def run(
        self,
        state: AdapterState,
        plan: TrainPlan,
        data: LocalData,
        *,
        seed: int,
        private: PrivateTask | None = None,
    ) -> LocalResult:
        """Follow a plan: measure the received adapter, train it, measure again; the optimizer starts afresh.

        Args:
            state: the received adapter.
            plan: what to do.
            data: the client's examples.
            seed: of data order and dropout, from `client_seed`; equal inputs give a bit-equal delta. Batches and noise
                under ``privacy.example`` come from elsewhere, and differ each time.
            private: of a run under ``privacy.example``; what it spends is `private_schedule`'s, known before.

        Raises:
            ModelError: if the state does not fit the model.
            DataError: if there is nothing to train on.
            PrivacyError: if training would not be as private as was asked for; no step is taken.
            FederatedError: if the loss is not finite (names the step).
        """
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        with self._settings(seed):
            self.adapter.write(state)
            if (plan.evaluate_before or plan.mode == "evaluate") and data.test:
                metrics |= self._measured("eval_before", data.test)
            if plan.mode == "evaluate":
                return LocalResult({}, 0, metrics | self._seconds(began))
            shift = {name.removeprefix(SHIFT): one for name, one in state.extra.items() if name.startswith(SHIFT)}
            metrics |= self._train(plan, data.train, seed, shift=shift, private=private or PrivateTask())
            if (plan.evaluate_after or self.config.evaluate_after) and data.test:
                metrics |= self._measured("eval_after", data.test)
        return LocalResult(self._moved(plan, state), len(data.train), metrics | self._seconds(began))

    def _seconds(self, began: float) -> dict[str, float]:
        """How long it took; nothing under ``privacy.example``, for that tells of the data."""
        return {} if self.privacy.example.enabled else {"seconds": time.perf_counter() - began}

    def _moved(self, plan: TrainPlan, state: AdapterState) -> dict[str, Tensor]:
        """The delta of the groups that the plan trains; the others must be as they came."""
        whole = subtract(self.adapter.masters(), state.tensors)
        delta = {name: tensor for name, tensor in whole.items() if group_of(name) in plan.trainable}
        stray = [name for name in whole.keys() - delta.keys() if whole[name].any()]
        if stray:
            raise ModelError(f"tensor {min(stray)} moved, though the plan trains only {', '.join(plan.trainable)}")
        return delta

    def evaluate(self, state: AdapterState, features: Sequence[Features]) -> Evaluation:
        """Measure an adapter.

        Raises:
            ModelError: if the state does not fit the model.
            DataError: for no features.
        """
        with self._settings(seed=0):
            self.adapter.write(state)
            return self._evaluate(features)

    def _evaluate(self, features: Sequence[Features]) -> Evaluation:
        with self._autocast():
            return self.task.evaluate(self.adapter.model, features, batch_size=self.config.eval_batch_size)

    def _measured(self, prefix: str, features: Sequence[Features]) -> dict[str, float]:
        return {f"{prefix}_{name}": float(value) for name, value in self._evaluate(features).to_dict().items()}

    def _train(
        self, plan: TrainPlan, train: Sequence[Features], seed: int, *, shift: Tensors, private: PrivateTask
    ) -> dict[str, float]:
        if not train:
            raise DataError("the client has no training examples; expected at least one")
        self.adapter.set_trainable(plan.trainable)
        named = self.adapter.trainable(plan.trainable)
        parameters = list(named.values())
        hidden = self._private_gradients(named, len(train), seed, private=private)
        groups = [] if hidden else step_groups([self.task.length(one) for one in train], self.config, seed)
        mu, penalty = plan.proximal_mu or self.config.proximal_mu, tail_penalty(plan, named)
        total = hidden.schedule.steps if hidden else len(groups)
        steps = Steps(parameters, self.config, mu, total=total, penalty=penalty)
        steps.shift_by([shift[name] for name in named] if shift else [])
        self.adapter.set_dropout(True)
        try:
            return self._follow_privately(hidden, train, steps) if hidden else self._follow(groups, train, steps)
        finally:  # the next client trains the same parameters: nothing of this one may stay, whatever happened
            self.adapter.set_dropout(False)
            for parameter in parameters:
                parameter.grad = None

    def _follow(self, groups: list[list[list[int]]], train: Sequence[Features], steps: Steps) -> dict[str, float]:
        losses, clipped = [], 0
        for number, group in enumerate(groups, start=1):
            losses.append(self._backward(steps, [[train[index] for index in batch] for batch in group], number))
            clipped += steps.step(losses[-1])
        return {
            "train_loss": math.fsum(losses) / len(losses),
            "steps": float(len(losses)),
            "grad_clipped_share": clipped / len(losses),
        }

    def _private_gradients(
        self, named: Mapping[str, nn.Parameter], count: int, seed: int, *, private: PrivateTask
    ) -> PrivateGradients | None:
        """What makes the gradients of a private run; None where nothing is promised."""
        example, test_seed = self.privacy.example, self.privacy.test_seed
        if not example.enabled:
            return None
        if test_seed >= 0:  # repeatable, and still another one for each client and round
            test_seed = client_seed(test_seed, seed, "noise")
        return PrivateGradients(
            named,
            private_schedule(count, self.config),
            clip_norm=example.clip_norm,
            noise_multiplier=private.noise_multiplier or example.noise_multiplier,
            source=noise_source(test_seed),
            observer=private.observer,
        )

    def _follow_privately(self, hidden: PrivateGradients, train: Sequence[Features], steps: Steps) -> dict[str, float]:
        """Privacy: only what `PrivateGradients` fills in, and its schedule, leave this function."""
        clipped = 0
        lengths = [self.task.length(one) for one in train]
        with per_sample(self.privacy.example.per_sample, self.adapter.model, hidden.parameters) as made:
            for number, batch in enumerate(hidden.batches(lengths), start=1):
                parts = micro_batches(batch, self.config.batch_size)
                collated = (self.task.collate([train[index] for index in part]) for part in parts)
                hidden.fill(number, batch, [hidden.clipped(made, self._losses, one) for one in collated])
                clipped += steps.step(0.0)
        count = hidden.schedule.steps
        return {"steps": float(count), "grad_clipped_share": clipped / count, **hidden.metrics()}

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            return self.task.per_sample_loss(model, batch)

    def _backward(self, steps: Steps, batches: list[list[Features]], number: int) -> float:
        """Accumulate the gradient of the mean per-sample loss of all batches together, and return that loss."""
        count = sum(len(batch) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self._losses(self.adapter.model, self.task.collate(batch)).sum() / count
            total += loss.item()
            if not math.isfinite(total):
                raise FederatedError(
                    f"the training loss became {total} at step {number}; lower train.learning_rate, set "
                    "train.max_grad_norm, or look for values that are not finite in the data"
                )
            steps.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @contextmanager
    def _settings(self, seed: int) -> Iterator[None]:
        """Threads and global randomness of this run, put back afterwards."""
        threads = torch.get_num_threads()
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` notes a stack trace for every other device
            if devices:
                torch.cuda.manual_seed(seed)
            if self.config.threads:
                torch.set_num_threads(self.config.threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"train.device = {name!r} cannot be used here ({first}); set auto or cpu") from None
    return device


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of the forward pass; None is plain float32."""
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else None
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("train.precision = 'float16' needs a GPU; on the CPU set auto, bfloat16 or float32")
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; emulation is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(told.get("avx512_bf16") or told.get("amx_bf16"))
