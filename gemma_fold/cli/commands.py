"""Every command: its arguments, one call into the library, and what is printed of the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from gemma_fold.cli.app import group
from gemma_fold.cli.output import Printer, output_options

Function = TypeVar("Function", bound=Callable[..., Any])
_path = click.Path(dir_okay=True, path_type=Path)
_out_option = click.option("-o", "--out", required=True, metavar="OUT", help="Folder to create.")
_resume_option = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
_restart_option = click.option(
    "--restart", is_flag=True, help="Discard an interrupted run and start over."
)
#: A folder, which shells complete, or a Hub id.
_place = click.Path(path_type=str)


def _command(summary: str, **options: Any) -> Callable[[Function], click.Command]:
    """A command of the group; `summary` is its line in the list of all."""
    return lambda function: group.command(short_help=summary, **options)(output_options(function))


@_command("Say which norms are zero-centred, and what folding would change.")
@click.argument("source", type=_place)
def inspect(printer: Printer, source: str) -> None:
    """List which norms of SOURCE are zero-centred, by which rule, and what folding would change.

    SOURCE is a folder, or a Hub id such as org/name or org/name@revision. Only headers are read
    (by range requests from the Hub); in a folder the norm weights too.

    \b
    Examples:
      gemma-fold inspect ./gemma-3-270m
      gemma-fold inspect google/gemma-3-27b-it@main --json
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.inspect import inspect as run
    from gemma_fold.commands.inspect import to_json
    from gemma_fold.rules import Verdict

    with printer.waiting("reading headers"):
        found = run(source)
    printer.show(lambda: to_json(found), lambda: render.inspection(found))
    if found.classification.verdict in (Verdict.NOTHING_TO_FOLD, Verdict.UNSUPPORTED):
        sys.exit(3)
    if found.incomplete:
        sys.exit(2)


@_command("Fold a checkpoint.")
@click.argument("source", type=_place)
@_out_option
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@_resume_option
@_restart_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT if it is a folded checkpoint that convert made, holds nothing else and was "
    "not changed since; an interrupted run is started over.",
)
@click.option(
    "--by-shard",
    is_flag=True,
    help="Fetch a weight file of a Hub id when it is folded and remove it then: the disk holds OUT "
    "and one file of the source at most.",
)
@click.option(
    "--no-digest",
    is_flag=True,
    help="Take no digests of the files, so that a reflinked copy reads only the norms. "
    "verify and unfold can then check the norms alone.",
)
@click.option(
    "--no-tensor-lock",
    is_flag=True,
    help="Write gammas as [H] instead of [H, 1]: for a plain-RMSNorm runtime of your own. "
    "Loaders unaware of the fold then load them without a word.",
)
def convert(
    printer: Printer,
    source: str,
    out: str,
    dry_run: bool,
    resume: bool,
    restart: bool,
    force: bool,
    by_shard: bool,
    no_digest: bool,
    no_tensor_lock: bool,
) -> None:
    """Fold SOURCE, a folder or a Hub id, into the new folder OUT.

    Every zero-centred norm weight becomes float32 gamma = 1 + w; every other byte stays. OUT is
    absent or complete, whatever happens.

    \b
    Examples:
      gemma-fold convert ./gemma-3-270m -o ./gemma-3-270m-folded
      gemma-fold convert google/gemma-3-270m@main -o ./gemma-3-270m-folded --dry-run
      gemma-fold convert google/gemma-3-27b-it -o ./gemma-3-27b-it-folded --by-shard
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.convert import convert as run

    with _resumable(), printer.progress("folding") as progress:
        report = run(
            source,
            out,
            tensor_lock=not no_tensor_lock,
            resume=resume,
            restart=restart,
            force=force,
            digest=not no_digest,
            dry_run=dry_run,
            by_shard=by_shard,
            progress=progress,
        )
    verb = "would fold" if dry_run else "folded"
    printer.warn(report.warnings)
    printer.show(lambda: asdict(report), lambda: render.conversion(report, verb=verb))


@_command("Check a folded checkpoint, every byte.")
@click.argument("folded", type=_place)
@click.option("--against", metavar="SOURCE", help="Compare every byte with the original, too.")
def verify(printer: Printer, folded: str, against: str | None) -> None:
    """Check the FOLDED checkpoint, all of it: format, locks, and every byte by its digest.

    \b
    Examples:
      gemma-fold verify ./gemma-3-270m-folded
      gemma-fold verify ./gemma-3-270m-folded --against google/gemma-3-270m
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.verify import verify as run

    with printer.progress("comparing") as progress:
        report = run(folded, against=against, progress=progress)
    printer.show(lambda: {"ok": report.ok, **asdict(report)}, lambda: render.verification(report))
    if not report.ok:
        sys.exit(1)


