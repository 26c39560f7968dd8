"""A PEFT folder from anywhere becomes an adapter of ours: LoRA factors and a head by exact name, and nothing else.

``adapter_config.json`` is read as plain data: a handful of its fields are understood, those that do not change what the
adapter computes are passed over, and any other that is set is refused by name. peft never sees it. Of the weights only
safetensors are read, and of these only ``lora_A`` and ``lora_B`` of layers that this base has, and the tensors of the
task's head: a foreign name, such as ``base_layer.weight``, would overwrite the base and is refused. A head that the
folder does not have starts from the seed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from federated.adapters.base import BaseModel
from federated.adapters.heads import backbone_path
from federated.adapters.model import AdapterModel, attach
from federated.adapters.peft_host import PeftHost, host_of
from federated.adapters.spec import head_spec
from federated.adapters.targets import adaptable
from federated.config import AdapterConfig, TaskConfig
from federated.errors import ModelError
from federated.state import AdapterState

__all__ = ["read_peft"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MOST_BYTES = 2**20
_PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
_UNDERSTOOD = (
    "r",
    "lora_alpha",
    "use_rslora",
    "peft_type",
    "bias",
    "init_lora_weights",
    "fan_in_fan_out",
    "modules_to_save",
)
_HARMLESS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "megatron_core", "layers_pattern", "layers_to_transform",
    "qalora_group_size", "runtime_config",
)  # fmt: skip
"""What does not change what the factors compute; which layers have factors is read from the weights."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ADDED = ("classifier", "score")
"""What peft itself writes into ``modules_to_save`` of every classifier, whether there is such a module or not."""

Factors = dict[str, dict[str, torch.Tensor]]


def read_peft(folder: Path, base: BaseModel, task: TaskConfig, *, seed: int) -> tuple[AdapterConfig, AdapterState]:
    """Read an adapter for this base.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the base model that it belongs to; PEFT's folder names one, which is not followed.
        task: decides the head.
        seed: of the head.

    Returns:
        How it is attached, and its tensors.

    Raises:
        ModelError: naming what is missing, not understood, or does not fit the base.
    """
    host = host_of(base, head_spec(task, trained=True, seed=seed))
    settings = _settings(folder / _CONFIG, host)
    found_factors, head = _tensors(folder, host)
    factors = _placed(found_factors, base, host)
    dtype = _dtype(factors)
    config = AdapterConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        use_rslora=settings["use_rslora"],
        target_modules=tuple(sorted(_relative(name, base, task) for name in factors)),
        dtype=dtype,  # type: ignore[arg-type]
    )
    model = attach(base, config, task, seed=seed)
    found = {module.name for module in model.spec.modules}
    if found != set(factors):
        raise ModelError(f"{folder} adapts {sorted(set(factors) ^ found)[:3]} besides what this task can train")
    _write(model, factors, head)
    return config, model.read()


def _settings(path: Path, host: PeftHost) -> dict[str, Any]:
    value = _parsed(path)
    for name, found in value.items():
        if name not in _UNDERSTOOD and name not in _HARMLESS and found:
            raise ModelError(
                f"{path}: {name} = {str(found)[:60]!r} is not understood here; only plain LoRA is imported"
            )
    if value.get("peft_type") != "LORA" or value.get("bias", "none") != "none":
        raise ModelError(
            f"{path}: peft_type = {value.get('peft_type')!r} with bias = {value.get('bias')!r}; expected LORA and none"
        )
    if value.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ModelError(
            f"{path}: init_lora_weights = {value['init_lora_weights']!r} changes the base model; not imported"
        )
    _check_saved(path, value.get("modules_to_save") or (), host)
    rank, alpha, rslora = value.get("r"), value.get("lora_alpha"), value.get("use_rslora", False)
    if type(rank) is not int or rank < 1 or type(rslora) is not bool:
        raise ModelError(f"{path}: r = {rank!r}, use_rslora = {rslora!r}; expected a positive integer, true or false")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not (math.isfinite(alpha) and alpha > 0):
        raise ModelError(f"{path}: lora_alpha = {alpha!r}; expected a positive number")
    return {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}


