"""What is kept of the noise between rounds, and that no course of events costs more than was charged."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from federated.aggregation import make_rule
from federated.config import experiment_from
from federated.errors import PrivacyError
from federated.flower.noise_keeper import NoiseKeeper
from federated.flower.server_privacy import ServerPrivacy
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.banded import coefficients, column_norm
from federated.privacy.fixed_groups import group_of
from federated.privacy.noise_chain import NoiseChain, NoiseHistory, Place
from federated.state import AdapterState

WIDTH = 24
EVENTS = ("published", "published", "lost", "silent", "unkept", "back")
NAMES = [f"client-{number:03d}" for number in range(12)]
SPEC = AdapterSpec("lora", 1, 2.0, use_rslora=False, modules=(ModuleSpec("q", WIDTH, 2, 1, 2.0),))
STATE = GlobalState(AdapterState(SPEC, {"q.factor_a": torch.zeros(1, WIDTH), "q.factor_b": torch.zeros(2, 1)}))


class Server:
    """Rounds with real charges, cohorts and noise, in which the n-th fresh noise is the n-th unit vector.

    So each row of what was given out says of which fresh noise it is made, and the mechanism lies open as a matrix.
    """

    def __init__(self, folder: Path, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.config = experiment_from(
            {
                "task": {"labels": ["a", "b"]},
                "rounds": 100,
                "selection": {"fraction": 1 / groups},
                "strategy": {"weighted": False},
                "privacy": {"client": {"enabled": True, "noise_multiplier": 2.0, "mechanism": "banded"}},
            }
        )
        self.rule, self.groups = make_rule("fedit"), groups
        self.finished, self.versions = 0, 0
        self.head: str | None = None
        self.rows: list[np.ndarray] = []
        self.group_of_row: list[int] = []
        self.charged: Counter[int] = Counter()
        monkeypatch.setattr("federated.aggregation.private_mean.noise_source", lambda seed=-1: self)
        self.privacy = self.opened()

    def normal(self, count: int) -> torch.Tensor:
        unit = torch.zeros(count)
        if count == WIDTH:
            unit[len(self.rows)] = 1.0
        return unit

    def opened(self) -> ServerPrivacy:
        found = ServerPrivacy.of_run(self.config, self.rule, folder=self.folder, run_id="run", saved_head=self.head)
        assert found is not None
        return found

    def restart(self) -> None:
        self.privacy.close()
        self.privacy = self.opened()

    def round(self, event: str) -> None:
        """One round that ends like this."""
        if event == "back":  # an older registry was put back: later releases had been seen, and the ledger has them
            self.finished = max(0, self.finished - 2)
            self.restart()
            return
        number = self.finished + 1
        self.privacy.plan(NAMES)
        self.privacy.charge(number)
        cohort = self.privacy.draw(NAMES, number)
        turn = (number - 1) % self.groups
        assert cohort == tuple(one for one in NAMES if group_of(one, groups=self.groups, seed=0) == turn)
        self.charged[turn] += 1
        accumulator = self.privacy.accumulator(self.rule.start(STATE, 1), STATE, number)
        if event != "silent":  # else the quorum was missed
            mean = accumulator.finish().mean_delta
            assert mean is not None
            scale = self.privacy.planned / (2.0 * column_norm(self.groups))
            self.rows.append(scale * mean["q.factor_a"].double().numpy().reshape(WIDTH))
            self.group_of_row.append(turn)
        if event in ("published", "unkept"):
            self.head = self.privacy.budget.head
        if event == "published":
            self.privacy.published(number)
        if event in ("lost", "unkept"):  # a crash, after the release was seen
            self.restart()
        self.finished = number if event != "lost" else self.finished

    def shifts(self) -> dict[int, float]:
        """Of each group, the most that one client could shift all that was seen, squared, in column norms."""
        count = len(self.rows)
        made_of = np.stack(self.rows)[:, :count]
        undone = np.linalg.inv(made_of)  # what is seen is x + N z: N^-1 takes it to independent noise
        found = {}
        for group in set(self.group_of_row):
            columns = undone[:, [row for row in range(count) if self.group_of_row[row] == group]]
            found[group] = float(np.abs(columns.T @ columns).sum()) / column_norm(self.groups) ** 2
        return found


@example(groups=3, course=["published", "published", "back", "published"])
@example(groups=3, course=["published", "published", "lost", "published", "silent", "published"])
@example(groups=4, course=["published", "published", "unkept", "back", "published", "silent", "lost"])
@settings(max_examples=30, deadline=None)
@given(groups=st.integers(2, 4), course=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=14))
def test_no_course_of_events_shows_more_of_a_client_than_its_group_was_charged(
    groups: int, course: list[str], tmp_path_factory: pytest.TempPathFactory
):
    with pytest.MonkeyPatch.context() as patch:
        server = Server(tmp_path_factory.mktemp("run"), groups, patch)
        for event in [*course, *["published"] * groups]:
            server.round(event)
        for group, shift in server.shifts().items():
            assert shift <= server.charged[group] * (1 + 1e-5)
        most = max(server.charged.values())
        assert server.privacy.budget.epsilon == pytest.approx(epsilon([GaussianSteps(2.0, 1.0, most)], 1e-5))
        server.privacy.close()


def course_of(folder: Path, patch: pytest.MonkeyPatch, events: list[str], groups: int = 3) -> Server:
    server = Server(folder, groups, patch)
    for event in events:
        server.round(event)
    server.privacy.close()
    return server


def test_rounds_that_are_all_published_are_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = course_of(tmp_path, monkeypatch, ["published"] * 9)
    dense = sum(np.eye(9, k=-lag) * one for lag, one in enumerate(coefficients(3)))
    assert np.allclose(np.stack(server.rows)[:, :9], np.linalg.inv(dense), atol=1e-6)
    assert {group: round(shift, 4) for group, shift in server.shifts().items()}[0] == 3.0


def test_a_crash_in_between_changes_nothing_where_the_round_was_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = Server(tmp_path, 3, monkeypatch)
    for _ in range(5):
        server.round("published")
        server.restart()
    server.privacy.close()
    (tmp_path / "other").mkdir()
    straight = course_of(tmp_path / "other", monkeypatch, ["published"] * 5)
    assert all(np.array_equal(one, other) for one, other in zip(server.rows, straight.rows, strict=True))


@pytest.mark.parametrize("event", ["lost", "silent", "unkept", "back"])
def test_after_anything_else_the_noise_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, caplog: pytest.LogCaptureFixture
):
    server = course_of(tmp_path, monkeypatch, ["published", "published", event, "published"])
    assert np.count_nonzero(server.rows[-1]) == 1
    assert "the noise starts anew" in caplog.text


def test_going_on_after_a_lost_release_would_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The rule that is not taken: the group just before loses more than it was charged for."""
    monkeypatch.setattr(NoiseHistory, "broken_by", lambda self, following: "")
    server = course_of(tmp_path, monkeypatch, ["published", "published", "lost", "published", "published"])
    assert server.charged[1] == 1
    assert server.shifts()[1] == pytest.approx(1 + 0.25 / column_norm(3) ** 2, rel=1e-5)