@_command("Turn a folded checkpoint back into its source.")
@click.argument("folded", type=_place)
@_out_option
@_resume_option
@_restart_option
def unfold(printer: Printer, folded: str, out: str, resume: bool, restart: bool) -> None:
    """Turn the FOLDED checkpoint back into the very bytes it was made from.

    \b
    Example:
      gemma-fold unfold ./gemma-3-270m-folded -o ./gemma-3-270m-again
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.unfold import unfold as run

    with _resumable(), printer.progress("unfolding") as progress:
        report = run(folded, out, resume=resume, restart=restart, progress=progress)
    printer.warn(report.warnings)
    printer.show(lambda: asdict(report), lambda: render.conversion(report, verb="unfolded"))


@_command("Say whether a converter got the +1 of every norm right.")
@click.argument("file", type=_place, required=False)
@click.option("--against", metavar="ORIGINAL", help="The checkpoint that FILE was made from.")
@click.option(
    "--tensor",
    "tensors",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="A norm that your runtime holds, instead of FILE; - is standard input. Repeat for more.",
)
@click.option(
    "--expect",
    type=click.Choice(["w", "gamma"]),
    help="What the norms should hold, where it is not what the format says. Tensors: gamma.",
)
@click.option(
    "--all", "every", is_flag=True, help="List every norm, not only those that are wrong."
)
@click.option("--html", type=_path, metavar="FILE", help="Write a report to look at.")
def check(
    printer: Printer,
    file: str | None,
    against: str | None,
    tensors: tuple[str, ...],
    expect: str | None,
    every: bool,
    html: Path | None,
) -> None:
    """Say whether the converter that wrote FILE got the +1 of every norm right.

    FILE is a GGUF file, an MLX, AWQ, GPTQ, compressed-tensors, bitsandbytes or folded folder, any
    other safetensors folder, or a Hub id; so is ORIGINAL. Only headers and norms are read. Without
    ORIGINAL, only what the numbers of FILE show by themselves is told.

    Exits with 0 if the norms are right, with 1 if they are wrong, with 2 if FILE cannot be read or
    does not tell, and with 3 if no rule knows the model.

    \b
    Examples:
      gemma-fold check gemma-3-270m.gguf --against google/gemma-3-270m
      gemma-fold check ./gemma-3-270m-mlx-4bit --against ./gemma-3-270m --json
      gemma-fold check ./published.gguf
      gemma-fold check --against ./gemma-3-270m --tensor blk.0.attn_norm=gain.npy
    """
    from gemma_fold.commands import check_text
    from gemma_fold.commands.check import check as run
    from gemma_fold.commands.check import to_json

    if html is not None:
        from gemma_fold.commands.check_html import html as page
        from gemma_fold.compare.report.html import check_page

        check_page(html)
    with printer.waiting("reading norms"):
        found = run(file, against=against, tensors=tensors, expect=expect)
    if html is not None:
        html.write_text(page(found), "utf-8")
    printer.show(lambda: to_json(found), lambda: check_text.text(found, every=every))
    sys.exit(found.verdict.exit_code)


@_command("Compare two checkpoints, or what two models answer.")
@click.argument("a", type=_place)
@click.argument("b", type=_place)
@click.option("--structure-only", is_flag=True, help="Headers and configs only: no download.")
@click.option(
    "--outputs/--no-outputs",
    default=None,
    help="Run both and compare logits. Default: if both can be run.",
)
@click.option(
    "--engine",
    multiple=True,
    metavar="ENGINE",
    help="transformers (default); vllm, sglang, or the address of an OpenAI-compatible server, "
    "whose top log-probabilities are compared. Twice: for A, then for B.",
)
@click.option("--text", type=_path, metavar="FILE", help="Read this instead of the bundled text.")
@click.option("--context", default=1024, show_default=True, help="Tokens in a window.")
@click.option("--prompts", default=4, show_default=True, type=click.IntRange(0, 4))
@click.option("--new-tokens", default=32, show_default=True, type=click.IntRange(1))
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="What both are run in; auto is A's own.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N.")
@click.option("--noise-floor/--no-noise-floor", default=True, help="Also compare A with itself.")
@click.option("--save-logits", type=_path, metavar="FILE", help="Keep A's logits.")
@click.option("--logits", type=_path, metavar="FILE", help="A's logits, instead of running A.")
@click.option("--timeout", default=120.0, show_default=True, help="Seconds to wait for a server.")
@click.option("--max-kl", type=float, metavar="NATS", help="Mean KL to tolerate.")
@click.option(
    "--max-ulp",
    default=0,
    metavar="N",
    help="Error of gamma to tolerate, in float32 ulp; 65536 is one bf16 ulp.",
)
@click.option("--markdown", is_flag=True, help="Print Markdown, for a model card.")
@click.option("--html", type=_path, metavar="FILE", help="Write a report to look at.")
def diff(printer: Printer, a: str, b: str, markdown: bool, html: Path | None, **given: Any) -> None:
    """Compare A, the reference, with B: structure, every weight, and what the models answer.

    Each is a folder (original or folded), a Hub id, or the http:// address of a server. Of files
    of two tools, such as GGUF, MLX or quantized ones, the norms are compared, as check does. Exits
    with 0 if they are the same, with 1 if they differ, and with 2 if the comparison could not run.
    Without --max-kl, outputs are the same if no value differs, or if the mean KL is within the
    noise of A itself.

    \b
    Examples:
      gemma-fold diff ./gemma-3-270m ./gemma-3-270m-folded --html report.html
      gemma-fold diff google/gemma-3-270m ./gemma-3-270m-folded --no-outputs
      gemma-fold diff ./gemma-3-270m gemma-3-270m.gguf
      gemma-fold diff http://127.0.0.1:8000 http://127.0.0.1:8001 --max-kl 1e-3
    """
    from gemma_fold.commands.diff import run

    with printer.progress("comparing") as progress:
        found = run(a, b, html=html, progress=progress, **given)
    printer.show(found.json, found.markdown if markdown else found.text)
    sys.exit(found.exit_code)


@_command("Upload a folded checkpoint to the Hub, with a model card.")
@click.argument("folded", type=_place)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="The source on the Hub, if FOLDED was made from a folder that does not name it.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the card, send nothing.")
def push(
    printer: Printer,
    folded: str,
    repo: str,
    private: bool,
    create_pr: bool,
    base_model: str | None,
    dry_run: bool,
) -> None:
    """Upload the FOLDED checkpoint to REPO on the Hub, once it is verified.

    REPO is made if there is none. It gets a model card with the source and its licence, how to
    load it, and what folding changed; the source's own card becomes README.source.md there. FOLDED
    stays as it is. After an interruption, run it again: what is there is not sent twice.

    \b
    Examples:
      gemma-fold push ./gemma-3-270m-folded me/gemma-3-270m-folded --private
      gemma-fold push ./gemma-3-270m-folded org/gemma-3-270m-folded --create-pr
      gemma-fold push ./gemma-3-270m-folded me/gemma-3-270m-folded --dry-run
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.push import push as run

    how = "run it again: what is on the Hub is not sent twice"
    with _resumable(how), printer.progress("checking") as progress:
        report = run(
            folded,
            repo,
            private=private,
            create_pr=create_pr,
            base_model=base_model,
            dry_run=dry_run,
            progress=progress,
        )
    printer.warn(report.warnings)
    printer.show(lambda: asdict(report), lambda: render.pushed(report))


