"""Names from files: nothing that leaves the folder on any system passes, and real names do."""

from __future__ import annotations

import ntpath
import posixpath
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_fold.checkpoint.names import check_name, check_top_name, unsafe_reason
from gemma_fold.errors import CheckpointError

REAL = [
    "config.json",
    "model-00001-of-00002.safetensors",
    "2_Dense/config.json",
    ".gitattributes",
    "a/.hidden/..data",
    "näme ✓.txt",
    "console.py",
    "COM10",
    "auxiliary/nul_model.bin",
    "a" * 255,
]
HOSTILE = {
    "absolute": "/etc/passwd",
    "above": "../x",
    "above, inside": "a/../../x",
    "above at the end": "a/..",
    "itself": ".",
    "a dot": "./x",
    "a dot inside": "a/./b",
    "empty": "",
    "empty part": "a//b",
    "ends with a slash": "a/",
    "NUL": "a\0b",
    "newline": "a\nb",
    "escape": "a\x1b[2Jb",
    "delete": "a\x7f",
    "C1": "a\x85b",
    "line separator": "a\u2028b",
    "backslash": "..\\x",
    "share": "\\\\host\\share",
    "lone surrogate": "a\ud800",
    "undecodable byte": "a\udcff",
    "long part": "a" * 256,
    "long part in bytes": "ä" * 128,
    "long": "a/" * 600 + "a",
    "drive": "C:",
    "drive path": "C:/x",
    "drive-relative": "c:x",
    "device": "CON",
    "device, lower case": "a/nul",
    "device with an extension": "com1.txt",
    "device with two": "LPT9.tar.gz",
    "device with a space": "AUX .txt",
    "device with a superscript": "COM\xb9",
    "device below": "prn.d/x",
}


@pytest.mark.parametrize("name", REAL)
def test_real_names_pass(name: str) -> None:
    assert check_name(name, "manifest") == name


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_names_are_refused(case: str) -> None:
    with pytest.raises(CheckpointError, match="do not trust this checkpoint") as caught:
        check_name(HOSTILE[case], Path("some") / "gemma_fold.json")
    message = str(caught.value)
    assert "gemma_fold.json points outside the folder" in message
    assert message.isprintable() and len(message.encode()) < 300


def test_a_top_name_is_no_path() -> None:
    assert check_top_name("a.safetensors", "index") == "a.safetensors"
    for name in ("a/b.safetensors", "..", ""):
        with pytest.raises(CheckpointError, match="points outside the folder"):
            check_top_name(name, "index")


PIECES = st.sampled_from(
    ["..", ".", "/", "\\", "C:", "a", "b.txt", "~", "\0", "NUL", " ", "\ud800"]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)))
def test_what_passes_stays_inside_by_the_path_rules_of_both_systems(name: str) -> None:
    if unsafe_reason(name) is not None:
        return
    for paths, root in ((posixpath, "/root/out"), (ntpath, "D:\\root\\out")):
        joined = paths.normpath(paths.join(root, name))
        assert paths.commonpath([root, joined]) == root and joined != root
    assert Path(name).as_posix() == name
