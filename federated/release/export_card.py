"""The model card of an export: a README.md whose front matter the Hugging Face Hub reads, and people the rest.

Everything in it comes from the version's record: which base, what method, how many took part and never who, what
privacy was spent. It proves nothing by itself; a seal does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from federated.release.exportable import Exportable

__all__ = ["model_card"]

_PIPELINES = {"causal_lm": "text-generation", "sequence_classification": "text-classification"}


def model_card(subject: Exportable, *, tags: Sequence[str], library: str, load: str) -> str:
    """The whole file.

    Args:
        subject: what is exported.
        tags: of the format and the kind of adapter, besides those of every export.
        library: that loads it, as the Hub calls it.
        load: lines of Python that load it.
    """
    manifest = subject.manifest
    front = yaml.safe_dump(_front(subject, tags, library), sort_keys=False, allow_unicode=True)
    title = manifest.adapter_id or "Adapter"
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _facts(subject))
    metrics = "\n".join(f"| {name} | {value:g} |" for name, value in sorted(manifest.metrics.items()))
    sections = (
        f"---\n{front}---",
        f"# {title}",
        "An adapter of a frozen base model, as a registry of federated-peft records it.",
        f"| | |\n|---|---|\n{rows}",
        f"## Privacy\n\n{_privacy(manifest.privacy)}",
        f"## Metrics\n\n{_table(metrics)}",
        f"## How to load it\n\nIn this folder:\n\n```python\n{load}\n```",
    )
    return "\n\n".join(sections) + "\n"


def _front(subject: Exportable, tags: Sequence[str], library: str) -> dict[str, Any]:
    manifest = subject.manifest
    front: dict[str, Any] = {
        "base_model": subject.base_name,
        "base_model_relation": "adapter",
        "library_name": library,
    }
    if manifest.licence:
        front["license"] = manifest.licence.lower()  # as the Hub spells SPDX expressions
    if subject.task.name in _PIPELINES:
        front["pipeline_tag"] = _PIPELINES[subject.task.name]
    return front | {"tags": ["federated-learning", "federated-peft", *tags]}


def _facts(subject: Exportable) -> Iterator[tuple[str, object]]:
    manifest, spec = subject.manifest, subject.manifest.spec
    yield "base model", subject.base_name
    yield "base digest", f"`{manifest.base_digest}`"
    yield "version id", f"`{subject.artefact.version_id}`"
    yield "weights digest", f"`{manifest.weights_digest}`"
    yield "parent version", f"`{manifest.parent}`" if manifest.parent else "none"
    yield "release counter", manifest.release_counter or "not counted"
    yield "method", manifest.method
    yield "rounds", manifest.round_number
    yield "run", manifest.run_id
    yield "participants in the last round", manifest.participants
    yield "kind", f"{spec.peft_type}, rank {spec.rank}, alpha {spec.alpha:g}" if spec.modules else spec.peft_type
    yield "task", subject.task.name
    if subject.task.labels:
        yield "labels", json.dumps(list(subject.task.labels), ensure_ascii=False)
    yield "licence", manifest.licence or "not stated"
    yield "made by", f"federated-peft {manifest.code_version}".strip()


def _privacy(spent: Mapping[str, Any] | None) -> str:
    accounts = (spent or {}).get("accounts") or ()
    if not accounts:
        return "Nothing was accounted: assume that training examples can be told from the weights."
    return "\n".join(_account(account) for account in accounts)


def _account(account: Mapping[str, Any]) -> str:
    epsilon = "without a bound" if account["epsilon"] is None else f"{account['epsilon']:g}"
    text = (
        f"- privacy_unit {account['unit']}: epsilon {epsilon} at target_delta {account['target_delta']:g} "
        f"(accountant {account['accountant']})"
    )
    if not account["private"]:
        text += "; **not private**: a test run, whose noise can be made again"
    if account["not_protected"]:
        text += f"; not protected: {_cell('; '.join(account['not_protected']))}"
    return text


def _table(metrics: str) -> str:
    return f"| metric | value |\n|---|---|\n{metrics}" if metrics else "None are in the record."


def _cell(value: object) -> str:
    """One line that does not end a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
