"""Proof of effect: an adapter that was loaded must answer as its publisher measured, and not as the base alone does.

Many runtimes load an adapter that then does nothing. So a release may carry probes: inputs, with the outputs of the
adapter and of the null adapter. On the device both must match within the probes' tolerance, and the two must differ. Of
a release without probes the device checks the last part by itself, on inputs that are built in.

Knows answers only as a runtime gives them: numbers, or records with ``label``, ``probability`` and ``scores`` (a task's
predictions). Imports neither torch nor SQLAlchemy. Called by the agent and by ``fedpeft release publish``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from federated.config import STRICT
from federated.device.slots import NULL, AdapterRuntime
from federated.errors import FederatedError, ProbeFailed
from federated.manifest import VersionManifest, canonical_json

__all__ = ["Answer", "Probe", "Probes", "distance", "make_probes", "probes_from", "prove", "prove_effect"]

MAX_BYTES = 1_000_000
_TOP = 5
_LEAST = 1e-6
"""By less than this, answers of one device to one input differ by the order of its sums alone."""

_TEXTS = (
    "My flight was late again and nobody told us why.",
    "Thank you, that was the best answer that I ever got.",
    "The committee meets on the first Tuesday of each month.",
    "Once upon a time there was",
)
_MOST_CHANNELS, _STEPS = 16, 24


@dataclass(frozen=True, config=STRICT)
class Answer:
    """One answer as plain data.

    Args:
        label: class, or continuation; ``""`` of a backend that answers with a number.
        value: the label's probability, or the number.
        scores: probability of the most likely classes; empty for a continuation.
    """

    label: str
    value: float
    scores: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Probe:
    """One input with what must be answered to it.

    Args:
        row: the task's row.
        adapter: the answer of the base with the adapter.
        null: the answer of the base alone.
    """

    row: dict[str, Any]
    adapter: Answer
    null: Answer


@dataclass(frozen=True, config=STRICT)
class Probes:
    """What a release carries as ``probes.json``.

    Args:
        probes: at least one.
        tolerance: how far an answer may be from the measured one, see `distance`: devices round differently.
        format: of the file.
    """

    probes: tuple[Probe, ...] = Field(min_length=1, max_length=64)
    tolerance: float = Field(default=0.02, gt=0, lt=1)
    format: Literal[1] = 1

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical_json(dataclasses.asdict(self))


_PROBES: TypeAdapter[Probes] = TypeAdapter(Probes)


def probes_from(data: bytes) -> Probes:
    """Read what `Probes.to_bytes` wrote.

    Raises:
        ProbeFailed: if it is something else.
    """
    if len(data) > MAX_BYTES:
        raise ProbeFailed(f"the release's probes have {len(data)} bytes; expected at most {MAX_BYTES}")
    try:
        return _PROBES.validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise ProbeFailed(
            f"the release's probes cannot be read ({where}: {fault['msg']}); tell the publisher"
        ) from None


def distance(one: Answer, other: Answer) -> float:
    """How far two answers to one input are apart.

    The largest difference between probabilities of one class, as far as ``one`` names it; 1 between different
    continuations; else the difference of the numbers. Not a number where an answer holds none.
    """
    if one.scores:
        return max(abs(value - other.scores.get(name, 0.0)) for name, value in one.scores.items())
    return 1.0 if one.label != other.label else abs(one.value - other.value)


def make_probes(
    runtime: AdapterRuntime, digest: str, rows: Sequence[Mapping[str, Any]], *, tolerance: float = 0.02
) -> Probes:
    """Measure probes on a resident slot: on the publisher's machine.

    Privacy: the rows become public with the release; never take training data.

    Raises:
        ProbeFailed: if on none of these inputs the adapter's effect is three times the tolerance: a device could not
            tell it from the base.
        FederatedError: if a row is none of the task's.
    """
    asked = [dict(row) for row in rows]
    found = zip(asked, _answers(runtime, digest, asked), _answers(runtime, NULL, asked), strict=True)
    made = tuple(Probe(row, _top(adapter), _top(null)) for row, adapter, null in found)
    effect = max((distance(one.adapter, one.null) for one in made), default=0.0)
    if not effect >= 3 * tolerance:
        raise ProbeFailed(
            f"on these {len(made)} inputs the adapter's answers are at most {effect:.3g} from the base's; probes need "
            f"{3 * tolerance:.3g} on one of them: choose inputs that show what it learned, or a smaller tolerance"
        )
    return Probes(made, tolerance)


def prove(runtime: AdapterRuntime, digest: str, probes: Probes) -> None:
    """Check a resident slot by a release's probes.

    Raises:
        ProbeFailed: naming the first that does not match, or that adapter and base do not differ.
    """
    rows = [one.row for one in probes.probes]
    with_adapter, alone = _answers(runtime, digest, rows), _answers(runtime, NULL, rows)
    for number, (probe, adapter, null) in enumerate(zip(probes.probes, with_adapter, alone, strict=True), start=1):
        for what, expected, found in (("the adapter", probe.adapter, adapter), ("the base alone", probe.null, null)):
            if not distance(expected, found) <= probes.tolerance:
                raise ProbeFailed(
                    f"probe {number} of {len(rows)}: {what} answers {_told(found)}, its publisher measured "
                    f"{_told(expected)} (tolerance {probes.tolerance:g}): this device would serve something else"
                )
    _require_effect(with_adapter, alone, probes.tolerance)


def prove_effect(runtime: AdapterRuntime, digest: str, manifest: VersionManifest) -> None:
    """Check on built-in inputs that a resident slot does not answer as the base alone.

    Raises:
        ProbeFailed: if it does, or no built-in input is answered at all.
    """
    fault: FederatedError | None = None
    for rows in _builtin(manifest):
        try:
            alone = _answers(runtime, NULL, rows)
        except FederatedError as error:
            fault = error
            continue
        _require_effect(_answers(runtime, digest, rows), alone, _LEAST)
        return
    raise ProbeFailed(f"the base model answers no built-in input ({fault}); release the version with probes of its own")


def _builtin(manifest: VersionManifest) -> list[list[dict[str, Any]]]:
    """Sets of inputs to try: texts, or series of 1, 2 ... channels."""
    task = manifest.task.get("task")
    if not (isinstance(task, Mapping) and task.get("name") == "sensor"):
        return [[{"text": text} for text in _TEXTS]]
    return [[{"values": _series(channels)}] for channels in range(1, _MOST_CHANNELS + 1)]


def _series(channels: int) -> list[list[float]]:
    return [[((7 * step + 3 * channel) % 11 - 5) / 5 for channel in range(channels)] for step in range(_STEPS)]


def _require_effect(adapter: Sequence[Answer], null: Sequence[Answer], least: float) -> None:
    effect = max(distance(one, other) for one, other in zip(adapter, null, strict=True))
    if not effect > least:
        raise ProbeFailed(
            f"the adapter is loaded and has no effect: on {len(adapter)} inputs its answers are within {effect:.3g} of "
            f"the base's"
        )


def _answers(runtime: AdapterRuntime, digest: str, rows: Sequence[Mapping[str, Any]]) -> list[Answer]:
    return [_answer(one) for one in runtime.predict(rows, digest=digest).predictions]


def _answer(found: Any) -> Answer:
    if isinstance(found, int | float):
        return Answer("", _finite(found))
    scores = {str(name): _finite(value) for name, value in found.scores.items()}
    return Answer(str(found.label), _finite(found.probability), scores)


def _finite(value: float) -> float:
    number = float(value)
    if not abs(number) < float("inf"):
        raise ProbeFailed(f"an answer holds {number}; expected a finite number")
    return number


def _top(answer: Answer) -> Answer:
    best = sorted(answer.scores.items(), key=lambda one: -one[1])[:_TOP]
    return dataclasses.replace(answer, scores=dict(best))


def _told(answer: Answer) -> str:
    return f"{answer.label[:40]!r} with {answer.value:.4g}" if answer.label else f"{answer.value:.4g}"
