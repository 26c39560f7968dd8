"""Which parts of a strategy go together: the one place that says so, before anything starts."""

from __future__ import annotations

from federated.aggregation.protocol import Rule
from federated.config import AdapterConfig, ExperimentConfig, RoundConfig, StrategyConfig
from federated.errors import ConfigError

__all__ = ["check_combination"]

_ADAPTIVE = ("adam", "yogi", "adagrad")


def check_combination(rule: Rule, config: ExperimentConfig) -> None:
    """Refuse what a rule cannot do: before anything starts, in one place, from its properties.

    Raises:
        ConfigError: naming the parts and the reason.
    """
    _check_optimizer(rule, config.strategy)
    _check_ranks(rule, config.adapter)
    _check_mode(rule, config.round)


def _check_optimizer(rule: Rule, strategy: StrategyConfig) -> None:
    """A server optimizer needs a direction to follow, and a step that is not far from any update's size."""
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
    how = "by a factorisation whose directions change from round to round"
    if rule.properties.residual:
        how = "and a residual that holds what it does not"
    raise ConfigError(
        f"strategy.server_optimizer = {found}: {rule.name} makes the next adapter itself, {how}, so there is no "
        "pseudo-gradient to follow; use sgd with learning rate 1"
    )


def _check_ranks(rule: Rule, adapter: AdapterConfig) -> None:
    """Clients of smaller ranks need a rule that can combine them."""
    smaller = [rank for rank in adapter.client_ranks if rank < adapter.rank]
    if smaller and not rule.properties.mixed_ranks:
        raise ConfigError(
            f"adapter.client_ranks = {list(adapter.client_ranks)}: {rule.name} averages factors of one rank "
            f"(adapter.rank = {adapter.rank}); give all clients that rank, or use a rule that takes mixed ranks "
            "(see fedpeft strategies)"
        )


def _check_mode(rule: Rule, policy: RoundConfig) -> None:
    """Buffered rounds mix updates of several versions: a rule must be able to, or few may be at work at a flush."""
    if policy.mode == "sync" or rule.properties.asynchronous == "any":
        return
    if rule.properties.asynchronous == "no":
        raise ConfigError(
            f"round.mode = 'buffered': {rule.name} needs a cohort that starts together and answers together; use "
            "round.mode=sync, or a rule that takes updates as they come (see fedpeft strategies)"
        )
    if policy.concurrency > policy.buffer:
        raise ConfigError(
            f"round.concurrency = {policy.concurrency} above round.buffer = {policy.buffer}: each version of "
            f"{rule.name} has a basis of its own, so what is still in training when one is made would be refused, up "
            f"to {policy.concurrency - 1} updates for {policy.buffer} that are taken; use a concurrency of at most "
            "round.buffer, or round.mode=sync"
        )
