"""Kernels: `reference.py` defines every operator in plain PyTorch; each other file is one family for the GPU."""
