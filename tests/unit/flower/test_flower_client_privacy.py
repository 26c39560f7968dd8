"""What a client does before it trains privately: the owner's limits, the charge ahead, the noise, and what it says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from federated.config import DataConfig, ExamplePrivacyConfig, ExperimentConfig, ModelConfig, PrivacyConfig
from federated.errors import BudgetExhausted, ConfigError, PrivacyError
from federated.flower import DeltaStrategy, InProcessGrid, handle_query, handle_train, open_session
from federated.flower.client_privacy import ExampleBudget
from federated.flower.client_site import ClientSite, check_limits
from federated.flower.client_store import ClientStore
from federated.flower.records import Assignment
from federated.manifest import TrainPlan
from federated.privacy.accounting import GaussianSteps, epsilon, noise_for
from federated.privacy.ledger import Ledger
from federated.tracking import MemoryTracker

Make = Callable[..., Any]
TRAIN = [{"input_ids": [number, number + 1], "label": number % 2} for number in range(20)]
EXAMPLE = {"enabled": True, "noise_multiplier": 2.0}


def experiment(config: ExperimentConfig, **privacy: Any) -> ExperimentConfig:
    example = ExamplePrivacyConfig(**{**EXAMPLE, **privacy.pop("example", {})})
    train = replace(config.train, batch_size=4, steps=3)
    return replace(config, rounds=2, train=train, privacy=PrivacyConfig(example=example, **privacy))


def task_of(run_id: str = "run", number: int = 1, acknowledged: str = "") -> Assignment:
    return Assignment(run_id, "client-000", number, "token", "", "b" * 64, TrainPlan(), acknowledged)


@pytest.fixture
def budget(real_config: ExperimentConfig, tmp_path: Path) -> Make:
    """A client's budget for one task, opened anew each time."""

    def make(
        *,
        run_id: str = "run",
        number: int = 1,
        acknowledged: str = "",
        site: dict[str, Any] | None = None,
        train: list[dict[str, Any]] | None = None,
        **privacy: Any,
    ) -> ExampleBudget:
        return ExampleBudget(
            task_of(run_id, number, acknowledged),
            experiment(real_config, **privacy),
            site=ClientSite("client-000", store=str(tmp_path), data=DataConfig(), **(site or {})),
            store=ClientStore(tmp_path, run_id=run_id, client_id="client-000"),
            train=TRAIN if train is None else train,
        )

    return make


def test_the_charge_is_on_disk_before_anything_is_computed_and_names_what_is_computed(budget: Make, tmp_path: Path):
    with budget() as made:
        assert made.spent == 0.0
        assert made.charge().noise_multiplier == 2.0
        event = GaussianSteps(2.0, 4 / 20, 3)
        lines = next((tmp_path / "privacy").glob("*.jsonl")).read_text().splitlines()
        assert json.loads(lines[-1])["event"] == event.to_dict()
        assert made.spent == epsilon([event], 1e-5)
        head = made.head
    with budget(number=2) as made:
        assert made.head == head
        made.charge()
        assert made.spent == epsilon([event, event], 1e-5)


def test_noise_is_solved_over_all_rounds_and_beside_what_other_runs_spent(budget: Make):
    solved = {"example": {"noise_multiplier": 0.0}, "target_epsilon": 3.0}
    with budget(**solved) as made:
        first = made.charge().noise_multiplier
    with budget(number=2, **solved) as made:
        assert made.charge().noise_multiplier == first
        assert 2.9 < made.spent <= 3.0
    with budget(run_id="another", **{**solved, "target_epsilon": 5.0}) as made:
        alone = noise_for(5.0, 1e-5, sampling=0.2, steps=6)
        assert made.charge().noise_multiplier > alone
        assert made.spent < 5.0
    with budget(run_id="a third", **solved) as made, pytest.raises(PrivacyError, match="spent"):
        made.charge()


def test_what_does_not_fit_is_neither_charged_nor_granted(budget: Make):
    one = epsilon([GaussianSteps(2.0, 0.2, 3)], 1e-5)
    with budget(target_epsilon=1.01 * one) as made:
        made.charge()
        head = made.head
        with pytest.raises(BudgetExhausted, match=r"the run allows epsilon .* 3 steps more do not fit"):
            made.charge()
        assert made.head == head


