"""A PEFT folder of ours is loaded by peft alone, by the lines of its own model card, with the version's answers.

The loading process knows nothing of this library: an import of ``federated`` fails there.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from federated.adapters import read_peft
from federated.config import AdapterConfig
from federated.errors import FederatedError, ModelError, WireError
from federated.manifest import VersionManifest, sha256_hex
from federated.release import Artefact
from federated.release.export_peft import export_peft
from federated.release.exportable import Exportable, export

from .peft_cases import CASES, PRIVACY, TEXT, exportable, logits, products, sensor, state_of, version

pytestmark = pytest.mark.slow

LOADER = """
import os, re, sys, warnings
sys.modules["federated"] = None
warnings.simplefilter("ignore")
import numpy as np, torch
ids = torch.arange(4, 24).reshape(2, 10)
mask = torch.ones_like(ids)
mask[1, 7:] = 0
for folder in sys.argv[1:]:
    os.chdir(folder)
    known = {}
    exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1], known)
    with torch.no_grad():
        answer = known["model"](input_ids=ids, attention_mask=mask)
    np.save("logits.npy", getattr(answer, "logits", answer).numpy())
"""
IDS = torch.arange(4, 24).reshape(2, 10)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def subjects(bases: Path) -> dict[str, Exportable]:
    return {name: exportable(name, bases) for name in CASES}


@pytest.fixture(scope="module")
def folders(subjects: dict[str, Exportable], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case exported, and loaded once by peft in another process."""
    root = tmp_path_factory.mktemp("exports")
    for name, subject in subjects.items():
        export(subject, export_peft, root / name)
    made = {name: root / name for name in subjects}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *map(str, made.values())],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return made


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("name", CASES)
def test_peft_answers_as_a_device_does(name: str, folders: dict[str, Path], subjects: dict[str, Exportable]) -> None:
    subject = subjects[name]
    expected, found = logits(subject, INPUTS), torch.from_numpy(np.load(folders[name] / "logits.npy"))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    real = slice(0, 7) if found.ndim == 3 else slice(None)  # what stands on padding means nothing
    torch.testing.assert_close(found[1, real], expected[1, real], rtol=1e-5, atol=1e-5)
    state = state_of(subject)
    nothing = replace(state, tensors={key: torch.zeros_like(one) for key, one in state.tensors.items()})
    assert not torch.allclose(logits(subject, INPUTS, nothing), expected, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CASES if "ia3" not in name])
def test_there_and_back_again(name: str, folders: dict[str, Path], subjects: dict[str, Exportable]) -> None:
    subject = subjects[name]
    config, state = read_peft(folders[name], subject.base, subject.task, seed=99)
    before = state_of(subject)
    for layer, product in products(before).items():
        torch.testing.assert_close(products(state)[layer], product, rtol=0, atol=1e-6 * float(product.abs().max()))
    rounding = 1e-5 if before.spec.dtype == "F32" else 2e-3  # a head in float32 comes back in the factors' dtype
    torch.testing.assert_close(logits(subject, INPUTS, state), logits(subject, INPUTS), rtol=1e-4, atol=rounding)
    assert config.use_rslora == before.spec.use_rslora


@pytest.mark.parametrize("name", ["llama-grown", "llama-grown-rslora"])
def test_a_grown_adapter_is_plain_lora_of_one_rank(name: str, folders: dict[str, Path], subjects: Any) -> None:
    ranks = {module.rank for module in subjects[name].manifest.spec.modules}
    config = config_of(folders[name])
    assert len(ranks) > 1
    assert config["r"] == max(ranks)
    assert {"rank_pattern", "alpha_pattern"} & set(config) == set()


def test_layers_are_called_by_their_last_names_where_that_is_exact(folders: dict[str, Path]) -> None:
    assert config_of(folders["llama"])["target_modules"] == ["q_proj", "v_proj"]
    assert config_of(folders["llama-one-layer"])["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert config_of(folders["gpt2"])["fan_in_fan_out"]
    assert config_of(folders["bert-stock"])["modules_to_save"] == ["bert.pooler", "classifier"]
    assert config_of(folders["llama"])["lora_alpha"] == 6.5
    assert isinstance(config_of(folders["gpt2"])["lora_alpha"], int)


def test_a_sum_of_layers_of_other_scalings_is_exact(bases: Path, tmp_path: Path) -> None:
    """As after ranks were cut to a layer's smaller side: alpha stays, so each layer has a scaling of its own."""
    subject = exportable("llama", bases)
    state = state_of(subject)
    modules = tuple(replace(one, alpha=one.alpha * (1 + index)) for index, one in enumerate(state.spec.modules))
    spec = replace(state.spec, modules=modules, dtype="BF16")
    state = replace(state, spec=spec).cast("BF16")
    mixed = replace(subject, artefact=_artefact(subject, spec, state))
    export(mixed, export_peft, tmp_path / "out")
    _, found = read_peft(tmp_path / "out", mixed.base, TEXT, seed=0)
    for layer, product in products(state).items():
        torch.testing.assert_close(products(found)[layer], product, rtol=0, atol=1e-6 * float(product.abs().max()))


def _artefact(subject: Exportable, spec: Any, state: Any) -> Artefact:
    from federated.state import to_raw
    from federated.wire import encode_tensors

    weights = encode_tensors(to_raw(state.tensors))
    return Artefact(replace(subject.manifest, spec=spec, weights_digest=sha256_hex(weights)), weights)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's
def test_a_plain_module_is_loaded_around(tmp_path: Path) -> None:
    subject = sensor()
    export(subject, export_peft, tmp_path / "out")
    from peft import PeftModel

    from federated.adapters.heads import MeanPoolClassifier
    from federated.adapters.tiny import tiny_model

    values, mask = torch.randn(2, 6, 3), torch.ones(2, 6)
    host = MeanPoolClassifier(tiny_model("sensor")[0], 32, 2)
    loaded = PeftModel.from_pretrained(host, tmp_path / "out").eval()
    with torch.no_grad():
        found = loaded(values=values, attention_mask=mask)
    torch.testing.assert_close(found, logits(subject, {"values": values, "attention_mask": mask}), rtol=1e-5, atol=1e-6)
    assert "YourModule()" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["prompt", "prefix", "layernorm", "full"])
