"""The report of whole, partial and hostile run folders."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from federated.errors import DataError
from federated.report import write_report
from federated.run_history import history_of, metric_names, result_warning

AIRLINES = ("american", "jetblue", "southwest", "united", "usairways", "virgin")
CONFIG = """\
name: airlines
rounds: 3
seed: 0
model:
  source: asset:minilm
adapter:
  rank: 8
  alpha: 16.0
strategy:
  rule: fedit
  server_optimizer:
    name: sgd
    learning_rate: 1.0
"""


def _client(round_number: int, index: int, *, metric: str) -> dict:
    value = 0.42 + 0.12 * round_number + 0.02 * index
    return {
        "event": "client", "round_number": round_number, "client_id": AIRLINES[index], "status": "ok", "reason": None,
        "message": None, "num_examples": 300 + 11 * index, "train_loss": 0.9 / round_number + 0.03 * index,
        "seconds": 4.1 + index, "bytes_up": 299_532, "bytes_down": 299_610, "update_norm": 1.3,
        "evaluation": {"loss": 1.1 / round_number, metric: value, "num_examples": 100},
    }  # fmt: skip


def _round(round_number: int, *, metric: str, refused: list | None = None) -> dict:
    return {
        "event": "round", "round_number": round_number, "participants": 6 - len(refused or []), "cohort": 6,
        "published": True, "version_id": f"{round_number}{'f' * 63}", "parent": f"{round_number - 1}{'f' * 63}",
        "weights_digest": f"{round_number}{'a' * 63}", "train_loss": 0.95 / round_number, "update_norm": 1.1,
        "bytes_up": 1_797_192, "bytes_down": 1_797_660, "seconds": 21.4, "refused": refused or [],
        "evaluation": {"loss": 1.1 / round_number, metric: 0.4 + 0.13 * round_number, "num_examples": 600,
                       "version_id": f"{round_number - 1}{'f' * 63}"},
    }  # fmt: skip


RUN = {
    "event": "run", "run_id": "r1", "name": "airlines", "method": "fedit + sgd", "engine": "inprocess", "clients": 6,
    "rounds": 3, "base_digest": "b" * 64, "base_bytes": 90_900_000, "base_params": 22_713_216,
    "adapter_bytes": 299_532, "adapter_params": 74_883, "seed": 0, "source": "asset:minilm",
    "notes": ["left out: delta (1 row)"],
}  # fmt: skip
REFUSED = {"client_id": "virgin", "reason": "not_finite", "message": "tensor q.factor_a holds NaN; 12 of 3072 values"}


def rounds_of(count: int, *, metric: str = "accuracy") -> list[dict]:
    events: list[dict] = [dict(RUN)]
    for number in range(1, count + 1):
        events.append({"event": "round_start", "round_number": number, "cohort": list(AIRLINES), "version_id": "x"})
        events += [_client(number, index, metric=metric) for index in range(6)]
        if number == 2:
            events[-1] |= {"status": "refused", "evaluation": None, **REFUSED}
        events.append(_round(number, metric=metric, refused=[REFUSED] if number == 2 else None))
    return events


def whole_run() -> list[dict]:
    detail = {name: {"loss": 0.8, "accuracy": 0.6 + 0.02 * i, "num_examples": 100} for i, name in enumerate(AIRLINES)}
    return [
        *rounds_of(3),
        {"event": "final", "version_id": "3" + "f" * 63, "evaluation": {"loss": 0.48, "accuracy": 0.812}},
        {"event": "baseline", "name": "null", "evaluation": {"loss": 1.1, "accuracy": 0.397}, "detail": None},
        {"event": "baseline", "name": "local_only", "evaluation": None, "detail": detail, "seconds": 60.0},
        {"event": "baseline", "name": "central", "evaluation": {"loss": 0.45, "accuracy": 0.825}, "detail": None},
        {"event": "activation", "what": "null", "version_id": None, "number": None, "milliseconds": 0.021},
        {"event": "activation", "what": "activate", "version_id": "3" + "f" * 63, "number": 3, "milliseconds": 1.73},
        {"event": "activation", "what": "rollback", "version_id": "2" + "f" * 63, "number": 2, "milliseconds": 0.04},
        {"event": "answer", "text": "two hours late again, thanks a lot", "version": "null", "label": "neutral",
         "probability": 0.34},
        {"event": "answer", "text": "two hours late again, thanks a lot", "version": "v3", "label": "negative",
         "probability": 0.91},
        {"event": "end", "status": "completed", "message": ""},
    ]  # fmt: skip


def versions_of(count: int) -> list[dict]:
    return [
        {
            "version_id": f"{number}{'f' * 63}", "number": number, "round_number": number,
            "parent": f"{number - 1}{'f' * 63}" if number else None, "weights_digest": f"{number}{'a' * 63}",
            "method": "fedit + sgd", "metrics": {"train_loss": 0.95 / (number or 1)},
            "channels": ["airlines"] if number == count - 1 else [], "created_at": f"2026-11-22T14:0{number}:00+00:00",
        }
        for number in range(count)
    ]  # fmt: skip


def folder(path: Path, events: list[dict], *, versions: list | None = None, config: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    lines = [json.dumps({"time": 1_790_000_000.0 + 3 * index, **event}) for index, event in enumerate(events)]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if versions is not None:
        (path / "versions.json").write_text(json.dumps(versions))
    if config is not None:
        (path / "config.yaml").write_text(config)
    return path


def page_of(path: Path) -> str:
    return write_report(path).read_text(encoding="utf-8")


class _References(HTMLParser):
    """Everything that a browser could fetch, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> _References:
    parser = _References()
    parser.feed(page)
    return parser


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(
        folder(tmp_path_factory.mktemp("whole") / "run", whole_run(), versions=versions_of(4), config=CONFIG)
    )


