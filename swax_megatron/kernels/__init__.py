"""The layers' mathematics but for matrix products: plain-torch references, and Triton implementations of the same functions for CUDA."""
