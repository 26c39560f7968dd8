"""``fedpeft strategies``: the aggregation rules, what each claims, and what it goes with."""

from __future__ import annotations

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from federated.aggregation import RULES, ClientView, NextPhase, Rule, make_rule
from federated.config.parts import WITHOUT_FACTORS
from federated.delta import Update
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec
from federated.sparse import thin
from federated.state import AdapterState, Tensors
from federated.uploads import layout

__all__ = ["show"]

_RANK, _SIDE = 8, 1024
_BUFFERED = {"any": "yes", "same_basis": "fresh", "no": "no"}
_CLAIMS = {
    "exact": "exact",
    "truncation": "best",
    "approximate": "approx.",
}


def show(console: Console) -> None:
    """Print a row per rule; bytes are of one square layer, in units of its factors together."""
    heads = ("B A", "up", "down", "server\nopt.", "mixed\nranks", "robust", "sum*", "basis**", "buffer")
    # Fits a terminal of 80 columns; names are never cut off, for half of one is of no use.
    columns = [Column("strategy", no_wrap=True, min_width=17), *(Column(head, overflow="fold") for head in heads)]
    table = Table(*columns, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in sorted(RULES):
        rule = make_rule(name)
        properties = rule.properties
        up, down = _traffic(rule)
        cells = (
            _yes(properties.fixed_space),
            _yes(properties.mixed_ranks),
            _yes(properties.robust),
            _yes(properties.linear),
            properties.gauge,
            _BUFFERED[properties.asynchronous],
        )
        claim = "own-B" if properties.personal else _CLAIMS[properties.exactness]
        table.add_row(name, claim, up, down, *cells)
    console.print(table)
    _explain(console)


def _explain(console: Console) -> None:
    """What the columns mean, and what a row has no room for."""
    _say(
        console,
        "B A: the mean of the clients' products is what the next adapter holds: exactly, the best "
        "that its rank can hold, or approximately; or, where each keeps its own B, exactly for each.",
    )
    _say(console, "Up and down: what a client sends and receives each round, in units of one adapter (A and B).")
    noised = ", ".join(name for name in sorted(RULES) if make_rule(name).properties.mean_decides)
    steady = ", ".join(name for name in sorted(RULES) if _steady(make_rule(name)))
    growing = ", ".join(name for name in sorted(RULES) if make_rule(name).properties.residual)
    _say(console, f"Down is more from the second round on for {growing}: a frozen residual, which grows.")
    _say(console, "strategy=fedavgm, fedadam, fedyogi and fedadagrad are fedit with that server optimizer.")
    any_adapter = ", ".join(name for name in sorted(RULES) if not make_rule(name).properties.needs_lora)
    _say(console, f"Adapters without factors (adapter={', '.join(WITHOUT_FACTORS)}) go with: {any_adapter}.")
    for name in sorted(RULES):
        properties = make_rule(name).properties
        needs = f"; {properties.min_updates_why}" if properties.min_updates_why else ""
        _say(console, f"{name}: {properties.paper}; in memory: {properties.memory}{needs}")
    _say(
        console,
        "Buffer: buffered rounds, with updates from older versions too, from the newest alone (fresh), or not at all.",
    )
    _say(
        console,
        "Robust rules stand in place of the others and combine with none: what they keep is not the mean that another "
        "rule needs.",
    )
    _say(
        console,
        "* the server needs only the sum of the updates: the condition of secure aggregation. Noise on the sum "
        f"(client-level privacy) needs the mean to decide all, and goes with: {noised}. Correlated noise "
        f"(mechanism=banded) also needs updates that add up in one space: {steady}. Noise in a client's own steps "
        "(example-level) is no matter of the rule.",
    )
    _say(
        console,
        "** basis: what (B Q, Q^-1 A), the same update in another basis, does to the result: nothing (immune), it "
        "cannot be sent because one factor is frozen (refused), or it changes it (exposed).",
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _steady(rule: Rule) -> bool:
    properties = rule.properties
    return properties.mean_decides and properties.fixed_space and not properties.alternates


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _traffic(rule: Rule) -> tuple[str, str]:
    """Tensors up and down in the first round, in all its exchanges, asked of the rule itself."""
    module = ModuleSpec("layer", _SIDE, _SIDE, _RANK, 2.0 * _RANK)
    spec = AdapterSpec(rule.properties.adapter, _RANK, 2.0 * _RANK, use_rslora=False, modules=(module,))
    factors = {"layer.factor_a": torch.ones(_RANK, _SIDE), "layer.factor_b": torch.ones(_SIDE, _RANK)}
    core = {"layer.core": torch.ones(_RANK, _RANK)} if spec.has_core else {}
    state, phase = GlobalState(AdapterState(spec, {**factors, **core}), rule_state=rule.init(spec)), 1
    up = down = 0
    while True:
        plan, payload = rule.plan(state, ClientView("anybody"), phase)
        entries = layout(plan, payload)
        up += sum(entry.nbytes for entry in entries)
        sent = thin(payload.tensors) if plan.density_down < 1 else payload.tensors
        down += _nbytes(sent) + _nbytes(payload.extra)
        if phase == rule.properties.phases:
            return _share(up, factors), _share(down, factors)
        accumulator = rule.start(state, phase)
        nothing = {entry.name: torch.zeros(entry.shape) for entry in entries}
        accumulator.add(Update("anybody", nothing, num_examples=1, received=payload), 1.0)
        found = accumulator.finish()
        if not isinstance(found, NextPhase):
            raise AggregationError(f"{rule.name} ends after phase {phase}, and declares {rule.properties.phases}")
        state, phase = found.state, found.phase


def _share(count: int, factors: Tensors) -> str:
    return f"{count / _nbytes(factors):.2g}"


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
