"""``fedpeft release publish`` with variants: measured on rows by the model that a version's record describes."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from federated.adapters import attach, load_base
from federated.cli.compose import compose
from federated.cli.release_variants import loss_on
from federated.errors import BaseMismatch
from federated.flower.publisher import recipe_record
from federated.manifest import RawTensor, VersionManifest, sha256_hex
from federated.registry import Registry
from federated.release import TOLERANCE, ReleaseClient, pem
from federated.state import to_raw
from federated.wire import encode_tensors

ROOT = Path(__file__).resolve().parents[3]
Command = Callable[..., Any]


@pytest.fixture
def versions(here: Path) -> list[VersionManifest]:
    """Three versions of adapters of the tiny BERT, each near the one before; ``stable`` is at the first."""
    config = compose(ROOT, ["experiment=tiny"])
    base = load_base(config.model)
    adapter = attach(base, config.adapter, config.task, seed=config.seed)
    rng, now = np.random.default_rng(0), to_raw(adapter.read().tensors)
    made: list[VersionManifest] = []
    with Registry.open(here / "registry") as registry:
        for number in range(3):
            steps = {name: rng.standard_normal(one.shape) for name, one in now.items()}
            moved = {
                name: one.array * (1 + 1e-3 * steps[name]) + (0 if made else 0.02 * steps[name])
                for name, one in now.items()
            }
            now = {name: RawTensor.from_array(one.astype(np.float32)) for name, one in moved.items()}
            weights = encode_tensors(now)
            manifest = VersionManifest(
                sha256_hex(weights), base.base_digest, adapter.spec, "fedit", "run-a", number,
                parent=made[-1].version_id if made else None, adapter_id="tiny", release_counter=number + 1,
                task=recipe_record(config),
            )  # fmt: skip
            registry.publish(manifest, weights, channel="dev")
            made.append(manifest)
        registry.channel("stable").promote("v0")
    rows = [f"a row about {word},{config.task.labels[number % 2]}" for number, word in enumerate("abcdefgh")]
    (here / "rows.csv").write_text("\n".join(["text,label", *rows]))
    return made


@pytest.fixture
def publish(fedpeft: Command, here: Path, versions: object, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Promotes a version to ``stable`` and publishes it."""
    monkeypatch.setattr(pem, "COST", 2)
    monkeypatch.setenv("FEDPEFT_PASSPHRASE", "correct")
    monkeypatch.setenv("FEDPEFT_REGISTRY", str(here / "registry"))
    fedpeft("release", "keys", "init", "--signatures", "root=1/1")

    def run(version: str, *arguments: object, code: int = 0) -> Any:
        fedpeft("channel", "promote", version, "--to", "stable")
        return fedpeft("release", "publish", "stable", *arguments, code=code)

    return run


def device(here: Path) -> ReleaseClient:
    return ReleaseClient(here / "keys/trusted/root.json", here / "releases", here / "device")


def shipped(here: Path) -> list[tuple[str, str]]:
    """Codec of each variant that a device sees, and the beginning of what it starts from."""
    client = device(here)
    client.refresh()
    return sorted((one.codec, one.source[:12]) for one in client.resolve("stable").record.variants)


def test_without_rows_only_lossless_variants(publish: Command, here: Path, versions: list[VersionManifest]) -> None:
    done = publish("v0")
    assert "no --held-out rows to measure a loss on: lossless variants only" in done.err
    assert re.search(r"│ lossless +│ +│ \d+ +│ \d+\.\d% +│ +│ yes +│", done.out)
    assert done.out.splitlines()[-1].startswith("published on stable: version ")
    assert shipped(here) == [("lossless", "")]
    publish("v1")
    first = versions[0].weights_digest[:12]
    assert shipped(here) == [("diff", first), ("lossless", "")]
    publish("v1")  # again: from the same version as before
    assert shipped(here) == [("diff", first), ("lossless", "")]


def test_measured_variants(publish: Command, here: Path) -> None:
    publish("v0", "--held-out", "rows.csv", "--tolerance", "0.5")
    client = device(here)
    held = client.download(client.resolve("stable"), prefer="smallest")
    done = publish("v1", "--held-out", "rows.csv", "--tolerance", "0.5")
    assert re.search(r"│ weights +│ +│ \d+ +│ 100\.0% +│ 0\.\d{6} +│ yes +│", done.out)
    client.refresh()
    found = client.resolve("stable")
    assert found.record.loss is not None
    assert all(one.loss is not None and one.loss <= 1.5 * found.record.loss for one in found.record.variants)
    files = client.download(found, prefer="smallest", holding=[held.weights])
    assert files.way.startswith(("recode-", "diff-"))
    assert files.nbytes < 0.2 * found.sizes["weights.safetensors"]
    measured = loss_on(files.manifest, here / "rows.csv")
    (signed,) = {one.loss for one in found.record.variants if one.weights_digest == files.weights_digest}
    assert measured(files.weights.read_bytes()) == pytest.approx(signed, rel=1e-5)


def test_named_codecs(publish: Command, here: Path, versions: list[VersionManifest]) -> None:
    publish("v0", "--variants", "int8")
    publish("v1", "--variants", "none")
    assert shipped(here) == []
    publish("v2", "--variants", "int8,recode-int8", "--diff-from", "v1")
    assert shipped(here) == [("int8", ""), ("recode-int8", versions[1].weights_digest[:12])]
    publish("v2", "--variants", "diff", "--diff-from", "v1", "--diff-from", "v0")
    assert len(shipped(here)) == 3  # from v1, and from both of what devices hold of v0
    publish("v2", "--variants", "int8,diff", "--diff-from", "none")
    assert shipped(here) == [("int8", "")]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--variants", "zip"), 1, "no codec 'zip'; there are lossless, fp16"),
        (("--diff-from", "none", "--diff-from", "v1"), 2, "--diff-from none stands alone"),
        (("--diff-from", "v9"), 1, "v9"),
        (("--held-out", "none.csv"), 1, "none.csv: no such file"),
    ],
)
def test_what_cannot_be_asked(publish: Command, arguments: tuple[str, ...], code: int, message: str) -> None:
    assert message in publish("v1", *arguments, code=code).err


def test_a_base_that_is_another_one_by_now(here: Path, versions: list[VersionManifest]) -> None:
    other = replace(versions[0], base_digest="c" * 64)
    with pytest.raises(BaseMismatch, match="belongs to the base model cccccccccccc, and tiny:bert is"):
        loss_on(other, here / "rows.csv")


def test_the_default_tolerance_is_the_librarys(fedpeft: Command) -> None:
    assert f"[default: {TOLERANCE}]" in fedpeft("release", "publish", "--help").out


def test_weights_that_are_not_canonical(publish: Command, here: Path) -> None:
    with Registry.open(here / "registry") as registry:
        manifest = replace(registry.get("v0").manifest, weights_digest=sha256_hex(b"junk"), round_number=7)
        version = registry.publish(manifest, b"junk")
    assert "no variants: the weights are not canonical" in publish(version).err
    assert shipped(here) == []
