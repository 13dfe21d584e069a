"""The group of all commands, and what they have in common."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from gemma_fold._version import __version__
from gemma_fold.cli.output import Printer, output_options
from gemma_fold.errors import missing_extra

_PACKAGES = ("numpy", "huggingface_hub", "torch", "triton", "transformers", "vllm", "sglang")
_VARIABLES = ("GEMMA_FOLD", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE")
#: What `hf extensions install` looks for; `hf gemma-fold` runs it.
_EXTENSION = "hf-gemma-fold"


def program() -> str:
    """What the user calls this program."""
    return "hf gemma-fold" if Path(sys.argv[0]).stem == _EXTENSION else "gemma-fold"


class _Commands(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            ctx.fail(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise missing_extra(ctx.invoked_subcommand or "", error) or error from None


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked or ctx.resilient_parsing:
        return
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    lines = [f"gemma-fold {__version__}", system, ", ".join(map(_package, _PACKAGES))]
    settings = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    click.echo("\n".join([*lines, *settings]))
    ctx.exit()


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, and of what it runs with, and exit.",
)
def group() -> None:
    """Fold zero-centred norm weights, gamma = 1 + w, once, offline and exactly.

    \b
    Examples:
      gemma-fold inspect google/gemma-3-270m
      gemma-fold convert gemma-3-270m -o gemma-3-270m-folded
      gemma-fold verify gemma-3-270m-folded --against gemma-3-270m
      gemma-fold unfold gemma-3-270m-folded -o gemma-3-270m-again
      gemma-fold check gemma-3-270m.gguf --against gemma-3-270m
      gemma-fold diff gemma-3-270m gemma-3-270m-folded
      gemma-fold push gemma-3-270m-folded me/gemma-3-270m-folded
      gemma-fold serve gemma-3-270m-folded
      gemma-fold doctor gemma-3-270m-folded
      gemma-fold rules gemma3_text

    \b
    Exit codes: 0 ok, 1 differs or check failed, 2 usage or bad input,
    3 unsupported model or nothing to fold, 130 interrupted.

    \b
    Environment: GEMMA_FOLD (native, stock or require) says which kernels engines run;
    HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_CACHE are the Hub's own; NO_COLOR.
    """


@group.command(short_help="Print what makes a shell complete commands, options and files.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output_options
def completion(printer: Printer, shell: str) -> None:
    """Print what makes SHELL complete the commands, options and files of gemma-fold.

    \b
    Examples:
      source <(gemma-fold completion bash)        # now, or as a line of ~/.bashrc
      gemma-fold completion zsh > ~/.zsh/completions/_gemma-fold
      gemma-fold completion fish > ~/.config/fish/completions/gemma-fold.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(group, {}, "gemma-fold", "_GEMMA_FOLD_COMPLETE").source()
    printer.show(lambda: {"shell": shell, "script": script}, lambda: script)
