"""Models in onnxruntime: one session over one exported base, and an adapter chosen for each run.

A run takes its adapter as an argument, so that runs with different adapters go on at the same time over one copy of the
base, and nothing is switched. The base repeats as an output which adapter's tensors it computed with; an answer
that is not the pinned slot's is never given.

Imports no torch, SQLAlchemy or transformers: a small device needs ``onnxruntime``, ``tokenizers`` and numpy. Needs the
``onnx`` extra. `federated.adapters.onnx_base` writes the folder that is opened here.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession, LoraAdapter, RunOptions, SessionOptions
from pydantic import TypeAdapter, ValidationError

from federated.config import TaskConfig
from federated.device.backends.onnx_answers import Answerer, answerer
from federated.device.recipe import check_task
from federated.errors import DeviceError, ModelError
from federated.manifest import AdapterSpec, RawTensor, VersionManifest, sha256_hex
from federated.onnx_adapter import read_adapter, write_adapter
from federated.onnx_layout import ANSWERED_BY, LOGITS, METADATA, NO_ADAPTER, AdapterRecord, OnnxBase, fold
from federated.rows import Prediction, Row
from federated.wire import encode_tensors

__all__ = ["OnnxBackend", "OnnxHandle"]

MODEL_FILE, TOKENIZER_FILE = "base.onnx", "tokenizer.json"


@dataclass(frozen=True, eq=False)
class OnnxHandle:
    """One adapter in memory, for reading only.

    Args:
        adapter: onnxruntime's; None for the base alone.
        record: what the base must say that it answered with.
        nbytes: of its tensors.
    """

    adapter: LoraAdapter | None
    record: bytes
    nbytes: int = 0


class OnnxBackend:
    """Runs adapters over one exported base; implements `federated.device.Backend`.

    Args:
        folder: with ``base.onnx`` and, where rows are texts, ``tokenizer.json``.
        threads: that one run uses; 0 leaves it to onnxruntime.

    Raises:
        ModelError: if there is no such base, it is damaged, or was not exported with slots.
        DeviceError: if the base answers what this backend cannot ask it, such as chats.
    """

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        self._session = _session(folder / MODEL_FILE, threads)
        self._record = _record_of(self._session, folder / MODEL_FILE)
        self._task = _task_of(self._record)
        self._answers: Answerer = answerer(self._record, self._task, folder / TOKENIZER_FILE)
        self._null = OnnxHandle(None, NO_ADAPTER)
        self._loaded: weakref.WeakValueDictionary[str, OnnxHandle] = weakref.WeakValueDictionary()
        self._loading = threading.Lock()
        self._scratch = Path(tempfile.mkdtemp(prefix="fedpeft-onnx-"))
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base model that was exported."""
        return self._record.base_digest

    @property
    def record(self) -> OnnxBase:
        """What the base says of itself."""
        return self._record

    def null(self) -> OnnxHandle:
        """The base alone, with the head as it starts."""
        return self._null

    def check(self, manifest: VersionManifest) -> None:
        """Refuse a version whose answers would be read as another task's, or whose frozen head is not the base's.

        Raises:
            DeviceError: naming what differs.
        """
        check_task(manifest, self._task)
        head, ours = manifest.spec.head, self._record.head
        if head is not None and ours is not None and not head.trained and head.seed != ours.seed:
            raise DeviceError(
                f"version {manifest.version_id[:12]} has a frozen head that starts from seed {head.seed}; this base "
                f"was exported with the head of seed {ours.seed}: export the base for that version"
            )

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> OnnxHandle:
        """The adapter in onnxruntime's memory; one and the same handle as long as equal ones are in use.

        Raises:
            ModelError: for a kind of adapter that slots cannot hold, tensors that do not fit the spec, or slots that
                the base was exported without.
        """
        weights_digest = sha256_hex(encode_tensors(tensors))
        with self._loading:
            key = f"{weights_digest}/{spec.digest}"
            handle = self._loaded.get(key)
            if handle is None:
                record = AdapterRecord(self.base_digest, weights_digest)
                handle = self._loaded[key] = self._load(record, fold(spec, tensors))
            return handle

    def load_file(self, path: Path) -> OnnxHandle:
        """The adapter of an ``.onnx_adapter`` file, for whoever has no more than that; the file is not needed any more.

        Nothing but its own record says what is in it: a version from a registry or a release goes through
        `federated.device.AdapterRuntime.install`.

        Raises:
            BaseMismatch: if it belongs to another base model.
            ModelError: if it is no such file, or does not fit this base's slots.
        """
        return self._load(*read_adapter(path))

    def _load(self, record: AdapterRecord, parameters: Mapping[str, npt.NDArray[np.float32]]) -> OnnxHandle:
        """Onnxruntime maps files into memory: it gets one of our own, that nobody changes, until the handle is gone."""
        self._record.check(record, parameters)
        path = self._scratch / f"{secrets.token_hex(8)}.onnx_adapter"
        write_adapter(path, record, parameters)
        adapter = LoraAdapter()
        adapter.Load(str(path))
        handle = OnnxHandle(adapter, record.to_bytes(), sum(one.nbytes for one in parameters.values()))
        weakref.finalize(handle, _remove, path)
        return handle

    def nbytes(self, handle: OnnxHandle) -> int:
        """Bytes of an adapter's tensors; 0 for the base alone."""
        return handle.nbytes

    def predict(self, handle: OnnxHandle, rows: Sequence[Row]) -> Sequence[Prediction]:
        """The task's predictions, in the order of the rows.

        Raises:
            DataError: for a row that is not of the task's shape.
            DeviceError: if onnxruntime fails, or computed with anything but this adapter.
        """
        return self._answers.predict(lambda inputs: self.logits(handle, inputs), rows)

    def logits(self, handle: OnnxHandle, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """One run: [batch, labels], or [batch, time, vocabulary] of a language model.

        Args:
            handle: of this backend.
            inputs: ``input_ids`` int64 [batch, time] or ``values`` float32 [batch, time, channels], and
                ``attention_mask`` int64 [batch, time].

        Raises:
            DeviceError: as `predict` does.
        """
        options = RunOptions()
        if handle.adapter is not None:
            options.add_active_adapter(handle.adapter)
        try:
            logits, answered_by = self._session.run([LOGITS, ANSWERED_BY], dict(inputs), options)
        except Exception as error:  # onnxruntime raises nearly anything
            raise DeviceError(f"onnxruntime cannot run the base: {str(error)[:200]}") from error
        if answered_by.tobytes() != handle.record:
            raise DeviceError("the base answered with another adapter than was asked for; nothing of it is given out")
        found: npt.NDArray[np.float32] = logits
        return found


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _session(path: Path, threads: int) -> InferenceSession:
    options = SessionOptions()
    options.log_severity_level = 3  # below, it warns about every slot
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # a battery, and other requests, matter more
    if not path.is_file():
        raise ModelError(f"{path} is not there; expected a folder that `fedpeft registry export --as onnx-base` wrote")
    try:
        return InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises nearly anything
        raise ModelError(f"{path} cannot be loaded by onnxruntime: {str(error)[:200]}") from error


def _record_of(session: InferenceSession, path: Path) -> OnnxBase:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise ModelError(
            f"{path} was not exported with slots for adapters; use `fedpeft registry export --as onnx-base`"
        )
    record = OnnxBase.from_json(text)
    slots = {one.name for one in session.get_overridable_initializers()}
    missing = sorted(set(record.slots) - slots)
    if missing:
        raise ModelError(f"{path} has no slot {missing[0]}, which its record names; export the base again")
    return record


def _task_of(record: OnnxBase) -> TaskConfig:
    try:
        return TypeAdapter(TaskConfig).validate_python(dict(record.task))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ModelError(f"the exported base's task cannot be read: {first['loc']}: {first['msg']}") from None
