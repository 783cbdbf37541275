"""What the documents name is there: tests, files, options, keys, links, the program's own words."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fvtitan.data.video import VideoLimits
from tests.helpers import ROOT

DOCUMENTS = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
INDEX, GENERATED = ROOT / "docs/README.md", ROOT / "docs/config.md"
CODE = ROOT / "docs/extending.md"  # most of it
NAMED_TEST = re.compile(r"`((?:tests/)?(?:unit|integration|faults|parity)/\w+\.py)(?:::(\w+))?`")


def missing_tests(text: str) -> list[str]:
    """The tests that a text names and that do not exist."""
    missing = []
    for file, name in NAMED_TEST.findall(text):
        path = ROOT / "tests" / file.removeprefix("tests/")
        if not path.is_file() or (
            name and not re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        ):
            missing.append(f"{file}::{name}")
    return missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_tests_exist(path):
    assert missing_tests(path.read_text(encoding="utf-8")) == []


def test_a_test_that_does_not_exist_is_noticed():
    text = "`tests/unit/test_docs.py::test_named_tests_exist` `unit/test_docs.py::test_no` `tests/unit/test_no.py`"
    assert missing_tests(text) == ["unit/test_docs.py::test_no", "tests/unit/test_no.py::"]


def test_each_point_of_security_has_a_line_with_a_test():
    """Thirteen; only the supply chain is not a matter of tests."""
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    section = text.split("\n## Security\n")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in re.findall(r"^\| \d+ \|.*$", section, re.MULTILINE)]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 14))
    assert [row[1] for row in rows if not NAMED_TEST.search(row[-1])] == ["supply chain"]
    options = set(re.findall(r"`(--[\w-]+)`", section))
    source = (ROOT / "fvtitan/preprocess.py").read_text(encoding="utf-8")
    assert options and all(f'"{option}"' in source for option in options)


def test_every_limit_is_named():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert all(f"`--{field.name.replace('_', '-')}`" in text for field in dataclasses.fields(VideoLimits))


@pytest.mark.parametrize("path", [path for path in PAGES if path != INDEX], ids=lambda path: path.name)
def test_pages_are_short_and_in_the_index(path):
    assert path.name in INDEX.read_text(encoding="utf-8")
    assert path in (GENERATED, CODE) or 40 <= len(path.read_text(encoding="utf-8").splitlines()) <= 100


# ------------------------------------------------------------------------------------------------------------ links


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, path: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        file, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (path.parent / file).resolve()
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and anchor not in anchors(target.read_text(encoding="utf-8") if file else text)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path.read_text(encoding="utf-8"), path) == []


def test_a_broken_link_is_noticed():
    text = "# A (b), `c`!\n[a](data.md) [b](#a-b-c) [c](data.md#from-videos) [d](https://x.org/y) `[e](none.md)`\n"
    wrong = "[f](none.md) [g](#nowhere) [h](data.md#nowhere) [i](../../outside.md)"
    page = ROOT / "docs/page.md"
    assert broken_links(text, page) == []
    assert broken_links(text + wrong, page) == re.findall(r"\(([^)]+)\)", wrong)


# ------------------------------------------------------------------------------------------- the program's own words


def said(source: str) -> str:
    """A module's text with neighbouring string literals joined, as the compiler does."""
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", source)


def unsaid(text: str, source: str) -> list[str]:
    """The words in the first column of a page's tables, between `...`, that the source does not hold."""
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| .*$", text, re.MULTILINE)]
    quotes = [code for cell in cells for code in re.findall(r"`([^`]+)`", cell)]
    pieces = [piece.strip() for quote in quotes for piece in quote.split("...")]
    return [piece for piece in pieces if len(piece) > 2 and piece not in source]


def test_troubleshooting_quotes_the_program():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    files = [*ROOT.glob("fvtitan/**/*.py"), ROOT / "train.py"]
    source = "\n".join(said(path.read_text(encoding="utf-8")) for path in files)
    assert unsaid(text, source) == []
    wrong = "| `unknown key ... and more`, `the disc is full` | why `x y` |"
    assert unsaid(wrong, source) == ["and more", "the disc is full"]
