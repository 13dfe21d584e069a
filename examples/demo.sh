#!/usr/bin/env bash
# A real Gemma 3 270M, inspected, folded, verified, unfolded back to identical bytes, loaded and
# compared with the original.
# `make demo` builds the model, puts the environment on PATH and runs this; results stay in .demo.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf .demo
mkdir .demo
ln -s ../.cache/gemma-3-270m ../.cache/gemma-3-270m-sharded .demo/
cd .demo

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
sums() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }

for model in gemma-3-270m gemma-3-270m-sharded; do
    step gemma-fold inspect "$model"
    step gemma-fold convert "$model" -o "$model-folded"
    step gemma-fold verify "$model-folded" --against "$model"
    step gemma-fold unfold "$model-folded" -o "$model-again"
    diff <(sums "$model/") <(sums "$model-again/")
    echo "sha256 of all $(sums "$model/" | wc -l) files: the same as the original's"
done

step python ../examples/convert_and_chat.py gemma-3-270m gemma-3-270m-folded "The capital of France is"
step gemma-fold diff gemma-3-270m gemma-3-270m-folded --html diff.html
echo "the same as a page to look at: .demo/diff.html"
