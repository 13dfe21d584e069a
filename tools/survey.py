"""Find out what the norms of released models do, and write the tables that say so.

    python tools/survey.py transformers [--write]
    python tools/survey.py source {vLLM,SGLang} PATH [--write]

The first runs every norm of the transformers that is installed and builds every model; it takes
minutes. The second reads the source of an engine, PATH being its package (`.../site-packages/vllm`
or an unpacked wheel). Each prints what the committed tables lack or say otherwise and then exits
with 1; --write brings the tables up to date:

    gemma_fold/rules/families/plain.py   model types without a zero-centred norm
    gemma_fold/rules/classes.py          classes of transformers that add to their weight
    tests/data/norms.json                the same classes, and norms by their names on disk
    tests/data/norms_sources.json        files of engines with zero-centred norms, and their rows

A row itself is written by hand, and named in the last file by hand: by one of its model types or
architectures, or with a `why` where a file calls for no row of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import survey_source

from gemma_fold.rules import TABLE

if TYPE_CHECKING:
    from survey_models import ClassFound, Sweep

ROOT = Path(__file__).resolve().parent.parent
PLAIN = ROOT / "gemma_fold/rules/families/plain.py"
CLASSES = ROOT / "gemma_fold/rules/classes.py"
NORMS = ROOT / "tests/data/norms.json"
SOURCES = ROOT / "tests/data/norms_sources.json"
#: Where an engine's models are, below its package.
MODELS = {
    "vLLM": ("model_executor/models/", "models/"),
    "SGLang": ("srt/models/", "multimodal_gen/runtime/models/"),
}
#: And where its own configs are.
CONFIGS = {
    "vLLM": ("transformers_utils/",),
    "SGLang": ("srt/configs/", "srt/models/"),
}
#: Configs that stand for any model.
ANY_MODEL = {"eagle", "extract_hidden_states", "speculators"}
#: Lists of plain.py by the release that they come from: built and run, and only read. One that
#: would be empty is not there.
BLOCKS = {"5.23": ("EXECUTED", "READ"), "5.24": ("EXECUTED_5_24", "READ_5_24")}
#: The release in which names on disk are measured: that of constraints.txt.
PINNED = "5.23"


# --- transformers --------------------------------------------------------------------------------


def lists(found: Sweep, version: str) -> dict[str, list[str]]:
    """The lists of plain.py that a sweep of this release calls for, by their names there.

    A model type is where the oldest release put it that has it.
    """
    with_rows = rows() - plain_rows()
    earlier = {
        each
        for other, names in BLOCKS.items()
        if other < version
        for name in names
        for each in block(PLAIN.read_text(), name)
    }
    types = found.executed | set(found.not_built)
    executed = {kind for kind in found.executed if not norms_not_run(found, kind)}
    names = BLOCKS[version]
    split = (types & executed, types - executed)
    return {
        name: sorted(each - with_rows - earlier) for name, each in zip(names, split, strict=True)
    }


def norms_not_run(found: Sweep, model_type: str) -> list[str]:
    """Norms of a model type, by their classes' names, that could not be called."""
    return [n for n in sorted(found.not_run.get(model_type, ())) if "norm" in n.lower()]


def without_row(found: Sweep) -> list[str]:
    """Model types that have a zero-centred norm and no row."""
    return sorted(set(found.zero_centred) - (rows() - plain_rows()))


def rows() -> set[str]:
    """Model types that the table knows."""
    return {kind for row in TABLE for kind in row.model_types}


def plain_rows() -> set[str]:
    """Model types that the table calls plain as a whole."""
    return {kind for row in TABLE if row.all_plain for kind in row.model_types}


def wrappers(text: str, found: set[str]) -> tuple[str, list[str]]:
    """plain.py with these of its model types among WRAPPERS too, and which were not there.

    What was there stays: each survey sees some of the configs.
    """
    known = {*block(text, "WRAPPERS")}
    new = sorted(found - known)
    problems = [f"WRAPPERS of plain.py lacks {kind}" for kind in new]
    return with_block(text, "WRAPPERS", sorted({*known, *new})), problems


def block(text: str, name: str) -> list[str]:
    """The words of the list `name` in a Python file; none where it has no such list."""
    found = re.search(rf'^{name} = """\n(.*?)"""', text, re.DOTALL | re.MULTILINE)
    return found[1].split() if found else []