def test_page_fetches_nothing(whole: str) -> None:
    parser = parsed(whole)
    assert [link for link in parser.references if not link.startswith(("#", "data:"))] == []
    assert "@import" not in whole
    assert "script" not in parser.tags


@pytest.mark.parametrize(
    "text",
    [
        "0.33 %",  # 299,532 of 90,900,000 bytes
        "300 kB",
        "81.2 %",
        "39.7 %",
        "82.5 %",
        "97% of the central adapter's gain",
        "65.0 %",  # mean of the local-only clients: 60, 62, ... 70
        "virgin: not_finite",
        "12 of 3072 values",
        "two hours late again, thanks a lot",
        "asset:minilm",
        "left out: delta (1 row)",
        "server_optimizer.learning_rate",
        "3ffffffffff",
        "1.73",
    ],
)
def test_page_shows(whole: str, text: str) -> None:
    assert text in whole.replace("&#39;", "'")


def test_charts_are_loss_accuracy_and_bytes(whole: str) -> None:
    assert parsed(whole).tags.count("figure") == 3
    assert "<?xml" not in whole
    assert "central</text>" in whole.replace("-->", "")


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    first = page_of(folder(tmp_path / "a", whole_run(), config=CONFIG))
    second = page_of(folder(tmp_path / "b", whole_run(), config=CONFIG))
    assert first == second


def test_everything_from_users_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    events = whole_run()
    for event in events:
        for key in ("client_id", "reason", "message", "text", "label", "name", "method", "source", "version"):
            if isinstance(event.get(key), str):
                event[key] = evil
        if event.get("refused"):
            event["refused"] = [dict.fromkeys(("client_id", "reason", "message"), evil)]
        for values in (event.get("evaluation"), event):
            if values and "loss" in values:
                values[evil] = 0.5
    versions = [{**version, "method": evil, "channels": [evil], "metrics": {evil: 1}} for version in versions_of(2)]
    page = page_of(folder(tmp_path / "run", events, versions=versions, config=f"name: {json.dumps(evil)}\n"))
    assert "<script" not in page
    assert "script" not in parsed(page).tags


def test_of_real_devices_those_count_that_were_heard_of(tmp_path: Path) -> None:
    """What the experiment's data would make is nobody there."""
    events = [{**one, "engine": "deployment", "clients": 40} if one["event"] == "run" else one for one in whole_run()]
    text = parsed(page_of(folder(tmp_path, events))).text
    assert "6" in text[: text.index("clients")][-3:]
    assert "40" not in text
    unasked = [
        {"event": "joined", "client_id": name} for name in ("virgin", "lufthansa")
    ]  # one of them trained as well
    text = parsed(page_of(folder(tmp_path, [events[0], *unasked, *events[1:]]))).text
    assert "7" in text[: text.index("clients")][-3:]


def test_nothing_is_compared_where_nothing_else_was_measured(tmp_path: Path, whole: str) -> None:
    assert ">Compared<" in whole
    alone = [one for one in whole_run() if one["event"] != "baseline"]
    assert ">Compared<" not in page_of(folder(tmp_path, alone))


