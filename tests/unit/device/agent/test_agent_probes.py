"""Proof of effect: a release's probes, and the device's own inputs where it has none."""

import json
from dataclasses import dataclass, field, replace

import pytest

from federated.device import NULL, AdapterRuntime
from federated.device.probes import MAX_BYTES, Answer, Probes, distance, make_probes, probes_from, prove, prove_effect
from federated.errors import DataError, ProbeFailed
from federated.manifest import VersionManifest

ROWS = [{"text": "one"}, {"text": "two"}]


@dataclass
class Label:
    label: str
    probability: float
    scores: dict[str, float] = field(default_factory=dict)


def spread(bad: float) -> Label:
    return Label("bad" if bad > 0.5 else "good", max(bad, 1 - bad), {"bad": bad, "good": 1 - bad})


@pytest.fixture
def probes(yard, make) -> Probes:
    """Of version 1, which answers mostly bad where null answers mostly good."""
    yard.backend.answers.update({1.0: spread(0.9), 0.0: spread(0.2)})
    runtime = AdapterRuntime(yard.backend)
    version = make(1)
    slot = runtime.install(version.manifest, version.weights, version_id=version.version_id)
    return make_probes(runtime, slot.digest, ROWS)


def test_a_release_with_probes_is_proved_by_them(yard, probes) -> None:
    yard.publish(1, files={"probes.json": probes.to_bytes()})
    with yard.started(probes="required") as agent:
        agent.poll()
        assert agent.undecided
    assert probes.probes[0].row == {"text": "one"}
    assert probes.probes[0].adapter == Answer("bad", 0.9, {"bad": 0.9, "good": 1 - 0.9})


@pytest.mark.parametrize(
    ("handle", "answer", "said"),
    [
        (1.0, spread(0.87), "probe 1 of 2: the adapter answers 'bad' with 0.87, its publisher measured 'bad' with 0.9"),
        (0.0, spread(0.25), "probe 1 of 2: the base alone answers 'good' with 0.75, its publisher measured"),
        (1.0, spread(0.2), "the adapter answers 'good' with 0.8"),
        (1.0, Label("bad", float("nan"), {"bad": float("nan")}), "an answer holds nan"),
        (1.0, Label("bad", 0.9), "the adapter answers"),
    ],
)
def test_other_answers_are_refused_and_the_reason_is_kept(yard, probes, handle, answer, said) -> None:
    version = yard.publish(1, files={"probes.json": probes.to_bytes()})
    yard.backend.answers[handle] = answer
    with yard.started() as agent:
        assert agent.poll()
        assert (agent.active, yard.state_of(version), yard.book.versions[version].code) == (
            NULL,
            "failed",
            "ProbeFailed",
        )
        assert said in yard.book.versions[version].reason


def test_answers_within_the_tolerance_pass(yard, probes) -> None:
    yard.publish(1, files={"probes.json": probes.to_bytes()})
    yard.backend.answers.update({1.0: spread(0.885), 0.0: spread(0.215)})
    with yard.started() as agent:
        agent.poll()
        assert agent.undecided


def test_adapter_and_base_must_differ_whatever_the_publisher_measured(yard, probes, make) -> None:
    same = replace(probes, probes=tuple(replace(one, null=one.adapter) for one in probes.probes))
    yard.backend.answers[0.0] = spread(0.9)
    runtime = AdapterRuntime(yard.backend)
    version = make(1)
    slot = runtime.install(version.manifest, version.weights, version_id=version.version_id)
    with pytest.raises(ProbeFailed, match="is loaded and has no effect"):
        prove(runtime, slot.digest, same)


def test_required_probes_that_a_release_lacks(yard) -> None:
    version = yard.publish(1)
    with yard.started(probes="required") as agent:
        agent.poll()
        assert yard.state_of(version) == "failed"
        assert "probes: required" in yard.book.versions[version].reason


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b'{"probes": [], "tolerance": 0.1}', b'{"probes": [{"row": {}}]}', b" " * (MAX_BYTES + 1)],
)
def test_probes_that_cannot_be_read_fail_their_version(yard, data) -> None:
    with pytest.raises(ProbeFailed, match="the release's probes"):
        probes_from(data)


