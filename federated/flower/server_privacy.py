"""Client-level privacy of one run, on the server: who is drawn, what is charged, which noise, and what is said of it.

Each round is charged before anybody is asked, and again when it is run again: a crash between the charge and the
release costs budget and no privacy. Ledger, cohort key, division into groups and the noise that the next round goes on
from live in the run's folder; without a folder they are as long-lived as the strategy. A sampled cohort is drawn anew
for a round that is done again: the same one twice would be no second independent sample, and the account counts two.

What it does not cover is listed beside every epsilon (`federated.privacy.account.NOT_PROTECTED`): it belongs to the
server's own records, and a version's manifest has none of it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from federated.aggregation import Accumulator, ClientView, Rule
from federated.aggregation.cohorts import planned_cohort
from federated.aggregation.private_mean import PrivateMean, noise_of_updates
from federated.config import ExperimentConfig
from federated.errors import PrivacyError
from federated.flower.noise_keeper import NoiseKeeper
from federated.flower.selection import Standing, select_cohort
from federated.global_state import GlobalState
from federated.manifest import digest_of
from federated.privacy.account import too_likely
from federated.privacy.cohorts import PoissonCohorts, open_cohort
from federated.privacy.fixed_groups import FixedGroups
from federated.privacy.ledger import Ledger
from federated.privacy.noise_chain import NoiseChain, Place
from federated.privacy.server_budget import ServerBudget
from federated.tracking import Tracker
from federated.uploads import layout

__all__ = ["ServerPrivacy", "choose_cohort"]

_LOG = logging.getLogger(__name__)
_KEY, _GROUPS, _NOISE, _LEDGER = "cohorts.key", "groups.json", "noise.history", "privacy_ledger.jsonl"


class ServerPrivacy:
    """What a strategy asks about client-level privacy.

    Args:
        config: the experiment, with ``privacy.client.enabled``.
        rule: aggregates.
        budget: what was spent and may be; default: with a ledger in memory.
        folder: of the run, for cohort key, groups and noise; None keeps them in memory.

    Attributes:
        planned: the planned cohort of the current round.

    Raises:
        PrivacyError: if the noise cannot be solved for, not even one round fits the budget, or the noise that is kept
            cannot be read.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        rule: Rule,
        *,
        budget: ServerBudget | None = None,
        folder: Path | None = None,
    ) -> None:
        self._config = config
        self._rule = rule
        self._folder = folder
        self._client = config.privacy.client
        self._test_seed = config.privacy.test_seed
        self.budget = budget or ServerBudget(config)
        self.planned = 0.0
        self._cohorts: PoissonCohorts | FixedGroups | None = None
        correlated = self.budget.band > 1
        self._noise = NoiseKeeper(folder / _NOISE if folder else None) if correlated else None
        self._before = ""
        self._chain: NoiseChain | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, rule: Rule) -> ServerPrivacy | None:
        """What the config asks for, kept in memory; None where client-level privacy is not enabled."""
        return cls(config, rule) if config.privacy.client.enabled else None

    @classmethod
    def of_run(
        cls, config: ExperimentConfig, rule: Rule, *, folder: Path, run_id: str, saved_head: str | None = None
    ) -> ServerPrivacy | None:
        """The same with all that it keeps in the run's folder; `close` lets others open it.

        Args:
            config: the experiment.
            rule: aggregates.
            folder: of the run.
            run_id: the run.
            saved_head: the ledger's head as the version says that is gone on from; None for a fresh run.

        Raises:
            PrivacyError: if the ledger is missing, damaged, in use or an older copy, or nothing fits the budget.
        """
        if not config.privacy.client.enabled:
            return None
        ledger = Ledger.open(
            folder / _LEDGER,
            subject=f"server of {run_id}",
            data_digest=digest_of(["clients of", run_id]),
            create=saved_head is None,
        )
        try:
            ledger.require_descends_from(saved_head)
            return cls(config, rule, budget=ServerBudget(config, run_id=run_id, ledger=ledger), folder=folder)
        except BaseException:
            ledger.close()
            raise

    def plan(self, present: Collection[str], resting: Collection[str] = ()) -> None:
        """Fix the round's planned cohort; the first call fixes the population of sampled cohorts and of groups.

        Args:
            present: the clients that are there.
            resting: those that said "not now": they belong to a population, and may be drawn and not be there.

        Raises:
            PrivacyError: if ``target_delta`` promises nothing to so many clients, so small a cohort leaves no budget
                for the updates, so few clients cannot be divided, or the cohort key or the groups cannot be kept.
        """
        if self._cohorts is None:
            self._cohorts = self._made_cohorts({*present, *resting})
        population = len(self._cohorts.population) if self._cohorts else len(present)
        if self._config.privacy.target_delta * population >= 1:
            raise PrivacyError(too_likely(self._config.privacy.target_delta, population))
        self.planned = planned_cohort(population, self._config.selection.fraction, self._client)
        noise_of_updates(self._client, self.budget.noise_multiplier, self.planned)

    def _made_cohorts(self, present: Collection[str]) -> PoissonCohorts | FixedGroups | None:
        if self._client.mechanism == "banded":
            return self._made_groups(present)
        if self._client.sampling == "none":
            return None
        if self._test_seed >= 0:
            return PoissonCohorts(present, key=digest_of(["cohorts", self._test_seed]).encode())
        return PoissonCohorts.of_run(self._folder / _KEY, present) if self._folder else PoissonCohorts(present)

    def _made_groups(self, present: Collection[str]) -> FixedGroups:
        division = {"groups": self.budget.groups, "seed": self._config.seed}
        if self._folder is None:
            return FixedGroups(present, **division)
        return FixedGroups.of_run(self._folder / _GROUPS, present, **division, fresh=not self.budget.events)

    def charge(self, round_number: int) -> str:
        """Charge a round ahead of it.

        Returns:
            What is to be said of it: that it was charged before, when it published nothing; mostly nothing.

        Raises:
            BudgetExhausted: if it would take epsilon above the target; nothing is charged then.
        """
        self._before = self.budget.mark
        self.budget.charge(round_number)
        times = self.budget.times_charged(round_number)
        if times < 2:
            return ""
        return (
            f"round {round_number} was charged before and published nothing: it is done again, and charged again "
            f"({times} times now), although nobody saw what it had computed: epsilon is not too small by that"
        )

    def draw(self, present: Collection[str], round_number: int) -> tuple[str, ...]:
        """The round's cohort among those that are there.

        Privacy: it may be empty. A sampled one is secret from all who see versions; others are not.
        """
        if self._cohorts is None:
            fraction, seed = self._config.selection.fraction, self._config.seed
            return open_cohort(present, fraction=fraction, seed=seed, round_number=round_number)
        if isinstance(self._cohorts, FixedGroups):
            drawn = self._cohorts.of_round(round_number)
        else:
            drawn = self._cohorts.draw(self._config.selection.fraction)
        return tuple(name for name in drawn if name in present)

    def accumulator(self, inner: Accumulator, state: GlobalState, round_number: int) -> PrivateMean:
        """The rule's accumulator behind clipping and noise, for the planned cohort.

        Raises:
            PrivacyError: if the round was not planned.
        """
        self._chain = self._noise.chain(self._place(round_number)) if self._noise else None
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
            chain=self._chain,
        )

    def _place(self, round_number: int) -> Place:
        std = self.budget.noise_multiplier * self._client.clip_norm
        return Place(round_number, self._before, self.budget.mark, std, self.budget.band)

    def published(self, round_number: int) -> None:
        """Keep what the next round's noise goes on from: called when a round is published, and for no other.

        Raises:
            PrivacyError: if it cannot be written.
        """
        if self._noise is not None and self._chain is not None and self._chain.place.round_number == round_number:
            self._noise.keep(self._chain)
        self._chain = None

    def close(self) -> None:
        """Let others open the ledger."""
        self.budget.close()


def choose_cohort(
    config: ExperimentConfig,
    round_number: int,
    present: Collection[str],
    *,
    standings: Mapping[str, Standing],
    privacy: ServerPrivacy | None = None,
    tracker: Tracker | None = None,
    resting: Collection[str] = (),
) -> tuple[str, ...]:
    """Who takes part in a round; with client-level privacy it is planned and charged first.

    Args:
        config: the experiment.
        round_number: 1-based.
        present: the clients that are there.
        standings: what is known of each.
        privacy: of the run, where there is any.
        tracker: takes a ``warning`` event where a round is charged once more.
        resting: clients that said "not now": they are not asked.

    Raises:
        BudgetExhausted: if the round does not fit what is left; nobody is asked then.
    """
    if privacy is not None:
        privacy.plan(present, resting)
        said = privacy.charge(round_number)
        if said:
            _LOG.warning("%s", said)
        if said and tracker is not None:
            tracker.emit({"event": "warning", "message": said})
        return privacy.draw(present, round_number)
    return select_cohort(
        list(present),
        fraction=config.selection.fraction,
        seed=config.seed,
        round_number=round_number,
        policy=config.selection.policy,
        standings=standings,
    )
