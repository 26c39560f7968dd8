"""What a run's rounds with client-level privacy have cost, and whether another one fits.

One event a round: a Gaussian mechanism of the accounted multiplier, Poisson-sampled where cohorts come from a secret
key, else without amplification. A round is charged before it begins, and again when it is run again. The ledger is the
run's own, on the server's disk; without one the charges are as long-lived as this object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from federated.config import ExperimentConfig
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.account import NO_AMPLIFICATION, POISSON, Account
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for
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

    Raises:
        PrivacyError: if no noise keeps the target, or not even the first round fits it.
    """

    def __init__(self, config: ExperimentConfig, *, run_id: str = "", ledger: Ledger | None = None) -> None:
        self._privacy = config.privacy
        self._run_id = run_id
        self._ledger = ledger
        self._kept: list[GaussianSteps] = []
        client = config.privacy.client
        sampling = config.selection.fraction if client.sampling == "poisson" else 1.0
        self.noise_multiplier = client.noise_multiplier or noise_for(
            self._privacy.target_epsilon,
            self._privacy.target_delta,
            sampling=sampling,
            steps=config.rounds,
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
        return self._kept if self._ledger is None else self._ledger.events

    @property
    def head(self) -> str:
        """The ledger's head, to be saved with each version; empty without a ledger."""
        return "" if self._ledger is None else self._ledger.head

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self._epsilon(self.events)

    def account(self) -> Account:
        """What stands beside a version."""
        return Account(
            unit="client",
            epsilon=self.epsilon,
            target_delta=self._privacy.target_delta,
            accountant=self._privacy.accountant,
            sampling=POISSON if self._privacy.client.sampling == "poisson" else NO_AMPLIFICATION,
            private=self._privacy.test_seed < 0,
        )

    def would_exceed(self) -> bool:
        """Whether another round would take epsilon above the target; never where there is none."""
        target = self._privacy.target_epsilon
        return bool(target) and self._epsilon([*self.events, self._round]) > target

    def charge(self, round_number: int) -> None:
        """Charge a round; only when this has returned may anybody be asked.

        Raises:
            BudgetExhausted: if it does not fit; nothing is charged then.
            PrivacyError: if the charge cannot be written.
        """
        if self.would_exceed():
            raise BudgetExhausted(
                f"{len(self.events)} rounds took epsilon {self.epsilon:.4g} of {self._privacy.target_epsilon:g} for "
                f"each client, and round {round_number} does not fit"
            )
        if self._ledger is None:
            self._kept.append(self._round)
        else:
            self._ledger.charge(self._round, key=ChargeKey(self._run_id, round_number, 1, _CLIENT_LEVEL))

    def close(self) -> None:
        """Let others open the ledger."""
        if self._ledger is not None:
            self._ledger.close()

    def _epsilon(self, events: Iterable[GaussianSteps]) -> float:
        return epsilon(events, self._privacy.target_delta, accountant=self._privacy.accountant)