def _check_saved(path: Path, saved: Any, host: PeftHost) -> None:
    """Whole modules that the folder replaces can be those of the task's head."""
    known = {name.rpartition(".")[2] for name in host.modules_to_save} | set(_ADDED if host.modules_to_save else ())
    if not (isinstance(saved, list | tuple) and all(str(name).rpartition(".")[2] in known for name in saved)):
        raise ModelError(
            f"{path}: modules_to_save = {str(saved)[:60]!r}; expected modules of the task's head alone: "
            f"{list(host.modules_to_save) or 'it has none'}"
        )


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ModelError(f"{path} has more than {_MOST_BYTES} bytes; expected a small JSON object")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; expected a PEFT folder with {_CONFIG} and {_WEIGHTS}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is no JSON object; expected PEFT's adapter_config.json")
    return value


def _tensors(folder: Path, host: PeftHost) -> tuple[Factors, dict[str, torch.Tensor]]:
    """Factors by PEFT's own module names, each with A and B; and the head by canonical name."""
    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = [one.name for pattern in ("*.bin", "*.pt", "*.pkl") for one in folder.glob(pattern)]
        what = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no weights"
        raise ModelError(f"{folder} holds {what}; expected {_WEIGHTS}")
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {str(error)[:200]}") from None
    found: Factors = {}
    head: dict[str, torch.Tensor] = {}
    places = {f"{_PREFIX}{place}": name for name, place in host.head.items()}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None and name not in places:
            raise ModelError(
                f"{path}: tensor {name[:120]!r} is no LoRA factor and not of the task's head; expected "
                f"base_model.model.LAYER.lora_A.weight and lora_B: anything else would change the base or is not served"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: tensor {name} holds NaN or infinity")
        if match is None:
            head[places[name]] = tensor
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor
    _check_whole(path, found, head, host)
    return found, head


def _check_whole(path: Path, found: Factors, head: Mapping[str, torch.Tensor], host: PeftHost) -> None:
    halves = sorted(name for name, pair in found.items() if set(pair) != {"A", "B"})
    if halves or not found:
        raise ModelError(f"{path}: {halves[0] if halves else 'no layer'} has lora_A and lora_B; expected both of each")
    poolers = any(name.startswith("pooler.") for name in head)  # without it, a head goes with the base's own
    needed = [name for name in host.head if head and (poolers or not name.startswith("pooler."))]
    missing = [name for name in needed if name not in head]
    if missing:
        raise ModelError(
            f"{path}: {missing[0]} of the task's head is missing; expected all of a head, or nothing of it"
        )


def _placed(factors: Factors, base: BaseModel, host: PeftHost) -> Factors:
    """By the base's own paths; PEFT may have wrapped it in a model with a head, whose prefix is one word in front."""
    layers = adaptable(base.model)
    hosted = {place: name for name, place in host.layers.items()}
    placed = {}
    for name, pair in factors.items():
        ours = name if name in layers else hosted.get(name, name.partition(".")[2])
        if ours not in layers:
            raise ModelError(f"the adapter is for a layer {name}, which {base.source} does not have")
        placed[ours] = pair
    if len(placed) < len(factors):
        raise ModelError("the adapter has two pairs of factors for one layer")
    return placed


def _dtype(factors: Factors) -> str:
    found = {tensor.dtype for pair in factors.values() for tensor in pair.values()}
    if len(found) != 1 or not found <= set(_DTYPES):
        raise ModelError(
            f"the factors have dtypes {sorted(map(str, found))}; expected one of {sorted(_DTYPES.values())}"
        )
    return _DTYPES[found.pop()]


def _relative(name: str, base: BaseModel, task: TaskConfig) -> str:
    path = "" if task.name == "causal_lm" else backbone_path(base)
    return name.removeprefix(f"{path}.") if path else name


def _write(model: AdapterModel, factors: Factors, head: Mapping[str, torch.Tensor]) -> None:
    tensors = {**model.read().tensors, **head}
    for module in model.spec.modules:
        pair = factors[module.name]
        shapes = [list(pair[key].shape) for key in ("A", "B")]
        wanted = [[module.rank, module.d_in], [module.d_out, module.rank]]
        if shapes != wanted:
            raise ModelError(f"layer {module.name}: the factors have shapes {shapes}, expected {wanted}")
        tensors |= {f"{module.name}.factor_a": pair["A"], f"{module.name}.factor_b": pair["B"]}
    model.write(AdapterState(model.spec, tensors))
