"""Charts: what stands on the axes."""

import re

import pytest

from federated.plots import Series, grouped_bars, line_chart


@pytest.mark.parametrize(
    ("values", "decimals"), [((0.3, 0.8), 0), ((0.97, 0.99), 1), ((0.9999, 0.99996), 3), ((0.5, 0.5), 0)]
)
def test_percent_has_as_many_decimals_as_tell_the_labels_apart(values: tuple[float, float], decimals: int) -> None:
    svg = line_chart([Series("kept", dict(enumerate(values)), "#123456")], ylabel="share", percent=True)
    labels = re.findall(r">(\d+(?:\.\d+)?)%</text>", svg)
    assert labels
    assert len(set(labels)) == len(labels)
    assert {len(label.partition(".")[2]) for label in labels} == {decimals}


def test_groups_of_bars_have_names_and_a_missing_bar_leaves_its_place_empty() -> None:
    bars = [Series("one", {0: 0.25, 1: 0.5}, "#123456"), Series("two", {1: 0.75}, "#654321")]
    svg = grouped_bars(bars, ["r=1", "r=8"], ylabel="accuracy", percent=True)
    assert all(f">{text}</text>" in svg for text in ("r=1", "r=8", "one", "two", "accuracy"))
    assert svg.count('class="rect reactive tooltip-trigger"') == 3
    assert "round" not in svg.lower().replace("background", "")
