"""What commands print: text or JSON on stdout; errors, warnings and progress on stderr."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from gemma_fold.text import printable

if TYPE_CHECKING:
    from gemma_fold.commands.render import ProgressBar

Function = TypeVar("Function", bound=Callable[..., Any])

#: Words at the beginning of a line, and the colours they have on a terminal.
_COLOURS = (
    (re.compile(r"^(ok|right|same|verdict: foldable)\b(?=:)", re.MULTILINE), "green"),
    (re.compile(r"^(FAILED|wrong|differs|verdict: \w+)\b(?=:| )", re.MULTILINE), "red"),
    (re.compile(r"^(warning|note)(?=:)", re.MULTILINE), "yellow"),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")


@dataclass(frozen=True, slots=True)
class Printer:
    """How one run prints, by its --json and --quiet."""

    as_json: bool = False
    quiet: bool = False

    def show(self, plain: Callable[[], Any], text: Callable[[], str]) -> None:
        """Print a result: plain values as JSON, or text; only what is printed is made."""
        if self.as_json:
            _echo(json.dumps(plain(), indent=2, default=str), sys.stdout, coloured=False)
        elif not self.quiet:
            _echo(text(), sys.stdout)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings on stderr; JSON has them already."""
        if not (self.quiet or self.as_json):
            for warning in warnings:
                _echo(f"warning: {warning}", sys.stderr)

    @contextmanager
    def progress(self, label: str) -> Iterator[ProgressBar]:
        """A bar on stderr; `label` is what is shown until bytes are counted."""
        from gemma_fold.commands import render

        hidden = self.quiet or not sys.stderr.isatty()
        if hidden:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        bar = render.ProgressBar(label, hidden=hidden)
        try:
            yield bar
        finally:
            bar.finish()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show on a terminal that `what` goes on, if it takes more than a moment."""
        with self.progress(what) as bar:
            bar.waiting(what)
            yield


def output_options(function: Function) -> Callable[..., Any]:
    """Give a command --json and --quiet; its first argument is the `Printer` that they ask for."""

    @functools.wraps(function)
    def wrapped(*, as_json: bool, quiet: bool, **given: Any) -> Any:
        return function(Printer(as_json, quiet), **given)

    own = wrapped.__dict__.pop("__click_params__", [])
    command: Any = _json_option(_quiet_option(wrapped))
    command.__click_params__ += own  # the last is listed first in the help
    wrapped_command: Callable[..., Any] = command
    return wrapped_command


def complain(message: str) -> None:
    """Print an error, one line, on stderr."""
    line = printable(f"gemma-fold: {message}", sys.stderr.encoding, one_line=True)
    if _coloured(sys.stderr):
        line = click.style("gemma-fold:", fg="red") + line.removeprefix("gemma-fold:")
    click.echo(line, err=True, color=_coloured(sys.stderr))


def _echo(text: str, stream: TextIO, *, coloured: bool = True) -> None:
    shown = printable(text, stream.encoding)
    coloured = coloured and _coloured(stream)
    if coloured:
        for words, colour in _COLOURS:
            shown = words.sub(click.style(r"\g<0>", fg=colour), shown)
    click.echo(shown, file=stream, color=coloured)


def _coloured(stream: TextIO) -> bool:
    """Whether to colour: as no-color.org and CLICOLOR_FORCE say, else on terminals only."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"
