"""Loading: where models come from, what the fingerprint covers, how little is touched."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from federated.adapters import BaseModel, base_from_module, load_base
from federated.adapters.fingerprint import base_digest, tokenizer_digest
from federated.adapters.tiny import TinySensor, tiny_model
from federated.config import ModelConfig
from federated.errors import ModelError

TINY = ("bert", "gpt2", "llama", "sensor")


def base(name: str = "bert", **options: str) -> BaseModel:
    return load_base(ModelConfig(source=f"tiny:{name}", **options))


def saved(folder: Path, name: str = "bert") -> Path:
    model, tokenizer = tiny_model(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_the_same_on_every_call(name):
    made = [tiny_model(name) for _ in range(2)]
    assert base_digest(*made[0]) == base_digest(*made[1])


def test_making_a_tiny_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    tiny_model("bert")
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_unknown_tiny_model_names_the_known_ones():
    with pytest.raises(ModelError, match=r"tiny:t5 is unknown; expected tiny:bert, .*tiny:sensor"):
        base("t5")


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "encoder"), ("gpt2", "decoder"), ("llama", "decoder"), ("sensor", "module")]
)
def test_the_kind_follows_the_architecture(name, kind):
    assert base(name).kind == kind


@pytest.mark.parametrize("name", TINY)
def test_nothing_in_a_base_can_train(name):
    model = base(name).model
    assert not model.training
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_a_base_is_loaded_once():
    assert base() is base()


def test_size_counts_tied_weights_once():
    llama = base("llama")
    head, table = llama.model.lm_head.weight, llama.model.model.embed_tokens.weight
    assert head is table
    assert llama.num_parameters == sum(tensor.numel() for tensor in llama.model.parameters())
    assert llama.num_bytes == 4 * llama.num_parameters


def test_bfloat16_halves_the_bytes_and_changes_the_fingerprint():
    half = base(dtype="bfloat16")
    assert half.num_bytes * 2 == base().num_bytes
    assert half.base_digest != base().base_digest


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_folder_has_the_fingerprint_of_the_model_that_was_saved_in_it(tmp_path, name):
    loaded = load_base(ModelConfig(source=str(saved(tmp_path / "model", name))))
    assert loaded.base_digest == base(name).base_digest


def test_a_relative_folder_is_looked_up_in_the_app_folder(tmp_path, monkeypatch):
    saved(tmp_path / "app" / "models" / "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_base(ModelConfig(source="models/mine"), app_dir=tmp_path / "app")
    assert found.base_digest == base().base_digest


def test_the_working_directory_comes_before_the_app_folder(tmp_path, monkeypatch):
    saved(tmp_path / "here" / "mine", "gpt2")
    saved(tmp_path / "app" / "mine", "bert")
    monkeypatch.chdir(tmp_path / "here")
    assert load_base(ModelConfig(source="mine"), app_dir=tmp_path / "app").kind == "decoder"


def test_an_asset_is_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("federated.data.asset_path", lambda name: saved(tmp_path / name), raising=False)
    assert load_base(ModelConfig(source="asset:minilm")).base_digest == base().base_digest


def test_loading_is_silent(tmp_path, capfd):
    folder = saved(tmp_path)
    capfd.readouterr()
    load_base(ModelConfig(source=str(folder)))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_loading_leaves_transformers_verbosity_alone(tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_base(ModelConfig(source=str(saved(tmp_path))))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_progress_bars_that_were_off_stay_off(tmp_path):
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        load_base(ModelConfig(source=str(saved(tmp_path))))
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_pooler_that_the_checkpoint_lacks_is_the_same_in_every_process(tmp_path):
    folders = [saved(tmp_path / name) for name in ("one", "two")]
    for number, folder in enumerate(folders):
        weights = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        torch.manual_seed(number)
    first, second = (load_base(ModelConfig(source=str(folder))) for folder in folders)
    assert first.base_digest == second.base_digest


def test_one_changed_weight_changes_the_fingerprint():
    model, tokenizer = tiny_model("bert")
    before = base_digest(model, tokenizer)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.bias[3] += 1e-6
    assert base_digest(model, tokenizer) != before


def test_two_swapped_weights_change_the_fingerprint():
    model, tokenizer = tiny_model("bert")
    before = base_digest(model, tokenizer)
    query = model.encoder.layer[0].attention.self.query
    query.weight.data = query.weight.data.flip(0)
    assert base_digest(model, tokenizer) != before


def test_another_activation_changes_the_fingerprint():
    model, tokenizer = tiny_model("bert")
    before = base_digest(model, tokenizer)
    model.config.hidden_act = "relu"
    assert base_digest(model, tokenizer) != before


def test_where_a_model_came_from_does_not_change_the_fingerprint():
    model, tokenizer = tiny_model("bert")
    before = base_digest(model, tokenizer)
    model.config._name_or_path = "/somewhere/else"
    model.config.id2label = {0: "yes", 1: "no", 2: "maybe"}
    assert base_digest(model, tokenizer) == before


def test_another_token_changes_the_fingerprint():
    _, tokenizer = tiny_model("bert")
    before = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before


def test_using_a_tokenizer_does_not_change_the_fingerprint():
    _, tokenizer = tiny_model("bert")
    before = tokenizer_digest(tokenizer)
    tokenizer(["some text", "more"], truncation=True, max_length=3, padding=True)
    assert tokenizer_digest(tokenizer) == before


def test_a_tokenizer_without_a_backend_is_fingerprinted_by_its_vocabulary():
    class Slow:
        special_tokens_map = {"pad_token": "<pad>"}  # noqa: RUF012
        chat_template = None

        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def get_vocab(self):
            return self.vocabulary

    assert tokenizer_digest(Slow({"a": 0, "b": 1})) == tokenizer_digest(Slow({"b": 1, "a": 0}))
    assert tokenizer_digest(Slow({"a": 0, "b": 1})) != tokenizer_digest(Slow({"a": 1, "b": 0}))


def test_a_tokenizer_without_padding_gets_its_end_token(tmp_path):
    folder = saved(tmp_path, "gpt2")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    assert load_base(ModelConfig(source=str(folder))).tokenizer.pad_token == "</s>"  # noqa: S105


def test_a_module_of_ones_own_becomes_a_base():
    made = base_from_module(TinySensor(channels=2), source="mine")
    assert (made.kind, made.source, made.hidden_size, made.tokenizer) == ("module", "mine", 32, None)


def test_a_module_that_does_not_say_its_size_is_named():
    made = base_from_module(torch.nn.Linear(2, 2), source="mine")
    with pytest.raises(ModelError, match="mine does not say its hidden_size"):
        _ = made.hidden_size


def test_the_sensor_model_ignores_padding():
    model, _ = tiny_model("sensor")
    values, mask = torch.randn(1, 4, 3), torch.ones(1, 4, dtype=torch.long)
    padded = torch.cat([values, torch.full((1, 2, 3), 9.0)], dim=1)
    longer = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert torch.equal(model(values=values, attention_mask=mask), model(values=padded, attention_mask=longer)[:, :4])


def test_the_sensor_model_names_a_wrong_number_of_channels():
    model, _ = tiny_model("sensor")
    with pytest.raises(ModelError, match="2 channels, the base model reads 3"):
        model(values=torch.zeros(1, 4, 2), attention_mask=torch.ones(1, 4))


def test_the_byte_tokenizer_gives_back_any_text():
    _, tokenizer = tiny_model("llama")
    text = "Grüße, 世界!\n\t<x>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_copy_of_a_base_has_its_fingerprint():
    original = base("llama")
    assert base_digest(copy.deepcopy(original.model), original.tokenizer) == original.base_digest
