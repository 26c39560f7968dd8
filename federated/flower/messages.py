"""One round's messages: what each client of a cohort is sent, and what its answer must say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import Message

from federated.aggregation import ClientView, Rule
from federated.config import ExperimentConfig
from federated.flower.records import Assignment, adapter_packet, task_content, task_token
from federated.flower.round_book import RoundBook
from federated.flower.server_state import ServerState
from federated.manifest import TrainPlan
from federated.state import AdapterState
from federated.wire import Expectation, Limits

__all__ = ["TaskWriter"]


class TaskWriter:
    """Writes the messages of a round and opens its book.

    Args:
        config: the experiment, sent along as plain scalars.
        rule: plans for each client.
        run_id: the run.
        base_digest: the base model that updates must belong to.
        secret: key of the task tokens.
    """

    def __init__(self, config: ExperimentConfig, *, rule: Rule, run_id: str, base_digest: str, secret: bytes) -> None:
        self._config = config
        self._rule = rule
        self._run_id = run_id
        self._base_digest = base_digest
        self._secret = secret

    def write(
        self, server: ServerState, nodes: Mapping[str, int], *, round_number: int, mode: str
    ) -> tuple[list[Message], RoundBook]:
        """One message per client, and the book that its reply goes into.

        Args:
            server: the state that clients start from.
            nodes: client id to node id: the cohort.
            round_number: 1-based.
            mode: ``"train"`` or ``"evaluate"``.
        """
        packets: dict[tuple[int, str], bytes] = {}
        messages, expected, sizes, layouts = [], {}, {}, {}
        for client_id, node in nodes.items():
            plan, payload = self._plan(server, client_id, mode)
            key = (plan.rank, client_id if self._rule.properties.own_payloads else "")
            if key not in packets:
                packets[key] = adapter_packet(payload)
            assignment = self._assign(plan, client_id, server.version_id or "", round_number=round_number)
            expected[client_id] = self._expect(assignment, payload, server.counters.get(client_id, 0))
            layouts[client_id] = payload.update_layout(plan.trainable)
            sizes[client_id] = len(packets[key])
            content = task_content(assignment, self._config, packets[key])
            messages.append(Message(content, node, "train", group_id=str(round_number)))
        book = RoundBook(
            round_number,
            expected=expected,
            nodes=nodes,
            layouts=layouts,
            limits=Limits(max_norm=self._config.round.max_norm),
            bytes_down=sizes,
            evaluate_only=mode == "evaluate",
        )
        return messages, book

    def _plan(self, server: ServerState, client_id: str, mode: str) -> tuple[TrainPlan, AdapterState]:
        plan, payload = self._rule.plan(server.global_state, ClientView(client_id), 1)
        train = self._config.train
        plan = replace(plan, mode=mode, proximal_mu=train.proximal_mu, evaluate_after=train.evaluate_after)
        return plan, payload

    def _assign(self, plan: TrainPlan, client_id: str, version_id: str, *, round_number: int) -> Assignment:
        token = task_token(self._secret, run_id=self._run_id, round_number=round_number, plan=plan, client_id=client_id)
        return Assignment(
            run_id=self._run_id,
            client_id=client_id,
            round_number=round_number,
            task_token=token,
            parent_version=version_id,
            base_digest=self._base_digest,
            plan=plan,
        )

    def _expect(self, assignment: Assignment, payload: AdapterState, last_counter: int) -> Expectation:
        return Expectation(
            run_id=assignment.run_id,
            round_number=assignment.round_number,
            phase=assignment.plan.phase,
            client_id=assignment.client_id,
            task_token=assignment.task_token,
            parent_version=assignment.parent_version,
            base_digest=assignment.base_digest,
            spec=payload.spec,
            plan_digest=assignment.plan.digest,
            max_examples=self._config.round.max_examples,
            last_counter=last_counter,
        )
