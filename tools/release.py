"""Print what is new in a release, if its tag, the version and the changelog agree.

python tools/release.py v0.2.0
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from environments import ROOT

_HEADING = re.compile(r"^## (?P<version>\S+) \((?P<when>[^)]*)\)$", re.MULTILINE)


def version() -> str:
    """The version that is written in the package."""
    text = (ROOT / "gemma_fold" / "_version.py").read_text()
    found: list[str] = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found[0]


def notes(tag: str, changelog: str) -> str:
    """The newest section of the changelog; ValueError where `tag` is not that of a release."""
    newest, *older = _HEADING.finditer(changelog)
    if tag != f"v{version()}":
        raise ValueError(f"tag {tag} is not v{version()}, as gemma_fold/_version.py has it")
    if newest["version"] != version():
        raise ValueError(f"CHANGELOG.md begins with {newest['version']}, not with {version()}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", newest["when"]):
        raise ValueError(f"CHANGELOG.md says ({newest['when']}); write the day of the release")
    end = older[0].start() if older else len(changelog)
    return changelog[newest.end() : end].strip()


def main(arguments: Sequence[str]) -> int:
    """Print the notes of the one tag named."""
    if len(arguments) != 1:
        print("usage: python tools/release.py TAG", file=sys.stderr)
        return 2
    try:
        print(notes(arguments[0], (ROOT / "CHANGELOG.md").read_text()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
