"""Attach to an engine's code by its structure, and prove by running it that nothing changed.

* `code`: a function's source as it runs, and a function made from changed source;
* `flow`: which value goes where in it, whatever its variables are called;
* `pattern`: the places where a norm, a residual add and the next norm follow each other;
* `rewrite`: the same function with those places changed, and nothing else;
* `prove`: both run on random inputs, and have to agree;
* `report`: what was fused, of how much, and why not the rest.
"""
