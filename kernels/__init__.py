"""Kernels: `reference/` defines every operator in plain PyTorch; each file here is one family for the GPU."""
