"""Lists of videos and captions: CSV and JSON lines, beside their videos or named by themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fvtitan.data.listing import Keys, list_prompts, list_records
from fvtitan.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files that a list can name; only their presence counts here."""
    root = tmp_path / "set"
    (root / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "deep/c.mp4", "left.mp4"):
        (root / name).write_bytes(name.encode())
    (tmp_path / "outside.mp4").write_bytes(b"x")
    return root


def listed(source: Path, **keys: tuple[str, ...]) -> dict[str, str]:
    """{file: its caption, or what is wrong with it}"""
    records, ignored = list_records(source, keys=Keys(**keys))
    return {record.file: record.problem or record.caption for record in records + ignored}


def test_csv_in_a_folder(folder):
    rows = '\ufeffpath,seconds,caption\r\na.mp4,3,"one, ""two""\nthree"\r\n\r\n./deep/c.mp4,1,ü\u2028v\r\n'
    (folder / "metadata.csv").write_text(rows, encoding="utf-8", newline="")
    assert listed(folder) == {
        "a.mp4": 'one, "two"\nthree',
        "deep/c.mp4": "ü\u2028v",
        "b.mp4": "not in metadata.csv",
        "left.mp4": "not in metadata.csv",
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_list_by_itself(folder, suffix):
    """Paths are relative to the list's folder, and what it does not name is no news."""
    entries = [{"video": "a.mp4", "text": "x"}, {"video": "deep/c.mp4", "text": "y"}]
    lines = [json.dumps(entry) for entry in entries]
    if suffix == "csv":
        lines = ["video,text", *(f"{entry['video']},{entry['text']}" for entry in entries)]
    source = folder / f"train.{suffix}"
    source.write_text("\n".join(lines))
    assert listed(source) == {"a.mp4": "x", "deep/c.mp4": "y"}
    source.rename(folder / f"metadata.{suffix}")
    assert listed(folder) == {"a.mp4": "x", "deep/c.mp4": "y"} | dict.fromkeys(
        ["b.mp4", "left.mp4"], f"not in metadata.{suffix}"
    )


@pytest.mark.faults
def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    """Fault 30."""
    scandir = os.scandir

    def denied(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=f"--data {folder}: {folder}/deep: Permission denied"):
        list_records(folder)
    # A list says what counts.
    (folder / "metadata.jsonl").write_text('{"file_name": "a.mp4", "caption": "a"}\n')
    records, ignored = list_records(folder)
    assert [record.file for record in records] == ["a.mp4"]
    assert [r.problem for r in ignored if r.file == "deep"] == ["a folder that cannot be read: Permission denied"]


def test_names_of_fields(folder):
    (folder / "list.csv").write_text("clip,long,caption\na.mp4,x,y\n")
    with pytest.raises(
        UserError, match="header 'clip,long,caption' has no column file_name or path .* --file-key names"
    ):
        listed(folder / "list.csv")
    assert listed(folder / "list.csv", file=("clip",)) == {"a.mp4": "y"}
    assert listed(folder / "list.csv", file=("clip",), caption=("long",)) == {"a.mp4": "x"}
    with pytest.raises(UserError, match="has no column words: --caption-key names another"):
        listed(folder / "list.csv", file=("clip",), caption=("words",))
    (folder / "list.jsonl").write_text('{"clip": "a.mp4", "long": "x"}\n{"path": "b.mp4", "caption": "y"}\n')
    assert listed(folder / "list.jsonl", file=("clip",), caption=("long",)) == {
        "a.mp4": "x",
        "list.jsonl:2": "no file: need one of the keys clip",
    }
    with pytest.raises(UserError, match="--file-key, --caption-key: for lists only, but .*set holds none of metadata"):
        listed(folder, file=("clip",))


def test_every_row_is_used_or_named_by_its_line(folder):
    rows = [
        b"path,caption",
        b'a.mp4,"of two\nlines"',
        b"b.mp4,with, a comma",
        b"b.mp4",
        b"b.mp4,\xff",
        b'b.mp4,"quoted" badly',
        b"b.mp4,",
        b",x",
        b"../outside.mp4,x",
        b"a.mp4,again",
        b"gone.mp4,x",
        b"b.mp4,a\0b",
        b"deep/c.mp4,the last",
    ]
    (folder / "list.csv").write_bytes(b"\n".join(rows))
    records, _ = list_records(folder / "list.csv")
    found = [(record.file, record.problem or record.caption) for record in records]
    expected = [
        ("a.mp4", "of two\nlines"),
        ("list.csv:4", "3 fields, the header has 2: a text with commas needs quotes"),
        ("list.csv:5", "1 fields, the header has 2"),
        ("list.csv:6", "the row is not UTF-8"),
        ("list.csv:7", "the row's quoting is wrong"),
        ("b.mp4", "the caption is empty"),
        ("list.csv:9", "no file: need one of the keys"),
        ("../outside.mp4", "the path leaves the data folder"),
        ("a.mp4", "listed twice"),
        ("gone.mp4", "no such file"),
        ("list.csv:13", "the row holds NUL"),
        ("deep/c.mp4", "the last"),
    ]
    assert [file for file, _ in found] == [file for file, _ in expected]
    for (file, text), (_, start) in zip(found, expected, strict=True):
        assert text.startswith(start), (file, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty: need a header line such as path,caption"),
        (b"path;caption\na.mp4;x\n", "header 'path;caption' has no column file_name or path"),
        (b"path,caption,path\n", "has a column twice"),
        (b"path,c\xff\n", "the header cannot be read: it is not UTF-8"),
        (b'path,"caption" x\n', "the header cannot be read"),
        (
            b'path,caption\na.mp4,x\nb.mp4,"never closed\nc.mp4,y\n',
            "line 3: a quote that is opened there is never closed",
        ),
        (
            b"path,caption\na.mp4,x\n" + b'b.mp4,"' + b"w " * 70000,
            "line 3: field larger than field limit .* never closed",
        ),
        ("path,caption\na.mp4,x\n".encode("utf-16"), "the file is UTF-16: need UTF-8"),
    ],
)
def test_lists_that_are_none(folder, content, message):
    (folder / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list_records(folder / "list.csv")


def test_two_lists_are_not_mixed(folder):
    (folder / "metadata.csv").write_text("path,caption\n")
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(
        UserError, match="holds metadata.jsonl and metadata.csv: give the one that counts, as --data FILE"
    ):
        list_records(folder)
    assert list_records(folder / "metadata.csv") == ([], [])


def test_a_list_stays_in_its_folder(folder):
    (folder.parent / "outside.csv").write_text("path,caption\na.mp4,x\n")
    (folder / "metadata.csv").symlink_to(folder.parent / "outside.csv")
    with pytest.raises(UserError, match="metadata.csv is a link that leaves the data folder"):
        list_records(folder)


def test_prompts_in_csv(tmp_path):
    source = tmp_path / "prompts.csv"
    source.write_bytes(b'id,prompt\n1,"a, b"\n2,\n3,c,d\n4,e\n')
    records = list_prompts(source)
    assert [(r.file, r.caption, r.problem.split(":")[0]) for r in records] == [
        ("prompts.csv:2", "a, b", ""),
        ("prompts.csv:3", "", "the caption is empty"),
        ("prompts.csv:4", "", "3 fields, the header has 2"),
        ("prompts.csv:5", "e", ""),
    ]
    with pytest.raises(UserError, match="has no column words: --caption-key names another"):
        list_prompts(source, Keys(caption=("words",)))
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(
        UserError, match="--caption-key: for .jsonl and .csv only, but .*prompts.txt has a prompt a line"
    ):
        list_prompts(tmp_path / "prompts.txt", Keys(caption=("words",)))
