"""The decoders of vLLM and SGLang whose norms may hand on their input, and which code may.

A class may if its methods do nothing with what one norm hands to the next but pass it on, when they
run on stand-ins. A few forwards cannot be followed, and were read instead: their digests are of
vLLM 0.26 to 0.33. Neither engine is imported here.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from gemma_fold.engines.attach.handed import Layout, Methods, layer_problem, model_problem


@dataclass(frozen=True, slots=True)
class Family:
    """A decoder of an engine.

    Attributes:
        layout: sandwich: a norm before and after each block; add_norm: a norm before each block.
        model_type: of its config.
        model: name of the class of the decoder.
        layer: name of the class of its layers.
        file: in the engine's folder of models, without `.py`; its model type if empty.
        read: digests of forwards that were read.
        attention: digest of the attention, in which q and k are normed by modules that are only
            called; empty if they are not, or their norms stay the engine's.
    """

    layout: Layout
    model_type: str
    model: str
    layer: str
    file: str = ""
    read: frozenset[str] = frozenset()
    attention: str = ""

    @property
    def module(self) -> str:
        return self.file or self.model_type

    def model_problem(self, methods: Methods, real: Any = None) -> str:
        """Why a class may not be the decoder; empty if it may. `real`: a module of it, if any."""
        return self._problem(self.model, methods, model_problem(methods, real))

    def layer_problem(self, methods: Methods, real: Any = None) -> str:
        """:meth:`model_problem` for a layer."""
        return self._problem(self.layer, methods, layer_problem(methods, self.layout, real))

    def _problem(self, name: str, methods: Methods, problem: str) -> str:
        if not problem or statements_digest(methods.get("forward")) in self.read:
            return ""
        return f"{name}.forward: {problem}"


_GEMMA = frozenset({"bdd40834f86e9aca17a26b1fe0f9041ade33986f4fb3caa29c60974961c9e373"})
# The q and k norms of Qwen stay vLLM's: on CUDA a fused kernel reads their raw weights.
_QWEN = frozenset(
    {
        "4369b2e054cd41dab58c255277e55212a83007a23ebf944983b382ddf6bc3297",
        "5b7360f7c00f4b5dbf70b630d80c3df38f5db0c29bd648177ac50f51969f1855",
        "209672e4b2cf3e14c397d68a45f3c2f9556b990974f0416cb6f8aed7daba5b83",
        "83e013e018b60d12ce7f5bb366589f39ac91fa5db3fc27d3e75a900b9a97812e",
    }
)
VLLM = (
    Family("add_norm", "gemma", "GemmaModel", "GemmaDecoderLayer", read=_GEMMA),
    Family("sandwich", "gemma2", "Gemma2Model", "Gemma2DecoderLayer"),
    Family(
        "sandwich",
        "gemma3",
        "Gemma3Model",
        "Gemma3DecoderLayer",
        attention="e5761aa386434bcde4569517020fdc52c95bb1ac7b10cac1a85d2a56d23aad47",
    ),
    Family("add_norm", "qwen3_next", "Qwen3NextModel", "Qwen3NextDecoderLayer", read=_QWEN),
    Family("add_norm", "qwen3_5", "Qwen3_5Model", "Qwen3_5DecoderLayer", read=_QWEN),
)
SGLANG = (
    Family("sandwich", "gemma2", "Gemma2Model", "Gemma2DecoderLayer"),
    Family("sandwich", "gemma3", "Gemma3TextModel", "Gemma3DecoderLayer", "gemma3_causal"),
)


@cache
def statements_digest(function: Callable[..., Any] | None) -> str:
    """sha256 of the statements of `function`, without layout, comments and signature.

    Empty if it has no source.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
        tree = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    statements = bare_targets(ast.unparse(ast.Module(tree.body, [])))
    return hashlib.sha256(statements.encode()).hexdigest()


def bare_targets(statements: str) -> str:
    """`statements` as Python 3.11 and later unparse them.

    Python 3.10 puts parentheses around several targets of an assignment or a loop.
    """
    statements = re.sub(r"^(\s*)\(([^()]*)\) = ", r"\1\2 = ", statements, flags=re.MULTILINE)
    return re.sub(r"\bfor \(([^()]*)\) in ", r"for \1 in ", statements)
