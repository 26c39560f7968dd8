"""The account of a version: epsilon with everything that it means nothing without.

A version's manifest holds ``{"accounts": [account.to_dict(), ...]}`` as ``privacy``, one for each protected unit;
`accounts_of` reads it again. An account says what was spent, never on whom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from federated.config import ExperimentConfig, PrivacyConfig
from federated.errors import PrivacyError
from federated.privacy.accounting import ACCOUNTANTS
from federated.privacy.fixed_groups import groups_of

__all__ = [
    "NEIGHBOURING",
    "NOT_PROTECTED",
    "NO_AMPLIFICATION",
    "POISSON",
    "Account",
    "accounts_of",
    "client_sampling",
    "example_account",
    "privacy_record",
    "too_likely",
]

NEIGHBOURING = "add or remove one"
"""Data sets are neighbours when one has one unit more; replacing a unit is both, and costs more."""

NO_AMPLIFICATION = "none claimed: every unit may take part in every step"
POISSON = "Poisson: each unit takes part in a step by a draw of its own, from a generator that nobody else knows"

NOT_PROTECTED = (
    "metrics (losses, accuracies)",
    "numbers of examples, steps and clients",
    "who took part, and when",
    "the last bits of the noise, which is rounded floating point and not discrete",
)
"""What no account of this library covers, in words."""

_UNITS = ("example", "client")


@dataclass(frozen=True)
class Account:
    """What one unit's privacy has cost up to a version.

    Args:
        unit: whose addition or removal is hidden, ``"example"`` or ``"client"``.
        epsilon: an upper bound on what was spent; infinity is no bound. Of the example unit it is the largest that any
            client may have spent.
        target_delta: the probability beside it.
        accountant: which one computed it.
        sampling: what is assumed about sampling, in words.
        neighbouring: which data sets are neighbours.
        private: False under a test seed, whose noise can be made again.
        not_protected: what is not covered, in words.
        target_epsilon: what may be spent, where that is bounded.
        noise_multiplier: of each step, where it is one.
        steps: that were charged, where they are alike.

    Raises:
        PrivacyError: if a value is out of range.
    """

    unit: str
    epsilon: float
    target_delta: float
    accountant: str
    sampling: str
    neighbouring: str = NEIGHBOURING
    private: bool = True
    not_protected: tuple[str, ...] = NOT_PROTECTED
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise PrivacyError(f"an account of the unit {self.unit!r}: expected example or client")
        if self.accountant not in ACCOUNTANTS:
            raise PrivacyError(f"an account by {self.accountant!r}: expected one of {', '.join(ACCOUNTANTS)}")
        if not _is_number(self.epsilon) or not self.epsilon >= 0:
            raise PrivacyError(f"an account of epsilon {self.epsilon!r}: expected 0 or more")
        if not _is_number(self.target_delta) or not 0 < self.target_delta < 1:
            raise PrivacyError(f"an account at target_delta {self.target_delta!r}: expected a probability")
        if type(self.private) is not bool or not all(
            isinstance(word, str) for word in (self.sampling, self.neighbouring, *self.not_protected)
        ):
            raise PrivacyError("an account whose words are not text, or whose 'private' is not true or false")
        for name in ("target_epsilon", "noise_multiplier", "steps"):
            found = getattr(self, name)
            if found is not None and not (_is_number(found) and math.isfinite(found) and found >= 0):
                raise PrivacyError(f"an account of {name} {found!r}: expected None, or 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a manifest holds it: JSON has no infinity, so an unbounded epsilon is None."""
        plain = asdict(self) | {"not_protected": list(self.not_protected)}
        return plain | {"epsilon": self.epsilon if math.isfinite(self.epsilon) else None}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            PrivacyError: if it is no account.
        """
        names = {one.name for one in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names or not isinstance(value["not_protected"], list):
            raise PrivacyError(f"not an account: expected the keys {', '.join(sorted(names))}")
        spent = math.inf if value["epsilon"] is None else value["epsilon"]
        return cls(**{**value, "epsilon": spent, "not_protected": tuple(value["not_protected"])})


def too_likely(target_delta: float, clients: int) -> str:
    """Why a probability promises nothing to so many clients."""
    return (
        f"privacy.target_delta = {target_delta:g} is not below 1 / {clients} clients: handing out one of them whole "
        "would keep it; set a smaller one"
    )


def client_sampling(config: ExperimentConfig) -> str:
    """What is assumed about the sampling of clients, in words.

    Args:
        config: with ``privacy.client`` enabled.
    """
    groups = groups_of(config.privacy.client, config.selection.fraction)
    if groups > 1:
        return f"none: each client at most once in {groups} rounds, by a fixed division"
    return POISSON if config.privacy.client.sampling == "poisson" else NO_AMPLIFICATION


def example_account(privacy: PrivacyConfig, epsilons: Iterable[float]) -> Account:
    """The account of the example unit, from what the clients say that they have spent.

    Args:
        privacy: with ``example`` enabled.
        epsilons: of each client so far; infinity for one that did not say. The largest counts.
    """
    return Account(
        unit="example",
        epsilon=max(epsilons, default=0.0),
        target_delta=privacy.target_delta,
        accountant=privacy.accountant,
        sampling=POISSON,
        private=privacy.test_seed < 0,
        target_epsilon=privacy.target_epsilon or None,
        noise_multiplier=privacy.example.noise_multiplier or None,
    )


def privacy_record(accounts: Sequence[Account]) -> dict[str, Any] | None:
    """What a manifest's ``privacy`` holds: None where nothing was accounted."""
    return {"accounts": [account.to_dict() for account in accounts]} if accounts else None


def accounts_of(privacy: Mapping[str, Any] | None) -> tuple[Account, ...]:
    """The accounts of a manifest's ``privacy``, none where nothing was accounted.

    Raises:
        PrivacyError: if it holds something else.
    """
    if privacy is None:
        return ()
    if not isinstance(privacy.get("accounts"), list):
        raise PrivacyError("a version's privacy record is not the one of this library: expected a list of accounts")
    return tuple(Account.from_dict(one) for one in privacy["accounts"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
