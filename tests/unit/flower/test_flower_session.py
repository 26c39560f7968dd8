"""Sessions are made once and shared; a site is who its owner says, within its owner's limits."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.config import DataConfig, ExperimentConfig, ModelConfig
from federated.errors import ConfigError, DataError
from federated.flower import Session, open_session, use_app_folder
from federated.flower.client_site import ClientSite, site_of
from federated.flower.folders import app_folder, use_client_store

Make = Callable[..., Any]


class TestSession:
    def test_is_shared_where_nothing_that_makes_it_differs(self, real_config: ExperimentConfig):
        other = replace(real_config, rounds=9, name="other", run_dir="elsewhere", registry="elsewhere")
        assert open_session(other) is open_session(real_config)

    @pytest.mark.parametrize(
        "change", [{"seed": 99}, {"train": {"steps": 2}}, {"adapter": {"rank": 3}}, {"data": {"seed": 1}}], ids=str
    )
    def test_is_another_where_something_does(
        self, real_config: ExperimentConfig, real_session: Session, change: dict[str, Any]
    ):
        parts = {
            key: replace(getattr(real_config, key), **value) if isinstance(value, dict) else value
            for key, value in change.items()
        }
        assert open_session(replace(real_config, **parts)) is not real_session

    def test_the_seed_decides_the_first_adapter(self, real_config: ExperimentConfig):
        first, second = (open_session(replace(real_config, seed=seed)).initial.tensors for seed in (0, 7))
        name = next(name for name in first if name.endswith("factor_a"))
        assert not torch.equal(first[name], second[name])

    def test_the_first_adapter_changes_nothing_yet(self, real_session: Session):
        factors = [tensor for name, tensor in real_session.initial.tensors.items() if name.endswith("factor_b")]
        assert len(factors) == 4
        assert all(tensor.abs().max() == 0 for tensor in factors)

    def test_training_leaves_the_first_adapter_alone(self, real_config: ExperimentConfig):
        session = open_session(real_config)
        before = {name: tensor.clone() for name, tensor in session.initial.tensors.items()}
        moved = {name: tensor + 1.0 for name, tensor in before.items()}
        session.adapter.write(replace(session.initial, tensors=moved))
        assert all(torch.equal(session.initial.tensors[name], tensor) for name, tensor in before.items())

    def test_a_client_s_data_is_split_and_encoded(self, real_session: Session):
        data = real_session.local_data("client-001")
        assert (len(data.train), len(data.test)) == (8, 4)
        assert real_session.local_data("client-001", held_out_only=True).train == []

    def test_an_unknown_client_has_no_data(self, real_session: Session):
        with pytest.raises(DataError, match="no client 'client-999'"):
            real_session.local_data("client-999")


def written(path: Path, text: str) -> dict[str, str]:
    path.write_text(text, encoding="utf-8")
    return {"client-config": str(path)}


class TestSite:
    def test_a_partition_is_the_client_of_that_place(self, real_config: ExperimentConfig, tmp_path: Path):
        site = site_of({"partition-id": 1, "num-partitions": 3}, real_config)
        assert (site.client_id, site.data, site.model) == ("client-001", None, None)
        assert site.store == str(tmp_path / "clients")

    def test_a_number_may_come_as_text(self, real_config: ExperimentConfig):
        assert site_of({"partition-id": "2"}, real_config).client_id == "client-002"

    @pytest.mark.parametrize("index", [3, -1, "x", 1.5, "", None, True], ids=repr)
    def test_a_place_that_is_none_is_refused(self, real_config: ExperimentConfig, index: Any):
        with pytest.raises(ConfigError, match="the data has 3 clients, numbered from 0"):
            site_of({"partition-id": index}, real_config)

    def test_a_node_that_says_nothing_is_told_what_to_say(self, real_config: ExperimentConfig):
        with pytest.raises(ConfigError, match=r"neither 'client-config' .* nor 'partition-id'"):
            site_of({"num-partitions": 3}, real_config)

    def test_a_file_says_all(self, real_config: ExperimentConfig, tmp_path: Path):
        text = """
            client_id: Klinik Nürnberg
            store: /var/lib/fedpeft
            data: {name: files, path: /srv/data, partition: natural}
            model: {source: /srv/model}
            max_rank: 4
            allowed_base_digests: [abc]
        """
        site = site_of(written(tmp_path / "client.yaml", text), real_config)
        assert site == ClientSite(
            "Klinik Nürnberg",
            "/var/lib/fedpeft",
            data=DataConfig(name="files", path="/srv/data"),
            model=ModelConfig(source="/srv/model"),
            max_rank=4,
            allowed_base_digests=("abc",),
        )

    def test_the_file_wins_over_a_place(self, real_config: ExperimentConfig, tmp_path: Path):
        node = written(
            tmp_path / "client.yaml",
            "{client_id: own, store: /tmp/x, data: {name: synthetic}, model: {source: 'tiny:bert'}}",
        ) | {"partition-id": "1"}
        assert site_of(node, real_config).client_id == "own"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "client.yaml: expected a mapping of keys to values"),
            ("just text", "client.yaml: expected a mapping of keys to values"),
            ("{client_id: [a], store: x}", "client_id: found a list, expected one text"),
            ("{client_id: a, store: x, allowed_base_digests: abc}", "allowed_base_digests: expected a list, such as ["),
            (
                "{client_id: a, store: x, data: files}",
                "data: expected a section: data.KEY, where KEY is one of name, path",
            ),
            ("{client_id: a}", "store: Field required"),
            ("{client_id: 5, store: x}", "client_id: Input should be a valid string"),
            ("{client_id: a, store: x, max_rank: many}", "max_rank: Input should be a valid integer"),
            ("{client_id: a, store: x, data: {name: secret}}", "data.name: Input should be"),
            ("{client_id: a, store: x, max_rnk: 4}", "max_rnk: unknown key"),
            ("{client_id: a, store: x, model: {sauce: y}}", "model.sauce: unknown key"),
            ("{client_id: a, store: x, model: {source: y}}", "data must be given: a server never chooses"),
            ("{client_id: a, store: x, data: {name: synthetic}}", "model must be given"),
            ("{client_id: [", "not valid YAML"),
            ("!!python/object/apply:os.system [echo]", "not valid YAML"),
        ],
    )
    def test_a_file_that_is_wrong_is_named_with_the_key(
        self, real_config: ExperimentConfig, tmp_path: Path, text: str, message: str
    ):
        with pytest.raises(ConfigError) as caught:
            site_of(written(tmp_path / "client.yaml", text), real_config)
        assert str(tmp_path / "client.yaml") in str(caught.value)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_file_that_is_no_text_or_not_there(self, real_config: ExperimentConfig, tmp_path: Path):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ConfigError, match="not valid YAML"):
            site_of({"client-config": str(tmp_path / "binary")}, real_config)
        with pytest.raises(ConfigError, match="No such file"):
            site_of({"client-config": str(tmp_path / "missing")}, real_config)


class TestSigningKey:
    TEXT = "{client_id: a, store: x, data: {name: synthetic}, model: {source: y}, signing_key: %s}"

    @pytest.mark.parametrize("key", ["keys/update.pem", "../update.pem"])
    def test_a_relative_path_starts_at_the_files_own_folder(
        self, real_config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
    ):
        written(tmp_path / "client.yaml", self.TEXT % key)
        monkeypatch.chdir(tmp_path.parent)
        relative = {"client-config": f"{tmp_path.name}/client.yaml"}
        assert site_of(relative, real_config).signing_key == str(tmp_path / key)

    def test_an_absolute_path_stays(self, real_config: ExperimentConfig, tmp_path: Path):
        node = written(tmp_path / "client.yaml", self.TEXT % "/srv/keys/update.pem")
        assert site_of(node, real_config).signing_key == "/srv/keys/update.pem"

    def test_without_one_nothing_is_signed(self):
        assert ClientSite("a", "x").update_key is None

    def test_it_is_read_when_it_is_used(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="No such file"):
            _ = ClientSite("a", "x", signing_key=str(tmp_path / "none.pem")).update_key


class TestLimits:
    def test_the_owner_s_data_and_model_replace_the_server_s(self, real_config: ExperimentConfig):
        data, model = DataConfig(name="files", path="/srv/data"), ModelConfig(source="/srv/model")
        applied = ClientSite("a", "x", data=data, model=model).applied_to(real_config)
        assert (applied.data, applied.model) == (data, model)
        assert replace(applied, data=real_config.data, model=real_config.model) == real_config

    def test_without_any_the_experiment_stays(self, real_config: ExperimentConfig):
        assert ClientSite("a", "x").applied_to(real_config) == real_config


def test_folders_are_named_for_child_processes_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPEFT_APP", "")
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", "")
    assert app_folder() is None
    use_app_folder(tmp_path / ".." / tmp_path.name)
    use_client_store(tmp_path)
    assert app_folder() == tmp_path
    assert os.environ["FEDPEFT_CLIENT_STORE"] == str(tmp_path)
