"""A GGUF model is converted once, said aloud, and all or nothing."""

import logging
from functools import partial
from pathlib import Path

import pytest

from federated.data import conversion
from federated.data.assets import ASSETS, asset_path
from federated.data.conversion import converted
from federated.errors import DataError


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(conversion, "version", lambda name: "0.10")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    asset = ASSETS["smollm2"]
    path = tmp_path / asset.folder / next(iter(asset.files))
    path.parent.mkdir()
    path.write_bytes(b"GGUF")
    return path


class FakeConverter:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, gguf_file: Path, out: Path) -> None:
        self.calls += 1
        if self.error:
            raise self.error
        out.mkdir()
        (out / "config.json").write_text("{}")


def test_the_first_use_converts_and_says_so(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeConverter()
    monkeypatch.setattr(conversion, "_convert", fake)
    with caplog.at_level(logging.WARNING):
        paths = {asset_path("smollm2") for _ in range(2)}
    assert fake.calls == 1
    assert [path.name for path in paths] == [f"{gguf_file.parent.name}-safetensors"]
    assert "converting SmolLM2-135M-Instruct.Q4_1.gguf to safetensors, once" in caplog.text


def test_without_the_extra_it_says_what_to_install(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise conversion.PackageNotFoundError(name)

    monkeypatch.setattr(conversion, "version", missing)
    with pytest.raises(DataError, match=r"needs the gguf extra; run: pip install 'federated-peft\[gguf\]'"):
        converted(gguf_file)


def test_a_failed_conversion_is_one_line_and_leaves_nothing(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_convert", FakeConverter(ValueError("bad\nheader")))
    with pytest.raises(DataError, match=r"cannot be converted to safetensors: bad header$"):
        converted(gguf_file)
    assert [path.name for path in gguf_file.parent.parent.iterdir()] == [gguf_file.parent.name]


def test_a_conversion_that_another_process_finished_first_is_taken(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeConverter()

    def raced(source: Path, out: Path) -> None:
        fake(source, source.parent.with_name(f"{source.parent.name}-safetensors"))
        fake(source, out)

    monkeypatch.setattr(conversion, "_convert", raced)
    assert (converted(gguf_file) / "config.json").is_file()


def test_the_result_is_a_bfloat16_model_that_loads(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = Path(__file__).parents[3] / "simulations" / "models" / "tiny-llama-sotu"
    real = {kind: kind.from_pretrained for kind in (AutoModelForCausalLM, AutoTokenizer)}
    asked = []

    def load_tiny(kind: type, folder: str, gguf_file: str, **options: object) -> object:
        asked.append((Path(folder).name, gguf_file))
        made = real[kind](tiny, **options)
        if kind is AutoModelForCausalLM:
            made.config.quantization_config = {"left": "over"}
        return made

    for kind in real:
        monkeypatch.setattr(kind, "from_pretrained", partial(load_tiny, kind))
    folder = converted(gguf_file)
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert asked == [(gguf_file.parent.name, gguf_file.name)] * 2
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder)("Hello")["input_ids"]


def test_something_in_the_way_is_an_error(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_convert", FakeConverter())
    gguf_file.parent.with_name(f"{gguf_file.parent.name}-safetensors").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be converted"):
        converted(gguf_file)
