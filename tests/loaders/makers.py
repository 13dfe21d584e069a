"""Convert a checkpoint with a real tool: `python makers.py MAKER ORIGINAL OUT` says its version.

Runs by the interpreter that the tool is installed in, which has no gemma-fold.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def mlx_lm(original: Path, out: Path, *options: str) -> str:
    """mlx-lm's `convert`, on the CPU where it has no GPU."""
    arguments = ["--hf-path", str(original), "--mlx-path", str(out), *options]
    subprocess.run([sys.executable, "-m", "mlx_lm", "convert", *arguments], check=True)
    return f"mlx-lm {version('mlx-lm')}"


def mlx_lm_q4(original: Path, out: Path) -> str:
    """The same, quantized."""
    return mlx_lm(original, out, "-q")


def mlx_qwen3_5(original: Path, out: Path) -> str:
    """mlx-lm's loader and writer alone, for a checkpoint without a tokenizer."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, save_config, save_model

    mx.set_default_device(mx.cpu)
    model, config = load_model(original)
    save_model(out, model)
    save_config(config, out / "config.json")
    return f"mlx-lm {version('mlx-lm')}"


def mlx_qwen3_5_again(original: Path, out: Path) -> str:
    """The same twice, with the convolution put back in between, which hides the first time."""
    import mlx.core as mx

    between = out.with_name(out.name + "-once")
    words = mlx_qwen3_5(original, between)
    file = str(between / "model.safetensors")
    tensors = mx.load(file)
    for name, tensor in tensors.items():
        if name.endswith("conv1d.weight"):
            tensors[name] = mx.contiguous(tensor.swapaxes(1, 2))
    mx.eval(tensors)
    mx.save_safetensors(file, tensors, metadata={"format": "mlx"})
    mlx_qwen3_5(between, out)
    shutil.rmtree(between)
    return words


def llama_cpp(original: Path, out: Path) -> str:
    """llama.cpp's convert_hf_to_gguf, as the package of that name ships it."""
    program = Path(sys.executable).with_name("convert-hf-to-gguf")
    subprocess.run([program, original, "--outfile", out], check=True)
    return f"convert-hf-to-gguf {version('convert-hf-to-gguf')}"


def llmcompressor(original: Path, out: Path) -> str:
    """llm-compressor's `oneshot` with FP8 weights, which needs no data."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    oneshot(
        model=str(original),
        tokenizer=None,
        processor=None,
        recipe=recipe,
        output_dir=str(out),
        pipeline="datafree",
    )
    return f"llm-compressor {version('llmcompressor')}"


def peft(original: Path, out: Path) -> str:
    """A LoRA adapter with random weights, merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload().save_pretrained(out)
    return f"PEFT {version('peft')}"


MAKERS = {
    maker.__name__: maker
    for maker in (
        mlx_lm,
        mlx_lm_q4,
        mlx_qwen3_5,
        mlx_qwen3_5_again,
        llama_cpp,
        llmcompressor,
        peft,
    )
}

if __name__ == "__main__":
    words = MAKERS[sys.argv[1]](Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute())
    print(json.dumps({"tool": words}))
