"""A client of plain Flower in `simulations.benchmarks.deployment`: the same training, whole weights both ways."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from federated.config import experiment_from
from federated.delta import apply_some
from federated.flower.session import open_session
from federated.manifest import TrainPlan
from federated.state import AdapterState

app = ClientApp()


def _worked(message: Message, context: Context, mode: str) -> Message:
    session = open_session(experiment_from(str(context.run_config["experiment"])))
    client_id = session.source.client_ids[int(context.node_config["partition-id"])]
    arrays = message.content.array_records["arrays"]
    state = AdapterState(session.initial.spec, dict(arrays.to_torch_state_dict()))
    plan = TrainPlan(mode=mode, rank=state.spec.rank, evaluate_before=False)
    result = session.trainer.run(state, plan, session.local_data(client_id), seed=1)
    metrics = MetricRecord({"num-examples": max(1, result.num_examples)})
    content = RecordDict({"metrics": metrics})
    if mode == "train":
        content["arrays"] = ArrayRecord(dict(apply_some(state, result.delta).tensors))
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train."""
    return _worked(message, context, "train")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure."""
    return _worked(message, context, "evaluate")
