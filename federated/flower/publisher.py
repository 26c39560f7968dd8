"""From a finished round to an immutable version, with what the server needs to go on from there.

The training state (master copy, optimizer moments, rule memory, message counters, what is known of the clients) is
saved with each version and never travels to devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from federated import __version__
from federated.config import ExperimentConfig
from federated.errors import RegistryError, WireError
from federated.flower.selection import Standing
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry
from federated.server_optimizers import OptimizerState
from federated.state import AdapterState, RuleState, Tensors, from_raw, to_raw
from federated.wire import Limits, decode_packet, encode_packet, encode_tensors

__all__ = ["Publisher", "RegistryPublisher", "TrainingState", "recipe_record", "weights_digest"]


def weights_digest(adapter: AdapterState) -> str:
    """SHA-256 of the adapter's canonical bytes."""
    return sha256_hex(encode_tensors(to_raw(adapter.tensors)))


def recipe_record(config: ExperimentConfig) -> dict[str, Any]:
    """What a device needs to serve a version: task, base model, adapter and seed, as plain data."""
    plain = config.to_dict()
    return {"task": plain["task"], "model": plain["model"], "adapter": plain["adapter"], "seed": config.seed}


@dataclass(frozen=True)
class TrainingState:
    """The server between two rounds.

    Args:
        round_number: the last finished round; 0 before the first.
        global_state: master copy and rule memory.
        optimizer_state: moments.
        counters: last message counter seen from each client.
        standings: what is known of each client, for its selection.
        at_work: clients that were in training when the version was made, and whose work a resumed run does not get.
        ledger_head: of the server's privacy ledger; empty where there is none.
        epsilons: what each client says that it has spent on its examples' privacy; infinity is no bound.
        client_heads: the last head of each client's privacy ledger.
    """

    round_number: int
    global_state: GlobalState
    optimizer_state: OptimizerState
    counters: Mapping[str, int] = field(default_factory=dict)
    standings: Mapping[str, Standing] = field(default_factory=dict)
    at_work: tuple[str, ...] = ()
    ledger_head: str = ""
    epsilons: Mapping[str, float] = field(default_factory=dict)
    client_heads: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Pack for the registry."""
        rule, residual = self.global_state.rule_state, self.global_state.residual
        header = {
            "kind": "training_state",
            "round_number": self.round_number,
            "optimizer": self.optimizer_state.name,
            "steps": self.optimizer_state.steps,
            "counters": dict(self.counters),
            "standings": {client_id: asdict(one) for client_id, one in self.standings.items()},
            "at_work": self.at_work,
            "ledger_head": self.ledger_head,
            "epsilons": {one: spent if math.isfinite(spent) else None for one, spent in self.epsilons.items()},
            "client_heads": dict(self.client_heads),
            "rule": dict(rule.scalars),
            "spec": self.global_state.adapter.spec.plain,
            "residual": residual.spec.plain if residual else None,
        }
        groups: dict[str, Tensors] = {
            "global": self.global_state.adapter.tensors,
            "optimizer": self.optimizer_state.moments,
            "rule": rule.tensors,
            "residual": residual.tensors if residual else {},
        }
        tensors = {f"{group}:{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        return encode_packet(header, to_raw(tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Unpack.

        Raises:
            RegistryError: if the bytes are no training state.
        """
        try:
            header, raw, _ = decode_packet(data, _OWN)
            groups: dict[str, dict[str, Any]] = {"global": {}, "optimizer": {}, "rule": {}, "residual": {}}
            for name, tensor in from_raw(raw).items():
                group, _, rest = name.partition(":")
                groups[group][rest] = tensor
            adapter = AdapterState(AdapterSpec.from_dict(header["spec"]), groups["global"])
            spec = header.get("residual")
            residual = AdapterState(AdapterSpec.from_dict(spec), groups["residual"]) if spec else None
            state = GlobalState(adapter, residual, rule_state=RuleState(header["rule"], groups["rule"]))
            moments = OptimizerState(int(header["steps"]), groups["optimizer"], str(header["optimizer"]))
            counters = {str(client_id): int(last) for client_id, last in header["counters"].items()}
            standings = {str(client_id): _standing(one) for client_id, one in header.get("standings", {}).items()}
            at_work = tuple(str(client_id) for client_id in header.get("at_work", ()))
            head = str(header.get("ledger_head", ""))
            spent = {str(one): _spent(value) for one, value in header.get("epsilons", {}).items()}
            heads = {str(one): str(value) for one, value in header.get("client_heads", {}).items()}
            return cls(int(header["round_number"]), state, moments, counters, standings, at_work, head, spent, heads)
        except (WireError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RegistryError(f"the stored training state cannot be read ({error}); start a new run") from None


def _spent(value: Any) -> float:
    return math.inf if value is None else float(value)


def _standing(value: Mapping[str, Any]) -> Standing:
    return Standing(int(value["examples"]), tuple(bool(answer) for answer in value["answers"]))


_OWN = Limits(max_bytes=2**40, max_header_bytes=2**28, max_tensors=2**20)
"""For what this server stored itself: as large as an adapter with all its moments may be."""


class Publisher(Protocol):
    """Takes each round's global adapter and gives it a version id."""

    def publish(
        self,
        training: TrainingState,
        *,
        parent: str | None,
        participants: int,
        metrics: Mapping[str, float],
        servable: bool = True,
        privacy: Mapping[str, Any] | None = None,
    ) -> VersionManifest:
        """Make a version; the manifest's ``version_id`` names it."""
        ...


class RegistryPublisher:
    """Publishes every round to a registry and moves a channel to it.

    Args:
        registry: open registry; None keeps no version (a plain Flower ServerApp without one).
        config: the experiment.
        run_id: the run.
        base_digest: the base model.
        method: rule and server optimizer, in words.
        channel: channel to move from round 1 on, to versions that can be served; None moves none.
        base: the base model's parts, see `federated.adapters.BaseModel`; empty where they are not known.
    """

    def __init__(
        self,
        registry: Registry | None,
        config: ExperimentConfig,
        *,
        run_id: str,
        base_digest: str,
        method: str,
        channel: str | None = "dev",
        base: Mapping[str, str | None] | None = None,
    ) -> None:
        self._registry = registry
        self._config = config
        self._run_id = run_id
        self._base_digest = base_digest
        self._method = method
        self._channel = channel
        self._base = dict(base or {})

    def publish(
        self,
        training: TrainingState,
        *,
        parent: str | None,
        participants: int,
        metrics: Mapping[str, float],
        servable: bool = True,
        privacy: Mapping[str, Any] | None = None,
    ) -> VersionManifest:
        """Make a version of the training state's adapter.

        Raises:
            RegistryError: if the registry refuses; earlier versions are untouched.
        """
        adapter = training.global_state.export()
        weights = encode_tensors(to_raw(adapter.tensors))
        manifest = VersionManifest(
            weights_digest=sha256_hex(weights),
            base_digest=self._base_digest,
            spec=adapter.spec,
            method=self._method,
            run_id=self._run_id,
            round_number=training.round_number,
            parent=parent,
            participants=participants,
            privacy=privacy,
            metrics=dict(metrics),
            code_version=__version__,
            servable=servable,
            task=recipe_record(self._config),
            adapter_id=self._config.adapter_name,
            release_counter=0 if self._registry is None else self._registry.next_counter(self._config.adapter_name),
            base=self._base,
            licence=self._config.licence,
        )
        if self._registry is not None:
            channel = self._channel if servable and training.round_number > 0 else None  # v0 is untrained
            self._registry.publish(manifest, weights, training_state=training.to_bytes(), channel=channel)
        return manifest