def with_block(text: str, name: str, words: Iterable[str]) -> str:
    """`text` with these words as its list `name`."""
    listed = textwrap.fill(" ".join(words), 100, break_on_hyphens=False, break_long_words=False)
    return re.sub(
        rf'^({name} = """\n).*?(""")',
        lambda match: match[1] + (f"{listed}\n" if listed else "") + match[2],
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def facts(classes: Iterable[ClassFound]) -> dict[str, dict[str, Any]]:
    """What norms.json says of each class that adds to its weight."""
    kinds = {"zero_centred": "zero_centred", "input_scaled": "input_scaled_1p"}
    return {
        each.name: {
            "file": each.file,
            "line": each.line,
            "param": each.parameter,
            "verdict": kinds[each.trial.verdict],
            "kind": each.trial.norm or "y = rms(x*(1+w))",
            "arithmetic_in_bf16": each.trial.rounding,
        }
        for each in classes
        if each.trial.verdict in kinds
    }


def class_rows(text: str, found: dict[str, dict[str, Any]], version: str) -> str:
    """classes.py with a row for each class of norms.json, in the order it has and new ones last."""
    kept = [name for name in re.findall(r'NormClass\(\s*"(\w+)"', text) if name in found]
    names = [*kept, *(name for name in found if name not in kept)]
    listed = "".join(f"    {_class_row(name, found[name])},\n" for name in names)
    text = re.sub(
        r"(= \(\n)(    NormClass.*?)(^\)$)", rf"\g<1>{listed}\g<3>", text, flags=re.S | re.M
    )
    text = re.sub(r"transformers [\d.]+ models", f"transformers {version} models", text)
    command = [sys.executable, "-m", "ruff", "format", f"--config={ROOT / 'pyproject.toml'}", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _class_row(name: str, fact: dict[str, Any]) -> str:
    place = f"{fact['file'].removeprefix('models/')}:{fact['line']}"
    if fact["verdict"] != "zero_centred":
        return f'NormClass("{name}", _ran("{place}"), fold=None, kind=Kind.NOT_A_GAMMA)'
    fold = {
        ("rms", "fp32 add, fp32 mul, cast"): "",
        ("rms", "bf16 add, fp32 mul, cast"): ", _RMS_STORAGE",
        ("layernorm", "bf16 add, fp32 mul, cast"): ", _LAYER_NORM",
        ("layernorm", "bf16 add, bf16 mul"): ", _LAYER_NORM_STORAGE",
    }[fact["kind"], fact["arithmetic_in_bf16"]]
    return f'NormClass("{name}", _ran("{place}"){fold})'


def transformers(write: bool) -> list[str]:
    """What the tables lack of the transformers that is installed; with `write`, after writing."""
    import survey_models as models
    from transformers import __version__ as release

    version = ".".join(release.split(".")[:2])
    found = facts(models.norm_classes())
    swept = models.sweep(lambda line: print(line, file=sys.stderr, flush=True))
    problems = [f"{kind} has a zero-centred norm and no row" for kind in without_row(swept)]
    if version not in BLOCKS:
        return [*problems, f"add lists for transformers {version} to BLOCKS and to plain.py"]
    text = PLAIN.read_text()
    for name, words in lists(swept, version).items():
        known = block(text, name)
        problems += [f"{name} of plain.py lacks {kind}" for kind in sorted({*words} - {*known})]
        problems += [f"{name} of plain.py has {kind}" for kind in sorted({*known} - {*words})]
        text = with_block(text, name, words)
    text, lacking = wrappers(text, models.wrappers() & plain_rows())
    problems += lacking
    told = json.loads(NORMS.read_text())
    known = told["_about"]["classes"]
    problems += [
        f"norms.json does not say of {name} what it does" for name in found if name not in known
    ]
    if version == PINNED:
        problems += [
            f"norms.json differs in {name}" for name in known if known[name] != found.get(name)
        ]
        told["_about"]["classes"] = found
        problems += merge_names(told, models.measured_names())
    if write:
        PLAIN.write_text(text)
    if write and version == PINNED:
        CLASSES.write_text(class_rows(CLASSES.read_text(), found, version))
        write_json(NORMS, told)
    return problems


def merge_names(told: dict[str, Any], measured: dict[str, dict[str, list[str]]]) -> list[str]:
    """Add measured names to those of norms.json, and say which were not there.

    What was there stays: it may come from a config that is not among those measured here.
    """
    problems = []
    for family, kinds in measured.items():
        entry = told.setdefault(family, {})
        for kind, names in kinds.items():
            known = entry.get(kind, [])
            new = sorted({*names} - {*known})
            problems += [f"norms.json does not call {name} of {family} {kind}" for name in new]
            entry[kind] = sorted({*names, *known})
    return problems


# --- engines -------------------------------------------------------------------------------------


def source(engine: str, path: Path, write: bool) -> list[str]:
    """What the tables lack of an engine's source; with `write`, after writing."""
    text = survey_source.Source(path)
    users = text.users(MODELS[engine])
    table = json.loads(SOURCES.read_text())
    known = table[engine]["files"]
    problems = [
        f"{file} uses {name}, which its rows have not answered for"
        for file, names in users.items()
        for name in names
        if name not in known.get(file, {}).get("adds", ())
    ]
    problems += [f"{file} is gone or adds nothing" for file in known if file not in users]
    types = survey_source.model_types(text, CONFIGS[engine])
    unknown = types.keys() - rows() - ANY_MODEL
    problems += [f"model type {kind} of {types[kind]} has no row" for kind in sorted(unknown)]
    plain = PLAIN.read_text()  # of a model type that transformers has, transformers knows best
    inside = survey_source.wrappers(text, CONFIGS[engine]) & {*block(plain, "ENGINES")}
    plain, lacking = wrappers(plain, inside)
    problems += lacking
    if write:
        PLAIN.write_text(plain)
        version = _version(path)
        table[engine] = {
            "version": version,
            "files": {
                file: {"adds": names, "rows": []} | known.get(file, {}) | {"adds": names}
                for file, names in users.items()
            },
        }
        write_json(SOURCES, table)
    return problems


def _version(package: Path) -> str:
    found = next(package.parent.glob(f"{package.name}-*.dist-info"), None)
    return found.name.removesuffix(".dist-info").split("-")[1] if found else "?"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Survey the norms of released models.")
    parser.add_argument("what", choices=["transformers", "source"])
    parser.add_argument("engine", nargs="?", choices=sorted(MODELS))
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--write", action="store_true", help="bring the tables up to date")
    options = parser.parse_args(arguments)
    if options.what == "transformers":
        problems = transformers(options.write)
    elif options.path is None or not options.path.is_dir():
        parser.error("say which engine, and the folder of its package")
    else:
        problems = source(options.engine, options.path, options.write)
    print("\n".join(problems) or "the tables say what was found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
