"""What every probe shares: call a tool with one checkpoint, print what became of it as JSON.

Runs by the interpreter that the tool is installed in, which has no gemma-fold; a probe that is to
have it takes it from this repository.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def report(package: str, load: Callable[[Path, Path], object], *, aware: bool = False) -> None:
    """Call `load(checkpoint, empty folder)` with the arguments of this process.

    It returns what it has to say of the model it loaded, such as its logits, as text or numbers.
    `aware` installs gemma-fold's integration into transformers first.
    """
    checkpoint, folder = (Path(argument).absolute() for argument in sys.argv[1:3])
    found: dict[str, object] = {"version": version(package)}
    if aware:
        sys.path.append(str(Path(__file__).resolve().parents[2]))
        from gemma_fold.engines.transformers import install

        install()
    try:
        found |= {"outcome": "loads", "result": load(checkpoint, folder)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        found |= {"outcome": "stops", "error": f"{type(error).__name__}: {error}"}
    assert ("gemma_fold" in sys.modules) == aware
    print(json.dumps(found))
