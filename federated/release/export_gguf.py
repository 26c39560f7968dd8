"""A version as a GGUF LoRA adapter: what llama.cpp and the programs around it load beside a base model.

Only what such a file can say is written, and anything else refused by name: plain LoRA on layers of
`federated.release.gguf_layers`, no head, no norms, no embeddings. llama.cpp computes, of each layer,

    (alpha / rank) * factor_b @ factor_a

with one alpha for the whole file and each layer's own rank. Here the scaling may be any (rsLoRA, ranks and alphas that
differ, ranks that a residual made grow): alpha is what most layers' ``scaling * rank`` is, and ``factor_b`` of the
others is multiplied by what is missing. Files have no date: one version gives one file, bit for bit.

Needs the ``gguf`` extra. Called by ``fedpeft registry export``; `adapter_gguf` gives the bytes, for a release's files.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from federated.errors import ModelError, ReleaseError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest
from federated.release.artefact import Artefact
from federated.release.gguf_layers import Place, interleaved, place_of
from federated.wire import decode_tensors

if TYPE_CHECKING:
    from federated.release.exportable import Exportable, Exporter

__all__ = ["FILE", "KINDS", "adapter_gguf", "exporter"]

FILE = "adapter.gguf"
"""Name of the file in an exported folder."""

KINDS: Mapping[str, tuple[str, str]] = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
"""How factors may be stored: gguf's names of the tensors' type and of the file's."""

Matrix = npt.NDArray[np.float32]
Stored = tuple[npt.NDArray[Any], Any]  # bytes as an array, and gguf's type of them
_BLOCK = 32  # values of a row that q8_0 stores together, with one scale


def exporter(kind: str = "f32") -> Exporter:
    """What writes ``adapter.gguf`` into an empty folder; see `adapter_gguf`.

    Raises:
        ReleaseError: if the ``gguf`` extra is not installed, or there is no such kind.
    """
    _check_kind(kind)
    return partial(_write_folder, kind=kind)


def _write_folder(subject: Exportable, folder: Path, *, kind: str) -> None:
    model: Any = subject.base.model
    config = getattr(model, "config", None)
    plain = config.to_dict() if config is not None else {}
    name = type(model).__name__
    data = adapter_gguf(subject.artefact, name, plain, kind=kind, base_name=subject.base_name)
    (folder / FILE).write_bytes(data)


def adapter_gguf(
    artefact: Artefact, base_class: str, config: Mapping[str, Any], *, kind: str = "f32", base_name: str = ""
) -> bytes:
    """The bytes of a GGUF LoRA adapter with a version's effective update.

    Args:
        artefact: the version; its weights are canonical.
        base_class: class of the base model, such as ``"LlamaForCausalLM"``.
        config: the base model's whole configuration, as transformers' ``config.to_dict()`` gives it.
        kind: ``"f32"``, ``"f16"``, or ``"q8_0"``: 8 bits and a scale for each 32 values of a row, f16 where rows are no
            multiple of 32 (``factor_b`` of most ranks).
        base_name: what the file calls the base model; empty: it does not say.

    Raises:
        ModelError: naming the first thing that such a file cannot say or that does not belong to this base.
        ReleaseError: if the ``gguf`` extra is not installed, there is no such kind, or no room for a temporary file.
        WireError: if the weights are no canonical tensors.
    """
    _check_kind(kind)
    spec, name = artefact.manifest.spec, artefact.version_id[:12]
    try:
        _check_plain(spec)
        places = [place_of(module, base_class, config) for module in spec.modules]
        factors = _factors(spec, decode_tensors(artefact.weights))
        alpha, missing = _one_alpha(spec)
        named = _named(places, factors, missing)
        stored = {key: _quantised(key, tensor, kind) for key, tensor in named}
    except ModelError as error:
        raise ModelError(f"version {name} cannot be written as a GGUF adapter: {error}") from None
    describe = partial(_describe, manifest=artefact.manifest, alpha=alpha, kind=kind, base_name=base_name)
    return _written(places[0].architecture, describe, stored)


