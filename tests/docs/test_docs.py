"""The documentation holds together: links resolve, commands exist, examples run."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from federated.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _python_blocks(page: Path) -> list[str]:
    return [code for language, code in _FENCE.findall(_text(page)) if language == "python"]


def _links(page: Path) -> list[str]:
    prose = _FENCE.sub("", _text(page))
    return [first or second for first, second in _LINK.findall(prose)]


def _anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", _text(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in _links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


@every_page
def test_make_targets_exist(page: Path) -> None:
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", _text(page), re.MULTILINE))
    assert named - set(TARGETS) == set()


@every_page
def test_python_blocks_run_by_themselves(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, code in enumerate(_python_blocks(page)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), {"__name__": "page"})  # noqa: S102 - our own


def test_registry_of_the_docs_is_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = _python_blocks(ROOT / "docs" / "registry.md")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/registry.md", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out.splitlines() == ["by hand", str(_size(tmp_path)), "[2, 1, 0]", "[]"]
    with Registry.open(tmp_path / "registry", create=False) as registry:
        pointed = {channel: registry.get(version_id).number for channel, version_id in registry.channels().items()}
    assert pointed == {"dev": 2, "stable": 1}


def _size(folder: Path) -> int:
    with Registry.open(folder / "registry", create=False) as registry:
        return len(registry.weights("v2"))


def test_every_page_can_be_reached_from_the_index() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        waiting += [page.parent / link.partition("#")[0] for link in _links(page) if not re.match(r"[a-z]+:|#", link)]
    assert [name for page, name in zip(PAGES, NAMES, strict=True) if "docs" in page.parts and page not in seen] == []


@pytest.mark.parametrize(
    "command", ["make demo", "make test", "fedpeft simulate", "fedpeft registry", "fedpeft device"]
)
def test_readme_shows_in_a_block(command: str) -> None:
    blocks = "\n".join(code for _, code in _FENCE.findall(_text(ROOT / "README.md")))
    assert command in blocks


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    assert set(TARGETS) - set(explained) == set()
