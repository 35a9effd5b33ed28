"""Sequence-mixing kernels: a plain-torch reference each, and Triton implementations of the same functions for CUDA."""
