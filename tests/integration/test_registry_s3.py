"""The registry's bytes in S3: a real server of that protocol on this machine, reached by s3fs over HTTP."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest

from federated.errors import CorruptBlob, RegistryError
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

MISSING = [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed (PyPI: federated-peft[dev])"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # the server's own
]
SPEC = AdapterSpec("lora", 2, 4.0, False, ())


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of a fresh server with one empty bucket, and credentials in the environment."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> str:
    """A bucket of the test's own."""
    import s3fs

    name = f"bucket-{abs(hash(request.node.name)):x}"
    s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/adapters"


@pytest.fixture
def registry(tmp_path, url) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry", blobs=url) as opened:
        yield opened


def publish(registry: Registry, number: int, **fields: object) -> str:
    weights = f"weights {number}".encode() * 1000
    manifest = VersionManifest(sha256_hex(weights), "b" * 64, SPEC, "fedit", "run", number)
    return registry.publish(manifest, weights, training_state=b"state %d" % number, **fields)


def objects(url: str) -> dict[str, int]:
    import s3fs

    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    return {path: entry["size"] for path, entry in system.find(url, detail=True).items()}


def test_bytes_go_there_and_come_back(registry: Registry, url: str) -> None:
    publish(registry, 0, channel="dev")
    assert registry.weights("dev") == b"weights 0" * 1000
    assert registry.training_state("dev") == b"state 0"
    digest = sha256_hex(b"state 0")
    assert objects(url)[f"{url.removeprefix('s3://')}/{digest[:2]}/{digest}"] == 7
    assert registry.verify() == []


def test_gc_removes_objects(registry: Registry, url: str) -> None:
    publish(registry, 0)
    publish(registry, 1, channel="dev")
    found = registry.gc(older_than=timedelta(0))
    assert (len(found.removed), found.blobs, found.freed) == (1, 2, 9007)
    assert len(objects(url)) == 2
    assert registry.verify() == []


def test_rotten_and_lost_objects_are_named(registry: Registry, url: str) -> None:
    import s3fs

    publish(registry, 0)
    system = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    for path, size in objects(url).items():
        if size == 7:
            system.rm_file(path)
        else:
            system.pipe_file(path, b"rot")
    assert sorted(fault.part for fault in registry.verify()) == ["training_state", "weights"]
    with pytest.raises(CorruptBlob, match="is damaged"):
        registry.weights("v0")
    publish(registry, 0)
    assert registry.verify() == []


def test_a_bucket_that_is_not_there(server: str, tmp_path) -> None:
    with Registry.open(tmp_path / "registry", blobs="s3://nobody-made-this") as registry:
        with pytest.raises(RegistryError, match="cannot write the blobs at s3://nobody-made-this"):
            publish(registry, 0)
        assert registry.versions() == []


def test_a_server_that_is_not_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with (
        Registry.open(tmp_path / "registry", blobs="s3://bucket") as registry,
        pytest.raises(RegistryError, match="check the URL, the credentials and the network"),
    ):
        publish(registry, 0)


WORK = """
import sys
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

folder, url, run_id = sys.argv[1:]
with Registry.open(folder, blobs=url) as registry:
    for number in range(5):
        weights = f"same {number}".encode()
        manifest = VersionManifest(
            sha256_hex(weights), "b" * 64, AdapterSpec("lora", 2, 4.0, False, ()), "fedit", run_id, number
        )
        registry.publish(manifest, weights, channel="dev")
"""


def test_two_processes_publish_the_same_bytes(registry: Registry, url: str, tmp_path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path / "registry"), url]
    workers = [subprocess.Popen([*command, name]) for name in ("run-a", "run-b")]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert (len(registry.versions()), len(objects(url))) == (10, 5)
    assert registry.verify() == []
