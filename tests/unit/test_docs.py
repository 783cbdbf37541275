"""What the documents name is there: tests, files, options, keys."""

from __future__ import annotations

import dataclasses
import re

import pytest

from fvtitan.data.video import VideoLimits
from tests.helpers import ROOT

DOCUMENTS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
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


def test_the_readme_names_every_limit():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`--{field.name.replace('_', '-')}`" in text for field in dataclasses.fields(VideoLimits))
