"""The command line: arguments in, one call into the library, text or JSON out."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from gemma_fold._version import __version__
from gemma_fold.errors import GemmaFoldError

EXIT_INTERRUPTED = 130
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gemma-fold")
def cli() -> None:
    """Fold zero-centred norm weights, gamma = 1 + w, once, offline and exactly.

    \b
    Examples:
      gemma-fold inspect google/gemma-3-270m
      gemma-fold convert gemma-3-270m -o gemma-3-270m-folded
      gemma-fold verify gemma-3-270m-folded --against gemma-3-270m
      gemma-fold unfold gemma-3-270m-folded -o gemma-3-270m-again

    \b
    Exit codes: 0 ok, 1 differs or check failed, 2 usage or bad input,
    3 unsupported model or nothing to fold, 130 interrupted.
    """


@cli.command()
@click.argument("source")
@_json_option
def inspect(source: str, as_json: bool) -> None:
    """Say which norms of SOURCE are zero-centred, by which rule, and what folding would change.

    SOURCE is a folder, or a Hub id such as org/name or org/name@revision. Only headers are read
    (by range requests from the Hub); in a folder the norm weights too.

    \b
    Examples:
      gemma-fold inspect ./gemma-3-270m
      gemma-fold inspect google/gemma-3-27b-it@main --json
    """
    from gemma_fold import inspection, render
    from gemma_fold.rules import Verdict

    found = inspection.inspect(source)
    _print(as_json, lambda: inspection.to_json(found), lambda: render.inspection(found))
    if found.classification.verdict in (Verdict.NOTHING_TO_FOLD, Verdict.UNSUPPORTED):
        sys.exit(3)
    if found.incomplete:
        sys.exit(2)


@cli.command()
@click.argument("source")
@click.option("-o", "--out", required=True, metavar="OUT", help="Folder to create.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--force", is_flag=True, help="Start over; replace OUT if it is a folded checkpoint.")
@click.option(
    "--no-tensor-lock",
    is_flag=True,
    help="Write gammas as [H] instead of [H, 1]: for a plain-RMSNorm runtime of your own. "
    "Loaders unaware of the fold then load them without a word.",
)
@_json_option
def convert(
    source: str,
    out: str,
    dry_run: bool,
    resume: bool,
    force: bool,
    no_tensor_lock: bool,
    as_json: bool,
) -> None:
    """Fold SOURCE, a folder or a Hub id, into the new folder OUT.

    Every zero-centred norm weight becomes float32 gamma = 1 + w; every other byte stays. OUT is
    absent or complete, whatever happens.

    \b
    Examples:
      gemma-fold convert ./gemma-3-270m -o ./gemma-3-270m-folded
      gemma-fold convert google/gemma-3-270m@main -o ./gemma-3-270m-folded --dry-run
    """
    from gemma_fold import render
    from gemma_fold.convert import convert as run

    report = run(
        source,
        out,
        tensor_lock=not no_tensor_lock,
        resume=resume,
        force=force,
        dry_run=dry_run,
        progress=render.ProgressBar("folding"),
    )
    verb = "would fold" if dry_run else "folded"
    _print(as_json, lambda: _plain(report), lambda: render.conversion(report, verb=verb))


@cli.command()
@click.argument("folded")
@click.option("--against", metavar="SOURCE", help="Compare every byte with the original, too.")
@_json_option
def verify(folded: str, against: str | None, as_json: bool) -> None:
    """Check the FOLDED checkpoint: format, locks, manifest, and every gamma against its rule.

    \b
    Examples:
      gemma-fold verify ./gemma-3-270m-folded
      gemma-fold verify ./gemma-3-270m-folded --against google/gemma-3-270m
    """
    from gemma_fold import render
    from gemma_fold.verify import verify as run

    report = run(folded, against=against, progress=render.ProgressBar("comparing"))
    _print(
        as_json, lambda: {"ok": report.ok, **_plain(report)}, lambda: render.verification(report)
    )
    if not report.ok:
        sys.exit(1)


@cli.command()
@click.argument("folded")
@click.option("-o", "--out", required=True, metavar="OUT", help="Folder to create.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--force", is_flag=True, help="Start an interrupted run over.")
@_json_option
def unfold(folded: str, out: str, resume: bool, force: bool, as_json: bool) -> None:
    """Turn the FOLDED checkpoint back into the very bytes it was made from.

    \b
    Example:
      gemma-fold unfold ./gemma-3-270m-folded -o ./gemma-3-270m-again
    """
    from gemma_fold import render
    from gemma_fold.unfold import unfold as run

    report = run(folded, out, resume=resume, force=force, progress=render.ProgressBar("unfolding"))
    _print(as_json, lambda: _plain(report), lambda: render.conversion(report, verb="unfolded"))


def _print(as_json: bool, plain: Callable[[], Any], text: Callable[[], str]) -> None:
    click.echo(json.dumps(plain(), indent=2, default=str) if as_json else text())


def _plain(report: Any) -> dict[str, Any]:
    return dataclasses.asdict(report)


def main() -> None:
    """Run the command line; every deliberate error is one line and its exit code."""
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except GemmaFoldError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted; an unfinished output can be continued with --resume", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does: nothing is wrong, nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; check the path, permissions and disk", 2)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"gemma-fold: {message}", err=True)
    sys.exit(exit_code)
