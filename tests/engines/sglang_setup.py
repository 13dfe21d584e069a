"""Make SGLang's CUDA wheels importable on a machine without CUDA; run once, by the Makefile.

Run with the Python of the environment that SGLang is in. Two packages stand in the way of a server
on the CPU, though the models served here call neither:

* torchvision registers shapes for operators of its CUDA extension, which does not load here.
* SGLang's rotary embedding imports vLLM's operator where it finds no GPU, and does not call it.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

_DECLARE = """
if not _has_ops():  # added: declared, so that their shapes can be registered
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
_VLLM_OPS = '''"""Stands in for vLLM's operators, which SGLang imports and no test calls."""


def rotary_embedding(*arguments: object) -> None:
    raise NotImplementedError("vLLM is not installed here")
'''


def main() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    extension = packages / "torchvision" / "extension.py"
    source = extension.read_text()
    if _DECLARE not in source:
        extension.write_text(source + _DECLARE)
    stub = packages / "vllm" / "_custom_ops.py"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(_VLLM_OPS)


if __name__ == "__main__":
    main()
