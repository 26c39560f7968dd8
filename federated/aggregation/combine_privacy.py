"""What client-level privacy goes with: a part of `federated.aggregation.combine`, before anything starts."""

from __future__ import annotations

from federated.aggregation.cohorts import planned_cohort
from federated.aggregation.private_mean import noise_of_updates
from federated.aggregation.protocol import Rule, RuleProperties
from federated.config import ExperimentConfig
from federated.errors import ConfigError, PrivacyError
from federated.privacy.account import too_likely
from federated.privacy.fixed_groups import group_count, too_few

__all__ = ["check_client_privacy"]


def check_client_privacy(rule: Rule, config: ExperimentConfig, *, clients: int | None = None) -> None:
    """Refuse what noise on the sum of clipped updates does not cover.

    Args:
        rule: aggregates.
        config: with ``privacy.client.enabled``.
        clients: how many there will be, where that is known.

    Raises:
        ConfigError: naming the parts and the reason.
    """
    why = _not_covered(rule.properties)
    if why:
        raise ConfigError(
            f"privacy.client.enabled: {rule.name} {why}; use a rule whose result depends on the mean alone, such as "
            "strategy=fedit, ffa, rolora or fedsvd"
        )
    _check_parts(config)
    if clients is not None and config.privacy.target_delta * clients >= 1:
        raise ConfigError(too_likely(config.privacy.target_delta, clients))
    if config.privacy.client.mechanism == "banded":
        _check_banded(rule, config, clients)
    _check_adaptive(config, clients)


def _not_covered(properties: RuleProperties) -> str:
    """Why noise on the sum is not enough for such a rule; empty where it is."""
    if properties.mean_decides:
        return ""
    if properties.residual:
        return "lets a residual grow by what each single client sends, which no noise on a sum covers"
    if properties.needs_individual_updates or properties.robust:
        return "looks at single updates beside each other, and what it keeps of them is no sum to put noise on"
    if properties.phases > 1:
        return "asks each client for a second message that depends on its data, and noise on one does not cover both"
    if not properties.linear:
        return "does not take a plain sum of its clients' messages, so that one bound on each covers nothing"
    return "remembers or weighs its clients one by one, beside the mean that gets the noise"


def _check_parts(config: ExperimentConfig) -> None:
    if config.strategy.weighted:
        raise ConfigError(
            "strategy.weighted = true: with client-level privacy each client counts once, because its number of "
            "examples is what it claims, and a weight would scale what the clipping norm bounds; set "
            "strategy.weighted=false"
        )
    if config.round.mode != "sync":
        raise ConfigError(
            f"round.mode = {config.round.mode!r}: client-level privacy accounts cohorts that are planned, and buffered "
            "rounds let those who answer fastest take part as often as they like; use round.mode=sync"
        )
    if config.selection.policy != "uniform":
        raise ConfigError(
            f"selection.policy = {config.selection.policy!r}: who is asked would depend on what clients did or hold, "
            "or come in turns that newcomers shift; client-level privacy needs selection.policy=uniform, and "
            "privacy.client.mechanism=banded has turns of its own"
        )


def _check_banded(rule: Rule, config: ExperimentConfig, clients: int | None) -> None:
    """Noise takes back that of earlier rounds where it lies on the same numbers, at the same scale."""
    found, client = "privacy.client.mechanism = 'banded'", config.privacy.client
    if client.sampling != "none":
        raise ConfigError(
            f"{found}, privacy.client.sampling = {client.sampling!r}: clients take turns in fixed groups, and nothing "
            "is drawn by chance; use sampling=none, or mechanism=gaussian with sampling=poisson"
        )
    if client.clipping != "fixed":
        raise ConfigError(
            f"{found}, privacy.client.clipping = {client.clipping!r}: each round's noise takes back that of earlier "
            "ones, so its scale may not follow the clipping norm; use clipping=fixed, or mechanism=gaussian"
        )
    if rule.properties.alternates or not rule.properties.fixed_space:
        why = "asks for other tensors from round to round"
        if not rule.properties.alternates:
            why = "makes a new basis in each round"
        raise ConfigError(
            f"{found}: {rule.name} {why}, and noise that takes back that of earlier rounds would lie on other numbers; "
            "use strategy=fedit, ffa or another rule whose updates add up in one fixed space, or mechanism=gaussian"
        )
    why = "" if clients is None else too_few(clients, groups=group_count(config.selection.fraction))
    if why:
        raise ConfigError(why)


def _check_adaptive(config: ExperimentConfig, clients: int | None) -> None:
    """The count of unclipped clients has a budget of its own: with small cohorts it may be all there is."""
    client = config.privacy.client
    if client.clipping != "adaptive" or not client.noise_multiplier:  # solved for later: checked then
        return
    if clients is None and not client.quantile_noise:
        return
    planned = planned_cohort(clients or 1, config.selection.fraction, client)
    try:
        noise_of_updates(client, client.noise_multiplier, planned)
    except PrivacyError as error:
        raise ConfigError(str(error)) from None
