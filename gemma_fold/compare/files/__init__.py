"""Files that other tools write, as `check` sees them: tensors under the names transformers uses.

opening     what a path or Hub id is, and the reader for it
folders     safetensors: original, quantized, merged, MLX or folded
gguf        GGUF headers; gguf_names says what its norms are called
mlx_names   which families MLX stores as gamma
arrays      single tensors from .npy files
model       what all of them come to
"""
