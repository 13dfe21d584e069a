"""Norm classes, for models that are in memory: names and checkpoints play no part there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gemma_fold.rules.model import Evidence, Fold, Kind
from gemma_fold.rules.row import RMS_NORM


@dataclass(frozen=True, slots=True)
class NormClass:
    """A norm class of transformers that adds an offset to its weight.

    fold: None where the result is no gain (kind NOT_A_GAMMA). An instance with a `group_size` is a
    grouped RMSNorm, whatever `fold.norm` says.
    """

    name: str
    evidence: Evidence
    fold: Fold | None = RMS_NORM
    kind: Kind = Kind.ZERO_CENTRED


def _ran(place: str) -> Evidence:
    return Evidence("executed", f"transformers 5.23 models/{place}")


_RMS_STORAGE = Fold(add_dtype="storage")
_LAYER_NORM = Fold(norm="layer_norm", add_dtype="storage")
_LAYER_NORM_STORAGE = Fold(norm="layer_norm", add_dtype="storage", mul_dtype="storage")

CLASSES: tuple[NormClass, ...] = (
    NormClass("GemmaRMSNorm", _ran("gemma/modeling_gemma.py:63")),
    NormClass("Gemma2RMSNorm", _ran("gemma2/modeling_gemma2.py:48")),
    NormClass("Gemma3RMSNorm", _ran("gemma3/modeling_gemma3.py:135")),
    NormClass("T5GemmaRMSNorm", _ran("t5gemma/modeling_t5gemma.py:60")),
    NormClass("T5Gemma2RMSNorm", _ran("t5gemma2/modeling_t5gemma2.py:54")),
    NormClass("VaultGemmaRMSNorm", _ran("vaultgemma/modeling_vaultgemma.py:45")),
    NormClass("RecurrentGemmaRMSNorm", _ran("recurrent_gemma/modeling_recurrent_gemma.py:44")),
    NormClass("Qwen3NextRMSNorm", _ran("qwen3_next/modeling_qwen3_next.py:126")),
    NormClass("Qwen3_5RMSNorm", _ran("qwen3_5/modeling_qwen3_5.py:833")),
    NormClass("Qwen3_5MoeRMSNorm", _ran("qwen3_5_moe/modeling_qwen3_5_moe.py:913")),
    NormClass("Qwen4ExpTextRMSNorm", _ran("qwen4_exp/modeling_qwen4_exp.py:141")),
    NormClass("Step3p7RMSNorm", _ran("step3p7/modeling_step3p7.py:501")),
    NormClass("MiniMaxM3VLRMSNorm", _ran("minimax_m3_vl/modeling_minimax_m3_vl.py:140")),
    NormClass("MuseGlimmerTextCenteredRMSNorm", _ran("muse_glimmer/modeling_muse_glimmer.py:122")),
    NormClass(
        "MuseSparkTextCenteredRMSNorm", _ran("muse_spark/modeling_muse_spark.py:126"), _RMS_STORAGE
    ),
    NormClass(
        "MuseSparkTextInputScaledRMSNorm",
        _ran("muse_spark/modeling_muse_spark.py:146"),
        fold=None,
        kind=Kind.NOT_A_GAMMA,
    ),
    NormClass("NemotronLayerNorm1P", _ran("nemotron/modeling_nemotron.py:61"), _LAYER_NORM),
    NormClass("VideoPrismLayerNorm", _ran("videoprism/modeling_videoprism.py:408"), _LAYER_NORM),
    NormClass(
        "MoonshineStreamingLayerNorm",
        _ran("moonshine_streaming/modeling_moonshine_streaming.py:120"),
        _LAYER_NORM_STORAGE,
    ),
)

#: Class name -> arithmetic, of the classes that can be folded.
NORM_CLASSES: Mapping[str, Fold] = MappingProxyType(
    {row.name: row.fold for row in CLASSES if row.fold is not None}
)
