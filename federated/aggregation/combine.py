"""Which parts of a strategy go together: the one place that says so, before anything starts."""

from __future__ import annotations

import math

from federated.aggregation.cohorts import cohort_size
from federated.aggregation.combine_privacy import check_client_privacy
from federated.aggregation.protocol import Rule
from federated.config import (
    AdapterConfig,
    ExperimentConfig,
    RoundConfig,
    SelectionConfig,
    StrategyConfig,
    TrainConfig,
)
from federated.config.parts import WITHOUT_FACTORS
from federated.errors import ConfigError

__all__ = ["check_combination", "clients_needed", "cohort_size"]

_ADAPTIVE = ("adam", "yogi", "adagrad")


def check_combination(rule: Rule, config: ExperimentConfig, *, clients: int | None = None) -> None:
    """Refuse what a rule cannot do: before anything starts, in one place, from its properties.

    Args:
        rule: made from ``config.strategy``, or the user's own.
        config: the experiment.
        clients: how many there will be, where that is known: in a simulation.

    Raises:
        ConfigError: naming the parts and the reason.
    """
    _check_kind(rule, config.adapter)
    _check_optimizer(rule, config.strategy)
    _check_ranks(rule, config.adapter)
    _check_training(rule, config.train)
    _check_mode(rule, config.round)
    _check_weights(rule, config.strategy)
    _check_cohort(rule, config.selection, clients)
    if config.privacy.client.enabled:
        check_client_privacy(rule, config, clients=clients)


def clients_needed(rule: Rule, fraction: float) -> int:
    """Fewest clients whose cohort can give the rule as many updates as it needs.

    Args:
        rule: says how many in its properties.
        fraction: share of the clients in a round, in (0, 1].
    """
    needed = rule.properties.min_updates
    return max(needed, math.floor((needed - 1 + 1e-9) / fraction) + 1)


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
    if not rule.properties.averages:
        how = "with a memory of all moves before"
    raise ConfigError(
        f"strategy.server_optimizer = {found}: {rule.name} makes the next adapter itself, {how}, so there is no "
        "pseudo-gradient to follow; use sgd with learning rate 1"
    )


def _check_kind(rule: Rule, adapter: AdapterConfig) -> None:
    """A rule for factors finds none in other adapters; a rule that averages cores none in LoRA, and the reverse."""
    wanted = rule.properties.adapter
    if adapter.kind in WITHOUT_FACTORS and rule.properties.needs_lora:
        raise ConfigError(
            f"adapter.kind = {adapter.kind}: {rule.name} works on LoRA's factors, and such an adapter has none; use a "
            f"rule that averages tensors as they are, such as strategy=fedit, or adapter={wanted}"
        )
    if adapter.kind not in WITHOUT_FACTORS and adapter.kind != wanted:
        raise ConfigError(
            f"adapter.kind = {adapter.kind!r}: {rule.name} is a rule for adapters of kind {wanted}; set "
            f"adapter.kind={wanted}, or choose another strategy"
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


def _check_training(rule: Rule, train: TrainConfig) -> None:
    """Control variates are differences of points: they say something about gradients under plain SGD alone."""
    plain = train.optimizer == "sgd" and train.scheduler == "none" and not (train.momentum or train.weight_decay)
    if rule.properties.plain_sgd and not plain:
        found = f"train.optimizer = {train.optimizer} with momentum {train.momentum:g}, schedule {train.scheduler}"
        raise ConfigError(
            f"{found}, weight decay {train.weight_decay:g}: {rule.name} needs SGD without momentum or decay, in steps "
            "of one size; use train=plain_sgd"
        )


def _check_weights(rule: Rule, strategy: StrategyConfig) -> None:
    """A number of examples is a claim, and a weight that a hostile client chooses is a way in."""
    if rule.properties.robust and strategy.weighted:
        raise ConfigError(
            f"strategy.weighted = true: {rule.name} counts each client once, because a number of examples is what the "
            f"client claims; set strategy.weighted=false, as strategy={rule.name} does"
        )


def _check_cohort(rule: Rule, selection: SelectionConfig, clients: int | None) -> None:
    """A rule's guarantee holds from some number of updates on, and no update comes from outside of the cohort.

    Where the number of clients is not known, ``selection.min_clients`` is what the user promises; its default of 1 is
    no promise, and the strategy waits for as many as the rule needs.
    """
    promised = selection.min_clients if clients is None else clients
    size, needed = cohort_size(promised, selection.fraction), rule.properties.min_updates
    if size >= needed or (clients is None and promised == 1):
        return
    found = f"selection.min_clients = {promised}" if clients is None else f"{promised} clients"
    raise ConfigError(
        f"{found} at selection.fraction = {selection.fraction:g}: a cohort of {size}, and {rule.name} needs at least "
        f"{needed} updates in each round ({rule.properties.min_updates_why}); that takes "
        f"{clients_needed(rule, selection.fraction)} clients, or a smaller strategy.options.byzantine"
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
