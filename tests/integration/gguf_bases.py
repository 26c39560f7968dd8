"""Tiny random language models of each family, and their weights as the GGUF file that llama.cpp's converter would make.

Written from llama.cpp's own rules, and apart from `federated.release.gguf_layers`: rows of llama's query and key
projections are put in order one by one, a Conv1D's weights are transposed, Gemma's norms are stored with one added.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import nn

from federated.adapters import BaseModel, base_from_module
from federated.adapters.tiny import byte_tokenizer

BLOCKS, CONTEXT = 2, 64
_HF = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "attn_implementation": "eager",
}  # fmt: skip


def _made(name: str, **fields: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**(_HF | fields))
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)


def _gpt2() -> nn.Module:
    kept = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attn_implementation")
    plain = {key: _HF[key] for key in kept}
    config = transformers.GPT2Config(**plain, n_embd=64, n_layer=BLOCKS, n_head=4, n_positions=CONTEXT, n_inner=96)
    return transformers.GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _made("Llama", tie_word_embeddings=False),
    "llama_tied": lambda: _made("Llama", tie_word_embeddings=True, num_key_value_heads=1, head_dim=32),
    "mistral": lambda: _made("Mistral", tie_word_embeddings=False, sliding_window=None),
    "qwen2": lambda: _made("Qwen2", tie_word_embeddings=False),
    "qwen3": lambda: _made("Qwen3", tie_word_embeddings=True, head_dim=32),
    "gemma3": lambda: _made("Gemma3Text", head_dim=32, query_pre_attn_scalar=32, sliding_window=32),
    "phi3": lambda: _made("Phi3", tie_word_embeddings=False),
    "gpt2": _gpt2,
}
"""By the name of the case."""


def tiny_base(name: str) -> BaseModel:
    """A random base whose every tensor matters: biases are not zero, norms not one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MODELS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return base_from_module(model, byte_tokenizer(chat=False), source=name)


def write_base(base: BaseModel, path: Path) -> None:
    """The base model as a float32 GGUF file."""
    config: Any = base.model.config
    kind = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    _settings(writer, config, kind)
    _vocabulary(writer, base.tokenizer)
    architecture = next(arch for arch, found in gguf.MODEL_ARCH_NAMES.items() if found == kind)
    names = gguf.get_tensor_name_map(architecture, BLOCKS)
    tied = config.tie_word_embeddings
    for name, tensor in base.model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            place = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert place is not None, name
            writer.add_tensor(place, _stored(name, tensor.numpy(), config, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(name: str, array: np.ndarray, config: Any, kind: str) -> np.ndarray:
    if kind == "llama" and "q_proj" in name:
        return array[turned_rows(len(array), config.num_attention_heads)]
    if kind == "llama" and "k_proj" in name:
        return array[turned_rows(len(array), config.num_key_value_heads)]
    if kind == "gpt2" and array.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(array.T)
    return array + 1 if kind == "gemma3" and "norm" in name else array


def turned_rows(count: int, heads: int) -> list[int]:
    """Which of transformers' rows is at each place of llama.cpp's."""
    size = count // heads
    places = {}
    for row in range(count):
        head, inner = divmod(row, size)
        second, pair = divmod(inner, size // 2)
        places[head * size + 2 * pair + second] = row
    return [places[place] for place in range(count)]


def _settings(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def _vocabulary(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Byte tokens; the tests hand in numbers, so that how a text is cut does not matter."""
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    control = [
        gguf.TokenType.CONTROL if token.startswith("<") and len(token) > 1 else gguf.TokenType.NORMAL
        for token in tokens
    ]
    writer.add_token_types(control)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
