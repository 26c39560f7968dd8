"""What a run's report says of privacy: a card for each account, and what accuracy each epsilon bought.

Epsilon stands beside its unit and target_delta, never alone; what the account does not cover is said with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from federated.formats import is_share, words
from federated.plots import Series, line_chart
from federated.run_history import History

__all__ = ["not_protected", "privacy_cards", "privacy_plots"]

_COLORS = {"client": "#1d4ed8", "example": "#b45309"}


def _accounts(event: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Unit to its account, of a ``round`` event."""
    accounts = (event.get("privacy") or {}).get("accounts") or ()
    return {str(account.get("unit")): account for account in accounts}


def privacy_cards(history: History) -> list[tuple[str, str, str]]:
    """Epsilon, for whom, and on which terms: one card for each unit of the last round."""
    last = history.rounds.get(history.last_round, {})
    cards = []
    for unit, account in _accounts(last).items():
        remark = f"target_delta {account.get('target_delta'):g}; {account.get('neighbouring')}"
        if account.get("private") is False:
            remark = f"NOT PRIVATE: repeatable noise of a test; {remark}"
        spent = account.get("epsilon")
        cards.append(("no bound" if spent is None else f"{float(spent):.3g}", f"epsilon, each {unit}", remark))
    return cards


def not_protected(history: History) -> list[str]:
    """What no account of the last round covers, in words; each once."""
    accounts = _accounts(history.rounds.get(history.last_round, {})).values()
    return list(dict.fromkeys(word for account in accounts for word in account.get("not_protected") or ()))


def privacy_plots(history: History, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """The first held-out metric, or the loss, of the adapter after each round, over the epsilon spent by then."""
    name = metrics[0] if metrics else "loss"
    lines: dict[str, dict[float, float]] = {}
    for number, event in sorted(history.rounds.items()):
        value = (history.held_out.get(number) or {}).get(name)
        for unit, account in _accounts(event).items():
            if value is not None and account.get("epsilon") is not None:
                lines.setdefault(unit, {})[float(f"{float(account['epsilon']):.3g}")] = float(value)
    if not lines:
        return []
    series = [Series(f"each {unit}", points, _COLORS.get(unit, "#7c3aed")) for unit, points in lines.items()]
    svg = line_chart(series, ylabel=f"held-out {words(name)}", percent=is_share(name), xlabel="epsilon spent")
    return [(f"{words(name).capitalize()} and epsilon", svg)]
