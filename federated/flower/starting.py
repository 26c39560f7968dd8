"""What round 1 starts from: a fresh adapter by the run's seed, or a version that is in the registry already.

``start_from`` names such a version: an imported PEFT adapter, or where another run ended. Its tensors become the run's
initial adapter, and it the parent of the run's first version. What would make them another adapter in this run is
refused: the configuration says what clients attach, and a version is never bent to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from federated.config import ExperimentConfig
from federated.errors import BaseMismatch, ConfigError
from federated.flower.session import Session, open_session
from federated.manifest import AdapterSpec, VersionManifest
from federated.registry import Registry
from federated.state import AdapterState, from_raw
from federated.wire import decode_tensors

__all__ = ["Start", "start_of"]

_KEYS = {
    "peft_type": "adapter.kind",
    "alpha": "adapter.alpha",
    "use_rslora": "adapter.use_rslora",
    "dtype": "adapter.dtype",
    "virtual_tokens": "adapter.virtual_tokens",
}


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        adapter: before round 1.
        base_digest: the base model that it belongs to.
        parent: id of the version that it is; None for a fresh one.
    """

    adapter: AdapterState
    base_digest: str
    parent: str | None = None

    @property
    def arguments(self) -> Mapping[str, Any]:
        """For `federated.flower.DeltaStrategy`."""
        return {"initial": self.adapter, "base_digest": self.base_digest, "parent": self.parent}


def start_of(config: ExperimentConfig, registry: Registry | None, session: Session | None = None) -> Start:
    """Find and check what a run starts from.

    Args:
        config: of the run.
        registry: open; needed where ``start_from`` names a version.
        session: its parts: base model, and the fresh adapter; default: opened here.

    Raises:
        VersionNotFound: if there is no such version.
        BaseMismatch: if it belongs to another base model.
        ConfigError: if it is another kind of adapter than the configuration's, cannot be served, or would break what
            the run promises.
    """
    session = session or open_session(config)
    base_digest = session.adapter.base.base_digest
    if not config.start_from:
        return Start(session.initial, base_digest)
    if registry is None:
        raise ConfigError(f"start_from = {config.start_from}: there is no registry to find it in; pass an open one")
    record = registry.get(config.start_from)
    _check(record.manifest, config, session, label=f"start_from = {config.start_from} ({record.version_id[:12]})")
    adapter = AdapterState(session.initial.spec, from_raw(decode_tensors(registry.weights(record.version_id))))
    if adapter.layout() != session.initial.layout():
        raise ConfigError(f"start_from = {config.start_from}: its tensors are not those that its record says")
    return Start(adapter, base_digest, record.version_id)


def _check(manifest: VersionManifest, config: ExperimentConfig, session: Session, *, label: str) -> None:
    base = session.adapter.base
    if manifest.base_digest != base.base_digest:
        raise BaseMismatch(
            f"{label} belongs to the base model {manifest.base_digest[:12]}, and model.source = {base.source} is "
            f"{base.base_digest[:12]}: set model.source to the base that it was made for"
        )
    if not manifest.servable:
        raise ConfigError(f"{label} is not whole: its clients hold the rest of the model; start from another version")
    if config.privacy.enabled and manifest.method != "import":
        raise ConfigError(
            f"{label} was made from data by {manifest.method}, of which this run's account of privacy would know "
            "nothing; start from an imported version, or with privacy=none"
        )
    labels = (manifest.task.get("task") or {}).get("labels")
    if labels is not None and tuple(labels) != config.task.labels:
        raise ConfigError(f"{label} answers with labels {list(labels)}; set task.labels to these, in this order")
    for fault in _differences(manifest.spec, session.initial.spec):
        raise ConfigError(f"{label} is another adapter than this run's: {fault}")


def _differences(found: AdapterSpec, asked: AdapterSpec) -> Iterator[str]:
    """What to set, the most telling first."""
    for name, key in _KEYS.items():
        if getattr(found, name) != getattr(asked, name):
            yield f"{key} is {getattr(found, name)} there and {getattr(asked, name)} here; set it to that"
    layers, ours = ({module.name for module in spec.modules} for spec in (found, asked))
    yield from _sides(layers, ours)
    ranks = sorted({module.rank for module in found.modules})
    if len(ranks) > 1:
        yield (
            f"its layers have ranks {ranks[0]} to {ranks[-1]}, and clients train one rank; write it with registry "
            "export --as peft, and import that: all its layers have the largest then"
        )
    if found.rank != asked.rank:
        yield f"adapter.rank is {found.rank} there and {asked.rank} here; set it to that"
    yield from _sides(set(found.trained), set(asked.trained))
    yield from _heads(found, asked)
    if _unseeded(found) != _unseeded(asked):
        yield f"its layers are other ones: {found.modules[:1]} there, {asked.modules[:1]} here"


def _sides(there: set[str], here: set[str]) -> Iterator[str]:
    if there != here:
        more, less = sorted(there - here)[:3], sorted(here - there)[:3]
        yield f"it trains {more} besides and not {less}; set adapter.target_modules to what it has"


def _heads(found: AdapterSpec, asked: AdapterSpec) -> Iterator[str]:
    """A trained head comes along; a frozen one is made from the seed, which has to be the same."""
    there, here = found.head, asked.head
    if there is None or here is None:
        if there is not here:
            yield f"it has {'no head' if there is None else 'a head'}; choose the task that it was made for"
        return
    if there.kind != here.kind or there.num_labels != here.num_labels:
        yield f"task.head is {there.kind} for {there.num_labels} labels there, {here.kind} for {here.num_labels} here"
    if there.trained != here.trained:
        yield f"adapter.train_head is {str(there.trained).lower()} there; set it to that"
    if there.seed != here.seed and not here.trained:
        yield f"its frozen head was made from seed {there.seed}; set seed={there.seed}"


def _unseeded(spec: AdapterSpec) -> AdapterSpec:
    head = spec.head
    return spec if head is None or not head.trained else replace(spec, head=replace(head, seed=0))
