"""What a release's codecs save and cost: bytes and held-out loss of every variant and diff of trained adapters.

    python -m simulations.benchmarks.release_codecs [--quick] [--seed N] [--run FOLDER]

Two federations are run here. ``airlines``: the default task, ``experiment=airlines`` (MiniLM, rank 8, head).
``stdlib``: a language model, the bundled 1 M-parameter Llama of speeches, which learns the texts of Python's own
standard library, one package to a client (rank 16, all linear layers; nothing is fetched). With ``--run`` a run that
you have takes the place of the first.

Of the last version each codec is measured: the size against that of all numbers in 16 bits, and the loss on all that
the clients hold out, against that of the version's own weights. Diffs start from the version before. Then the newest
versions are published one after another as ``--variants auto`` does, and a device that follows by the smallest way is
compared with one that fetches the full weights. ``line`` is that device's loss at the end: steps start from what it
held, so their errors do not add up.

The best diff is the smallest lossy or lossless one whose loss is within the publisher's tolerance. Top-level figures
of the JSON line are of the first federation; all are under each name.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from federated.cli.apps import enter_app, load_client_app
from federated.cli.compose import compose
from federated.config import ExperimentConfig, experiment_from
from federated.flower import open_session, simulate
from federated.flower.baselines import evaluate_everywhere
from federated.manifest import VersionManifest, sha256_hex
from federated.registry import Registry
from federated.release import TOLERANCE, Artefact, with_variants
from federated.release.codecs import DIFFS, FULL, decode, encode
from federated.state import AdapterState, from_raw
from federated.wire import decode_tensors

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("asyncio", "email", "json", "unittest", "xml", "logging", "http", "importlib")
CHARACTERS = 400
FOLLOWED = 4
Loss = Callable[[bytes], float]


@dataclass
class Subject:
    """A federation's versions, and how they are measured.

    Args:
        name: of the federation.
        manifest: of the last version.
        versions: weights, oldest first.
        measure: held-out loss of weights.
    """

    name: str
    manifest: VersionManifest
    versions: list[bytes]
    measure: Loss
    known: dict[str, float] = field(default_factory=dict)

    def loss(self, weights: bytes) -> float:
        """Measured once."""
        digest = sha256_hex(weights)
        if digest not in self.known:
            self.known[digest] = self.measure(weights)
        return self.known[digest]


def stdlib_texts(folder: Path, packages: Iterable[str], rows: int) -> Path:
    """One JSONL file for each package: pieces of its modules' texts, in order, at most so many."""
    folder.mkdir()
    for package in packages:
        source = Path(sysconfig.get_paths()["stdlib"]) / package
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(source.glob("*.py")))
        pieces = [text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS)][:rows]
        lines = [json.dumps({"text": piece}) for piece in pieces if piece.strip()]
        (folder / f"{package}.jsonl").write_text("\n".join(lines))
    return folder


