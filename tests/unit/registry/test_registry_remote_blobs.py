"""Bytes in a store that is no folder; memory stands for S3, which `tests/integration/test_registry_s3.py` has."""

import secrets
from datetime import timedelta

import fsspec
import pytest

from federated.errors import CorruptBlob, RegistryError
from federated.manifest import sha256_hex
from federated.registry import Registry
from federated.registry.blobs import BlobStore
from federated.registry.remote_blobs import RemoteBlobs, open_blobs


@pytest.fixture
def url():
    place = f"memory://{secrets.token_hex(8)}"
    yield place
    system = fsspec.filesystem("memory")
    if system.exists(place):
        system.rm(place, recursive=True)


@pytest.fixture
def blobs(url):
    return open_blobs(url)


def overwrite(url, digest, data):
    fsspec.filesystem("memory").pipe_file(f"{url}/{digest[:2]}/{digest}", data)


def test_a_folder_is_a_folder(tmp_path):
    assert isinstance(open_blobs(tmp_path), BlobStore)


def test_bytes_come_back(blobs):
    digest = blobs.put(b"one")
    assert (digest, blobs.read(digest), blobs.has(digest)) == (sha256_hex(b"one"), b"one", True)
    assert blobs.sizes() == {digest: 3}
    assert blobs.put(b"one") == digest


def test_an_empty_store(blobs):
    assert (blobs.sizes(), blobs.sweep(), blobs.has("a" * 64)) == ({}, 0, False)
    with pytest.raises(CorruptBlob, match=r"memory://.*/aa/a{64} is missing"):
        blobs.read("a" * 64)


def test_damaged_bytes_never_come_out_and_are_mended_by_publishing_again(blobs, url):
    digest = blobs.put(b"one")
    overwrite(url, digest, b"two")
    with pytest.raises(CorruptBlob, match=f"expected {digest}"):
        blobs.read(digest)
    blobs.put(b"one")
    assert blobs.read(digest) == b"one"


def test_deleted_twice_is_gone(blobs):
    digest = blobs.put(b"one")
    blobs.delete([digest])
    blobs.delete([digest, "a" * 64])
    assert blobs.sizes() == {}


def test_what_is_no_blob_is_not_listed(blobs, url):
    fsspec.filesystem("memory").pipe_file(f"{url}/notes.txt", b"hello")
    assert blobs.sizes() == {}


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64])
def test_forged_digest_names_no_object(blobs, digest):
    for ask in (blobs.read, blobs.has, lambda one: blobs.delete([one])):
        with pytest.raises(CorruptBlob, match="no SHA-256"):
            ask(digest)


@pytest.mark.parametrize(
    ("place", "message"),
    [("nonsense://x", "nothing installed reaches nonsense://"), ("s3://x", r"install federated-peft\[s3\]")],
)
def test_a_store_that_nothing_reaches(place, message, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RegistryError, match=message):
        RemoteBlobs(place)


class Refusing:
    """A store that raises what no other does."""

    def __getattr__(self, name):
        def refuse(*_, **__):
            raise RuntimeError("the network\nis down") if name != "exists" else TimeoutError

        return refuse


@pytest.mark.parametrize(
    ("doing", "message"),
    [
        (lambda blobs: blobs.put(b"x"), "cannot read the blobs at memory://.*: the network is down; check"),
        (lambda blobs: blobs.sizes(), "cannot list"),
        (lambda blobs: blobs.delete(["a" * 64]), "cannot delete from"),
        (lambda blobs: blobs.has("a" * 64), "cannot look into .*: TimeoutError"),
    ],
)
def test_whatever_a_store_raises_is_one_clear_error(blobs, doing, message):
    blobs._system = Refusing()
    with pytest.raises(RegistryError, match=message):
        doing(blobs)


def test_a_store_that_cannot_even_be_opened(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(RegistryError, match="cannot reach the blobs at s3://x: no credentials"):
        RemoteBlobs("s3://x")


def test_a_registry_over_it(location, url, manifest_for):
    with Registry.open(location, blobs=url) as registry:
        first = registry.publish(manifest_for(b"one"), b"one", training_state=b"state", channel="dev")
        registry.publish(manifest_for(b"two", round_number=1), b"two")
        assert (registry.weights("dev"), registry.training_state(first)) == (b"one", b"state")
        assert registry.verify() == []
        overwrite(url, sha256_hex(b"two"), b"rot")
        assert [fault.part for fault in registry.verify()] == ["weights"]
        assert registry.gc(older_than=timedelta(0)).blobs == 1
        assert registry.verify() == []
    assert not (location / "blobs").exists()


def test_a_database_url_with_a_blob_url(tmp_path, url, manifest_for):
    with Registry.open(f"sqlite:///{tmp_path}/meta.db", blobs=url) as registry:
        registry.publish(manifest_for(b"one"), b"one")
    with Registry.open(f"sqlite:///{tmp_path}/meta.db", blobs=url, create=False) as registry:
        assert registry.weights("v0") == b"one"


def test_a_file_url_is_a_folder(location, tmp_path, manifest_for):
    with Registry.open(location, blobs=f"file://{tmp_path}/elsewhere") as registry:
        registry.publish(manifest_for(b"one"), b"one")
    assert (tmp_path / "elsewhere" / sha256_hex(b"one")[:2]).is_dir()
