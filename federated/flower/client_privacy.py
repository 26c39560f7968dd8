"""What a client does about its own examples' privacy: its owner's limits, its ledger, and the noise of one task.

The order is what counts: the limits and the budget are asked first, the charge is on disk, and only then is anything
computed. An answer that was stored is sent again as it was; computed again it is charged again.

The ledger belongs to the data, not to the run: on a device it lies in the owner's store and holds what all runs have
spent. A simulation has one for each run, since its clients are made up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from federated.config import ExperimentConfig
from federated.errors import BudgetExhausted, PrivacyError
from federated.flower.client_site import ClientSite
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment
from federated.manifest import digest_of
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for
from federated.privacy.ledger import ChargeKey, Ledger
from federated.tasks import Features
from federated.training import PrivateTask, private_schedule

__all__ = ["ExampleBudget", "Limit"]


@dataclass(frozen=True)
class Limit:
    """A bound on what may be spent, and who set it."""

    epsilon: float
    target_delta: float
    setter: str


class ExampleBudget:
    """The ledger of one client, open for one task; use it as a context.

    Args:
        task: what is asked for.
        config: the experiment as this site runs it, with ``privacy.example`` enabled.
        site: the owner's limits.
        store: of this client and run.
        train: the examples that it will train on.

    Raises:
        PrivacyError: if the ledger is damaged, another data set's, in use, or not the one (or an older copy of it) that
            the task acknowledges; or if the data do not fit the batches.
    """

    def __init__(
        self,
        task: Assignment,
        config: ExperimentConfig,
        *,
        site: ClientSite,
        store: ClientStore,
        train: Sequence[Features],
    ) -> None:
        self._task = task
        self._privacy = config.privacy
        self._least = site.least_noise
        self._limits = _limits(config, site)
        schedule = private_schedule(len(train), config.train)
        if config.privacy.target_delta * len(train) >= 1:
            raise PrivacyError(
                f"privacy.target_delta = {config.privacy.target_delta:g}: with that probability all of an example may "
                "be given away, and this client has so many that one is; set it below one over their number"
            )
        self._sampling, self._steps = schedule.sampling, schedule.steps
        self._rounds = config.rounds
        self._ledger = _opened(task, site=site, store=store, train=train)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger.close()

    @property
    def head(self) -> str:
        """The ledger's head."""
        return self._ledger.head

    @property
    def spent(self) -> float:
        """Epsilon of all that was charged to these examples, by this run and others."""
        return self._epsilon(self._ledger.events, self._privacy.target_delta)

    def charge(self) -> PrivateTask:
        """Charge this task's steps; only when this has returned may they be computed.

        Raises:
            BudgetExhausted: if they do not fit what is left; nothing is charged then.
            PrivacyError: if no noise keeps the target, or less than the owner's least is asked for.
        """
        event = GaussianSteps(self._noise(), self._sampling, self._steps)
        for limit in self._limits:
            if self._epsilon([*self._ledger.events, event], limit.target_delta) > limit.epsilon:
                raise BudgetExhausted(
                    f"{limit.setter} allows epsilon {limit.epsilon:g} at {limit.target_delta:g}, "
                    f"{self._epsilon(self._ledger.events, limit.target_delta):.4g} is spent on these examples, and "
                    f"{self._steps} steps more do not fit"
                )
        task = self._task
        self._ledger.charge(event, key=ChargeKey(task.run_id, task.round_number, task.plan.phase, task.plan.digest))
        return PrivateTask(event.noise_multiplier)

    def _noise(self) -> float:
        """As configured, or the least that keeps the target over all rounds, beside what other runs spent."""
        given = self._privacy.example.noise_multiplier
        if not given:
            others = tuple(one.event for one in self._ledger.charges if one.key.run_id != self._task.run_id)
            given = noise_for(
                self._privacy.target_epsilon,
                self._privacy.target_delta,
                sampling=self._sampling,
                steps=self._steps * self._rounds,
                spent=others,
                accountant=self._privacy.accountant,
            )
        if given < self._least:
            raise PrivacyError(f"a noise multiplier of {given:.4g}: this client allows no less than {self._least:g}")
        return given

    def _epsilon(self, events: Iterable[GaussianSteps], target_delta: float) -> float:
        return epsilon(events, target_delta, accountant=self._privacy.accountant)


def _limits(config: ExperimentConfig, site: ClientSite) -> list[Limit]:
    privacy = config.privacy
    limits = []
    if privacy.target_epsilon:
        limits.append(Limit(privacy.target_epsilon, privacy.target_delta, "the run"))
    if site.max_epsilon is not None:
        limits.append(Limit(site.max_epsilon, min(site.target_delta, privacy.target_delta), "this client's owner"))
    return limits


def _opened(task: Assignment, *, site: ClientSite, store: ClientStore, train: Sequence[Features]) -> Ledger:
    """The client's ledger; once the server has acknowledged a head of it, none is made and no older copy will do."""
    known = task.acknowledged_head
    ledger = Ledger.open(_path(site, store), subject=site.client_id, data_digest=_digest(train), create=not known)
    try:
        ledger.require_descends_from(known or None)
    except PrivacyError:
        ledger.close()
        raise
    return ledger


def _path(site: ClientSite, store: ClientStore) -> Path:
    if site.data is None:
        return store.folder / "privacy_ledger.jsonl"
    name = hashlib.sha256(site.client_id.encode()).hexdigest()[:32]
    return Path(site.store) / "privacy" / f"{name}.jsonl"


def _digest(train: Sequence[Features]) -> str:
    """Names the examples, whatever their order. Privacy: never leaves the client."""
    texts = (json.dumps(dict(one), sort_keys=True, default=_plain) for one in train)
    return digest_of(sorted(hashlib.sha256(text.encode()).hexdigest() for text in texts))


def _plain(value: Any) -> Any:
    """A tensor or an array as lists."""
    return value.tolist()
