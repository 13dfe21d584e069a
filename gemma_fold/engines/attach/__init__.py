"""Attach to an engine's code by its structure, and prove by running it that nothing changed.

Where an engine's code is changed, as in transformers:

* `code`: a function's source as it runs, and a function made from changed source;
* `flow`: which value goes where in it, whatever its variables are called;
* `pattern`: the places where a norm, a residual add and the next norm follow each other;
* `rewrite`: the same function with those places changed, and nothing else;
* `prove`: both run on random inputs, and have to agree;
* `layers`: all of this for the layers of a model.

Where its code stays and its norms hand their input on, as in vLLM and SGLang:

* `trace`: code run on stand-ins, with values that nothing may look at;
* `handed`: whether a layer, model or block only passes such a value on.

For both: `report`, what was fused and why not the rest; `setting`, what GEMMA_FOLD asks for;
`outlook`, what an installed engine would fuse, without weights.
"""
