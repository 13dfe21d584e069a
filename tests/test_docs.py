"""What the documents show is what the program prints today, and what they link to exists."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report import documents, pictures
from benchmarks.report.plots import Bar, digest, svg

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
SHOWN = {name: text for path in DOCUMENTS for name, text in documents.found(path).items()}


def test_every_generated_block_is_in_a_document() -> None:
    assert SHOWN.keys() == documents.BLOCKS.keys()


@pytest.mark.parametrize("name", documents.TABLES)
def test_tables_are_up_to_date(name: str) -> None:
    assert documents.TABLES[name]() == SHOWN[name], f"{name} is stale: run `make docs`"


@pytest.mark.slow
@pytest.mark.usefixtures("real_270m")
@pytest.mark.parametrize("name", documents.TRANSCRIPTS)
def test_transcripts_are_up_to_date(name: str) -> None:
    assert documents.TRANSCRIPTS[name]() == SHOWN[name], f"{name} is stale: run `make docs`"


def test_pictures_are_up_to_date() -> None:
    assert not list(pictures.stale()), "run `make docs`"


def test_pictures_say_of_what_they_show_when_it_changes() -> None:
    drawn = pictures.PICTURES["engines.svg"]()
    faster = replace(drawn.groups[0], bars=(Bar(0.5, 0.5, 0.5),))
    assert digest(drawn) != digest(replace(drawn, groups=(faster, *drawn.groups[1:])))
    text = svg(drawn)
    assert digest(drawn) in text and text == svg(drawn)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_every_picture_is_shown(name: str) -> None:
    assert any(f"images/{name})" in document.read_text() for document in DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    for target, heading in re.findall(
        r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.read_text()
    ):
        path = document.parent / target if target else document
        assert path.exists(), f"{document.name} links to {target}"
        if heading and path.suffix == ".md":
            assert heading in headings(path), f"{document.name} links to {target}#{heading}"


def headings(document: Path) -> set[str]:
    """What links name the headings of a document by."""
    found = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in found}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
    assert len(pictures.PICTURES) <= 4
