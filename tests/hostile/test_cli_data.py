"""Bad data on the command line: one line, before anything starts."""

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
GOOD = "text,label\nfine,positive\nawful,negative\nso so,neutral\n"


def folder_with(**files: str) -> None:
    Path("mine").mkdir()
    for name, content in files.items():
        Path("mine", f"{name}.csv").write_text(content)


@pytest.mark.parametrize("kind", ["files", "table"])
def test_missing_data(simulate_refused: Refused, kind: str) -> None:
    line = simulate_refused(f"data={kind}", "data.path=nowhere")
    assert line.startswith("data.path: no such file or folder: 'nowhere'")


def test_data_without_a_path(simulate_refused: Refused) -> None:
    assert simulate_refused("data=table", code=2) == "data.path: data=table needs a path, found none"


def test_empty_folder(simulate_refused: Refused) -> None:
    folder_with()
    assert "mine is empty; expected one file per client" in simulate_refused("data=files", "data.path=mine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "mine/bad.csv: the file has no rows; expected at least 2 per client"),
        ("text,label\n", "mine/bad.csv: the file has no rows; expected at least 2 per client"),
        ("text,label\nfine,positive\n", "client 'bad' has one example; expected at least 2"),
        ("text,label\nfine,splendid\nawful,negative\n", "mine/bad.csv line 2: unknown label in column 'label'"),
        ("words,label\nfine,positive\nawful,negative\n", "mine/bad.csv line 2: no column 'text'"),
        ("text,label\n,positive\nawful,negative\n", "mine/bad.csv line 2: the text is empty"),
    ],
)
def test_one_bad_client_among_good_ones(simulate_refused: Refused, content: str, message: str) -> None:
    folder_with(good=GOOD, bad=content)
    assert simulate_refused("data=files", "data.path=mine").startswith(message)


def test_one_bad_client_of_central_training(refused: Refused, versions: Path) -> None:
    folder_with(good=GOOD, bad="")
    line = refused(
        "train", f"--app={Path(__file__).parents[2]}", "data=files", "data.path=mine", f"registry={versions}"
    )
    assert line.startswith("mine/bad.csv: the file has no rows")


def test_table_with_a_client_of_one_example(simulate_refused: Refused) -> None:
    Path("table.csv").write_text("client,text,label\na,fine,positive\na,awful,negative\nb,so so,neutral\n")
    assert simulate_refused("data=table", "data.path=table.csv").startswith("client 'b' has one example")


def test_folder_in_place_of_a_table(simulate_refused: Refused) -> None:
    folder_with(good=GOOD)
    assert "expects one file, or use data=files" in simulate_refused("data=table", "data.path=mine")


def test_data_that_does_not_fit_the_task(simulate_refused: Refused) -> None:
    folder_with(good=GOOD)
    line = simulate_refused("data=files", "data.path=mine", "task=sensor", "model=sensor_net")
    assert "no column 'values'" in line


def test_refused_data_leaves_no_run_folder(simulate_refused: Refused) -> None:
    simulate_refused("data=files", "data.path=nowhere")
    assert not Path("runs").exists()
