"""The `torch.ops.dsv3c.*` vocabulary: schema, checked shapes, FLOPs, and who computes it on which device.

Passes match these names on every device. The CPU implementation is the definition (`kernels/reference/`, which says
what each operator means and explains the letters); the CUDA one is a launcher, imported at its first call, so that a
machine without Triton can import, trace and run everything. Functional and opaque: the names survive AOTAutograd.
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
