"""A disk that is really full (a small tmpfs), and a folder that really cannot be written to."""

import os
import shutil
import subprocess

import pytest

from federated.errors import RegistryError, StorageFull
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

SIZE = 256 * 1024
LARGEST_FILLER = 1024 * 1024  # were the small disk not there, this is all that could be written


def manifest_of(weights, number=0):
    spec = AdapterSpec("lora", 2, 4.0, False, ())
    return VersionManifest(sha256_hex(weights), "b" * 64, spec, "fedit", "run-a", number)


def mount(folder, options):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"this machine does not let root mount a tmpfs: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, f"size={SIZE}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk):
    """Leave not one free byte."""
    assert disk.is_mount()
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while file.tell() < LARGEST_FILLER:
                file.write(bytes(4096))
        except OSError:
            pass
    assert shutil.disk_usage(disk).free == 0


def test_blob_that_does_not_fit_is_refused_and_the_rest_stays(disk):
    with Registry.open(disk / "registry") as registry:
        registry.publish(manifest_of(b"one"), b"one", channel="dev")
        large = os.urandom(SIZE)
        with pytest.raises(StorageFull, match=rf"blobs is full \(\d+ bytes free, about {SIZE + 131072} needed"):
            registry.publish(manifest_of(large, 1), large, channel="dev")
        assert registry.weights("dev") == b"one"
        assert registry.verify() == []
        assert list(disk.rglob("*.tmp")) == []


def test_smaller_version_still_fits_after_a_refusal(disk):
    with Registry.open(disk / "registry") as registry:
        large = os.urandom(SIZE)
        with pytest.raises(StorageFull):
            registry.publish(manifest_of(large), large)
        registry.publish(manifest_of(b"one", 1), b"one")
        assert registry.weights("v1") == b"one"


def test_database_that_cannot_grow_is_refused(disk):
    with Registry.open(disk / "registry") as registry:
        first = registry.publish(manifest_of(b"one"), b"one", channel="dev")
        fill(disk)
        with pytest.raises(StorageFull):
            registry.channel("stable").promote("v0", expected=None)
        assert registry.channels() == {"dev": first}


def test_full_disk_can_be_opened_and_read_but_not_written(disk):
    with Registry.open(disk / "registry") as registry:
        registry.publish(manifest_of(b"one"), b"one")
    fill(disk)
    with Registry.open(disk / "registry", create=False) as registry:
        assert registry.weights("latest") == b"one"
        with pytest.raises(StorageFull):
            registry.channel("stable").promote("v0", expected=None)


def test_new_registry_on_a_full_disk(disk):
    fill(disk)
    with pytest.raises(StorageFull, match="cannot open the registry"):
        Registry.open(disk / "registry")


def test_publishing_goes_on_after_space_is_freed(disk):
    with Registry.open(disk / "registry") as registry:
        fill(disk)
        with pytest.raises(StorageFull):
            registry.publish(manifest_of(b"one"), b"one")
        (disk / "filler").unlink()
        assert registry.weights(registry.publish(manifest_of(b"one"), b"one")) == b"one"


def test_read_only_folder(disk):
    Registry.open(disk / "registry").close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RegistryError, match="cannot be written to"):
        Registry.open(disk / "registry")
