"""This library's release client behind the command line that the TUF project's conformance suite asks for.

    tuf_client.py --metadata-dir DIR [--metadata-url URL] [--target-name PATH]... [...] init|refresh|download

The suite works on plain TUF repositories, without channels: so this goes one floor below `ReleaseClient`, to the same
workflow, store and transfer. Run by `test_tuf_conformance`.
"""

import argparse
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from federated.errors import FederatedError, NotReleased
from federated.release.source import HttpSource
from federated.release.store import Store
from federated.release.transfer import holds, transfer
from federated.release.workflow import Limits, Workflow


class Renamed(HttpSource):
    """The suite's URLs of metadata and targets in place of the folders of one release."""

    def __init__(self, metadata_url: str, targets_url: str) -> None:
        super().__init__(metadata_url)
        self._places = {"metadata": metadata_url.rstrip("/"), "targets": targets_url.rstrip("/")}

    def read(self, name: str):
        return super().read(self._moved(name))

    def read_from(self, name: str, start: int):
        return super().read_from(self._moved(name), start)

    def _moved(self, name: str) -> str:
        folder, _, rest = name.partition("/")
        self._base = self._places[folder]
        return rest


def refreshed(options: argparse.Namespace) -> tuple[Workflow, Renamed]:
    """A pass from the trusted root on; what was verified becomes visible, whatever the outcome."""
    folder = Path(options.metadata_dir)
    store = Store(folder / "state")
    source = Renamed(options.metadata_url, options.target_base_url or "")
    limits = Limits(roots=256)
    flow = Workflow((folder / "state" / "root.json").read_bytes(), source, store, now=datetime.now(UTC), limits=limits)
    try:
        flow.refresh()
    finally:
        show(folder)
    return flow, source


def show(folder: Path) -> None:
    """Copy what is trusted to where the suite looks: the newest root, and the roles."""
    kept = folder / "state" / "metadata"
    roots = sorted((kept / "roots").glob("*.json"), key=lambda path: int(path.stem))
    for path in (*roots[-1:], *kept.glob("*.json")):
        shutil.copyfile(path, folder / ("root.json" if path.parent.name == "roots" else path.name))


def download(options: argparse.Namespace) -> None:
    """Fetch targets in their order, by one client."""
    flow, source = refreshed(options)
    try:
        for name in options.target_name:
            target = flow.find(name)
            if target is None:
                raise NotReleased(f"nobody signed {name}")
            path = Path(options.target_dir) / quote(name, safe="")
            if not holds(path, target):
                transfer(source, target, path, limit=10**9)
    finally:
        show(Path(options.metadata_dir))


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--metadata-dir", "--metadata-url", "--target-dir", "--target-base-url"):
        parser.add_argument(name)
    parser.add_argument("--target-name", action="append")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("init").add_argument("trusted_root")
    verbs.add_parser("refresh")
    verbs.add_parser("download")
    options = parser.parse_args()
    if options.verb == "init":
        folder = Path(options.metadata_dir)
        (folder / "state").mkdir()
        for place in (folder / "state" / "root.json", folder / "root.json"):
            shutil.copyfile(options.trusted_root, place)
        return 0
    try:
        refreshed(options) if options.verb == "refresh" else download(options)
    except FederatedError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
