"""``fedpeft privacy plan`` and ``spent``: what they print, and what they refuse in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federated.cli import privacy_plan, privacy_spent
from federated.errors import ModelError

Command = Callable[..., Any]
APP = f"--app={Path(__file__).resolve().parents[3]}"
EXAMPLE = ("privacy=example_dp", "train.batch_size=8", "train.steps=2")
CLIENT = ("privacy=client_dp",)
TINY = ("experiment=tiny", "data.partition.num_clients=2", "train.steps=1", "engine.workers=1", "run_dir=out")


def plan(fedpeft: Command, *arguments: str, code: int = 0) -> Any:
    return fedpeft("privacy", "plan", APP, *arguments, code=code)


def test_without_privacy_it_says_that_nothing_is_protected(fedpeft: Command) -> None:
    assert plan(fedpeft).out.startswith("privacy=none: nothing is protected: the server sees each client's delta")
    plain = json.loads(plan(fedpeft, "--json").out)
    assert (plain["private"], plain["not_protected"], plain["example"], plain["client"]) == (
        False,
        ["everything"],
        [],
        None,
    )


def test_examples_of_given_sizes(fedpeft: Command) -> None:
    out = plan(fedpeft, *EXAMPLE, "--examples", "500", "--examples", "1", "rounds=12").out
    assert "epsilon, 1 round " in out
    assert "epsilon, 10 rounds" in out
    assert "epsilon, 12 rounds" in out
    assert "doubtful: much noise" in out
    assert "refused: 1 training" in out
    assert "adding or removing one example is hidden (add or remove one); sampling: Poisson" in out
    assert "need not be trusted" in out
    assert "accountant: rdp; target_delta: 1e-05" in out
    assert "not protected: metrics" in out
    assert "rounded floating point and not discrete" in out


def test_sizes_are_counted_where_none_is_given(fedpeft: Command) -> None:
    plain = json.loads(plan(fedpeft, *EXAMPLE, "experiment=tiny", "data.partition.num_clients=3", "--json").out)
    assert sum(row["clients"] for row in plain["example"]) == 3
    assert plain["client"] is None


def test_clients_are_counted_and_the_model_is_asked(fedpeft: Command) -> None:
    plain = json.loads(plan(fedpeft, *CLIENT, "experiment=tiny", "data.partition.num_clients=4", "--json").out)
    assert plain["client"]["population"] == 4
    assert plain["client"]["cohort"] == 4.0
    assert plain["client"]["parameters"] > 100
    assert plain["sampling"] == {"client": "none claimed: every unit may take part in every step"}
    assert "without secure aggregation it sees each client's delta" in plain["trusted"]["client"]
    assert [mark["population"] for mark in plain["landmarks"]] == [10, 100, 1_000, 10_000, 1_000_000]


def test_the_tables_of_a_large_federation(fedpeft: Command) -> None:
    sampled = ("selection.fraction=0.1", "privacy.client.sampling=poisson", "rounds=100")
    out = plan(fedpeft, *CLIENT, *sampled, "--clients=1000", "--parameters=73728").out
    assert "73,728" in out
    assert "can be useful" in out
    assert "1,000,000" in out
    assert "For orientation" in out
    assert "the server is trusted" in out


TURNS = ("privacy.client.mechanism=banded", "selection.fraction=0.1", "rounds=100", "--clients=1000")


def test_correlated_noise_is_shown_beside_independent_noise(fedpeft: Command) -> None:
    out = plan(fedpeft, *CLIENT, *TURNS, "--parameters=73728").out
    assert "Correlated noise" in out
    assert "rms, same groups" in out
    assert "sampling: none: each client at most once in 10 rounds, by a fixed division" in out
    assert "Length is of the noise on one round's mean update" in out
    assert "with sqrt(T)" not in out
    client = json.loads(plan(fedpeft, *CLIENT, *TURNS, "--parameters=73728", "--json").out)["client"]
    assert (client["banded"]["groups"], client["banded"]["participations"], client["banded"]["band"]) == (10, 10, 10)
    assert client["banded"]["noise_of_the_sums"] < 0.5 * client["banded"]["independent"]
    assert client["banded"]["independent"] < 0.4 * client["banded"]["everybody"]


def test_one_group_has_no_such_table(fedpeft: Command) -> None:
    whole = ("privacy.client.mechanism=banded", "--clients=1000", "--parameters=100")
    assert "Correlated noise" not in plan(fedpeft, *CLIENT, *whole).out
    assert json.loads(plan(fedpeft, *CLIENT, *whole, "--json").out)["client"]["banded"] is None


def test_both_units_in_one_plan(fedpeft: Command) -> None:
    both = ("privacy=both", "train.batch_size=8", "--parameters=100")
    plain = json.loads(plan(fedpeft, *both, "--examples=500", "--clients=50", "--json").out)
    assert set(plain["sampling"]) == {"example", "client"}
    assert plain["client"]["population"] == 50
    assert [row["examples"] for row in plain["example"]] == [500]


def test_given_examples_do_not_stand_for_the_population(fedpeft: Command) -> None:
    both = ("privacy=both", "train.batch_size=8", "--parameters=100")
    plain = json.loads(plan(fedpeft, *both, "--examples=500", "data.partition.num_clients=3", "--json").out)
    assert plain["client"]["population"] == 3


def test_a_model_that_is_not_here_leaves_the_noise_unjudged(fedpeft: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ModelError("not here")

    monkeypatch.setattr("federated.adapters.load_base", absent)
    out = plan(fedpeft, *CLIENT, "--clients=1000").out
    assert "say --parameters N" in out
    assert "unknown" in out


def test_a_test_seed_is_said_to_make_nothing_private(fedpeft: Command) -> None:
    seeded = (*EXAMPLE, "--examples=500", "privacy.test_seed=1")
    assert "NOTHING of this run is private" in plan(fedpeft, *seeded).out
    assert json.loads(plan(fedpeft, *seeded, "--json").out)["private"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--examples=0", *EXAMPLE), "--examples 0: expected at least 1"),
        (("--clients=0", *CLIENT), "--clients 0: expected at least 1"),
        (("--parameters=-3", *CLIENT), "--parameters -3: expected at least 1"),
        (("--examples=1", *EXAMPLE), "at least two training examples"),
        (("--examples=7", *EXAMPLE), "is more than this client's training examples"),
        (("--examples=500", *EXAMPLE, "privacy.target_epsilon=-1"), "privacy.target_epsilon = -1"),
        (("--examples=500", *EXAMPLE, "privacy.target_delta=1"), "privacy.target_delta = 1"),
        (("--examples=500", *EXAMPLE, "privacy.target_delta=0.01"), "is not below 1 / 500 examples"),
        (("--examples=20", *EXAMPLE, "privacy.target_epsilon=1e-5", "rounds=1000"), "cannot be kept"),
        (("--clients=1", *CLIENT), "expected at least two clients"),
        (("--clients=9", "privacy=client_dp", "strategy.weighted=true"), "set strategy.weighted=false"),
        (("--clients=9", *CLIENT, "strategy=flora"), "a rule whose result depends on the mean alone"),
        ((*TURNS, *CLIENT, "--clients=9"), "9 clients in 10 groups would leave some empty"),
        ((*TURNS, *CLIENT, "strategy=rolora"), "rolora asks for other tensors from round to round"),
    ],
)
def test_bad_input_is_one_clear_line(fedpeft: Command, arguments: tuple[str, ...], said: str) -> None:
    done = plan(fedpeft, *arguments, code=2)
    assert said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


def test_an_epsilon_without_bound_is_null() -> None:
    assert privacy_plan._finite({"epsilons": ((1, 2.0), (2, float("inf")))}) == {"epsilons": {"1": 2.0, "2": None}}
    assert privacy_plan._number(float("inf")) == "no bound"


def test_spent_shows_each_version_s_account(fedpeft: Command, here: Path) -> None:
    noise = ("privacy.client.noise_multiplier=1", "privacy.target_epsilon=0", "rounds=2", "tracking.progress=false")
    fedpeft("simulate", APP, *TINY, *CLIENT, *noise)
    out = fedpeft("privacy", "spent", here / "out").out
    assert "add or remove one" in out
    assert "4.729" in out
    assert "not protected: metrics" in out
    versions = json.loads(fedpeft("privacy", "spent", here / "out" / "registry", "--json").out)["versions"]
    assert [version["version"] for version in versions] == [2, 1, 0]
    assert [len(version["accounts"]) for version in versions[:2]] == [1, 1]
    newest, first = (version["accounts"][0] for version in versions[:2])
    assert newest["epsilon"] > first["epsilon"] == pytest.approx(4.73, abs=0.01)
    assert (first["unit"], first["accountant"], first["private"]) == ("client", "rdp", True)


def test_spent_shows_whose_turns_were_charged(fedpeft: Command, here: Path) -> None:
    turns = ("privacy.client.mechanism=banded", "selection.fraction=0.5", "data.partition.num_clients=4")
    noise = ("privacy.client.noise_multiplier=1", "privacy.target_epsilon=0", "rounds=3", "tracking.progress=false")
    fedpeft("simulate", APP, *TINY, *CLIENT, *turns, *noise)
    versions = json.loads(fedpeft("privacy", "spent", here / "out", "--json").out)["versions"]
    spent = [version["accounts"][0]["epsilon"] for version in reversed(versions)]
    assert spent == pytest.approx([0.0, 4.729, 4.729, 7.077], abs=0.01)
    words = {version["accounts"][0]["sampling"] for version in versions}
    assert words == {"none: each client at most once in 2 rounds, by a fixed division"}
    assert "each client at most once" in fedpeft("privacy", "spent", here / "out").out
    assert "epsilon, each client" in (here / "out" / "report.html").read_text()
    assert (here / "out" / "noise.history").stat().st_mode & 0o777 == 0o600


def test_spent_says_where_nothing_was_accounted(fedpeft: Command, finished: Path) -> None:
    out = fedpeft("privacy", "spent", finished).out
    assert out.count("not accounted") == 3
    assert "not protected" not in out
    versions = json.loads(fedpeft("privacy", "spent", finished, "--json").out)["versions"]
    assert {version["why"] for version in versions} == {"not accounted"}


def test_spent_of_a_url(fedpeft: Command, finished: Path) -> None:
    url = f"sqlite:///{finished / 'registry' / 'registry.db'}"
    done = fedpeft("privacy", "spent", url, "--blobs", finished / "registry" / "blobs")
    assert done.out.count("not accounted") == 3


def test_spent_of_no_run_is_one_line(fedpeft: Command, here: Path) -> None:
    done = fedpeft("privacy", "spent", here / "nowhere", code=1)
    assert len(done.err.strip().splitlines()) == 1
    assert "nowhere" in done.err


@pytest.mark.parametrize("bad", [{"accounts": "none"}, {"epsilon": 3}, {"accounts": [{"epsilon": 3}]}])
def test_an_account_that_cannot_be_read_is_said(bad: dict[str, Any]) -> None:
    class Manifest:
        privacy = bad

    class Record:
        manifest = Manifest

    assert str(privacy_spent._accounts(Record())).startswith("cannot be read: ")  # type: ignore[arg-type]
