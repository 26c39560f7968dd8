"""What factor averaging costs: the conformance suite on Flower's own FedAvg, beside rules of this library.

    python -m simulations.reproductions.flower_fedavg [--seeds 0 1 2]

Flower's `FedAvg.aggregate_train` is called as it is, with real messages: each client's reply holds its adapter after
training and its weight as ``num-examples``. Its result is held against the dense float64 mean of the effective updates,
as `federated.testing.examine` does for any rule. FedAvg averages A and B each on its own, so what it makes is not the
mean of the products: the gap is what one round of factor averaging loses. Downloads nothing, and takes seconds.

The last line of standard output is one JSON object: mean and largest relative error by rule over all cases and seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections import OrderedDict

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table

from federated.aggregation import ClientView, FedIT, FlexLoRA, Result, Rule, RuleProperties
from federated.delta import Update, apply
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState
from federated.testing import Finding, cases, examine

__all__ = ["FlowerFedAvg", "main"]


class FlowerFedAvg:
    """Flower's FedAvg behind the `Rule` protocol: clients send whole adapters, and Flower averages them."""

    name = "flwr FedAvg"
    properties = RuleProperties(exactness="approximate", space="factor", linear=True, paper="McMahan et al. 2017")

    def init(self, spec: AdapterSpec) -> RuleState:  # noqa: ARG002 - the protocol's signature
        """It remembers nothing."""
        return RuleState()

    def plan(self, state: GlobalState, client: ClientView, phase: int) -> tuple[TrainPlan, AdapterState]:
        """Train everything."""
        payload = state.materialise(client.rank)
        return TrainPlan(phase=phase, rank=payload.spec.rank), payload

    def start(self, state: GlobalState, phase: int) -> _Replies:  # noqa: ARG002
        """A fresh list of replies."""
        return _Replies(state)


class _Replies:
    """Flower's messages, and what FedAvg makes of them."""

    def __init__(self, state: GlobalState) -> None:
        self._state = state
        self._replies: list[Message] = []

    def add(self, update: Update, weight: float) -> None:
        """One client's reply as Flower's strategies expect it: the whole adapter, and its weight."""
        after = apply(update.received or self._state.materialise(), update.delta)
        arrays = ArrayRecord(torch_state_dict=OrderedDict(after.tensors))
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
        asked = Message(RecordDict(), len(self._replies) + 1, "train")
        self._replies.append(Message(content, reply_to=asked))

    def finish(self) -> Result:
        """Flower's average as the next adapter.

        Raises:
            AggregationError: if Flower gives none.
        """
        arrays, _ = FedAvg().aggregate_train(1, self._replies)
        if arrays is None:
            raise AggregationError("Flower's FedAvg gave no arrays")
        tensors = {name: tensor.float() for name, tensor in arrays.to_torch_state_dict().items()}
        return Result(state=GlobalState(AdapterState(self._state.adapter.spec, tensors)))


def main() -> None:
    """Examine, show and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0  # Flower makes no message without them
    logging.getLogger("flwr").setLevel(logging.WARNING)
    rules: list[Rule] = [FlowerFedAvg(), FedIT(), FlexLoRA()]
    found = {rule.name: [examine(rule, case) for seed in seeds for case in cases(seed)] for rule in rules}
    Console(stderr=True).print(table(found, len(seeds)))
    print(json.dumps({name: _figures(findings) for name, findings in found.items()}))


def table(found: dict[str, list[Finding]], seeds: int) -> Table:
    """Mean relative error by case and rule."""
    title = f"Distance from the dense mean of s B A, over {seeds} seeds"
    made = Table("case", *found, "best of that rank", title=title)
    best = next(iter(found.values()))
    for name in dict.fromkeys(finding.case for finding in best):
        cells = [_percent([one.error for one in findings if one.case == name]) for findings in found.values()]
        made.add_row(name, *cells, _percent([one.optimum for one in best if one.case == name]))
    return made


def _percent(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1%}"


def _figures(findings: list[Finding]) -> dict[str, float]:
    errors = [finding.error for finding in findings]
    return {"mean_error": round(statistics.fmean(errors), 6), "largest_error": round(max(errors), 6)}


if __name__ == "__main__":
    main()
