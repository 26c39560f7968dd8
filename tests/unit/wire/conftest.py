"""One honest update and what the server expects of it."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec, RawTensor, TensorLayout, layout_of
from federated.wire import Expectation, seal_update

Seal = Callable[..., bytes]


@pytest.fixture
def spec() -> AdapterSpec:
    modules = (ModuleSpec("block.query", d_in=3, d_out=2, rank=2, alpha=4.0),)
    return AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=modules, head=HeadSpec("mean_pool", 2, True, 0))


@pytest.fixture
def tensors() -> dict[str, RawTensor]:
    return {
        "block.query.factor_a": RawTensor.from_array(np.full((2, 3), 0.5, "<f4")),
        "block.query.factor_b": RawTensor.from_array(np.full((2, 2), -1.0, "<f4")),
        "head.bias": RawTensor("BF16", (2,), bytes.fromhex("803f0040")),  # 1.0, 2.0
    }


@pytest.fixture
def layout(tensors: dict[str, RawTensor]) -> TensorLayout:
    return layout_of(tensors)


@pytest.fixture
def expected(spec: AdapterSpec) -> Expectation:
    return Expectation(
        run_id="run",
        round_number=2,
        phase=1,
        client_id="clinic",
        task_token="secret-token",  # noqa: S106
        parent_version="a" * 64,
        base_digest="b" * 64,
        spec=spec,
        plan_digest="c" * 64,
        max_examples=1000,
        last_counter=4,
    )


@pytest.fixture
def seal(expected: Expectation, tensors: dict[str, RawTensor]) -> Seal:
    """`seal_update` for the honest update, with any field replaced."""
    honest = {field.name: getattr(expected, field.name) for field in fields(expected)}
    del honest["max_examples"], honest["last_counter"], honest["update_key"]

    def make(replaced: dict[str, RawTensor] | None = None, **changes: Any) -> bytes:
        chosen = tensors if replaced is None else replaced
        return seal_update(chosen, **{**honest, "counter": 5, "num_examples": 10, **changes})

    return make
