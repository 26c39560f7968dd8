"""The onnxruntime backend: no torch, no silent base, no mixing, and what it refuses."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from federated.adapters import load_base
from federated.adapters.onnx_base import write_onnx_base
from federated.config import AdapterConfig, TaskConfig
from federated.device import AdapterRuntime, OnnxBackend
from federated.device.backends.onnx import OnnxHandle
from federated.errors import BaseMismatch, DeviceError, ModelError
from federated.manifest import canonical_json, sha256_hex
from federated.onnx_adapter import write_adapter
from federated.onnx_layout import METADATA, AdapterRecord, fold
from federated.wire import decode_tensors, encode_tensors

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [{"text": "late again"}, {"text": ""}]
INPUTS = {"input_ids": np.array([[5, 6, 7, 8]]), "attention_mask": np.ones((1, 4), np.int64)}


@pytest.fixture
def version(recipe: Make, real_version: Make) -> Any:
    return real_version(recipe(), 1)


@pytest.fixture
def folder(version: Any, onnx_base: Make, tmp_path: Path) -> Path:
    """A copy of an exported base, to be spoilt."""
    return Path(shutil.copytree(onnx_base(version.manifest), tmp_path / "base"))


@pytest.fixture
def backend(version: Any, onnx_base: Make) -> OnnxBackend:
    return OnnxBackend(onnx_base(version.manifest), threads=1)


def built(backend: OnnxBackend, version: Any) -> OnnxHandle:
    return backend.build(version.manifest.spec, decode_tensors(version.weights))


def file_of(version: Any, path: Path, base_digest: str = "", **more: np.ndarray) -> Path:
    parameters = fold(version.manifest.spec, decode_tensors(version.weights)) | more
    record = AdapterRecord(base_digest or version.manifest.base_digest, version.digest, version.version_id)
    write_adapter(path, record, parameters)
    return path


_DEVICE = """
import importlib.abc, json, sys
BLOCKED = ("torch", "sqlalchemy", "alembic", "transformers", "peft", "onnx", "tuf", "flwr", "datasets")
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(name + " is blocked here")
sys.meta_path.insert(0, Blocked())
from pathlib import Path
from federated.device import AdapterRuntime, OnnxBackend
from federated.manifest import VersionManifest
base, version, rows = sys.argv[1:]
runtime = AdapterRuntime(OnnxBackend(Path(base), threads=1))
manifest = VersionManifest.from_dict(json.loads((Path(version) / "manifest.json").read_bytes()))
weights = (Path(version) / "weights.safetensors").read_bytes()
slot = runtime.install(manifest, weights, version_id=manifest.version_id)
answers = []
for digest in ("null", slot.digest):
    runtime.activate(digest)
    answers.append([one.probability for one in runtime.predict(json.loads(rows)).predictions])
