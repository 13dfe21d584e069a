"""optimum: `main_export` to ONNX."""

from __future__ import annotations

from pathlib import Path

import probe
from optimum.exporters.onnx import main_export


def load(checkpoint: Path, folder: Path) -> object:
    main_export(str(checkpoint), folder / "out", task="text-generation", do_validation=False)
    return sorted(path.name for path in (folder / "out").iterdir())


if __name__ == "__main__":
    probe.report("optimum-onnx", load)