def test_going_on_across_a_silent_round_would_bring_a_group_too_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(NoiseHistory, "broken_by", lambda self, following: "")
    server = course_of(tmp_path, monkeypatch, ["published", "silent", "published", "published", "silent", "published"])
    assert max(shift - server.charged[group] for group, shift in server.shifts().items()) > 0.1


# ---- the file --------------------------------------------------------------------------------------------------------


def chain(number: int, history: NoiseHistory | None = None) -> NoiseChain:
    made = NoiseChain(Place(number, f"{number - 1}", f"{number}", 1.5, 3), history)
    made.draw("w", torch.arange(4.0) + number)
    return made


def test_the_newest_history_is_on_the_disk_and_its_owner_s_alone(tmp_path: Path):
    path = tmp_path / "noise.history"
    before = os.umask(0)
    try:
        keeper = NoiseKeeper(path)
        first = chain(1)
        keeper.keep(first)
        keeper.keep(chain(2, first.history()))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["noise.history"]
    again = NoiseKeeper(path)._history
    assert again is not None
    assert (again.place, again.rows) == (Place(2, "1", "2", 1.5, 3), 2)
    assert torch.equal(again.tensors["w"], chain(2, first.history()).history().tensors["w"])
    path.chmod(0o640)
    with pytest.raises(PrivacyError, match="others can read the noise of the last rounds"):
        NoiseKeeper(path)


def test_noise_on_the_disk_does_not_grow_with_the_rounds(tmp_path: Path):
    path = tmp_path / "noise.history"
    keeper, history, sizes = NoiseKeeper(path), None, []
    for number in range(1, 7):
        made = chain(number, history)
        keeper.keep(made)
        history = made.history()
        sizes.append(path.stat().st_size)
    assert sizes[0] < sizes[1]
    assert max(sizes[1:]) - min(sizes[1:]) < 8


@pytest.mark.parametrize("data", [b"", b"nothing", b"\0" * 200])
def test_a_damaged_file_ends_the_run(tmp_path: Path, data: bytes):
    path = tmp_path / "noise.history"
    path.touch(0o600)
    path.write_bytes(data)
    with pytest.raises(PrivacyError, match="is damaged"):
        NoiseKeeper(path)


def test_a_packet_of_something_else_is_no_history(tmp_path: Path):
    from federated.wire import encode_packet

    path = tmp_path / "noise.history"
    path.touch(0o600)
    path.write_bytes(encode_packet({"kind": "training_state"}, {}))
    with pytest.raises(PrivacyError, match="is damaged"):
        NoiseKeeper(path)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path):
    with pytest.raises(PrivacyError, match="cannot go on from this one"):
        NoiseKeeper(tmp_path / "nowhere" / "noise.history").keep(chain(1))
    with pytest.raises(PrivacyError, match="goes on from it"):
        NoiseKeeper(tmp_path)


def test_only_the_round_that_is_published_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(tmp_path, 3, monkeypatch)
    server.round("published")
    kept = (tmp_path / "noise.history").read_bytes()
    server.round("silent")
    server.privacy.published(7)
    assert (tmp_path / "noise.history").read_bytes() == kept
    server.privacy.close()