print(json.dumps(answers))
"""


@pytest.mark.parametrize("source", ["tiny:bert", "tiny:llama", "tiny:sensor"])
def test_a_device_serves_without_torch_transformers_and_a_database(
    source: str, recipe: Make, real_version: Make, onnx_base: Make, opened: Make, tmp_path: Path
) -> None:
    version = real_version(recipe(source), 1)
    (tmp_path / "manifest.json").write_bytes(canonical_json(version.manifest.to_dict()))
    (tmp_path / "weights.safetensors").write_bytes(version.weights)
    rows = [{"text": "late again", "values": [[0.1, 0.2, 0.3]]}]
    command = [sys.executable, "-c", _DEVICE, str(onnx_base(version.manifest)), str(tmp_path), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    reference = opened("torch", version.manifest)
    slot = version.install(reference)
    for found, digest in zip(json.loads(done.stdout), ("null", slot.digest), strict=True):
        expected = [one.probability for one in reference.predict(rows, digest=digest).predictions]
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("source", ["tiny:bert", "tiny:llama"])
def test_threads_with_an_adapter_each_never_see_another(
    source: str, recipe: Make, real_version: Make, onnx_base: Make
) -> None:
    """Hundreds of runs, every thread going from one adapter to the next: each answer has the bits of its own."""
    versions = [real_version(recipe(source), value) for value in (1, 2, 3)]
    backend = OnnxBackend(onnx_base(versions[0].manifest), threads=1)
    handles = [backend.null(), *(built(backend, version) for version in versions)]
    alone = [backend.logits(handle, INPUTS) for handle in handles]
    assert min(float(np.abs(alone[one] - alone[other]).max()) for one in range(4) for other in range(one)) > 1e-3
    wrong: list[int] = []
    runs: list[int] = []

    def ask(first: int) -> None:
        for at in range(first, first + 100):
            found = backend.logits(handles[at % 4], INPUTS)
            runs.append(at)
            if not np.array_equal(found, alone[at % 4]):
                wrong.append(at)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert (wrong, len(runs)) == ([], 400)


def test_an_answer_of_another_adapter_is_not_given_out(backend: OnnxBackend, version: Any) -> None:
    silent = OnnxHandle(None, built(backend, version).record)
    with pytest.raises(DeviceError, match="answered with another adapter"):
        backend.logits(silent, INPUTS)


def test_equal_adapters_are_loaded_once_and_forgotten_with_their_files(version: Any, backend: OnnxBackend) -> None:
    handle = built(backend, version)
    assert built(backend, version) is handle
    assert len(list(backend._scratch.iterdir())) == 1
    del handle
    gc.collect()
    assert list(backend._scratch.iterdir()) == []


def test_the_same_weights_under_another_scaling_are_another_adapter(version: Any, backend: OnnxBackend) -> None:
    spec = version.manifest.spec
    modules = tuple(replace(one, alpha=one.alpha * 2) for one in spec.modules)
    other = backend.build(replace(spec, alpha=spec.alpha * 2, modules=modules), decode_tensors(version.weights))
    same = built(backend, version)
    assert other is not same
    assert not np.array_equal(backend.logits(other, INPUTS), backend.logits(same, INPUTS))


def test_a_backend_leaves_nothing_behind(version: Any, onnx_base: Make) -> None:
    backend = OnnxBackend(onnx_base(version.manifest), threads=1)
    scratch = backend._scratch
    handle = built(backend, version)
    del backend
    gc.collect()
    assert not scratch.exists()
    del handle


def test_an_exported_file_answers_as_the_version(version: Any, backend: OnnxBackend, tmp_path: Path) -> None:
    path = file_of(version, tmp_path / "a.onnx_adapter")
    handle = backend.load_file(path)
    path.write_bytes(b"changed afterwards")
    assert np.array_equal(backend.logits(handle, INPUTS), backend.logits(built(backend, version), INPUTS))


def test_a_file_of_another_base_is_refused(version: Any, backend: OnnxBackend, tmp_path: Path) -> None:
    path = file_of(version, tmp_path / "a.onnx_adapter", base_digest="f" * 64)
    with pytest.raises(BaseMismatch, match="belongs to the base model ffffffffffff"):
        backend.load_file(path)


def test_a_file_with_a_slot_that_the_base_does_not_have_is_refused(
    version: Any, backend: OnnxBackend, tmp_path: Path
) -> None:
    path = file_of(version, tmp_path / "a.onnx_adapter", **{"decoder.secret": np.ones(3, np.float32)})
    with pytest.raises(ModelError, match=r"sets decoder\.secret .* without slots: the base alone would answer"):
        backend.load_file(path)


def test_a_version_whose_layers_have_no_slots_is_refused(recipe: Make, real_version: Make, onnx_base: Make) -> None:
    few = real_version(recipe(adapter=AdapterConfig(rank=2, target_modules=("query",))), 1)
    more = real_version(recipe(adapter=AdapterConfig(rank=2, target_modules=("query", "value"))), 2)
    runtime = AdapterRuntime(OnnxBackend(onnx_base(few.manifest)))
    before = runtime.slots
    with pytest.raises(ModelError, match=r"value\.factor_a and 3 others, for which this base was exported without"):
        more.install(runtime)
    assert runtime.slots == before


@pytest.mark.parametrize("kind", ["ia3", "layernorm", "full", "prompt", "prefix"])
def test_a_kind_without_slots_is_refused_by_name(
    kind: Any, recipe: Make, real_version: Make, backend: OnnxBackend
) -> None:
    version = real_version(recipe(adapter=AdapterConfig(kind=kind)), 1)
    with pytest.raises(ModelError, match=f"an adapter of kind {kind} cannot be given to an ONNX model"):
        version.install(AdapterRuntime(backend))


def test_a_frozen_head_of_another_seed_is_refused(recipe: Make, real_version: Make, onnx_base: Make) -> None:
    adapter = AdapterConfig(rank=2, train_head=False)
    one, other = (real_version(recipe(adapter=adapter, seed=seed), 1) for seed in (5, 6))
    with pytest.raises(DeviceError, match="starts from seed 6; this base was exported with the head of seed 5"):
        other.install(AdapterRuntime(OnnxBackend(onnx_base(one.manifest))))


def test_a_head_in_part_is_refused(version: Any, backend: OnnxBackend) -> None:
    tensors = decode_tensors(version.weights)
    del tensors["classifier.bias"]
    weights = encode_tensors(tensors)
    manifest = replace(version.manifest, weights_digest=sha256_hex(weights))
    with pytest.raises(ModelError, match=r"a part of the head, without classifier\.bias"):
        AdapterRuntime(backend).install(manifest, weights, version_id=manifest.version_id)


def test_chats_are_refused(recipe: Make, real_version: Make, onnx_base: Make) -> None:
    version = real_version(recipe("tiny:llama", task=TaskConfig(name="causal_lm", chat=True, max_length=16)), 1)
    with pytest.raises(DeviceError, match="chats, whose template needs transformers"):
        OnnxBackend(onnx_base(version.manifest))


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base\.onnx is not there; expected a folder that .* --as onnx-base"):
        OnnxBackend(tmp_path)


def test_a_damaged_base_is_named(folder: Path) -> None:
    (folder / "base.onnx").write_bytes((folder / "base.onnx").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"base\.onnx cannot be loaded by onnxruntime"):
        OnnxBackend(folder)


def test_a_base_of_another_exporter_is_refused(folder: Path) -> None:
    model = onnx.load(folder / "base.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "base.onnx")
    with pytest.raises(ModelError, match="was not exported with slots for adapters"):
        OnnxBackend(folder)


def test_a_base_that_lost_a_slot_is_refused(folder: Path) -> None:
    """What a tool does that takes initialisers off the inputs."""
    model = onnx.load(folder / "base.onnx")
    kept = [one for one in model.graph.input if not one.name.startswith("classifier")]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, folder / "base.onnx")
    with pytest.raises(ModelError, match=r"has no slot classifier\.bias, which its record names"):
        OnnxBackend(folder)


def with_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    model = onnx.load(folder / "base.onnx")
    (entry,) = [one for one in model.metadata_props if one.key == METADATA]
    record = json.loads(entry.value)
    change(record)
    entry.value = json.dumps(record)
    onnx.save(model, folder / "base.onnx")
    return folder


def test_a_task_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"the exported base's task cannot be read: \('name',\)"):
        OnnxBackend(with_record(folder, lambda record: record["task"].update(name="chess")))


def test_a_record_without_a_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="says nothing of a tokenizer, which task sequence_classification needs"):
        OnnxBackend(with_record(folder, lambda record: record.update(tokenizer=None)))


def test_another_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<pad>", "<dap>"))
    with pytest.raises(ModelError, match="is not the tokenizer that was exported with the base"):
        OnnxBackend(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: No such file"):
        OnnxBackend(folder)


def test_what_onnxruntime_cannot_run_is_an_error_of_ours(backend: OnnxBackend) -> None:
    with pytest.raises(DeviceError, match="onnxruntime cannot run the base"):
        backend.logits(
            backend.null(), {"input_ids": np.array([[999_999]]), "attention_mask": np.ones((1, 1), np.int64)}
        )


def test_long_texts_are_cut_where_the_tokenizer_cuts(recipe: Make, real_version: Make, opened: Make) -> None:
    version = real_version(recipe(task=replace(recipe().task, max_length=8)), 1)
    rows = [{"text": "a text of many more than eight bytes"}, {"text": "short"}]
    runtimes = [opened(engine, version.manifest) for engine in ("torch", "onnx")]
    torch, found = ([one.probability for one in runtime.predict(rows).predictions] for runtime in runtimes)
    assert found == pytest.approx(torch, abs=1e-5)


def test_a_continuation_ends_at_a_stop_token(recipe: Make, real_version: Make, onnx_base: Make, tmp_path: Path) -> None:
    version = real_version(recipe("tiny:llama"), 1)
    folder = Path(shutil.copytree(onnx_base(version.manifest), tmp_path / "base"))
    whole = OnnxBackend(folder)
    long = whole.predict(whole.null(), [{"text": "thank you"}])[0].label
    stop = whole._answers._tokenizer.token_to_id(long[0])
    short = OnnxBackend(with_record(folder, lambda record: record["tokenizer"].update(stop=[stop])))
    assert short.predict(short.null(), [{"text": "thank you"}])[0].label == long[0]


def test_a_version_of_the_same_base_and_another_export_serves(recipe: Make, real_version: Make, tmp_path: Path) -> None:
    """One base for all: exported for every layer, it serves versions with fewer."""
    every, few = recipe(), recipe(adapter=AdapterConfig(rank=3, target_modules=("query",)))
    wide, narrow = real_version(every, 1), real_version(few, 2)
    write_onnx_base(load_base(every.model), wide.manifest.spec, every.task, tmp_path)
    runtime = AdapterRuntime(OnnxBackend(tmp_path))
    answers = [runtime.predict(TEXTS, digest=one.install(runtime).digest).predictions for one in (wide, narrow)]
    assert answers[0] != answers[1]
