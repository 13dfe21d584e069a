"""Attach to an engine's code by its structure, and prove by running it that nothing changed.

For transformers, whose code is changed:

* `code`: a function's source as it runs, and a function made from changed source;
* `flow`: which value goes where in it, whatever its variables are called;
* `pattern`: the places where a norm, a residual add and the next norm follow each other, and the
  function with those places changed, and nothing else;
* `prove`: all of this for the layers of a model; both forms run on random inputs and have to agree.

For vLLM and SGLang, whose code stays and whose norms hand their input on:

* `trace`: code run on stand-ins, with values that nothing may look at;
* `handed`: whether a layer, model or block only passes such a value on.
"""