@pytest.mark.parametrize("count", [0, 1])
def test_interrupted_run(tmp_path: Path, count: int) -> None:
    events = [*rounds_of(count), {"event": "end", "status": "interrupted", "message": "go on with resume=true"}]
    page = page_of(folder(tmp_path / "run", events))
    assert "go on with resume=true" in page
    assert ("No round was finished" in page) is (count == 0)


def test_run_that_was_killed(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", rounds_of(2)[:-3])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "cli')
    assert "not finished" in page_of(path)


def test_rounds_without_any_number(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", [{"event": "round", "round_number": 1}, {"event": "client", "round_number": 1,
                                      "client_id": "a", "status": "late"}])  # fmt: skip
    assert "late: 1" in page_of(path)


def test_language_model_has_perplexity_in_place_of_accuracy(tmp_path: Path) -> None:
    page = page_of(folder(tmp_path / "run", rounds_of(2, metric="perplexity")))
    assert "latest held-out perplexity" in page
    assert "accuracy" not in "".join(parsed(page).text)


def test_a_run_whose_clients_keep_a_part_claims_no_global_adapter(tmp_path: Path) -> None:
    shared = page_of(folder(tmp_path / "shared", whole_run()))
    personal = page_of(folder(tmp_path / "personal", [{**whole_run()[0], "personal": True}, *whole_run()[1:]]))
    assert shared.count("global adapter") == 3
    assert "global adapter" not in personal
    assert personal.count("each client&#39;s own adapter") == 2
    assert "the last adapter of its own that this client measured" in personal


def test_what_the_rule_reports_is_a_table_and_a_chart_of_the_energy_kept(tmp_path: Path, whole: str) -> None:
    events = whole_run()
    rounds = [event for event in events if event["event"] == "round"]
    for kept, event in zip((0.91234, 0.75, 1.0), rounds, strict=False):
        event["rule"] = {"energy_kept": kept, "residual_bytes": 12_300.0, "staleness_mean": 0.5}
    rounds[-1]["rule"]["uncovered_layers"] = 2.0
    page = page_of(folder(tmp_path / "run", events))
    assert "<th>energy kept</th><th>residual bytes</th><th>uncovered layers</th></tr>" in page
    assert "<td>91.23 %</td><td>12.3 kB</td><td>-</td></tr>" in page
    assert "<td>100.00 %</td><td>12.3 kB</td><td>2</td></tr>" in page
    assert page.count("<figure>") == whole.count("<figure>") + 1
    assert "<h3>Energy kept</h3>" in page
    assert "What the rule says" not in whole


def test_round_that_published_nothing_says_so(tmp_path: Path) -> None:
    events = rounds_of(1)
    events[-1]["published"] = False
    assert "the global adapter stayed as it was" in page_of(folder(tmp_path / "run", events))


def test_lineage_names_parent_and_unchanged_weights(tmp_path: Path) -> None:
    versions = versions_of(3)
    versions[2]["weights_digest"] = versions[1]["weights_digest"]
    page = page_of(folder(tmp_path / "run", rounds_of(1), versions=versions))
    assert "from v1" in page
    assert "same as its parent" in page


def test_no_run_folder_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("versions.json", "{"), ("versions.json", '{"a": 1}'), ("config.yaml", "a: [1"), ("config.yaml", "- 1\n")],
)
def test_unreadable_side_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    path = folder(tmp_path / "run", rounds_of(1))
    (path / name).write_text(text)
    with pytest.raises(DataError, match=name):
        write_report(path)


def test_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", rounds_of(1))
    before = page_of(path)
    (path / "versions.json").write_text("{")
    with pytest.raises(DataError):
        write_report(path)
    assert (path / "report.html").read_text(encoding="utf-8") == before


def test_evaluation_belongs_to_the_round_before() -> None:
    history = history_of(whole_run())
    assert history.held_out[0]["accuracy"] == pytest.approx(0.53)
    assert history.held_out[3]["accuracy"] == 0.812


def test_without_final_the_last_adapter_is_unmeasured() -> None:
    history = history_of(rounds_of(3))
    assert 3 not in history.held_out
    assert history.final_evaluation == history.held_out[2]


def test_repeated_round_of_a_resumed_run_counts_once() -> None:
    events = rounds_of(2)
    again = [{**RUN}, {**_round(2, metric="accuracy"), "train_loss": 0.111}]
    assert history_of(events + again).rounds[2]["train_loss"] == 0.111


def test_last_of_several_runs_counts() -> None:
    history = history_of([*rounds_of(3), {**RUN, "run_id": "r2"}])
    assert history.rounds == {}


