"""A small made-up data set for every task, so that a federation runs with nothing fetched.

Each client has its own style (filler words, sensor offset) and its own share of each label. Rows depend on
``(config.seed, client_id)`` only. It proves that learning happens; it is no benchmark.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from federated.config import DataConfig, TaskConfig
from federated.data.chance import draw_normal, draw_uniform
from federated.data.rows import RowReader
from federated.data.source import Pool, Row

__all__ = ["CHANNELS", "ROWS_PER_CLIENT", "synthetic_pool"]

ROWS_PER_CLIENT = 60
CHANNELS = 3
TIME_STEPS = 32

_CUES = (
    ("rain", "wind", "cloud", "storm"),
    ("bread", "soup", "apple", "cheese"),
    ("train", "wheel", "road", "engine"),
    ("song", "drum", "piano", "dance"),
    ("river", "fish", "boat", "shore"),
    ("garden", "rose", "tree", "leaf"),
    ("money", "bank", "price", "trade"),
    ("goal", "team", "ball", "match"),
)
_FILLERS = ("today", "again", "maybe", "still", "here", "often", "now", "later", "there", "soon", "always", "never")


def synthetic_pool(config: DataConfig, task: TaskConfig) -> Pool:
    """``config.partition.num_clients`` clients of `ROWS_PER_CLIENT` rows each, made when they are asked for.

    Sensor rows are ``min(task.max_length, 32)`` steps of `CHANNELS` channels: label k is a sinusoid of k + 1 periods
    around its own level, plus the client's offset and noise.
    """
    count = config.partition.num_clients
    width = max(3, len(str(count - 1)))
    names = tuple(f"client-{number:0{width}d}" for number in range(count))
    rows = partial(_client_rows, config=config, task=task)
    return Pool(names, rows, dict.fromkeys(names, ROWS_PER_CLIENT))


def _client_rows(client_id: str, *, config: DataConfig, task: TaskConfig) -> list[Row]:
    labels = _client_labels(client_id, config.seed, classes=max(2, len(task.labels)))
    if task.name == "sensor":
        return [_series(client_id, config.seed, number, label, task) for number, label in enumerate(labels)]
    texts = [_sentence(client_id, config.seed, number, label) for number, label in enumerate(labels)]
    reader = RowReader(config, task)
    if task.name == "causal_lm":
        return [reader.spoken("Say a sentence.", text) for text in texts]
    return [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]


def _client_labels(client_id: str, seed: int, *, classes: int) -> list[int]:
    """Skewed labels: each client draws its own shares, between one and three parts of each label."""
    parts = 1.0 + 2.0 * draw_uniform(classes, seed, client_id, "shares")
    edges = np.cumsum(parts / parts.sum())
    drawn = np.searchsorted(edges, draw_uniform(ROWS_PER_CLIENT, seed, client_id, "labels"), side="right")
    return [min(int(label), classes - 1) for label in drawn]


def _sentence(client_id: str, seed: int, number: int, label: int) -> str:
    """Two cue words of the label among the client's favourite fillers."""
    cues = _CUES[label % len(_CUES)]
    style = int(draw_uniform(1, client_id, "style")[0] * len(_FILLERS))
    draws = draw_uniform(4, seed, client_id, number, "words")
    first, second = (cues[int(draw * len(cues))] for draw in draws[:2])
    fillers = [_FILLERS[(style + int(draw * 4)) % len(_FILLERS)] for draw in draws[2:]]
    more = f" {label // len(_CUES)}" if label >= len(_CUES) else ""
    return f"{fillers[0]} the {first} and {fillers[1]} the {second}{more}"


def _series(client_id: str, seed: int, number: int, label: int, task: TaskConfig) -> Row:
    steps = min(task.max_length, TIME_STEPS)
    offset = 0.3 * draw_normal(CHANNELS, client_id, "offset")
    phase = 2.0 * np.pi * draw_uniform(CHANNELS, seed, client_id, number, "phase")
    noise = 0.2 * draw_normal(steps * CHANNELS, seed, client_id, number, "noise").reshape(steps, CHANNELS)
    time = np.linspace(0.0, 2.0 * np.pi, steps, endpoint=False)[:, None]
    level = 0.5 * (label % 4) - 0.75
    values = level + offset + np.sin((label + 1) * time + phase) + noise
    return {"values": np.round(values, 4).tolist(), "label": label}
