"""Client-level privacy of one run, on the server: who is drawn, what is charged, which noise, and what is said of it.

Each round is charged before anybody is asked, and again when it is run again: a crash between the charge and the
release costs budget and no privacy. Ledger and cohort key live in the run's folder; without a folder they are as long-
lived as the strategy.

What it does not cover is listed beside every epsilon (`NOT_PROTECTED`): it belongs to the server's own records, and a
version's manifest has none of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from federated.aggregation import Accumulator, ClientView, Rule
from federated.aggregation.cohorts import planned_cohort
from federated.aggregation.private_mean import PrivateMean, noise_of_updates
from federated.config import ExperimentConfig
from federated.flower.selection import Standing, select_cohort
from federated.global_state import GlobalState
from federated.manifest import digest_of
from federated.privacy.cohorts import PoissonCohorts
from federated.privacy.server_budget import ServerBudget
from federated.uploads import layout

__all__ = ["NOT_PROTECTED", "ServerPrivacy", "choose_cohort"]

NOT_PROTECTED = (
    "who took part and when",
    "training losses and update norms",
    "held-out metrics",
    "refusals and quorum",
)
"""What a run's records say of clients without noise: for the server's eyes."""
_KEY = "cohorts.key"
_RELATION = "add or remove one client"
_SAMPLING = {
    "none": "none: no amplification is claimed",
    "poisson": "poisson: each client independently, by a secret key; holds for whoever does not know who took part",
}


class ServerPrivacy:
    """What a strategy asks about client-level privacy.

    Args:
        config: the experiment, with ``privacy.client.enabled``.
        rule: aggregates.
        folder: of the run, for ledger and cohort key; None keeps both in memory.
        budget: what was spent and may be; default: made from the config.

    Attributes:
        planned: the planned cohort of the current round.

    Raises:
        PrivacyError: if the noise cannot be solved for, or not even one round fits the budget.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        rule: Rule,
        *,
        folder: Path | None = None,
        budget: ServerBudget | None = None,
    ) -> None:
        self._config = config
        self._rule = rule
        self._folder = folder
        self._client = config.privacy.client
        self._test_seed = config.privacy.test_seed
        self.budget = budget or ServerBudget(config)
        self.planned = 0.0
        self._cohorts: PoissonCohorts | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, rule: Rule, *, folder: Path | None = None) -> ServerPrivacy | None:
        """What the config asks for; None where client-level privacy is not enabled."""
        return cls(config, rule, folder=folder) if config.privacy.client.enabled else None

    def plan(self, present: Collection[str]) -> None:
        """Fix the round's planned cohort; the first call fixes the population of sampled cohorts.

        Args:
            present: the clients that are there.

        Raises:
            PrivacyError: if so small a cohort leaves no budget for the updates, or the cohort key cannot be kept.
        """
        if self._client.sampling == "poisson" and self._cohorts is None:
            self._cohorts = self._made_cohorts(present)
        population = len(self._cohorts.population) if self._cohorts else len(present)
        self.planned = planned_cohort(population, self._config.selection.fraction, sampling=self._client.sampling)
        noise_of_updates(self._client, self.budget.noise_multiplier, self.planned)

    def _made_cohorts(self, present: Collection[str]) -> PoissonCohorts:
        if self._test_seed >= 0:
            return PoissonCohorts(present, key=digest_of(["cohorts", self._test_seed]).encode())
        return PoissonCohorts.of_run(self._folder / _KEY, present) if self._folder else PoissonCohorts(present)

    def charge(self, round_number: int) -> None:
        """Charge a round ahead of it.

        Raises:
            BudgetExhausted: if it would take epsilon above the target; nothing is charged then.
        """
        self.budget.charge(round_number)

    def draw(self, present: Collection[str]) -> tuple[str, ...] | None:
        """The round's cohort among those that are there; None where the config's own policy draws it.

        Privacy: it may be empty, and is secret from all who see versions.
        """
        if self._cohorts is None:
            return None
        drawn = self._cohorts.draw(self._config.selection.fraction)
        return tuple(name for name in drawn if name in present)

    def accumulator(self, inner: Accumulator, state: GlobalState, round_number: int) -> PrivateMean:
        """The rule's accumulator behind clipping and noise, for the planned cohort.

        Raises:
            PrivacyError: if the round was not planned.
        """
        plan, payload = self._rule.plan(state, ClientView("anybody"), 1)
        seed = int(digest_of(["noise", self._test_seed, round_number])[:12], 16) if self._test_seed >= 0 else -1
        return PrivateMean(
            inner,
            state.rule_state,
            layout(plan, payload),
            config=self._client,
            noise_multiplier=self.budget.noise_multiplier,
            planned=self.planned,
            test_seed=seed,
        )

    def record(self) -> dict[str, Any]:
        """What stands beside each version and round: epsilon so far, and under which assumptions."""
        privacy = self._config.privacy
        account = {
            "privacy_unit": "client",
            "epsilon": self.budget.epsilon,
            "target_delta": privacy.target_delta,
            "target_epsilon": privacy.target_epsilon or None,
            "neighbouring": _RELATION,
            "accountant": privacy.accountant,
            "sampling": _SAMPLING[self._client.sampling],
            "noise_multiplier": self.budget.noise_multiplier,
            "steps": self.budget.steps,
            "private": self._test_seed < 0,
        }
        return {"accounts": [account], "not_protected": list(NOT_PROTECTED)}


def choose_cohort(
    config: ExperimentConfig,
    round_number: int,
    present: Collection[str],
    *,
    standings: Mapping[str, Standing],
    privacy: ServerPrivacy | None = None,
) -> tuple[str, ...]:
    """Who takes part in a round; with client-level privacy it is planned and charged first.

    Args:
        config: the experiment.
        round_number: 1-based.
        present: the clients that are there.
        standings: what is known of each.
        privacy: of the run, where there is any.

    Raises:
        BudgetExhausted: if the round does not fit what is left; nobody is asked then.
    """
    if privacy is not None:
        privacy.plan(present)
        privacy.charge(round_number)
        drawn = privacy.draw(present)
        if drawn is not None:
            return drawn
    return select_cohort(
        list(present),
        fraction=config.selection.fraction,
        seed=config.seed,
        round_number=round_number,
        policy=config.selection.policy,
        standings=standings,
    )
