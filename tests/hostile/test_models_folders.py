"""Model folders and names that must be refused in one line, before anything is loaded or run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from federated.adapters import base_from_module, load_base, locate
from federated.adapters.tiny import tiny_model
from federated.config import ModelConfig
from federated.errors import ModelError


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny_model("bert")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(source, **options):
    with pytest.raises(ModelError) as caught:
        load_base(ModelConfig(source=str(source), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    told = refusal(tmp_path / "nowhere")
    assert "nowhere was not found" in told
    assert "config.json and model.safetensors" in told


def test_an_empty_folder(tmp_path):
    assert f"{tmp_path} holds no config.json" in refusal(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert f"{folder} holds no weights; expected model.safetensors" in refusal(folder)


def test_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "holds only pickled weights, which can run code" in refusal(folder)


def test_pickled_weights_beside_an_unrelated_safetensors_file(folder):
    shutil.move(folder / "model.safetensors", folder / "other.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    assert "could not be loaded" in refusal(folder)


def test_a_folder_that_holds_an_adapter(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../../etc"}))
    assert "holds an adapter; expected a base model" in refusal(folder)


def test_a_model_that_loads_an_adapter_of_its_own_accord(folder, monkeypatch):
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def with_adapter(*arguments, **options):
        model, report = load(*arguments, **options)
        model._hf_peft_config_loaded = True
        return model, report

    monkeypatch.setattr(AutoModel, "from_pretrained", with_adapter)
    assert "expected the base model alone" in refusal(folder)


def test_a_checkpoint_with_a_missing_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the weights of encoder.layer.1.output.dense.weight" in refusal(folder)


def test_a_truncated_weights_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "could not be loaded" in refusal(folder)


def test_a_config_that_asks_to_run_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the model folder was run')")
    assert "could not be loaded" in refusal(folder)


def test_an_encoder_decoder(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert "encoder-decoder" in refusal(folder)


def test_a_gguf_file_that_is_not_there(folder):
    assert "holds no weights.gguf" in refusal(folder, gguf_file="weights.gguf")


def test_gguf_without_its_package(folder, monkeypatch):
    (folder / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "install federated-peft[gguf]" in refusal(folder, gguf_file="weights.gguf")


@pytest.mark.parametrize("source", ["../up/and/away", "a b", "-rf", "asset.d/x/y", "/abs/olute"])
def test_a_name_that_is_no_hub_name_is_taken_for_a_folder(source):
    assert f"model folder {source} was not found" in refusal(source)


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setattr(locate, "_reachable", lambda: False)
    assert "not in the hub's cache, and the hub cannot be reached" in refusal("nobody/nothing")


class TestReachable:
    @pytest.fixture(autouse=True)
    def no_proxy(self, monkeypatch):
        monkeypatch.setattr(locate, "getproxies", dict)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def test_a_closed_port_is_not(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert not locate._reachable()

    def test_an_open_port_is(self, monkeypatch):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as server:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            assert locate._reachable()

    def test_offline_mode_is_not(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert not locate._reachable()

    def test_a_proxy_is_believed(self, monkeypatch):
        monkeypatch.setattr(locate, "getproxies", lambda: {"https": "http://proxy:1"})
        assert locate._reachable()


def test_a_cached_hub_model_needs_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "/cache/model.safetensors")
    place = locate.locate(ModelConfig(source="some/model", revision="main"))
    assert place.options == {"trust_remote_code": False, "local_files_only": True, "revision": "main"}


def test_a_gguf_asset_is_loaded_from_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr("federated.data.asset_path", lambda name: tmp_path / "small.gguf", raising=False)
    assert locate.locate(ModelConfig(source="asset:small")).options["gguf_file"] == "small.gguf"


def test_gguf_leftovers_are_forgotten(folder, monkeypatch):
    from transformers import AutoModel

    load = AutoModel.from_pretrained

    def quantised(*arguments, **options):
        model, report = load(*arguments, **options)
        model.config.quantization_config = {"from": "gguf"}
        return model, report

    monkeypatch.setattr(AutoModel, "from_pretrained", quantised)
    loaded = load_base(ModelConfig(source=str(folder)))
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.base_digest == base_from_module(*tiny_model("bert")).base_digest
