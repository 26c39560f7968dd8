"""A version as the folder that peft loads: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

Readers of such folders differ in what they understand: several read ``r`` and ``lora_alpha`` and pass over
``rank_pattern`` and ``alpha_pattern`` without a word. So an adapter whose layers have several ranks (as those of FLoRA
and FedEx, which grow) is written at the largest, the others padded with zeros; where scalings differ, the ratio is
multiplied into ``lora_B``. The head goes along as ``modules_to_save``, a frozen one too. Answers are the version's own,
as `federated.device` gives them, up to the last bits of float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federated.errors import ModelError
from federated.release.export_card import model_card
from federated.release.exportable import Exportable
from federated.release.loading import loading_code
from federated.wire import decode_tensors, encode_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from federated.adapters.peft_host import PeftHost
    from federated.state import AdapterState

__all__ = ["export_peft"]

_PREFIX = "base_model.model"
Parts = tuple[dict[str, Any], "dict[str, Tensor]"]


def export_peft(subject: Exportable, folder: Path) -> None:
    """Write a version as a PEFT folder.

    Args:
        subject: the version with its base.
        folder: empty.

    Raises:
        ModelError: for a kind of adapter that is not exported, or tensors that are not what the record says.
        WireError: if the weights are no tensors.
    """
    from federated.adapters.peft_host import host_of
    from federated.state import to_raw

    spec = subject.manifest.spec
    parts = _KINDS.get(spec.peft_type)
    if parts is None:
        raise ModelError(
            f"version {subject.artefact.version_id[:12]} is an adapter of kind {spec.peft_type}; as a PEFT folder go "
            f"{', '.join(_KINDS)} (lora_xs is published as lora): serve it with federated.device, or export its lineage"
        )
    state, host = _checked(subject), host_of(subject.base, spec.head)
    settings, tensors = parts(state, host)
    head = {host.head[name]: state.tensors.get(name, start) for name, start in host.start.items()}
    tensors |= {f"{_PREFIX}.{place}": tensor for place, tensor in head.items()}
    config = _config(subject, host) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(encode_tensors(to_raw(tensors)))
    card = model_card(subject, tags=("peft", spec.peft_type), library="peft", load=loading_code(subject))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _checked(subject: Exportable) -> AdapterState:
    """The version's adapter, after it went into a model of its base."""
    from federated.adapters import shell
    from federated.state import AdapterState, from_raw

    state = AdapterState(subject.manifest.spec, from_raw(decode_tensors(subject.artefact.weights)))
    shell(subject.base, state.spec).write(state)
    return state


def _config(subject: Exportable, host: PeftHost) -> dict[str, Any]:
    head = subject.manifest.spec.head
    stock = None if head is None or head.kind != "stock" else "SEQ_CLS"  # around our own head peft adds nothing
    return {
        "base_model_name_or_path": subject.base_name,
        "inference_mode": True,
        "modules_to_save": list(host.modules_to_save) or None,
        "task_type": "CAUSAL_LM" if head is None else stock,
    }


def _lora(state: AdapterState, host: PeftHost) -> Parts:
    """One rank and one scaling for all layers."""
    from torch.nn.functional import pad

    spec = state.spec
    widest = max(spec.modules, key=lambda module: module.rank)
    rank, scaling = widest.rank, spec.scaling(widest)
    one_scaling = all(spec.scaling(module) == scaling for module in spec.modules)
    state = state if one_scaling else state.cast("F32")  # a ratio in bfloat16 would cost more than the last bits
    tensors = {}
    for pair in state.pairs():
        place, missing = f"{_PREFIX}.{host.layers[pair.module.name]}", rank - pair.module.rank
        factor_b = pair.factor_b if pair.scaling == scaling else pair.factor_b * (pair.scaling / scaling)
        tensors[f"{place}.lora_A.weight"] = pad(pair.factor_a, (0, 0, 0, missing))
        tensors[f"{place}.lora_B.weight"] = pad(factor_b, (0, missing))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(widest.alpha),
        "use_rslora": spec.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.fan_in_fan_out for module in spec.modules),
        "target_modules": host.targets({module.name for module in spec.modules}),
    }, tensors


def _plain(alpha: float) -> int | float:
    """Readers other than peft expect a whole number where there is one."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _ia3(state: AdapterState, host: PeftHost) -> Parts:
    sides = {path: side for path, _, side in (name.rpartition(".") for name in state.spec.trained)}
    inputs = {path for path, side in sides.items() if side == "scale_in"}
    tensors = {f"{_PREFIX}.{host.layers[path]}.ia3_l": state.tensors[f"{path}.{side}"] for path, side in sides.items()}
    return {
        "peft_type": "IA3",
        "target_modules": sorted(host.layers[path] for path in sides),
        "feedforward_modules": sorted(host.layers[path] for path in inputs),
    }, tensors


_KINDS: Mapping[str, Callable[[AdapterState, PeftHost], Parts]] = {"lora": _lora, "ia3": _ia3}
"""By `AdapterSpec.peft_type`. Prompts and prefixes count positions in another way than peft does."""
