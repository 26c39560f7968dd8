"""``fedpeft registry export --as gguf``: from a federation's registry to a file, and what cannot be said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from .conftest import APP, QUICK, _once


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a version of a language model."""
    asked = ("experiment=tiny", "data.partition.num_clients=2", "model=tiny_llama", "task=causal_lm")
    folder = tmp_path_factory.mktemp("language")
    return _once(folder, "simulate", APP, *QUICK, *asked, "adapter.target_modules=all-linear") / "registry"


@pytest.mark.parametrize(("form", "stored"), [("gguf", "F32"), ("gguf-f16", "F16"), ("gguf-q8_0", "Q8_0")])
def test_a_version_becomes_a_file(
    form: str, stored: str, fedpeft: Callable[..., Any], language: Path, here: Path
) -> None:
    said = fedpeft("registry", "export", "v1", "--registry", language, "--to", here / "out", "--as", form).out
    assert f"as {form}: adapter.gguf" in said
    found = gguf.GGUFReader(here / "out" / "adapter.gguf")
    types = {one.name: one.tensor_type.name for one in found.tensors}
    assert len(types) == 2 * 2 * 7
    assert types["blk.1.ffn_down.weight.lora_a"] == stored


def test_a_classifier_is_refused_and_leaves_nothing(fedpeft: Callable[..., Any], finished: Path, here: Path) -> None:
    arguments = ("registry", "export", "v2", "--registry", finished / "registry", "--to", here / "out", "--as", "gguf")
    error = fedpeft(*arguments, code=1).err
    assert "cannot be written as a GGUF adapter: it belongs with a head (mean_pool" in error
    assert not (here / "out").exists()
