"""One round's messages: what each client of a cohort is sent, and what its answer must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from flwr.app import Message

from federated.aggregation import ClientView, Rule
from federated.config import ExperimentConfig
from federated.flower.adapter_packets import adapter_packet
from federated.flower.records import Assignment, task_content, task_token
from federated.flower.round_book import RoundBook
from federated.global_state import GlobalState
from federated.manifest import TrainPlan
from federated.state import AdapterState
from federated.tasks.batching import step_count
from federated.uploads import layout
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
        update_key: what a client's update must be signed with; None where it need not.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        rule: Rule,
        run_id: str,
        base_digest: str,
        secret: bytes,
        update_key: Callable[[str], bytes | None] = lambda _: None,
    ) -> None:
        self._config = config
        self._rule = rule
        self._run_id = run_id
        self._base_digest = base_digest
        self._secret = secret
        self._update_key = update_key

    def write(
        self,
        state: GlobalState,
        nodes: Mapping[str, int],
        *,
        round_number: int,
        mode: str,
        version_id: str = "",
        counters: Mapping[str, int] | None = None,
        ranks: Mapping[str, int] | None = None,
        heads: Mapping[str, str] | None = None,
        phase: int = 1,
    ) -> tuple[list[Message], RoundBook]:
        """One message per client, and the book that its reply goes into.

        Args:
            state: what clients start from.
            nodes: client id to node id: the cohort.
            round_number: 1-based.
            mode: ``"train"`` or ``"evaluate"``.
            version_id: of the version that the state is.
            counters: last message counter of each client.
            ranks: largest rank that each client trains, as far as it said so.
            heads: last head of each client's privacy ledger, as far as it said so.
            phase: exchange within the round, 1-based.
        """
        plans: dict[tuple[int | None, str], tuple[TrainPlan, AdapterState, bytes]] = {}
        messages, expected, sizes, layouts, payloads, all_plans = [], {}, {}, {}, {}, {}
        for client_id, node in nodes.items():
            view = ClientView(client_id, self._rank(state, (ranks or {}).get(client_id)))
            key = (view.rank, client_id if self._rule.properties.own_payloads else "")
            if key not in plans:
                plan, payload = self._plan(state, view, mode, phase=phase, round_number=round_number)
                plans[key] = plan, payload, adapter_packet(payload, sparse=plan.density_down < 1)
            plan, payload, packet = plans[key]
            head = (heads or {}).get(client_id, "")
            assignment = self._assign(plan, client_id, version_id, round_number=round_number, head=head)
            expected[client_id] = self._expect(assignment, payload, (counters or {}).get(client_id, 0))
            layouts[client_id] = layout(plan, payload)
            all_plans[client_id] = plan
            payloads[client_id] = payload
            sizes[client_id] = len(packet)
            content = task_content(assignment, self._config, packet)
            messages.append(Message(content, node, "train", group_id=str(round_number)))
        book = RoundBook(
            round_number,
            expected=expected,
            nodes=nodes,
            layouts=layouts,
            payloads=payloads,
            plans=all_plans,
            limits=Limits(max_norm=self._config.round.max_norm),
            bytes_down=sizes,
            steps=lambda examples: step_count(examples, self._config.train),
            evaluate_only=mode == "evaluate",
        )
        return messages, book

    def _rank(self, state: GlobalState, declared: int | None) -> int | None:
        """The client's own rank, where the rule mixes them and it is smaller than the adapter's."""
        if declared is None or not self._rule.properties.mixed_ranks:
            return None
        return declared if declared < state.adapter.spec.rank else None

    def _plan(
        self, state: GlobalState, view: ClientView, mode: str, *, phase: int, round_number: int
    ) -> tuple[TrainPlan, AdapterState]:
        plan, payload = self._rule.plan(state, view, phase)
        train, every = self._config.train, self._config.round.evaluate_every
        plan = replace(
            plan,
            mode=mode,
            proximal_mu=plan.proximal_mu or train.proximal_mu,
            evaluate_before=every > 0 and (round_number - 1) % every == 0,
            evaluate_after=train.evaluate_after,
        )
        if mode == "evaluate" and plan.density_down < 1:  # what is measured last is what is published
            plan, payload = replace(plan, density_down=1.0), state.materialise(view.rank)
        return plan, payload if mode == "train" else replace(payload, extra={})

    def _assign(self, plan: TrainPlan, client_id: str, version_id: str, *, round_number: int, head: str) -> Assignment:
        token = task_token(self._secret, run_id=self._run_id, round_number=round_number, plan=plan, client_id=client_id)
        return Assignment(
            run_id=self._run_id,
            client_id=client_id,
            round_number=round_number,
            task_token=token,
            parent_version=version_id,
            base_digest=self._base_digest,
            plan=plan,
            acknowledged_head=head,
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
            update_key=self._update_key(assignment.client_id),
        )
