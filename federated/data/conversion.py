"""Converts a GGUF model to a safetensors folder, once, because loading GGUF takes about a minute each time.

The only place besides `federated.adapters` and `federated.tasks` that imports transformers, and only while it converts.
"""

from __future__ import annotations

import logging
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from federated.errors import DataError

__all__ = ["converted"]

_log = logging.getLogger(__name__)


def converted(gguf_file: Path) -> Path:
    """The bfloat16 safetensors folder made from ``gguf_file``, beside its folder; made now if it is not there.

    Raises:
        DataError: if the ``gguf`` extra is not installed, or the file cannot be converted.
    """
    target = gguf_file.parent.with_name(f"{gguf_file.parent.name}-safetensors")
    if (target / "config.json").is_file():
        return target
    try:
        version("gguf")
    except PackageNotFoundError:
        raise DataError(f"{gguf_file.name} needs the gguf extra; run: pip install 'federated-peft[gguf]'") from None
    _log.warning("converting %s to safetensors, once; this takes about a minute", gguf_file.name)
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as work:
            staged = Path(work) / "model"
            _convert(gguf_file, staged)
            _rename(staged, target)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{gguf_file.name} cannot be converted to safetensors: {reason}") from None
    return target


def _convert(gguf_file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf_file.parent), gguf_file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # the tensors are dense by now; save them as such
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _rename(staged: Path, target: Path) -> None:
    try:
        os.rename(staged, target)  # noqa: PTH104 - one atomic step
    except OSError:
        if not (target / "config.json").is_file():  # another process was first
            raise
