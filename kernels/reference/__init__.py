"""The definition of every dsv3c operator, in plain PyTorch. These run on the CPU and are what the GPU kernels must
equal: casts bit for bit, products within `numerics.gemm_bounds`.

Shapes: R rows (tokens), K and N features, E experts, P rows padded to tiles of 128 (see `quantize_tile_t_ref`), G =
⌈K/128⌉. All FP8 is E4M3 and all scale_inv float32; scale_inv multiplies to dequantise. `offs` is int32 [E]: the end
row of each group, as in `torch.nn.functional.grouped_mm`. Rows from offs[-1] on belong to no group: no result depends
on them.

Scales of 1×128 tiles are stored column-major, strides (1, R): a GEMM reads one K-block of many rows at a time, which
is then contiguous, and it is the layout that cuBLASLt takes. Casts compute in float32 whatever the input; products
accumulate in float32, or in float64 when that is the output's dtype.
"""
