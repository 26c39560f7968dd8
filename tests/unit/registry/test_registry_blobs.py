import os
import time

import pytest

from federated.errors import CorruptBlob
from federated.manifest import sha256_hex
from federated.registry.blobs import STRAY_SECONDS, BlobStore


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def test_path_is_the_digest_below_its_first_two_characters(blobs):
    digest = blobs.put(b"one")
    assert digest == sha256_hex(b"one")
    assert blobs.path(digest).relative_to(blobs.root).as_posix() == f"{digest[:2]}/{digest}"


def test_put_again_leaves_the_file_alone(blobs):
    path = blobs.path(blobs.put(b"one"))
    before = path.stat().st_ino
    blobs.put(b"one")
    assert path.stat().st_ino == before


def test_damaged_blob_names_both_digests(blobs):
    digest = blobs.put(b"one")
    blobs.path(digest).write_bytes(b"two")
    with pytest.raises(CorruptBlob, match=f"{sha256_hex(b'two')}, expected {digest}; publish the same version again"):
        blobs.read(digest)


def test_missing_blob_is_corrupt(blobs):
    with pytest.raises(CorruptBlob, match="is missing"):
        blobs.read("a" * 64)


@pytest.mark.parametrize("digest", ["", "../../../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_forged_digest_names_no_file(blobs, digest):
    with pytest.raises(CorruptBlob, match="no SHA-256"):
        blobs.read(digest)


def test_failed_write_leaves_nothing(blobs, monkeypatch):
    def refuse(descriptor):
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", refuse)
    blobs.path(sha256_hex(b"one")).parent.mkdir(parents=True)
    with pytest.raises(OSError, match="no"):
        blobs.put(b"one")
    assert [path for path in blobs.root.rglob("*") if path.is_file()] == []


def test_sweep_removes_old_strays_only(blobs):
    folder = blobs.path(blobs.put(b"one")).parent
    old, new = folder / ".old.tmp", folder / ".new.tmp"
    for path in (old, new):
        path.touch()
    long_ago = time.time() - STRAY_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    assert blobs.sweep() == 1
    assert (old.exists(), new.exists()) == (False, True)


def test_sweep_passes_over_a_file_that_went_away(blobs):
    folder = blobs.path(blobs.put(b"one")).parent
    (folder / ".gone.tmp").symlink_to(folder / "nowhere")
    assert blobs.sweep() == 0
