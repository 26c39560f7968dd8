"""Series of sensor values: a task without text, tokenizer or transformers."""

import pytest
import torch

from federated.adapters import load_base, null_model
from federated.config import ModelConfig, TaskConfig
from federated.errors import DataError
from federated.tasks import make_task

CONFIG = TaskConfig(name="sensor", labels=("calm", "wild"), max_length=6)
TASK = make_task(CONFIG)


def series(*, steps, label=0, channels=3):
    return {"values": [[0.1 * step + channel for channel in range(channels)] for step in range(steps)], "label": label}


def test_series_are_padded_in_time():
    batch = TASK.collate(TASK.encode([series(steps=2), series(steps=4, label=1)]))
    assert batch["values"].shape == (2, 4, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert not batch["values"][0, 2:].any()


def test_long_series_are_cut():
    (features,) = TASK.encode([series(steps=50)])
    assert len(features["values"]) == 6


def test_padding_does_not_change_a_loss():
    model = null_model(load_base(ModelConfig(source="tiny:sensor")), CONFIG, seed=0)
    features = TASK.encode([series(steps=2), series(steps=6, label=1)])
    together = TASK.per_sample_loss(model, TASK.collate(features))
    alone = torch.cat([TASK.per_sample_loss(model, TASK.collate([one])) for one in features])
    torch.testing.assert_close(together, alone)


def test_evaluation_sorts_series_too():
    model = null_model(load_base(ModelConfig(source="tiny:sensor")), CONFIG, seed=0)
    features = TASK.encode([series(steps=2 + index % 4, label=index % 2) for index in range(7)])
    assert TASK.evaluate(model, features, batch_size=3) == TASK.evaluate(model, features[::-1], batch_size=3)


@pytest.mark.parametrize(
    "values",
    [None, [], [[]], 3, [1.0, 2.0], [["a"]], [[float("nan")]], [[float("inf")]]],
    ids=["none", "empty", "no-channels", "number", "flat", "text", "nan", "inf"],
)
def test_what_is_no_series_is_named(values):
    with pytest.raises(DataError, match="row 1: 'values' is not a series of finite numbers"):
        TASK.encode([{"values": values, "label": 0}])


def test_a_row_without_values_is_named():
    with pytest.raises(DataError, match="row 2: 'values' is not a series"):
        TASK.encode([series(steps=2), {"text": "hm", "label": 0}])


def test_ragged_channels_are_named():
    with pytest.raises(DataError, match=r"row 2: a step has another number of channels than row 1 \(3\)"):
        TASK.encode([series(steps=2), series(steps=2, channels=2)])
