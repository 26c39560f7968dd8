"""Plain Flower's half of `simulations.benchmarks.deployment`: FedAvg, as Flower's documentation has it.

Copied into an app folder of its own and run by Flower; no part of this library is on the way of a message.
"""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from federated.config import experiment_from
from federated.flower.session import open_session

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds of training and evaluation; when each ended is written down."""
    session = open_session(experiment_from(str(context.run_config["experiment"])))
    ends: list[float] = []

    def ended(_: int, __: ArrayRecord) -> MetricRecord | None:
        ends.append(time.time())
        Path(str(context.run_config["times"])).write_text(json.dumps(ends))
        return None

    arrays = ArrayRecord(dict(session.initial.tensors))
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    strategy.start(grid, arrays, num_rounds=int(context.run_config["rounds"]), evaluate_fn=ended)