def test_resumed_run_drops_the_final_measurement_of_before() -> None:
    events = [*whole_run(), RUN, _round(4, metric="accuracy")]
    assert 4 not in history_of(events).held_out


def test_clients_sum_bytes_and_count_refusals() -> None:
    virgin = history_of(whole_run()).clients[-1]
    assert (virgin.client_id, virgin.rounds, virgin.missed) == ("virgin", 2, {"not_finite": 1})
    assert virgin.bytes_up == 3 * 299_532


def test_accuracy_comes_first_among_metrics() -> None:
    event = {"event": "final", "evaluation": {"loss": 1.0, "a": 1.0, "accuracy": 0.5, "num_examples": 3, "text": "x"}}
    assert metric_names(history_of([event])) == ["accuracy", "a"]


def _ended(before: dict | None, after: dict | None, **final: object) -> list[dict]:
    return [
        {**RUN, "rounds": 1},
        {"event": "round", "round_number": 1, "evaluation": before},
        {"event": "final", "evaluation": after, **final},
    ]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"loss": 1.25}, {"loss": 1.0}, None),
        ({"loss": 1.25}, {"loss": 1.25}, None),
        (
            {"loss": 1.25},
            {"loss": 1.2501},
            "worse than the initial one: held-out loss 1.2501, at the start 1.25; lower",
        ),
        ({"loss": 1.25}, {"loss": 2e7}, "worse than the initial one: held-out loss 2e+07, at the start 1.25; lower"),
        (
            {"loss": 1, "num_examples": 9},
            {"loss": 2.1, "num_examples": 12},
            "start 1 (on 9 examples, 12 at the end); lower",
        ),
        (
            {"loss": 1, "num_examples": 9},
            {"loss": 1.9, "num_examples": 12},
            None,
        ),  # others' examples, perhaps harder ones
        ({"loss": 1, "num_examples": 9}, {"loss": 2, "num_examples": 9}, "at the start 1; lower train.learning_rate"),
        (
            {"loss": 1.25},
            {"loss": None, "not_finite": ["loss"]},
            "loss of the last adapter is not finite, at the start",
        ),
        ({"loss": 1.25}, None, "the held-out loss of the last adapter is not finite, at the start it was 1.25; lower"),
        (None, {"loss": 2.0}, None),  # nobody has examples to hold out, or the first round's were not measured
        (None, None, None),
    ],
)
def test_result_that_is_worse_than_the_start(before: dict | None, after: dict | None, said: str | None) -> None:
    warning = result_warning(history_of(_ended(before, after)))
    assert said in warning if said else warning == ""


def test_a_share_of_the_clients_may_have_harder_examples() -> None:
    """As many, and still others."""
    for loss, worse in ((1.9, False), (2.1, True)):
        events = _ended({"loss": 1, "num_examples": 9}, {"loss": loss, "num_examples": 9}, share=0.5)
        assert bool(result_warning(history_of(events))) == worse


def test_what_a_share_measured_is_set_against_no_other_measurement(tmp_path: Path, whole: str) -> None:
    assert "of the central adapter&#39;s gain" in whole
    events = [{**one, "share": 0.5} if one["event"] == "final" else one for one in whole_run()]
    page = page_of(folder(tmp_path, events))
    assert "of the central adapter" not in page
    assert "measured by a share of the clients" in page
    assert "those of a share of the clients in the first line" in page


def test_result_that_nobody_measured_is_not_called_worse() -> None:
    assert result_warning(history_of(_ended({"loss": 1.25}, None, refused=[REFUSED]))) == ""


@pytest.mark.parametrize("last", [1, 2])
def test_start_is_that_of_the_whole_run_when_it_was_resumed(last: int) -> None:
    events = _ended({"loss": 1.5}, {"loss": 9.0})
    resumed = [
        {"event": "round", "round_number": 2, "evaluation": {"loss": 9.0}},
        {"event": "final", "evaluation": {"loss": float(last)}},
    ]
    assert ("worse" in result_warning(history_of([*events, RUN, *resumed]))) == (last == 2)


def test_run_that_was_stopped_has_no_result_to_warn_of() -> None:
    assert result_warning(history_of(_ended({"loss": 1.25}, None)[:-1])) == ""


def test_page_warns_of_a_result_that_is_worse(tmp_path: Path, whole: str) -> None:
    page = page_of(folder(tmp_path / "run", _ended({"loss": 1.25}, {"loss": 3.5})))
    assert '<p class="bad"><b>Warning:</b> the last adapter is worse than the initial one: held-out loss 3.5' in page
    assert "Warning:" not in whole