def test_the_owner_s_limit_counts_all_runs_at_the_owner_s_own_probability(budget: Make):
    one = epsilon([GaussianSteps(2.0, 0.2, 3)], 1e-5)
    site = {"max_epsilon": 1.01 * one}
    with budget(site=site, target_delta=0.04) as made:
        made.charge()
    with budget(site=site, run_id="another", target_delta=0.04) as made, pytest.raises(BudgetExhausted, match="owner"):
        made.charge()


def test_an_owner_s_least_noise_holds_for_solved_noise_too(budget: Make):
    solved = {"example": {"noise_multiplier": 0.0}, "target_epsilon": 8.0}
    with budget(site={"least_noise": 5.0}, **solved) as made, pytest.raises(PrivacyError, match="no less than 5"):
        made.charge()


def test_a_ledger_of_other_examples_is_refused_and_order_is_no_difference(budget: Make):
    with budget() as made:
        made.charge()
    with budget(train=list(reversed(TRAIN))) as made:
        assert made.spent > 0
    with pytest.raises(PrivacyError, match="data"):
        budget(train=TRAIN[:-1])
    tensors = [{"values": torch.tensor([float(number)])} for number in range(20)]
    with pytest.raises(PrivacyError, match="data"):
        budget(train=tensors)


def test_a_ledger_that_lacks_the_acknowledged_head_is_refused_and_may_be_put_right(budget: Make, tmp_path: Path):
    with budget() as made:
        made.charge()
        first = made.head
    path = next((tmp_path / "privacy").glob("*.jsonl"))
    older = path.read_bytes()
    with budget(number=2, acknowledged=first) as made:
        made.charge()
        second = made.head
    newer = path.read_bytes()
    path.write_bytes(older)
    with pytest.raises(PrivacyError, match=f"does not go on from the head {second[:12]} that was last acknowledged"):
        budget(number=3, acknowledged=second)
    path.unlink()
    with pytest.raises(PrivacyError, match="is missing, and one is expected"):
        budget(number=3, acknowledged=second)
    assert not path.exists(), "no ledger is made where one was acknowledged"
    path.write_bytes(newer)
    with budget(number=3, acknowledged=first) as made:  # the reply to the second charge was lost: still its history
        assert made.head == second


class PutsBack(MemoryTracker):
    """After round 2, one client's ledger is as it was after round 1, and another's is gone."""

    def __init__(self, store: Path) -> None:
        super().__init__(clock=lambda: 0.0)
        self._store = store
        self._older: dict[Path, bytes] = {}

    def emit(self, event: Any) -> None:
        super().emit(event)
        ledgers = sorted(self._store.rglob("privacy_ledger.jsonl"))
        if (event["event"], event.get("round_number")) == ("round", 1):
            self._older = {path: path.read_bytes() for path in ledgers}
        if (event["event"], event.get("round_number")) == ("round", 2):
            ledgers[0].write_bytes(self._older[ledgers[0]])
            ledgers[1].unlink()


def test_a_restored_ledger_is_noticed_by_what_the_server_acknowledged_and_the_others_go_on(
    real_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path))
    config = replace(experiment(real_config), rounds=3)
    strategy, tracker = run(replace(config, round=replace(config.round, quorum=0.1)), PutsBack(tmp_path))
    said = [event for event in tracker.events if event["event"] == "client" and event["round_number"] == 3]
    failed = {event["client_id"]: event for event in said if event["status"] == "failed"}
    assert len(failed) == 2 < len(said)
    assert {event["reason"] for event in failed.values()} == {"PrivacyError"}
    texts = sorted(event["message"] for event in failed.values())
    assert "is missing, and one is expected" in texts[1] or "is missing, and one is expected" in texts[0]
    assert any("an older copy of it was put back" in text for text in texts)
    saved = strategy.server.training_state(3)
    heads = type(saved).from_bytes(saved.to_bytes()).client_heads
    assert heads.keys() == {event["client_id"] for event in said}
    held = [json.loads(path.read_text().splitlines()[-1])["digest"] for path in tmp_path.rglob("privacy_ledger.jsonl")]
    good = [heads[event["client_id"]] for event in said if event["status"] == "ok"]
    assert set(good) <= set(held), "what is acknowledged is what the client's own disk holds"


