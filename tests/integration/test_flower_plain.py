"""The strategy inside somebody's plain Flower app: the very code of docs/flower.md, and the app that this ships."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from federated.config import experiment_from
from federated.flower import DeltaStrategy, InProcessGrid, handle_query, handle_train, simulate
from federated.registry import Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 10  # of the schema's default data


def _block(mark: str) -> str:
    """The only Python block of the page that holds this text."""
    page = (ROOT / "docs" / "flower.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if mark in block]
    return str(found)


def _app(code: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(compile(code, "docs/flower.md", "exec"), namespace)  # noqa: S102 - our own page
    return namespace["app"]


def _serve(
    server: ServerApp, client: ClientApp, *, nodes: int = CLIENTS, run_config: Mapping[str, str] | None = None
) -> None:
    with InProcessGrid(client, nodes) as grid:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config or {}))
        server(grid, context)


def _digests(registry: Path) -> dict[int, str]:
    with Registry.open(registry, create=False) as opened:
        manifests = [record.manifest for record in opened.versions()]
    return {manifest.round_number: manifest.weights_digest for manifest in manifests}


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory of its own, and no app folder or client store of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDPEFT_APP", str(tmp_path))
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "clients"))
    yield


@pytest.fixture
def client() -> ClientApp:
    """A ClientApp with our handlers."""
    app = ClientApp()
    app.query()(handle_query)
    app.train()(handle_train)
    return app


def test_server_side_of_the_docs_is_short() -> None:
    assert len(_block("ServerApp()").splitlines()) < 15


def test_code_of_the_docs_gives_what_a_simulation_gives(client: ClientApp, tmp_path: Path) -> None:
    _serve(_app(_block("ServerApp()")), _app(_block("ClientApp()")))
    settings = {"rounds": 2, "seed": 7, "task": {"labels": ["no", "yes"]}, "tracking": {"progress": False}}
    config = experiment_from({**settings, "run_dir": str(tmp_path / "run"), "engine": {"workers": 1}})
    simulated = simulate(config, client)
    assert _digests(tmp_path / "registry") == _digests(Path(simulated.registry))


def test_strategy_without_a_registry_still_trains(client: ClientApp) -> None:
    config = experiment_from({"rounds": 1, "task": {"labels": ["no", "yes"]}})
    strategy = DeltaStrategy.from_config(config)
    before = strategy.initial_arrays().object_id
    with InProcessGrid(client, CLIENTS) as grid:
        result = strategy.start(grid)
    assert result.arrays.object_id != before


@pytest.fixture
def shipped() -> ModuleType:
    """``strategies/app.py``, whichever package of that name is installed."""
    spec = importlib.util.spec_from_file_location("shipped_server_app", ROOT / "strategies" / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _overrides(run_dir: Path, *more: str) -> dict[str, str]:
    own = ["experiment=tiny", "data.partition.num_clients=2", "train.steps=2", "tracking.progress=false"]
    return {"overrides": " ".join([*own, f"run_dir={run_dir}", *more])}


def test_shipped_server_app_goes_on_with_a_run(shipped: ModuleType, client: ClientApp, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run_config in (
        _overrides(whole, "rounds=2"),
        _overrides(parts, "rounds=1"),
        _overrides(parts, "rounds=2", "resume=true"),
    ):
        _serve(shipped.app, client, nodes=2, run_config=run_config)
    assert _digests(parts / "registry") == _digests(whole / "registry")
