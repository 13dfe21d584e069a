"""What MLX does with the norms of each family, read in mlx-lm 0.32.2 and mlx-vlm 0.7.10.

Most models keep w, and their class adds 1 when it runs. Those below use MLX's own RMSNorm, so
`sanitize` adds 1 while it loads an original checkpoint, and `convert` saves the result: gamma, in
the dtype of the weights. Whether a folder was through that shows in what `sanitize` changes beside
the norms; where a folder shows none of it, or `sanitize` does not look, 1 is added again.
"""

from __future__ import annotations

#: Families by the row of the rules that decides -> where their +1 is.
STORED_AS_GAMMA = {
    "qwen3_next": "mlx_lm/models/qwen3_next.py:505-515",
    "qwen3_5_text": "mlx_lm/models/qwen3_5.py:351-371",
    "qwen3_5_moe_text": "mlx_lm/models/qwen3_5.py:351-371",
    "step3p5": "mlx_lm/models/step3p5.py:436-437",
    "muse_spark_text": "mlx_lm/models/muse_spark.py:124,945-946",
}
#: Only MLX names tensors like this, or not at all: see `Converted` in the rules.
MARKS = ("linear_attn.conv1d.weight", ".mlp.switch_mlp.", ".add_attn_", ".add_ffn_")
