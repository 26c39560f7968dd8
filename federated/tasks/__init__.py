"""Tasks: text classification, causal language modelling, and series of sensor values.

The only room that uses tokenizers. `make_task` is the door.
"""

from __future__ import annotations

from typing import Any

from federated.config import TaskConfig
from federated.errors import ModelError
from federated.tasks.causal_lm import CausalLM
from federated.tasks.classification import Classification, TextInputs
from federated.tasks.protocol import Batch, Evaluation, Features, Prediction, Row, Task
from federated.tasks.sensor import SeriesInputs

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Evaluation",
    "Features",
    "Prediction",
    "Row",
    "Task",
    "make_task",
]


def make_task(config: TaskConfig, tokenizer: Any | None = None) -> Task:
    """The task that a configuration names.

    Args:
        config: kind, labels, lengths.
        tokenizer: the base model's (`BaseModel.tokenizer`); None for a plain module.

    Raises:
        ModelError: if the task needs a tokenizer (or a chat template) that the base model does not have.
    """
    if config.name == "sensor":
        return Classification(config.name, config.labels, SeriesInputs(config.max_length))
    if tokenizer is None:
        raise ModelError(f"task {config.name} needs a tokenizer, which this base model does not have")
    if config.name == "causal_lm":
        return CausalLM(config, tokenizer)
    return Classification(config.name, config.labels, TextInputs(tokenizer, config.max_length))
