"""docs/commands.md: every command and option, as the command line itself describes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from benchmarks.report.words import table
from gemma_fold.cli import commands  # noqa: F401  (which adds them to the group)
from gemma_fold.cli.app import group

#: Of every command; told once.
SHARED = ("as_json", "quiet")
#: Before a paragraph that click does not wrap.
AS_IT_IS = "\b\n"


def reference() -> str:
    """What all commands share, then a chapter for each."""
    first = next(iter(group.commands.values()))
    shared = [param for param in first.params if param.name in SHARED]
    parts = ["Every command takes these, and `--help`:", _options(shared)]
    parts += [part for name, command in group.commands.items() for part in _chapter(name, command)]
    return "\n\n".join(parts)


def _chapter(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {name}"
    yield f"```text\ngemma-fold {name} {usage}\n```"
    yield from map(_paragraph, inspect.cleandoc(command.help or "").split("\n\n"))
    options = [
        param
        for param in command.params
        if isinstance(param, click.Option) and param.name not in SHARED
    ]
    if options:
        yield _options(options)


def _paragraph(text: str) -> str:
    """A paragraph of a docstring; examples become what can be copied."""
    if not text.startswith(AS_IT_IS):
        return text.replace("<", "&lt;")
    head, *lines = text.removeprefix(AS_IT_IS).splitlines()
    code = "\n".join(line.strip() for line in lines)
    return f"{head}\n\n```sh\n{code}\n```"


def _options(options: list[click.Parameter] | list[click.Option]) -> str:
    rows = [(_names(one), _help(one)) for one in options if isinstance(one, click.Option)]
    return table(("option", ""), rows)


def _names(option: click.Option) -> str:
    """As it is given, in all its spellings."""
    value = "" if option.is_flag else f" {_value(option)}"
    spellings = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{one}{value}`" for one in spellings)


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return "{" + ",".join(map(str, option.type.choices)) + "}"
    return option.metavar or (option.name or "").upper().replace("_", "-")


def _help(option: click.Option) -> str:
    text = (option.help or "").replace("|", "\\|")
    if option.show_default:
        text = f"{text} Default: {option.default}.".strip()
    if option.multiple:
        text += " May be given more than once."
    return f"{text} Required.".strip() if option.required else text