@_command(
    "Serve a folded checkpoint over an OpenAI-compatible API.",
    context_settings={"ignore_unknown_options": True},
)
@click.argument("folded", type=_place)
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "sglang", "transformers"]),
    default="auto",
    show_default=True,
    help="auto picks the first that is installed of vllm, sglang, transformers.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.argument("engine_arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    printer: Printer,
    folded: str,
    engine: str,
    host: str,
    port: int,
    engine_arguments: tuple[str, ...],
) -> None:
    """Serve the FOLDED checkpoint, a folder or a Hub id, over an OpenAI-compatible API.

    The checkpoint is checked first. Arguments after -- go to the engine's own server.

    \b
    Examples:
      gemma-fold serve ./gemma-3-270m-folded
      gemma-fold serve ./gemma-3-270m-folded --port 8080 -- --dtype float32
      gemma-fold serve ./gemma-3-27b-folded --engine vllm -- --tensor-parallel-size 2
    """
    from gemma_fold.engines.serve import serve as run

    def starting(engine: str) -> None:
        url = f"http://{host}:{port}/v1"
        printer.show(
            lambda: {"checkpoint": folded, "engine": engine, "url": url},
            lambda: f"{engine} serves {folded} at {url} as soon as it is loaded; Ctrl-C ends it",
        )

    run(folded, engine, host, port, engine_arguments, starting)


@_command("List the engines here, and what they would fuse.")
@click.argument("model", type=_place, required=False)
def doctor(printer: Printer, model: str | None) -> None:
    """List which engines are installed here and what each would fuse in MODEL, loading no weights.

    MODEL is a folder or a Hub id, folded or not. Exits with 1 if an engine does not find
    gemma-fold, or would leave something of MODEL unfused that could be.

    \b
    Examples:
      gemma-fold doctor
      gemma-fold doctor ./gemma-3-270m-folded --json
    """
    with printer.waiting("looking at the engines"):
        from gemma_fold.engines import doctor as doctoring

        found = doctoring.diagnose(model)
    printer.show(lambda: doctoring.to_json(found), lambda: doctoring.text(found))
    if not found.ok:
        sys.exit(1)


@_command("Say which norms of a model family are zero-centred.")
@click.argument("model_type", required=False)
def rules(printer: Printer, model_type: str | None) -> None:
    """Say which norms of MODEL_TYPE are zero-centred and how that is known; of all without it.

    MODEL_TYPE is as config.json says it, or one of its architectures. The JSON has a schema, in
    the package beside the rules.

    \b
    Examples:
      gemma-fold rules qwen3_next
      gemma-fold rules --json > rules.json
    """
    from gemma_fold.commands import render
    from gemma_fold.commands.rules import rules as run
    from gemma_fold.commands.rules import to_json

    found = run(model_type)
    printer.show(lambda: to_json(found), lambda: render.rules(found, model_type))


@contextmanager
def _resumable(how: str = "run again with --resume to continue") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {how}") from None
