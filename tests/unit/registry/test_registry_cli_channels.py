"""``fedpeft channel``, ``approve``, ``audit`` and what of ``registry`` writes, as typed."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from federated.cli.main import app
from federated.errors import ConfigError, FederatedError, NotApproved, RegistryError
from federated.manifest import RawTensor, sha256_hex
from federated.registry import Registry
from federated.wire import encode_tensors


@pytest.fixture
def fedpeft(monkeypatch, registry, publish, location):
    """Runs a command on a registry of v0 (dev) and v1; its output in words."""
    first = publish(b"one", channel="dev")
    publish(b"two", round_number=1, parent=first)
    registry.close()
    monkeypatch.setenv("FEDPEFT_REGISTRY", str(location))

    def run(*arguments, ok=True):
        result = CliRunner().invoke(app, list(arguments))
        assert (result.exception is None) is ok, (result.output, result.exception)
        return result.stdout if ok else result.exception

    return run


def test_a_version_goes_out_and_comes_back(fedpeft, location):
    assert re.fullmatch(r"stable points at v0 \(\w{12}\)\n", fedpeft("channel", "promote", "v0", "--to", "stable"))
    fedpeft("channel", "promote", "v1", "--to", "stable", "--expect", "v0")
    assert re.fullmatch(r"stable points at v0 \(\w{12}\) again\n", fedpeft("channel", "rollback", "stable"))
    with Registry.open(location, create=False) as registry:
        assert registry.get("stable").number == 0


def test_rollback_to_a_version(fedpeft):
    fedpeft("channel", "promote", "v0", "--to", "stable")
    fedpeft("channel", "promote", "v1", "--to", "stable")
    assert "v0" in fedpeft("channel", "rollback", "stable", "--to", "v0", "--expect", "v1")


def test_expecting_another_version_is_a_conflict(fedpeft):
    fedpeft("channel", "promote", "v0", "--to", "stable")
    assert "moved meanwhile" in str(fedpeft("channel", "promote", "v1", "--to", "stable", "--expect", "v1", ok=False))


def test_a_new_channel_is_made_by_expecting_nothing(fedpeft):
    assert "--expect nothing" in str(fedpeft("channel", "promote", "v0", "--to", "pilot", ok=False))
    assert "pilot points" in fedpeft("channel", "promote", "v0", "--to", "pilot", "--expect", "nothing")


def test_two_people_approve(fedpeft):
    assert fedpeft("channel", "require", "stable", "--approvals", "2") == "stable requires 2 approvals\n"
    assert isinstance(fedpeft("channel", "promote", "v1", "--to", "stable", ok=False), NotApproved)
    for name in ("Ann", "Bob"):
        said = fedpeft("approve", "v1", "--for", "stable", "--as", name)
    assert said.endswith("is approved for stable by Ann, Bob\n")
    fedpeft("channel", "promote", "v1", "--to", "stable")


def test_list_shows_what_is_required(fedpeft):
    fedpeft("channel", "require", "stable", "--approvals", "2")
    rows = [line.split("│")[1:-1] for line in fedpeft("channel", "list").splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["dev", "v0", rows[0][2].strip(), "run-a", "2026-01-01 00:00:02", ""],
        ["stable", "", "nothing yet", "", "", "2 approvals"],
    ]


def test_history(fedpeft):
    fedpeft("channel", "promote", "v1", "--to", "dev", "--as", "Ann")
    rows = [line for line in fedpeft("channel", "history", "dev").splitlines() if line.startswith("│")]
    assert ["promote" in row for row in rows] == [True, True]
    assert "Ann" in rows[0]


def test_log_ends_with_its_head(fedpeft, location):
    with Registry.open(location, create=False) as registry:
        head = registry.audit.head()
    output = fedpeft("audit", "log", "--newest", "2")
    assert output.endswith(f"head {head}\n")
    assert [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")] == ["4", "3"]


def test_log_as_json_is_what_the_digests_cover(fedpeft):
    rows = [json.loads(line) for line in fedpeft("audit", "log", "--json").splitlines()]
    assert [row["action"] for row in rows] == ["init", "publish", "promote", "publish"]
    assert {"number", "at", "actor", "subject", "details", "previous", "digest"} < set(rows[0])


def test_long_details_are_cut_in_the_table(fedpeft, monkeypatch):
    monkeypatch.setattr("federated.cli.audit._SHOWN", 5)
    assert '{"rou...' in fedpeft("audit", "log")


def test_verify_says_that_it_is_whole(fedpeft, location):
    with Registry.open(location, create=False) as registry:
        head = registry.audit.head()
    assert fedpeft("audit", "verify") == f"4 rows are whole; head {head}\n"
    assert f"holds the head that was kept at row {head.number}" in fedpeft("audit", "verify", "--head", str(head))
    assert fedpeft("registry", "verify").startswith("2 versions, their bytes and lineages, the channels")


def test_verify_fails_with_the_row(fedpeft, location):
    head = f"9:{'a' * 64}"
    error = fedpeft("audit", "verify", "--head", head, ok=False)
    assert isinstance(error, RegistryError)
    assert "tampered with at row 5 (1 faults)" in str(error)


def test_registry_verify_names_what_rotted(fedpeft, location):
    for blob in location.glob("blobs/*/*"):
        blob.write_bytes(b"rot")
    assert "2 faults" in str(fedpeft("registry", "verify", ok=False))


def test_tags_are_given_listed_and_removed(fedpeft):
    assert re.fullmatch(r"release-1  \w{64}\n", fedpeft("registry", "tag", "v1", "release-1"))
    assert "release-1" in fedpeft("registry", "list")
    assert fedpeft("registry", "tag", "--remove", "release-1") == ""
    assert fedpeft("registry", "tag") == ""


@pytest.mark.parametrize("arguments", [["v1"], ["v1", "x", "--remove", "x"]])
def test_tag_says_what_it_takes(fedpeft, arguments):
    assert isinstance(fedpeft("registry", "tag", *arguments, ok=False), ConfigError)


def test_init_makes_one(fedpeft, tmp_path):
    assert fedpeft("registry", "init", str(tmp_path / "new"), "--as", "Ann").startswith(
        f"registry {tmp_path / 'new'}: 0"
    )
    with Registry.open(tmp_path / "new", create=False) as registry:
        assert registry.audit.entries()[0].actor == "Ann"


def test_init_where_nobody_may_write(fedpeft, tmp_path):
    (tmp_path / "file").write_text("x")
    assert isinstance(fedpeft("registry", "init", str(tmp_path / "file"), ok=False), FederatedError)


def test_newest_few(fedpeft):
    assert "1 versions" in fedpeft("registry", "list", "--newest", "1")


def test_the_process_s_user_is_noted(fedpeft, location, monkeypatch):
    monkeypatch.setenv("LOGNAME", "carla")
    fedpeft("registry", "tag", "v1", "x")
    with Registry.open(location, create=False) as registry:
        assert registry.audit.entries()[-1].actor == "carla"


def test_a_user_without_a_name_has_a_number(monkeypatch):
    from federated.cli import registry

    def nobody():
        raise KeyError("uid not found")

    monkeypatch.setattr(registry.getpass, "getuser", nobody)
    assert registry.actor().startswith("user ")


def test_gc_says_what_would_go_and_then_removes_it(fedpeft, location):
    said = fedpeft("registry", "gc", "--dry-run", "--older-than", "0")
    assert re.fullmatch(r"would remove \w{64}\n1 versions and 1 blobs \(3 bytes\) would go, 1 kept\n", said)
    assert fedpeft("registry", "gc", "--older-than", "0").startswith("removed ")
    with Registry.open(location, create=False) as registry:
        assert len(registry.versions()) == 1


def test_gc_keeps_young_versions_and_says_so(fedpeft, location):
    with Registry.open(location, create=False) as registry:
        manifest = registry.get("v1").manifest
        registry.publish(replace(manifest, round_number=2), b"two")
    output = fedpeft("registry", "gc")
    assert "2 kept (1 of them only because they are younger than 1 days)" in output


def test_diff_of_what_are_no_tensors(fedpeft):
    output = fedpeft("registry", "diff", "v0", "v1")
    assert "from v0" in output
    assert "round_number" in output
    assert "cannot be compared" in output


def test_diff_of_tensors(fedpeft, location):
    base = {"a": np.array([3.0, 4.0], np.float32), "b": np.ones(1, np.float32)}
    changed = {"a": np.array([3.0, 1.0], np.float32), "b": np.ones(1, np.float32), "c": np.ones(1, np.float32)}
    ids = []
    with Registry.open(location, create=False) as registry:
        for number, arrays in enumerate((base, changed, base)):
            data = encode_tensors({name: RawTensor.from_array(array) for name, array in arrays.items()})
            fields = {"weights_digest": sha256_hex(data), "run_id": f"run-{number}", "parent": None}
            ids.append(registry.publish(replace(registry.get("v0").manifest, **fields), data))
    output = fedpeft("registry", "diff", *ids[:2])
    assert "no common ancestor" in output
    assert "60.00%" in output
    assert "2 of 3 tensors differ; the change is 60.00% of the first's length" in output
    assert "only in the second" in output
    assert "only in the second" not in fedpeft("registry", "diff", *ids[:2], "--largest", "0")
    assert "all 2 tensors are equal" in fedpeft("registry", "diff", ids[0], ids[2])


def test_export_and_import(fedpeft, location, tmp_path):
    data = encode_tensors({"a": RawTensor.from_array(np.ones(2, np.float32))})
    with Registry.open(location, create=False) as registry:
        fields = {"weights_digest": sha256_hex(data), "run_id": "run-x", "parent": None}
        registry.publish(replace(registry.get("v0").manifest, **fields), data)
    out, other = str(tmp_path / "out"), str(tmp_path / "other")
    assert "and 0 ancestors" in fedpeft("registry", "export", "run-x:v0", "--to", out)
    fedpeft("registry", "init", other)
    assert f"and 0 ancestors are in {other}" in fedpeft("registry", "import", out, "--registry", other, "--as", "Ann")
    with Registry.open(other, create=False) as registry:
        assert [entry.actor for entry in registry.audit.entries()][-1] == "Ann"
