"""Rewrites of float graphs that leave the function unchanged and make it easier to quantize, and training on top."""
