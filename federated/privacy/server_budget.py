"""What a run's rounds with client-level privacy have cost, and whether another one fits.

One event a round: a Gaussian mechanism of the accounted multiplier, Poisson-sampled where cohorts come from a secret
key, else without amplification. It is charged to all clients; where fixed groups take turns (`mechanism=banded`), to
those of the group that is asked, and what is spent is what the group that was charged most has spent. A round is
charged before it begins, and again when it is run again. The ledger is the run's own, on the server's disk; without one
the charges are as long-lived as this object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from federated.config import ExperimentConfig
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.account import Account, client_sampling
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for
from federated.privacy.fixed_groups import groups_of
from federated.privacy.ledger import ChargeKey, Ledger

__all__ = ["ServerBudget"]

_CLIENT_LEVEL = "client-level"


class ServerBudget:
    """The budget of one run.

    Args:
        config: the experiment, with ``privacy.client.enabled``.
        run_id: the run.
        ledger: of the run, open; None keeps charges in memory.

    Attributes:
        noise_multiplier: the accounted one of each round, as given or solved for all planned rounds.
        groups: of clients, of which each round asks one; 1 where a round may ask anybody.
        band: rounds that the noise of one round goes on from, and itself; 1 where it is independent.

    Raises:
        PrivacyError: if no noise keeps the target, or not even the first round fits it.
    """

    def __init__(self, config: ExperimentConfig, *, run_id: str = "", ledger: Ledger | None = None) -> None:
        self._privacy = config.privacy
        self._sampling = client_sampling(config)
        self._run_id = run_id
        self._ledger = ledger
        self._kept: list[tuple[str, GaussianSteps]] = []
        client = config.privacy.client
        self.groups = groups_of(client, config.selection.fraction)
        self.band = min(self.groups, config.rounds)  # a longer one would add noise, and no round to take it back
        sampling = config.selection.fraction if client.sampling == "poisson" else 1.0
        self.noise_multiplier = client.noise_multiplier or noise_for(
            self._privacy.target_epsilon,
            self._privacy.target_delta,
            sampling=sampling,
            steps=math.ceil(config.rounds / self.groups),
            accountant=self._privacy.accountant,
        )
        self._round = GaussianSteps(self.noise_multiplier, sampling, 1)
        if not self.events and self.would_exceed():
            raise PrivacyError(
                f"privacy.client.noise_multiplier = {self.noise_multiplier:g}: one round alone costs epsilon "
                f"{self._epsilon([self._round]):.4g}, the target is {self._privacy.target_epsilon:g}; give more noise, "
                "or 0 to have it solved for"
            )

    @property
    def events(self) -> Sequence[GaussianSteps]:
        """What was charged, in order."""
        return [event for _, event in self._charges()]

    @property
    def head(self) -> str:
        """The ledger's head, to be saved with each version; empty without a ledger."""
        return "" if self._ledger is None else self._ledger.head

    @property
    def mark(self) -> str:
        """What changes with each charge, and never comes again as long as the charges live."""
        return f"{len(self._kept)} in memory" if self._ledger is None else self._ledger.head

    @property
    def epsilon(self) -> float:
        """Spent so far, by the clients that were charged most."""
        return self._epsilon(self._most())

    def _most(self) -> list[GaussianSteps]:
        """What was charged to those who were charged most."""
        common, own = self._by_group()
        return [*common, *max(own.values(), key=_precision, default=[])]

    def account(self) -> Account:
        """What stands beside a version."""
        return Account(
            unit="client",
            epsilon=self.epsilon,
            target_delta=self._privacy.target_delta,
            accountant=self._privacy.accountant,
            sampling=self._sampling,
            private=self._privacy.test_seed < 0,
            target_epsilon=self._privacy.target_epsilon or None,
            noise_multiplier=self.noise_multiplier,
            steps=len(self._most()),
        )

    def would_exceed(self, round_number: int = 1) -> bool:
        """Whether this round would take epsilon above the target for those it asks; never where there is none."""
        target = self._privacy.target_epsilon
        return bool(target) and self._epsilon([*self._of(self._group(round_number)), self._round]) > target

    def charge(self, round_number: int) -> None:
        """Charge a round; only when this has returned may anybody be asked.

        Raises:
            BudgetExhausted: if it does not fit; nothing is charged then.
            PrivacyError: if the charge cannot be written.
        """
        group = self._group(round_number)
        if self.would_exceed(round_number):
            spent, of_group = self._of(group), f" of group {group + 1}" if self.groups > 1 else ""
            raise BudgetExhausted(
                f"{len(spent)} rounds{of_group} took epsilon {self._epsilon(spent):.4g} of "
                f"{self._privacy.target_epsilon:g} for each client, and round {round_number} does not fit"
            )
        if self._ledger is None:
            self._kept.append((self._name(group), self._round))
        else:
            self._ledger.charge(self._round, key=self._key(round_number))

    def times_charged(self, round_number: int) -> int:
        """How often a round was charged: more than once where it was begun, published nothing, and is done again.

        Without a ledger nothing is known of it, and nothing outlives the process that could be done again.
        """
        if self._ledger is None:
            return 0
        return sum(charge.key == self._key(round_number) for charge in self._ledger.charges)

    def _key(self, round_number: int) -> ChargeKey:
        return ChargeKey(self._run_id, round_number, 1, self._name(self._group(round_number)))

    def close(self) -> None:
        """Let others open the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _group(self, round_number: int) -> int:
        return (round_number - 1) % self.groups

    def _name(self, group: int) -> str:
        return _CLIENT_LEVEL if self.groups == 1 else f"{_CLIENT_LEVEL}, group {group + 1} of {self.groups}"

    def _charges(self) -> Sequence[tuple[str, GaussianSteps]]:
        """Who was charged, and for what."""
        if self._ledger is None:
            return self._kept
        return [(charge.key.plan_digest, charge.event) for charge in self._ledger.charges]

    def _of(self, group: int) -> list[GaussianSteps]:
        """What was charged to a group."""
        common, own = self._by_group()
        return [*common, *own.get(group, [])]

    def _by_group(self) -> tuple[list[GaussianSteps], dict[int, list[GaussianSteps]]]:
        """What was charged to all, and to single groups; what names no group of this division is everybody's."""
        groups = {self._name(group): group for group in range(self.groups)} if self.groups > 1 else {}
        common: list[GaussianSteps] = []
        own: dict[int, list[GaussianSteps]] = {}
        for name, event in self._charges():
            (own.setdefault(groups[name], []) if name in groups else common).append(event)
        return common, own

    def _epsilon(self, events: Iterable[GaussianSteps]) -> float:
        return epsilon(events, self._privacy.target_delta, accountant=self._privacy.accountant)


def _precision(events: Sequence[GaussianSteps]) -> float:
    """What orders groups by what they spent: Gaussians without sampling, whose precisions add up."""
    return math.fsum(event.steps / event.noise_multiplier**2 for event in events)
