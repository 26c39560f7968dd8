"""``.onnx_adapter`` files: written, read back, and what is none of ours."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from federated.errors import ModelError
from federated.onnx_adapter import read_adapter, write_adapter
from federated.onnx_layout import RECORD, AdapterRecord

WHO = AdapterRecord("b" * 64, "a" * 64, "v" * 64)
PARAMETERS = {
    "layer.factor_b": np.ones((4, 2), np.float32),
    "layer.factor_a": np.arange(6, dtype=np.float32).reshape(2, 3),
}


def test_a_file_comes_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.onnx_adapter", WHO, PARAMETERS)
    write_adapter(tmp_path / "two.onnx_adapter", WHO, dict(sorted(PARAMETERS.items())))
    assert (tmp_path / "one.onnx_adapter").read_bytes() == (tmp_path / "two.onnx_adapter").read_bytes()
    record, parameters = read_adapter(tmp_path / "one.onnx_adapter")
    assert record == WHO
    assert sorted(parameters) == sorted(PARAMETERS)
    assert all(np.array_equal(parameters[name], PARAMETERS[name]) for name in PARAMETERS)


def test_onnxruntime_reads_the_counter_and_the_bases_first_bits(tmp_path: Path) -> None:
    write_adapter(tmp_path / "one.onnx_adapter", WHO, PARAMETERS, counter=7)
    made = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "one.onnx_adapter"))
    assert (made.get_adapter_version(), made.get_model_version()) == (7, 0x3BBBBBBB)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be written"):
        write_adapter(tmp_path / "no" / "such" / "one.onnx_adapter", WHO, PARAMETERS)


@pytest.mark.parametrize("data", [b"", b"nothing", b"\x00" * 1000])
def test_other_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.onnx_adapter").write_bytes(data)
    with pytest.raises(ModelError, match=r"is no \.onnx_adapter file"):
        read_adapter(tmp_path / "one.onnx_adapter")


@pytest.mark.parametrize("record", [None, np.ones(3, np.float32)])
def test_a_file_that_does_not_say_what_it_is_is_refused(record: np.ndarray | None, tmp_path: Path) -> None:
    made = onnxruntime.AdapterFormat()
    arrays = PARAMETERS | ({} if record is None else {RECORD: record})
    made.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()})
    made.export_adapter(str(tmp_path / "one.onnx_adapter"))
    with pytest.raises(ModelError, match="does not say which adapter it is"):
        read_adapter(tmp_path / "one.onnx_adapter")