def test_a_head_that_is_none_is_not_acknowledged(real_config: ExperimentConfig) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    from federated.flower.records import Reply

    for told, kept in (("f" * 64, "f" * 64), ("F" * 64, ""), ("f" * 65, ""), (3, "")):
        head = ConfigRecord({"client_id": "a", "task_token": "t", "ledger_head": told})
        assert Reply.from_message(Message(RecordDict({"reply": head}), 1, "train")).ledger_head == kept


def test_a_probability_that_gives_one_example_away_is_refused(budget: Make):
    with pytest.raises(PrivacyError, match=r"privacy\.target_delta = 0\.05"):
        budget(target_delta=0.05)


@pytest.mark.parametrize(
    ("site", "privacy", "found"),
    [
        ({"max_epsilon": 3.0}, {"example": {"enabled": False}}, "no privacy.example"),
        ({"least_noise": 1.0}, {"example": {"enabled": False}}, "no privacy.example"),
        ({"max_epsilon": 3.0}, {"target_epsilon": 8.0}, r"target_epsilon = 8: this client allows at most 3"),
        ({"least_noise": 3.0}, {}, r"noise_multiplier = 2: this client allows no less than 3"),
        ({"data": DataConfig()}, {"test_seed": 1}, r"privacy\.test_seed"),
        ({}, {"test_seed": 1}, ""),
        ({}, {"example": {"enabled": False}}, ""),
        ({"max_epsilon": 3.0, "least_noise": 1.0}, {"target_epsilon": 3.0}, ""),
    ],
)
def test_limits_of_the_device(
    real_config: ExperimentConfig, tmp_path: Path, site: dict[str, Any], privacy: dict[str, Any], found: str
) -> None:
    config = experiment(real_config, **privacy)
    made = ClientSite("client-000", store=str(tmp_path), model=ModelConfig(), **site)
    if not found:
        check_limits(config, made)
        return
    with pytest.raises(PrivacyError, match=found):
        check_limits(config, made)


def run(config: ExperimentConfig, tracker: MemoryTracker | None = None) -> tuple[DeltaStrategy, MemoryTracker]:
    session, app, tracker = open_session(config), ClientApp(), tracker or MemoryTracker(clock=lambda: 0.0)
    app.query()(handle_query)
    app.train()(handle_train)
    base = session.adapter.base.base_digest
    strategy = DeltaStrategy(config, initial=session.initial, base_digest=base, tracker=tracker, run_id="run")
    with InProcessGrid(app, len(session.source.client_ids)) as grid:
        strategy.start(grid)
    return strategy, tracker


def test_a_federation_keeps_its_target_and_every_round_says_what_was_spent(real_config: ExperimentConfig) -> None:
    config = experiment(real_config, example={"noise_multiplier": 0.0}, target_epsilon=6.0)
    strategy, tracker = run(config)
    rounds = [event for event in tracker.events if event["event"] == "round"]
    spent = [event["privacy"]["accounts"][0] for event in rounds]
    assert [one["unit"] for one in spent] == ["example", "example"]
    assert 0 < spent[0]["epsilon"] < spent[1]["epsilon"] <= 6.0
    assert spent[1]["private"]
    assert all(event["train_loss"] is None for event in rounds)
    saved = strategy.server.training_state(2)
    assert max(saved.epsilons.values()) == spent[1]["epsilon"]
    assert type(saved).from_bytes(saved.to_bytes()).epsilons == saved.epsilons


def test_one_seed_gives_other_noise_each_time_and_a_test_seed_is_stamped(real_config: ExperimentConfig) -> None:
    def weights(config: ExperimentConfig) -> tuple[torch.Tensor, bool]:
        strategy, tracker = run(config)
        event = next(event for event in reversed(tracker.events) if event["event"] == "round")
        parts = [one.flatten() for _, one in sorted(strategy.server.adapter.tensors.items())]
        return torch.cat(parts), event["privacy"]["accounts"][0]["private"]

    once, again = (weights(replace(experiment(real_config), rounds=1)) for _ in range(2))
    assert not torch.equal(once[0], again[0])
    assert once[1]


