"""diff: records field by field, tensors as they are stored, and where two lineages part."""

import math

import numpy as np
import pytest

from federated.manifest import RawTensor
from federated.wire import encode_tensors


def adapter(**arrays):
    return encode_tensors({name: RawTensor.from_array(np.asarray(array, np.float32)) for name, array in arrays.items()})


@pytest.fixture
def diff(registry, publish):
    """Publishes two adapters, the second from the first unless told otherwise, and compares them."""

    def run(first, second, **fields):
        before = publish(first)
        after = publish(second, **{"round_number": 1, "parent": before} | fields)
        return registry.diff(before, after)

    return run


def test_tensors_are_measured(diff):
    found = diff(adapter(a=[3.0, 4.0], b=[1.0]), adapter(a=[3.0, 1.0], b=[1.0]))
    (change,) = found.tensors
    assert (change.name, change.change, change.norm, found.same) == ("a", 3.0, 5.0, 1)
    assert found.relative == pytest.approx(0.6)


def test_bfloat16_is_read(registry, publish):
    raw = encode_tensors({"a": RawTensor("BF16", (1,), b"\x80\x3f")})  # 1.0
    ids = [publish(raw), publish(encode_tensors({"a": RawTensor("BF16", (1,), b"\x00\x40")}), round_number=1)]
    assert registry.diff(*ids).tensors[0].change == 1.0


def test_equal_tensors_of_two_rounds(diff):
    found = diff(adapter(a=[1.0]), adapter(a=[1.0]))
    assert (found.tensors, found.same, found.relative) == ((), 1, math.inf)
    assert {name for name, *_ in found.fields} == {"parent", "round_number"}


def test_tensors_that_only_one_has_or_of_other_shapes(diff):
    found = diff(adapter(a=[1.0], c=[2.0]), adapter(b=[1.0], c=[2.0, 2.0]))
    assert [(one.name, one.change, one.norm, one.message) for one in found.tensors] == [
        ("a", None, 1.0, "only in the first"),
        ("b", None, 0.0, "only in the second"),
        ("c", None, 2.0, "shape [1], then [2]"),
    ]


def test_fields_are_named_with_dots(diff):
    found = diff(adapter(a=[1.0]), adapter(a=[2.0]), metrics={"train_loss": 0.5}, task={"task": {"name": "sensor"}})
    changed = {name: values for name, *values in found.fields}
    assert changed["metrics.train_loss"] == [None, 0.5]
    assert changed["task.task.name"] == [None, "sensor"]


def test_lineages_part_at_their_nearest_ancestor(registry, publish):
    root = publish(adapter(a=[0.0]))
    middle = publish(adapter(a=[1.0]), round_number=1, parent=root)
    ids = [publish(adapter(a=[value]), round_number=2, parent=middle) for value in (2.0, 3.0)]
    assert registry.diff(*ids).ancestor.version_id == middle
    assert registry.diff(root, ids[0]).ancestor.version_id == root


def test_strangers_have_no_ancestor(diff):
    assert diff(adapter(a=[1.0]), adapter(a=[2.0]), parent=None).ancestor is None


def test_bytes_that_are_no_tensors_are_said_to_be_none(diff):
    found = diff(b"one", b"two")
    assert found.message.startswith("the tensors cannot be compared: ")
    assert "weights_digest" in {name for name, *_ in found.fields}
