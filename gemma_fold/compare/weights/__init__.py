"""Weights: bytes, and the arithmetic of norms."""