def test_a_client_that_does_not_say_what_it_spent_has_no_bound(real_config: ExperimentConfig) -> None:
    from federated.flower.round_book import Outcome
    from federated.privacy.account import example_account

    strategy, _ = run(replace(experiment(real_config), rounds=1))
    server = strategy.server
    server.note_spent([Outcome("client-000", "ok", metrics={"epsilon": 0.1}), Outcome("stranger", "ok")])
    assert server.epsilons["client-000"] > 0.1
    account = example_account(experiment(real_config).privacy, server.epsilons.values())
    assert account.to_dict()["epsilon"] is None
    server.note_spent([Outcome("client-000", "ok", metrics={"epsilon": -1.0})])
    assert server.epsilons["client-000"] == float("inf")
    saved = server.training_state(1)
    assert type(saved).from_bytes(saved.to_bytes()).epsilons == saved.epsilons


def test_central_training_promises_nothing_and_says_so(real_config: ExperimentConfig, tmp_path: Path) -> None:
    from federated.flower.central import train_centrally

    with pytest.raises(ConfigError, match="use privacy=none"):
        train_centrally(replace(experiment(real_config), run_dir=str(tmp_path / "run")))


def test_the_ledger_of_a_simulated_client_is_the_run_s(real_config: ExperimentConfig, tmp_path: Path) -> None:
    store = ClientStore(tmp_path, run_id="run", client_id="client-000")
    site = ClientSite("client-000", store=str(tmp_path))
    with ExampleBudget(task_of(), experiment(real_config), site=site, store=store, train=TRAIN) as made:
        made.charge()
    path = store.folder / "privacy_ledger.jsonl"
    with pytest.raises(PrivacyError, match="client"):
        Ledger.open(path, subject="client-001", data_digest="d" * 64)


def test_measurements_leave_a_client_with_limits_only_if_its_owner_says_so() -> None:
    def made(**limits: Any) -> bool:
        return ClientSite("a", store="s", **limits).measures

    assert made()
    assert not made(max_epsilon=8.0)
    assert not made(least_noise=1.0)
    assert made(max_epsilon=8.0, share_metrics=True)
    assert not made(share_metrics=False)


def test_a_client_that_measures_nothing_for_others_trains_all_the_same(
    real_config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(experiment(real_config), rounds=1)
    for measures in (True, False):
        monkeypatch.setattr(ClientSite, "measures", measures)
        _, tracker = run(config)
        clients = [event for event in tracker.events if event["event"] == "client"]
        assert {event["status"] for event in clients} == {"ok"}
        assert all((event["evaluation"] is not None) == measures for event in clients)
        final = [event for event in tracker.events if event["event"] == "final"]
        assert all(bool(event.get("evaluation")) == measures for event in final)


def test_an_update_that_came_counts_in_the_account_whether_a_version_comes_of_it_or_not(real_config: Any) -> None:
    from federated.flower.round_book import Outcome

    strategy, _ = run(replace(experiment(real_config), rounds=1))
    server = strategy.server
    server.note_spent([Outcome("client-000", "refused", metrics={"epsilon": 7.0}), Outcome("client-001", "refused")])
    assert server.epsilons["client-000"] == 7.0
    assert server.epsilons["client-001"] < 7.0
    server.note_spent([Outcome("client-001", "late"), Outcome("client-002", "ok")])
    assert server.epsilons["client-001"] < 7.0
    assert server.epsilons["client-002"] == float("inf")


def test_a_row_is_one_example_whatever_length_the_server_chooses(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from federated.config import experiment_from

    texts = [" ".join(["word"] * count) for count in (3, 40, 7, 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"client": "a", "text": text}) + "\n" for text in texts))
    plain = {
        "model": {"source": "tiny:llama"}, "task": {"name": "causal_lm", "max_length": 8}, "train": {"batch_size": 2},
        "data": {"name": "table", "path": str(tmp_path / "rows.jsonl"), "test_fraction": 0.25},
    }  # fmt: skip
    loose = open_session(experiment_from(plain))
    (client,) = loose.source.client_ids
    assert len(loose.local_data(client).train) > 3
    private = {**plain, "privacy": {"example": {"enabled": True, "noise_multiplier": 1.0}}}
    found = {}
    for length in (2, 8, 64):
        config = experiment_from({**private, "task": {"name": "causal_lm", "max_length": length}})
        data = open_session(config).local_data(client)
        assert len(data.train) == len(data.rows) == 3
        assert all(len(one["input_ids"]) <= length for one in data.train)
        found[length] = data
    assert "the first of each row's examples is trained on" in caplog.text
    assert found[2].rows == found[64].rows, "what the ledger is bound to does not depend on it either"