def test_kinds_that_peft_counts_in_another_way_are_refused(kind: Any, bases: Path, tmp_path: Path) -> None:
    subject = exportable("llama", bases)
    made = version(subject.base, TEXT, AdapterConfig(kind=kind))
    with pytest.raises(ModelError, match=f"is an adapter of kind {kind}; as a PEFT folder go lora, ia3"):
        export(replace(subject, artefact=made), export_peft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_alone_is_refused(bases: Path, tmp_path: Path) -> None:
    subject = exportable("bert-pooled", bases)
    made = version(subject.base, subject.task, AdapterConfig(kind="head"))
    with pytest.raises(ModelError, match="of kind head"):
        export(replace(subject, artefact=made), export_peft, tmp_path / "out")


def test_weights_that_are_not_what_the_record_says(bases: Path, tmp_path: Path) -> None:
    subject = exportable("llama", bases)
    for weights, error in ((b"no tensors", WireError), (_short(subject), ModelError)):
        manifest: VersionManifest = replace(subject.manifest, weights_digest=sha256_hex(weights))
        broken = replace(subject, artefact=Artefact(manifest, weights))
        with pytest.raises(error):
            export(broken, export_peft, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def _short(subject: Exportable) -> bytes:
    from federated.wire import decode_tensors, encode_tensors

    tensors = decode_tensors(subject.artefact.weights)
    return encode_tensors(dict(list(tensors.items())[1:]))


def test_what_clients_hold_a_part_of_is_refused(bases: Path) -> None:
    with pytest.raises(FederatedError, match="cannot be served"):
        exportable("llama", bases, servable=False)


def card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_says_where_it_came_from(bases: Path, tmp_path: Path) -> None:
    fields = {
        "adapter_id": "support", "licence": "Apache-2.0", "privacy": PRIVACY, "metrics": {"train_loss": 0.125},
        "parent": "d" * 64, "release_counter": 7, "code_version": "0.1.0",
    }  # fmt: skip
    subject = replace(exportable("bert-pooled", bases, **fields), public_name="org/tiny-bert")
    export(subject, export_peft, tmp_path / "out")
    front, text = card(tmp_path / "out")
    assert front == {
        "base_model": "org/tiny-bert",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["federated-learning", "federated-peft", "peft", "lora"],
    }
    for said in (
        "# support\n", subject.base.base_digest, subject.artefact.version_id, "d" * 64, "| release counter | 7 |",
        "| method | fedex + sgd |", "| rounds | 5 |", "| participants in the last round | 3 |",
        'labels | ["bad", "good", "so so"] |',
        "privacy_unit client: epsilon 3.25 at target_delta 1e-05 (accountant rdp)",
        "privacy_unit example: epsilon without a bound", "**not private**", "not protected: evaluation metrics",
        "| train_loss | 0.125 |",
    ):  # fmt: skip
        assert said in text
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "org/tiny-bert"


def test_a_card_of_a_bare_record_promises_nothing(folders: dict[str, Path]) -> None:
    front, text = card(folders["llama-core"])
    assert "license" not in front
    for said in (
        "# Adapter\n",
        "assume that training examples can be told",
        "None are in the record",
        "licence | not stated",
    ):
        assert said in text


def test_how_to_load_says_what_the_record_does(bases: Path, tmp_path: Path) -> None:
    model = {"dtype": "bfloat16", "revision": "v1", "gguf_file": "x.gguf"}
    export(exportable("llama", bases, model=model), export_peft, tmp_path / "out")
    assert ', dtype="bfloat16", revision="v1", gguf_file="x.gguf")' in card(tmp_path / "out")[1]


def test_a_folder_s_path_is_not_told(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = replace(exportable("llama", bases), public_name="")
    assert subject.base_name == "llama"
    named = {"org/model": "org/model", "tiny:bert": "tiny-bert", "gpt2": "gpt2", "models/mine": "mine"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for source, said in named.items():
        assert replace(subject, base=replace(subject.base, source=source)).base_name == said
