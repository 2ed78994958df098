"""The `torch.ops.dsv3c.*` vocabulary: schema, checked shapes, FLOPs, and who computes it on which device.

Passes match these names on every device. The CPU implementation is the definition (`kernels/reference/`, which says
what each operator means and explains the letters); the CUDA one is a launcher, imported at its first call, so that a
machine without Triton can import, trace and run everything. Functional and opaque: the names survive AOTAutograd.
Passes insert them when gradients are in the graph already, so these have none of their own, and torch warns if one is
asked for. Operators with gradients stand in a model from the start: dsv3c/attention.py, embedding.py,
grouped_linear.py, losses.py.
Importing this package defines the operators; nothing else does. Layouts are exact: Inductor hands over the strides
that were traced.
"""

from dsv3c.operators import (  # noqa: F401
    accumulate,
    casts,
    cross_entropy,
    embedding,
    gemms,
    heads,
    mla_decode,
    norm,
    permute,
    rotary,
    router,
    swiglu,
)
from dsv3c.operators.define import OperatorError  # noqa: F401
