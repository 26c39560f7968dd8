"""Which parts of a strategy go together: the one place that says so, before anything starts."""

from __future__ import annotations

from federated.aggregation.protocol import Rule
from federated.config import StrategyConfig
from federated.errors import ConfigError

__all__ = ["check_combination"]

_ADAPTIVE = ("adam", "yogi", "adagrad")


def check_combination(rule: Rule, strategy: StrategyConfig) -> None:
    """Refuse a server optimizer that the rule leaves nothing to follow, or whose step is far from any update's size.

    Raises:
        ConfigError: naming the parts and the reason.
    """
    optimizer = strategy.server_optimizer
    if optimizer.name in _ADAPTIVE and optimizer.learning_rate >= 1.0 > 10 * optimizer.tau:
        raise ConfigError(
            f"strategy.server_optimizer.learning_rate = {optimizer.learning_rate:g}: {optimizer.name} moves every "
            "value by about that much each round, however small the updates; give one such as 0.005, or a tau of 0.1 "
            "and more"
        )
    if rule.properties.fixed_space or (optimizer.name == "sgd" and optimizer.learning_rate == 1.0):
        return
    found = f"{optimizer.name} with learning rate {optimizer.learning_rate:g}"
    raise ConfigError(
        f"strategy.server_optimizer = {found}: {rule.name} makes the next adapter itself, by a factorisation whose "
        "directions change from round to round, so there is no pseudo-gradient to follow; use sgd with learning rate 1"
    )
