"""LocalTrainer: one client's local steps, from a received adapter to a delta.

The one interpreter of `TrainPlan` on the client. It knows no Flower, no files and no other clients; chance comes in as
a seed and the global random state is left as it was.

* The loss is the mean of per-sample losses over an optimizer step, however many forward passes it is made of.
* Trainable tensors are float32 while they train, whatever the adapter's dtype; ``delta = after - before`` in float32.
* The frozen base stays in eval mode: the one dropout is the adapter's own.
* FedProx: ``mu * (w - w_received)`` is added to the gradient, and so are a plan's penalty (`federated.penalties`) and a
  constant shift that comes with the state (`federated.corrections`: SCAFFOLD, FedDyn); the reported loss is without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from federated.adapters import AdapterModel
from federated.config import TrainConfig
from federated.corrections import SHIFT
from federated.delta import subtract
from federated.errors import ConfigError, DataError, FederatedError, ModelError
from federated.manifest import TrainPlan, digest_of
from federated.penalties import TailPenalty, tail_penalty
from federated.state import AdapterState, Tensors, group_of
from federated.tasks import Evaluation, Features, Task
from federated.tasks.batching import step_groups

__all__ = ["LocalData", "LocalResult", "LocalTrainer", "client_seed", "step_groups"]


def client_seed(seed: int, round_number: int, client_id: str) -> int:
    """The seed of one client's round: unrelated for other rounds and clients, at most 63 bits."""
    return int(digest_of([seed, round_number, client_id])[:16], 16) >> 1


@dataclass(frozen=True)
class LocalData:
    """One client's encoded examples; ``test`` may be empty (then nothing is measured).

    Privacy: never leaves the process that made it.
    """

    train: Sequence[Features]
    test: Sequence[Features] = ()


@dataclass(frozen=True)
class LocalResult:
    """What local training gives.

    Args:
        delta: canonical name to float32 tensor of the trained groups, ``after - before``; empty when only evaluated.
        num_examples: training examples behind it.
        metrics: ``train_loss`` (mean over the steps), ``steps``, ``seconds``, ``grad_clipped_share``, and
            ``eval_before_*`` and ``eval_after_*`` where asked for.
    """

    delta: Mapping[str, Tensor]
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class LocalTrainer:
    """Trains one adapter model on one client's data; may be used again for the next client or round.

    Args:
        adapter: written to before each run, and moved to the training device.
        task: batches, losses, metrics.
        config: optimizer, schedule, precision, device.

    Raises:
        ConfigError: if the scheduler, the device or the precision cannot be used here.
    """

    def __init__(self, adapter: AdapterModel, task: Task, config: TrainConfig) -> None:
        self.task = task
        self.config = config
        self.device = _device(config.device)
        self.autocast_dtype = _autocast_dtype(config.precision, self.device)
        probe = _optimizer([nn.Parameter(torch.zeros(1))], config)
        _scheduler(probe, config, total=10)  # a fault in its arguments shows now, not in the middle of a round
        self.adapter = adapter.to(self.device)

    def run(self, state: AdapterState, plan: TrainPlan, data: LocalData, *, seed: int) -> LocalResult:
        """Follow a plan: measure the received adapter, train it, measure again; the optimizer starts afresh.

        Args:
            state: the received adapter.
            plan: what to do.
            data: the client's examples.
            seed: of data order and dropout, from `client_seed`; equal inputs give a bit-equal delta.

        Raises:
            ModelError: if the state does not fit the model.
            DataError: if there is nothing to train on.
            FederatedError: if the loss is not finite (names the step).
        """
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        with self._settings(seed):
            self.adapter.write(state)
            if (plan.evaluate_before or plan.mode == "evaluate") and data.test:
                metrics |= self._measured("eval_before", data.test)
            if plan.mode == "evaluate":
                return LocalResult({}, 0, {**metrics, "seconds": time.perf_counter() - began})
            shift = {name.removeprefix(SHIFT): one for name, one in state.extra.items() if name.startswith(SHIFT)}
            metrics |= self._train(plan, data.train, seed, shift=shift)
            if (plan.evaluate_after or self.config.evaluate_after) and data.test:
                metrics |= self._measured("eval_after", data.test)
        metrics["seconds"] = time.perf_counter() - began
        return LocalResult(self._moved(plan, state), len(data.train), metrics)

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

    def _train(self, plan: TrainPlan, train: Sequence[Features], seed: int, *, shift: Tensors) -> dict[str, float]:
        if not train:
            raise DataError("the client has no training examples; expected at least one")
        self.adapter.set_trainable(plan.trainable)
        named = self.adapter.trainable(plan.trainable)
        parameters = list(named.values())
        groups = step_groups([self.task.length(one) for one in train], self.config, seed)
        mu, penalty = plan.proximal_mu or self.config.proximal_mu, tail_penalty(plan, named)
        steps = _Steps(parameters, self.config, mu, total=len(groups), penalty=penalty)
        steps.shift_by([shift[name] for name in named] if shift else [])
        losses, clipped = [], 0
        self.adapter.set_dropout(True)
        try:
            for number, group in enumerate(groups, start=1):
                losses.append(self._backward(steps, [[train[index] for index in batch] for batch in group], number))
                clipped += steps.step(losses[-1])
        finally:  # the next client trains the same parameters: nothing of this one may stay, whatever happened
            self.adapter.set_dropout(False)
            for parameter in parameters:
                parameter.grad = None
        return {
            "train_loss": math.fsum(losses) / len(losses),
            "steps": float(len(losses)),
            "grad_clipped_share": clipped / len(losses),
        }

    def _backward(self, steps: _Steps, batches: list[list[Features]], number: int) -> float:
        """Accumulate the gradient of the mean per-sample loss of all batches together, and return that loss."""
        count = sum(len(batch) for batch in batches)
        total = 0.0
        for batch in batches:
            with self._autocast():
                losses = self.task.per_sample_loss(self.adapter.model, self.task.collate(batch))
            loss = losses.sum() / count
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


