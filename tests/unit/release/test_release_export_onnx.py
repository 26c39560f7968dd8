"""A version as ``.onnx_adapter`` with the base that it was made for, through the formats' one door."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from federated.adapters import attach, load_base
from federated.cli.export_formats import exporter_of
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.errors import ModelError
from federated.manifest import VersionManifest, sha256_hex
from federated.onnx_adapter import read_adapter
from federated.release import Artefact
from federated.release.export_onnx import ADAPTER_FILE
from federated.release.exportable import Exportable, export
from federated.state import to_raw
from federated.wire import encode_tensors

TASK = TaskConfig(labels=("bad", "good"))


def subject(adapter: AdapterConfig) -> Exportable:
    base = load_base(ModelConfig(source="tiny:bert"))
    model = attach(base, adapter, TASK, seed=5)
    weights = encode_tensors(to_raw(model.read().tensors))
    manifest = VersionManifest(sha256_hex(weights), base.base_digest, model.spec, "fedit", "run", 1, release_counter=4)
    return Exportable(Artefact(manifest, weights), base, TASK)


def test_the_adapter_says_which_version_it_is(tmp_path: Path) -> None:
    one = subject(AdapterConfig(rank=2, alpha=8.0))
    assert export(one, exporter_of("onnx"), tmp_path / "out") == (ADAPTER_FILE,)
    record, parameters = read_adapter(tmp_path / "out" / ADAPTER_FILE)
    assert (record.version_id, record.weights_digest) == (one.artefact.version_id, one.manifest.weights_digest)
    assert record.base_digest == one.manifest.base_digest
    name = one.manifest.spec.modules[0].name
    assert parameters[f"{name}.factor_a"].shape == (2, 32)
    assert np.array_equal(parameters[f"{name}.factor_b"], np.zeros((32, 2), np.float32))


def test_the_base_is_exported_beside(tmp_path: Path) -> None:
    files = export(subject(AdapterConfig(rank=2)), exporter_of("onnx-base"), tmp_path / "out")
    assert files == ("base.onnx", "tokenizer.json")


@pytest.mark.parametrize("name", ["onnx", "onnx-base"])
def test_a_kind_without_slots_is_refused_by_name_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="an adapter of kind prompt cannot be given to an ONNX model"):
        export(subject(AdapterConfig(kind="prompt", virtual_tokens=3)), exporter_of(name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_written_without_torch() -> None:
    block = "import sys\nfor name in ('torch', 'transformers', 'peft', 'onnx'): sys.modules[name] = None\n"
    command = [sys.executable, "-c", block + "import federated.release.export_onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