def test_broken_probes_of_a_release(yard) -> None:
    version = yard.publish(1, files={"probes.json": b"{}"})
    with yard.started() as agent:
        agent.poll()
        assert (yard.state_of(version), yard.book.versions[version].code) == ("failed", "ProbeFailed")


def test_too_many_probes_are_not_fetched(yard) -> None:
    version = yard.publish(1, files={"probes.json": b" " * (MAX_BYTES + 1)})
    with yard.started() as agent:
        assert not agent.poll()
        assert yard.state_of(version) == "discovered"
        assert yard.book.trouble.startswith("EndlessData")


def test_probes_survive_the_file(probes) -> None:
    assert probes_from(probes.to_bytes()) == probes
    told = json.loads(probes.to_bytes())
    with pytest.raises(ProbeFailed, match="surprise"):
        probes_from(json.dumps(told | {"surprise": 1}).encode())


@pytest.mark.parametrize("answers", [{1.0: spread(0.25), 0.0: spread(0.2)}, {1.0: spread(0.2), 0.0: spread(0.2)}])
def test_inputs_that_do_not_show_the_effect_make_no_probes(yard, make, answers) -> None:
    yard.backend.answers.update(answers)
    runtime = AdapterRuntime(yard.backend)
    version = make(1)
    slot = runtime.install(version.manifest, version.weights, version_id=version.version_id)
    with pytest.raises(ProbeFailed, match=r"at most 0.\d+ from the base's; probes need 0.06|at most 0 from"):
        make_probes(runtime, slot.digest, ROWS)


def test_only_the_most_likely_classes_are_kept(yard, make) -> None:
    many = {f"class {number}": 0.5**number for number in range(1, 12)}
    yard.backend.answers.update({1.0: Label("class 1", 0.5, many), 0.0: Label("other", 0.1, {"other": 1.0})})
    runtime = AdapterRuntime(yard.backend)
    version = make(1)
    slot = runtime.install(version.manifest, version.weights, version_id=version.version_id)
    made = make_probes(runtime, slot.digest, ROWS)
    assert list(made.probes[0].adapter.scores) == [f"class {number}" for number in range(1, 6)]


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (Answer("", 1.0), Answer("", 1.5), 0.5),
        (Answer("said", 0.5), Answer("said", 0.4), pytest.approx(0.1)),
        (Answer("said", 0.5), Answer("meant", 0.5), 1.0),
        (Answer("a", 0.6, {"a": 0.6, "b": 0.4}), Answer("b", 0.7, {"a": 0.3, "b": 0.7}), pytest.approx(0.3)),
        (Answer("a", 0.6, {"a": 0.6}), Answer("b", 1.0, {"b": 1.0}), 0.6),
    ],
)
def test_how_far_answers_are_apart(one, other, apart) -> None:
    assert distance(one, other) == apart


class Series:
    """Answers series of three channels alone."""

    base_digest = "b" * 64

    def __init__(self, channels: int, effect: float) -> None:
        self.channels, self.effect = channels, effect

    def null(self) -> float:
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        pass

    def build(self, spec, tensors) -> float:
        return self.effect

    def nbytes(self, handle: float) -> int:
        return 0

    def predict(self, handle, rows) -> list[float]:
        if any(len(step) != self.channels for row in rows for step in row["values"]):
            raise DataError("other channels")
        return [handle + sum(map(sum, row["values"])) for row in rows]


@pytest.mark.parametrize(
    ("channels", "effect", "fault"), [(3, 1.0, ""), (3, 0.0, "no effect"), (40, 1.0, "no built-in")]
)
def test_built_in_series_find_the_number_of_channels(make, channels, effect, fault) -> None:
    runtime = AdapterRuntime(Series(channels, effect))
    version = make(1, task={"task": {"name": "sensor"}})
    slot = runtime.install(version.manifest, version.weights, version_id=version.version_id)
    if not fault:
        prove_effect(runtime, slot.digest, version.manifest)
        return
    with pytest.raises(ProbeFailed, match=fault):
        prove_effect(runtime, slot.digest, version.manifest)
