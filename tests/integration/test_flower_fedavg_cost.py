"""The conformance suite runs on an aggregator that is not ours: Flower's own FedAvg."""

import pytest
from flwr.supercore.task_identity import TaskIdentity

from federated.aggregation import FedIT
from federated.testing import cases, examine
from simulations.reproductions.flower_fedavg import FlowerFedAvg


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 1, "_node_id": 0, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


def test_flower_s_average_is_fedit_s_and_not_the_mean_of_the_products() -> None:
    worst = 0.0
    for case in cases():
        found = examine(FlowerFedAvg(), case)
        near = 1e-2 if case.name == "bfloat16" else 1e-5
        assert found.error == pytest.approx(examine(FedIT(), case).error, abs=near)
        worst = max(worst, found.error - found.optimum)
    assert worst > 0.1
