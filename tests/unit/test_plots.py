"""Charts: what stands on the axes."""

import re

import pytest

from federated.plots import Series, line_chart


@pytest.mark.parametrize(
    ("values", "decimals"), [((0.3, 0.8), 0), ((0.97, 0.99), 1), ((0.9999, 0.99996), 3), ((0.5, 0.5), 0)]
)
def test_percent_has_as_many_decimals_as_tell_the_labels_apart(values: tuple[float, float], decimals: int) -> None:
    svg = line_chart([Series("kept", dict(enumerate(values)), "#123456")], ylabel="share", percent=True)
    labels = re.findall(r">(\d+(?:\.\d+)?)%</text>", svg)
    assert labels
    assert len(set(labels)) == len(labels)
    assert {len(label.partition(".")[2]) for label in labels} == {decimals}
