"""One client's part of one round, made by the library as a client makes it: what the attacks are run on.

The client's plan is its rule's, its training `LocalTrainer`'s; under ``privacy.example`` its noise is solved for and
charged to a ledger first. What it sends is a sealed packet. `opened` is the server's side: it sees the packet, the
adapter that it sent itself, and the base model, and nothing else.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from federated.adapters import BaseModel, attach
from federated.aggregation import ClientView, make_rule
from federated.config import ExperimentConfig, PrivacyConfig
from federated.delta import norm
from federated.flower.client_privacy import ExampleBudget
from federated.flower.client_site import ClientSite
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment
from federated.global_state import GlobalState
from federated.privacy.accounting import noise_for
from federated.privacy.chance import noise_source
from federated.privacy.client_level import NoisySum
from federated.state import AdapterState, Tensors, from_raw, to_raw
from federated.tasks import Features, make_task
from federated.training import LocalData, LocalTrainer, PrivateTask, client_seed
from federated.uploads import pack
from federated.wire import decode_packet, seal_update

__all__ = ["Sent", "client_release", "client_round", "encoded", "noised", "opened"]

CLIENT = "the client"


@dataclass(frozen=True)
class Sent:
    """What goes over the wire in both directions.

    Args:
        received: the adapter that the client was sent.
        packet: its answer.
        epsilon: what the client has charged for it; None where nothing is private.
    """

    received: AdapterState
    packet: bytes
    epsilon: float | None = None


def encoded(config: ExperimentConfig, base: BaseModel, texts: Sequence[str]) -> list[Features]:
    """The client's examples; labels are given out in turn."""
    labels = len(config.task.labels)
    rows = [{"text": text, "label": (number + config.seed) % labels} for number, text in enumerate(texts)]
    return make_task(config.task, base.tokenizer).encode(rows)


def client_round(
    config: ExperimentConfig, base: BaseModel, train: Sequence[Features], *, received: AdapterState | None = None
) -> Sent:
    """Train as a client does and seal what is to be sent.

    Args:
        config: the experiment; its seed decides the first adapter.
        base: the frozen model.
        train: the client's examples.
        received: a later round's adapter; None is round 1, a fresh one.

    Privacy: all that comes of the examples is in the packet.
    """
    adapter = attach(base, config.adapter, config.task, seed=config.seed)
    trainer = LocalTrainer(adapter, make_task(config.task, base.tokenizer), config.train, config.privacy)
    rule = make_rule(config.strategy.rule, config.strategy.options)
    plan, state = rule.plan(GlobalState(received or adapter.read()), ClientView(CLIENT), 1)
    plan = replace(plan, evaluate_before=False)
    task = Assignment("a run", CLIENT, 1, "a token", "a version", base.base_digest, plan)
    private, spent = _charged(config, task, train) if config.privacy.example.enabled else (None, None)
    seed = client_seed(config.seed, task.round_number, CLIENT)
    result = trainer.run(state, plan, LocalData(train), seed=seed, private=private)
    packet = seal_update(
        to_raw(pack(plan, state, result.delta)),
        run_id=task.run_id,
        client_id=CLIENT,
        round_number=task.round_number,
        phase=plan.phase,
        task_token=task.task_token,
        counter=1,
        parent_version=task.parent_version,
        base_digest=base.base_digest,
        spec=state.spec,
        plan_digest=plan.digest,
        num_examples=result.num_examples,
    )
    return Sent(state, packet, spent)


def _charged(config: ExperimentConfig, task: Assignment, train: Sequence[Features]) -> tuple[PrivateTask, float]:
    """The noise of the task and the epsilon that it brings the client's ledger to."""
    with tempfile.TemporaryDirectory(prefix="ledger-") as place:
        store = ClientStore(Path(place), run_id=task.run_id, client_id=CLIENT)
        with ExampleBudget(task, config, site=ClientSite(CLIENT, store=place), store=store, train=train) as budget:
            return budget.charge(), budget.spent


def opened(sent: Sent) -> dict[str, Tensor]:
    """The delta in a packet, as the server reads it."""
    _, raw, _ = decode_packet(sent.packet)
    return from_raw(raw)


def noised(delta: Tensors, share: float, *, seed: int) -> dict[str, Tensor]:
    """The delta and normal noise of that share of its length, evenly on all values; a bare attempt, and no promise."""
    generator = torch.Generator().manual_seed(seed)
    std = share * norm(delta) / math.sqrt(sum(one.numel() for one in delta.values()))
    return {name: delta[name] + std * torch.randn(delta[name].shape, generator=generator) for name in sorted(delta)}


def client_release(delta: Tensors, privacy: PrivacyConfig) -> dict[str, Tensor]:
    """What client-level privacy lets out of a sum that this client is alone in, over one round, sampling not claimed.

    The most favourable case for whoever reads it: all other clients' updates are known and subtracted, and the clipping
    norm is the very length of this one, so that nothing is clipped and no more noise is drawn than it needs.
    """
    total = NoisySum(
        {name: tuple(tensor.shape) for name, tensor in delta.items()},
        clip_norm=norm(delta),
        noise_multiplier=noise_for(privacy.target_epsilon, privacy.target_delta, sampling=1.0, steps=1),
        planned=1,
        source=noise_source(),
    )
    total.add(delta)
    return {name: tensor.float() for name, tensor in total.release().mean.items()}