def _check_kind(kind: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ReleaseError("GGUF files need the gguf extra; run: pip install 'federated-peft[gguf]'")
    if kind not in KINDS:
        raise ReleaseError(f"GGUF factors as {kind!r} are not written here; expected one of {', '.join(KINDS)}")


def _check_plain(spec: AdapterSpec) -> None:
    if spec.peft_type != "lora":
        raise ModelError(f"it is an adapter of kind {spec.peft_type}; expected plain LoRA")
    if spec.head is not None:
        raise ModelError(f"it belongs with a head ({spec.head.kind}, {spec.head.num_labels} labels); expected none")
    if not spec.modules:
        raise ModelError("it adapts no layer; expected at least one")
    if len({module.name for module in spec.modules}) < len(spec.modules):
        raise ModelError("it names a layer twice; expected each once")
    for module in spec.modules:
        if module.rank < 1 or not 0 < _own_alpha(spec, module) < math.inf:
            raise ModelError(f"layer {module.name} has rank {module.rank}, alpha {module.alpha}; expected both above 0")


def _factors(spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> list[tuple[Matrix, Matrix]]:
    """Both factors of each module, after checking that there is nothing else."""
    wanted = {
        name: shape
        for one in spec.modules
        for name, shape in (
            (f"{one.name}.factor_a", (one.rank, one.d_in)),
            (f"{one.name}.factor_b", (one.d_out, one.rank)),
        )
    }
    for name in sorted(tensors.keys() | wanted):
        if name not in wanted:
            raise ModelError(f"tensor {name} is no LoRA factor (trained heads, norms and embeddings cannot be said)")
        found = tensors[name].shape if name in tensors else None
        if found != wanted[name]:
            raise ModelError(f"tensor {name} has shape {found}, expected {wanted[name]}")
        if not np.isfinite(tensors[name].array).all():
            raise ModelError(f"tensor {name} holds NaN or infinity")
    arrays = {name: _float32(tensor.array) for name, tensor in tensors.items()}
    return [(arrays[f"{one.name}.factor_a"], arrays[f"{one.name}.factor_b"]) for one in spec.modules]


def _float32(array: Any) -> Any:
    with np.errstate(over="ignore"):  # what is too large becomes infinity, and is refused when it is stored
        return array.astype(np.float32)


def _one_alpha(spec: AdapterSpec) -> tuple[float, list[float]]:
    """The file's alpha, and by what each layer's ``factor_b`` is multiplied so that its scaling is right."""
    own = [_own_alpha(spec, module) for module in spec.modules]
    [(alpha, _)] = Counter(own).most_common(1)
    return alpha, [value / alpha for value in own]


def _own_alpha(spec: AdapterSpec, module: ModuleSpec) -> float:
    """The alpha that would be right for this layer alone; as float32, which is what a file holds."""
    return float(_float32(np.float64(spec.scaling(module) * module.rank)))


def _named(
    places: list[Place], factors: list[tuple[Matrix, Matrix]], missing: list[float]
) -> Iterator[tuple[str, Matrix]]:
    for place, (factor_a, factor_b), factor in zip(places, factors, missing, strict=True):
        scaled = factor_b if factor == 1.0 else _float32(factor_b * np.float64(factor))
        yield f"{place.name}.lora_a", factor_a
        yield f"{place.name}.lora_b", interleaved(scaled, place.heads)


def _written(architecture: str, describe: Callable[[Any], None], tensors: Mapping[str, Stored]) -> bytes:
    import gguf

    try:
        with tempfile.TemporaryDirectory(prefix="fedpeft-gguf-") as folder:
            path = Path(folder) / FILE
            writer = gguf.GGUFWriter(path, architecture)
            describe(writer)
            for name, (data, dtype) in tensors.items():
                writer.add_tensor(name, data, raw_dtype=dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"no GGUF file could be written in {tempfile.gettempdir()}: {error.strerror}") from error


def _describe(writer: Any, *, manifest: VersionManifest, alpha: float, kind: str, base_name: str) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(manifest.adapter_id or manifest.run_id)
    writer.add_version(manifest.version_id)
    if manifest.licence:
        writer.add_license(manifest.licence)
    if base_name:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
    writer.add_string("federated.weights_digest", manifest.weights_digest)
    writer.add_string("federated.base_digest", manifest.base_digest)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind][1]])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _quantised(name: str, tensor: Matrix, kind: str) -> Stored:
    import gguf

    as_blocks = kind == "q8_0" and tensor.shape[-1] % _BLOCK == 0
    dtype = gguf.GGMLQuantizationType[KINDS[kind if kind != "q8_0" or as_blocks else "f16"][0]]
    largest = np.finfo(np.float32 if kind == "f32" else np.float16).max
    if np.abs(tensor).max() > largest:
        raise ModelError(f"tensor {name} holds values that {kind} cannot; largest is {largest}")
    return gguf.quants.quantize(tensor, dtype), dtype
