"""What a run's rounds with client-level privacy have cost, and whether another one fits.

One event a round: a Gaussian mechanism of the accounted multiplier, Poisson-sampled where cohorts come from a secret
key, else without amplification. A round is charged before it begins.
"""

from __future__ import annotations

from collections.abc import Iterable

from federated.config import ExperimentConfig
from federated.errors import BudgetExhausted, PrivacyError
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for

__all__ = ["ServerBudget"]


class ServerBudget:
    """The budget of one run.

    Args:
        config: the experiment, with ``privacy.client.enabled``.
        spent: events of earlier rounds of this run.

    Attributes:
        noise_multiplier: the accounted one of each round, as given or solved for all planned rounds.
        events: what was charged.

    Raises:
        PrivacyError: if no noise keeps the target, or not even the first round fits it.
    """

    def __init__(self, config: ExperimentConfig, *, spent: Iterable[GaussianSteps] = ()) -> None:
        self._privacy = config.privacy
        client = config.privacy.client
        sampling = config.selection.fraction if client.sampling == "poisson" else 1.0
        self.events = list(spent)
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
    def epsilon(self) -> float:
        """Spent so far."""
        return self._epsilon(self.events)

    @property
    def steps(self) -> int:
        """Rounds that were charged."""
        return sum(event.steps for event in self.events)

    def would_exceed(self) -> bool:
        """Whether another round would take epsilon above the target; never where there is none."""
        target = self._privacy.target_epsilon
        return bool(target) and self._epsilon([*self.events, self._round]) > target

    def charge(self, round_number: int) -> None:
        """Charge a round.

        Raises:
            BudgetExhausted: if it does not fit; nothing is charged then.
        """
        if self.would_exceed():
            raise BudgetExhausted(
                f"{self.steps} rounds took epsilon {self.epsilon:.4g} of {self._privacy.target_epsilon:g} for each "
                f"client, and round {round_number} does not fit"
            )
        self.events.append(self._round)

    def _epsilon(self, events: Iterable[GaussianSteps]) -> float:
        return epsilon(events, self._privacy.target_delta, accountant=self._privacy.accountant)