def overrides(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """A federation as ``fedpeft simulate`` takes it."""
    made = [f"seed={options.seed}", "tracking.progress=false", "engine.workers=1", f"run_dir={folder / name}"]
    if name == "airlines":
        made += ["experiment=airlines", f"rounds={2 if options.quick else 6}"]
        return made + (["data.max_train_per_client=32", "data.max_test_per_client=8"] if options.quick else [])
    packages = PACKAGES[:2] if options.quick else PACKAGES
    texts = stdlib_texts(folder / "texts", packages, 40 if options.quick else 160)
    made += ["model=sotu_llama", "task=causal_lm", "adapter=lora_all", "adapter.rank=16", "adapter.alpha=32"]
    made += ["data=files", f"data.path={texts}", "train.learning_rate=0.005", "name=stdlib"]
    return [*made, f"rounds={2 if options.quick else 6}", f"data.max_test_per_client={8 if options.quick else 40}"]


def federated(name: str, options: argparse.Namespace, folder: Path) -> Subject:
    """Run a federation, and keep its versions."""
    config = compose(ROOT, overrides(name, options, folder))
    summary = simulate(config, load_client_app(enter_app(ROOT)))
    return subject_of(name, config, summary.registry)


def subject_of(name: str, config: ExperimentConfig, location: Any) -> Subject:
    """The versions of a run's registry."""
    with Registry.open(location, create=False) as registry:
        lineage = registry.lineage("latest")[::-1]
        versions = [registry.weights(one.version_id) for one in lineage]
    session = open_session(config)

    def measure(weights: bytes) -> float:
        state = AdapterState(session.initial.spec, from_raw(decode_tensors(weights)))
        return float(evaluate_everywhere(session, state)[0]["loss"])

    return Subject(name, lineage[-1].manifest, versions, measure)


def of_a_run(folder: Path) -> Subject:
    """A run that is there."""
    config = experiment_from(yaml.safe_load((folder / "config.yaml").read_text()))
    return subject_of(config.name, config, folder / "registry")


def each_codec(subject: Subject) -> list[dict[str, Any]]:
    """One row for each codec, of the last version, from the one before."""
    before, last = subject.versions[-2:]
    half = 2 * sum(tensor.array.size for tensor in decode_tensors(last).values())
    base = subject.loss(last)
    rows = [{"codec": "weights", "nbytes": len(last), "fraction": len(last) / half, "increase": 0.0}]
    for codec in (*FULL, *DIFFS):
        held = before if codec in DIFFS else None
        made = encode(last, codec, held)
        if decode(made.data, held) != made.weights:
            raise SystemExit(f"{codec} does not give what it says")
        size = {"nbytes": len(made.data), "fraction": len(made.data) / half}
        rows.append({"codec": codec, **size, "increase": subject.loss(made.weights) - base})
    return rows


def followed(subject: Subject) -> dict[str, Any]:
    """Publish version after version with ``auto``; what devices fetch that follow by the smallest way."""
    held: list[bytes] = []
    ways: list[str] = []
    nbytes = 0
    published = subject.versions[1:][-FOLLOWED:]  # the first is untrained
    for weights in published:
        manifest = VersionManifest(
            sha256_hex(weights), subject.manifest.base_digest, subject.manifest.spec, "benchmark", "run", len(ways)
        )
        made, _ = with_variants(Artefact(manifest, weights), held=held, evaluate=subject.loss)
        sizes = {
            one: len(made.files[one.file]) for one in made.variants if not one.source or _is_held(one.source, held)
        }
        best = min(sizes, key=sizes.__getitem__)
        source = next((one for one in held if sha256_hex(one) == best.source), None)
        line = decode(made.files[best.file], source)
        ways.append(best.codec)
        nbytes += sizes[best]
        held = [line]
    return {
        "ways": ways,
        "nbytes": nbytes,
        "full_nbytes": sum(map(len, published)),
        "line_increase": subject.loss(line) - subject.loss(subject.versions[-1]),
    }


def _is_held(digest: str, held: Iterable[bytes]) -> bool:
    return any(sha256_hex(one) == digest for one in held)


def result_of(subject: Subject) -> dict[str, Any]:
    """All figures of one federation."""
    rows = each_codec(subject)
    base = subject.loss(subject.versions[-1])
    good = [one for one in rows if one["codec"] in DIFFS and one["increase"] <= TOLERANCE * base]
    best, int4 = min(good, key=lambda one: one["nbytes"]), next(one for one in rows if one["codec"] == "int4")
    show(subject, rows, base)
    return {
        "best_diff": best["codec"],
        "best_diff_fraction_of_fp16": round(best["fraction"], 4),
        "best_diff_loss_increase": round(best["increase"], 6),
        "int4_full_fraction_of_fp16": round(int4["fraction"], 4),
        "int4_full_loss_increase": round(int4["increase"], 6),
        "loss": round(base, 6),
        "null_loss": round(subject.loss(subject.versions[0]), 6),
        "followed": followed(subject),
        "codecs": {one["codec"]: [round(one["fraction"], 4), round(one["increase"], 6)] for one in rows},
    }


def show(subject: Subject, rows: Iterable[dict[str, Any]], base: float) -> None:
    """The table, in the form in which the documentation has it."""
    untrained = subject.loss(subject.versions[0])
    table = Table(
        "codec",
        "bytes",
        "of fp16",
        "loss",
        title=f"{subject.name}: held-out loss {base:.4f}, untrained {untrained:.4f}",
    )
    for one in rows:
        table.add_row(one["codec"], f"{one['nbytes']:,}", f"{one['fraction']:.3f}", f"{one['increase']:+.5f}")
    Console(stderr=True).print(table)


def main() -> None:
    """Run both federations, print their tables and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores: few rows, two rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="measure this run in place of airlines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="release-codecs-") as place:
        folder = Path(place)
        first = of_a_run(options.run) if options.run else federated("airlines", options, folder)
        results = {one.name: result_of(one) for one in (first, federated("stdlib", options, folder))}
    shown = {name: value for name, value in results[first.name].items() if name.startswith(("best", "int4"))}
    print(json.dumps({**shown, "federations": results, "seed": options.seed, "quick": options.quick}))


if __name__ == "__main__":
    main()
