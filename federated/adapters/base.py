"""The frozen base model: find, load, freeze, fingerprint.

One base lives in memory per process, shared by every adapted tree (`federated.adapters.share`) and, after a fork, by
every worker. Weights come as safetensors or GGUF; pickled weights are refused. Nothing here knows adapters or peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from federated.adapters.fingerprint import base_parts
from federated.adapters.locate import Location, locate
from federated.adapters.quiet import quiet_transformers
from federated.adapters.tiny import tiny_model
from federated.config import ModelConfig
from federated.errors import ModelError
from federated.manifest import digest_of

__all__ = ["BaseKind", "BaseModel", "base_from_module", "load_base"]

BaseKind = Literal["encoder", "decoder", "module"]
"""``encoder``: text features; ``decoder``: a causal language model; ``module``: a plain `nn.Module`."""


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A frozen base model; nobody may change its tensors or its modules.

    Args:
        model: in eval mode, no parameter requires a gradient.
        tokenizer: transformers tokenizer with a padding token; None for a plain module.
        base_digest: fingerprint over config, weights and tokenizer.
        source: as it was asked for.
        kind: what the model can do.
        num_parameters: parameters, tied ones once.
        num_bytes: their size in memory.
        parts: what the fingerprint is the digest of; see `federated.adapters.fingerprint.base_parts`.
    """

    model: nn.Module
    tokenizer: Any | None
    base_digest: str
    source: str
    kind: BaseKind
    num_parameters: int
    num_bytes: int
    parts: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def quantization(self) -> str | None:
        """How the weights were quantised; None where they are full."""
        return self.parts.get("quantization")

    @property
    def full_digest(self) -> str:
        """The fingerprint before quantisation; ``base_digest`` where there was none."""
        if self.quantization is None:
            return self.base_digest
        return digest_of({name: part for name, part in self.parts.items() if name != "quantization"})

    @property
    def hidden_size(self) -> int:
        """Size of the model's feature vectors.

        Raises:
            ModelError: if the model does not say.
        """
        holder = getattr(self.model, "config", self.model)
        size = getattr(holder, "hidden_size", None)
        if not isinstance(size, int):
            raise ModelError(f"base model {self.source} does not say its hidden_size; give it that attribute")
        return size


def load_base(config: ModelConfig, *, app_dir: Path | None = None) -> BaseModel:
    """Load the base model that ``config`` names, frozen and fingerprinted; the last few are kept in memory.

    An architecture with a language-modelling head is loaded with it (``decoder``), any other as its bare features
    (``encoder``), whatever the task: the fingerprint does not depend on what the base is used for.

    Args:
        config: source, dtype, revision, quantization.
        app_dir: where relative folders are looked up after the working directory.

    Raises:
        ModelError: if there is no such model, its weights are missing, incomplete or pickled, or it cannot be used.
        DataError: if an asset was not fetched.
    """
    kind, _, name = config.source.partition(":")
    place = None if kind == "tiny" else locate(config, app_dir)
    if config.quantization != "none":
        return _load_quantized(place, name, config.dtype, config.source, config.quantization)
    return _load_tiny(name, config.dtype) if place is None else _load(place, config.dtype, config.source)


@lru_cache(maxsize=2)
def _load_quantized(
    place: Location | None, name: str, dtype: str, source: str, kind: Literal["int8", "nf4"]
) -> BaseModel:
    """The full weights are loaded past the cache, which would keep them, and go as the quantised ones are made."""
    from federated.adapters.quantized import quantize

    full = _load_tiny.__wrapped__(name, dtype) if place is None else _load.__wrapped__(place, dtype, source)
    return quantize(full, kind)


def base_from_module(model: nn.Module, tokenizer: Any | None = None, *, source: str = "module") -> BaseModel:
    """Freeze and fingerprint a model that is already in memory (in place: switched to eval, gradients off).

    A plain `nn.Module` takes ``values`` [batch, time, channels] and ``attention_mask`` [batch, time], returns features
    [batch, time, hidden] and has the attribute ``hidden_size``.
    """
    model.eval().requires_grad_(False)
    parameters, parts = list(model.parameters()), base_parts(model, tokenizer)
    return BaseModel(
        model=model,
        tokenizer=_with_padding(tokenizer),
        base_digest=digest_of(parts),
        source=source,
        kind=_kind_of(model),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        parts=parts,
    )


def _kind_of(model: nn.Module) -> BaseKind:
    if not hasattr(model, "get_output_embeddings"):
        return "module"
    return "encoder" if model.get_output_embeddings() is None else "decoder"  # type: ignore[operator]


def _with_padding(tokenizer: Any | None) -> Any | None:
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@lru_cache(maxsize=8)
def _load_tiny(name: str, dtype: str) -> BaseModel:
    model, tokenizer = tiny_model(name)
    return base_from_module(model.to(_torch_dtype(dtype)), tokenizer, source=f"tiny:{name}")


@lru_cache(maxsize=4)
def _load(place: Location, dtype: str, source: str) -> BaseModel:
    if place.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{place.gguf_file} needs the gguf package; install federated-peft[gguf]")
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a pooler that the checkpoint lacks must be the same everywhere
            model, missing = _read_weights(place, _torch_dtype(dtype))
            tokenizer = _read_tokenizer(place)
    except ModelError:
        raise
    except Exception as error:  # loaders raise nearly anything; the cause is kept in one line
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"model {source} could not be loaded: {first.strip()} (expected config.json, model.safetensors and a "
            "tokenizer that fit each other; set model.source)"
        ) from error
    _check_complete(source, missing)
    return base_from_module(model, tokenizer, source=source)


def _read_weights(place: Location, dtype: torch.dtype) -> tuple[Any, list[str]]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place.folder, **place.options)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{place.folder} is an encoder-decoder model; expected an encoder or a decoder")
    names = tuple(getattr(config, "architectures", None) or ())
    decoder = place.gguf_file is not None or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    factory = AutoModelForCausalLM if decoder else AutoModel
    safe = None if place.gguf_file else True
    model, report = factory.from_pretrained(
        place.folder, dtype=dtype, use_safetensors=safe, output_loading_info=True, **place.options
    )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{place.folder} holds an adapter besides the base model; expected the base model alone")
    _forget_quantization(model)
    return model, sorted(report["missing_keys"])


def _forget_quantization(model: Any) -> None:
    """GGUF weights arrive dequantised; what is left of their origin would stand in the way of saving and copying."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None


def _read_tokenizer(place: Location) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place.folder, **place.options)


def _check_complete(source: str, missing: list[str]) -> None:
    """A pooler may be made anew (few checkpoints of language models have one); any other gap is a broken model."""
    gaps = [name for name in missing if "pooler" not in name.split(".")]
    if gaps:
        raise ModelError(
            f"model {source} lacks the weights of {gaps[0]} and {len(gaps) - 1} others; "
            "expected a complete model.safetensors that matches config.json"
        )
