"""Triton's kernels, and what launches them."""