class _Steps:
    """Optimizer, schedule, clipping, proximal term and penalty of one run."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        config: TrainConfig,
        mu: float,
        *,
        total: int,
        penalty: TailPenalty | None = None,
    ) -> None:
        self._parameters = parameters
        self._penalty = penalty
        self._bound = config.max_grad_norm
        self._mu = mu
        self._received = [parameter.detach().clone() for parameter in parameters] if mu else []
        self._shift: list[Tensor] = []
        self._optimizer = _optimizer(parameters, config)
        self._scheduler = _scheduler(self._optimizer, config, total=total)
        device = parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and config.precision == "float16")

    def shift_by(self, shift: Sequence[Tensor]) -> None:
        """Add these to every gradient, one to each parameter; none adds nothing."""
        self._shift = [one.to(p.device, p.dtype) for p, one in zip(self._parameters, shift, strict=False)]

    def step(self, loss: float) -> bool:
        """Move once and forget the gradients; returns whether they were clipped."""
        self.scaler.unscale_(self._optimizer)
        self._pull_back()
        clipped = self._clip()
        scale = self.scaler.get_scale()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._scheduler is not None and self.scaler.get_scale() >= scale:  # else the scaler skipped the step
            _advance(self._scheduler, loss)
        return clipped

    def _pull_back(self) -> None:
        for parameter, received in zip(self._parameters, self._received, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=self._mu)
        for parameter, shift in zip(self._parameters, self._shift, strict=False):
            parameter.grad = shift.clone() if parameter.grad is None else parameter.grad.add_(shift)
        if self._penalty is not None:
            self._penalty.add_gradient()

    def _clip(self) -> bool:
        if not self._bound:
            return False
        norm = nn.utils.clip_grad_norm_(self._parameters, self._bound)
        return bool(norm > self._bound)


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def _schedulers() -> dict[str, type[lr_scheduler.LRScheduler]]:
    """Every public schedule of torch by name."""
    base = lr_scheduler.LRScheduler
    return {
        name: value
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not name.startswith("_")
    }


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, *, total: int) -> lr_scheduler.LRScheduler | None:
    if config.scheduler == "none":
        return None
    known = _schedulers()
    if config.scheduler not in known:
        raise ConfigError(
            f"train.scheduler = {config.scheduler!r} is not in torch.optim.lr_scheduler; "
            f"expected none or one of {', '.join(sorted(known))}"
        )
    arguments = {name: total if value == "total" else value for name, value in config.scheduler_args.items()}
    try:
        return known[config.scheduler](optimizer, **arguments)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise ConfigError(f"train.scheduler_args = {arguments} do not fit {config.scheduler}: {error}") from None


def _advance(scheduler: lr_scheduler.LRScheduler, loss: float) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


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
