"""The optimizer's side of local training: how parameters move once their gradients are there.

`federated.training` makes one `Steps` for each run, whatever made the gradients. No data comes here but the loss that
a schedule may follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from federated.config import TrainConfig
from federated.errors import ConfigError
from federated.penalties import TailPenalty

__all__ = ["Steps", "make_optimizer", "make_scheduler"]


class Steps:
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
        self._optimizer = make_optimizer(parameters, config)
        self._scheduler = make_scheduler(self._optimizer, config, total=total)
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


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer, fresh."""
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


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, *, total: int
) -> lr_scheduler.LRScheduler | None:
    """The configured schedule over ``total`` steps, if any.

    Raises:
        ConfigError: if there is no such schedule, or its arguments do not fit.
    """
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
