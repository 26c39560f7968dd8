"""Versions of every form that goes into a PEFT folder, made in memory over tiny bases that are kept as folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from federated.adapters import BaseModel, attach, base_from_module, load_base, shell
from federated.adapters.tiny import tiny_model
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.global_state import GlobalState
from federated.lowrank import LowRank, effective
from federated.manifest import VersionManifest, sha256_hex
from federated.release import Artefact
from federated.release.exportable import Exportable
from federated.residual import grow
from federated.state import AdapterState, from_raw, to_raw
from federated.wire import decode_tensors, encode_tensors

TEXT = TaskConfig(name="causal_lm")
POOLED = TaskConfig(labels=("bad", "good", "so so"))
STOCK = TaskConfig(labels=("bad", "good", "so so"), head="stock")
SENSOR = TaskConfig(name="sensor", labels=("low", "high"))
PRIVACY = {
    "accounts": [
        {"unit": "client", "epsilon": 3.25, "target_delta": 1e-5, "accountant": "rdp", "private": True,
         "not_protected": []},
        {"unit": "example", "epsilon": None, "target_delta": 1e-6, "accountant": "pld", "private": False,
         "not_protected": ["evaluation metrics"]},
    ]
}  # fmt: skip

CASES: Mapping[str, tuple[str, TaskConfig, AdapterConfig]] = {
    "llama": ("llama", TEXT, AdapterConfig(rank=4, alpha=6.5)),
    "llama-rslora-bfloat16": (
        "llama", TEXT, AdapterConfig(rank=4, alpha=6, use_rslora=True, target_modules="all-linear", dtype="bfloat16"),
    ),
    "llama-grown": ("llama", TEXT, AdapterConfig(rank=2, alpha=4, target_modules=("q_proj", "up_proj"))),
    "llama-grown-rslora": ("llama", TEXT, AdapterConfig(rank=2, alpha=4, use_rslora=True)),
    "llama-core": ("llama", TEXT, AdapterConfig(kind="lora_xs", rank=4, alpha=8)),
    "llama-one-layer": ("llama", TEXT, AdapterConfig(rank=2, target_modules=("layers.1.self_attn.q_proj",))),
    "llama-pooled": ("llama", POOLED, AdapterConfig(rank=2)),
    "llama-stock-frozen": ("llama", STOCK, AdapterConfig(rank=2, train_head=False)),
    "gpt2": ("gpt2", TEXT, AdapterConfig(rank=4, target_modules="all-linear")),
    "gpt2-stock": ("gpt2", STOCK, AdapterConfig(rank=2)),
    "bert-pooled": ("bert", POOLED, AdapterConfig(rank=2)),
    "bert-pooled-frozen": ("bert", POOLED, AdapterConfig(rank=2, train_head=False, dtype="float16")),
    "bert-stock": ("bert", STOCK, AdapterConfig(rank=2)),
    "bert-ia3": ("bert", POOLED, AdapterConfig(kind="ia3")),
    "gpt2-ia3": ("gpt2", TEXT, AdapterConfig(kind="ia3")),
}  # fmt: skip


def base_folder(kind: str, root: Path) -> Path:
    """A tiny base as transformers keeps it."""
    folder = root / kind
    if not folder.exists():
        model, tokenizer = tiny_model(kind)
        model.save_pretrained(folder)  # type: ignore[operator]
        assert tokenizer is not None
        tokenizer.save_pretrained(folder)
    return folder


def version(
    base: BaseModel, task: TaskConfig, adapter: AdapterConfig, *, grown: bool = False, model: Any = None, **fields: Any
) -> Artefact:
    """A version with random tensors: with a residual in one layer of two, where it grew."""
    start = attach(base, adapter, task, seed=3).read()
    chance = torch.Generator().manual_seed(7)
    noise = {name: torch.randn(one.shape, generator=chance) * 0.2 for name, one in start.tensors.items()}
    state = replace(start, tensors={name: one + noise[name].to(one.dtype) for name, one in start.tensors.items()})
    added = {
        pair.module.name: LowRank(torch.randn(pair.module.d_out, 3).double(), torch.randn(3, pair.module.d_in).double())
        for pair in list(state.pairs())[::2]
    }
    residual = grow(None, added, state, max_rank=0, truncate=False).residual if grown else None
    published = GlobalState(state.cast("F32"), residual).export()
    weights = encode_tensors(to_raw(published.tensors))
    record: dict[str, Any] = {
        "weights_digest": sha256_hex(weights),
        "base_digest": base.base_digest,
        "spec": published.spec,
        "method": "fedex + sgd",
        "run_id": "run-a",
        "round_number": 5,
        "participants": 3,
        "task": {"model": model or {"dtype": "float32", "revision": None}},
    }
    return Artefact(VersionManifest(**(record | fields)), weights)


def exportable(name: str, root: Path, **fields: Any) -> Exportable:
    """One of `CASES`, its base in a folder below ``root``."""
    kind, task, adapter = CASES[name]
    folder = base_folder(kind, root)
    base = load_base(ModelConfig(source=str(folder)))
    torch.manual_seed(11)
    made = version(base, task, adapter, grown="grown" in name, **fields)
    return Exportable(made, base, task, public_name=str(folder))


def sensor(**fields: Any) -> Exportable:
    """A version for a plain torch module."""
    model, _ = tiny_model("sensor")
    base = base_from_module(model)
    return Exportable(version(base, SENSOR, AdapterConfig(rank=2, target_modules=("mix",))), base, SENSOR)


def state_of(subject: Exportable) -> AdapterState:
    """The version's tensors."""
    return AdapterState(subject.manifest.spec, from_raw(decode_tensors(subject.artefact.weights)))


def logits(subject: Exportable, inputs: Mapping[str, torch.Tensor], state: AdapterState | None = None) -> torch.Tensor:
    """What the version answers on a device, or the base with another state."""
    state = state or state_of(subject)
    model = shell(subject.base, state.spec)
    model.write(state)
    with torch.no_grad():
        answer = model.model(**inputs)
    found: torch.Tensor = getattr(answer, "logits", answer)
    return found


def products(state: AdapterState) -> dict[str, torch.Tensor]:
    """Each layer's dense effective update, float64."""
    found = {pair.module.name: effective(pair) for pair in state.pairs()}
    return {name: one.left @ one.right for name, one in found.items()}
