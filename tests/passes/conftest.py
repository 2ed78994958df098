"""Fixtures of the passes' tests: modules through AOTAutograd."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from functorch.compile import aot_module, default_partition, nop
from torch import fx
from torch._inductor.decomposition import select_decomp_table

from dsv3c.passes.contract import Level, Tier, run
from dsv3c.passes.rewrite import aten, insert


def names(gm):
    calls = [str(node.target).split(".") for node in gm.graph.nodes if node.op == "call_function"]
    return Counter(call[1] for call in calls if call[0] == "dsv3c" and "linear" not in call[1])


@pytest.fixture
def rewritten():
    """rewritten(module, passes, found): the module, whose joint graph the passes have been over; our operators in it
    are counted in `found`, and a second run must find nothing."""

    def make(module, passes, found=None):
        def partition(joint, inputs, *, num_fwd_outputs, **kwargs):
            joint.graph.eliminate_dead_code()
            run(joint, passes)
            if found is not None:
                found.update(names(joint))
                assert all(record.sites == 0 for record in run(joint, passes))
            return default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

        return aot_module(module, fw_compiler=nop, partition_fn=partition, decompositions=select_decomp_table())

    return make


@dataclass(frozen=True)
class Mutant:
    """A pass behind the others: calls of an operator of ours get another tensor as this argument, its neighbour in the
    first dimension where each value should stand, or none."""

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT
    operator: str
    argument: int
    none: bool = False

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in gm.graph.find_nodes(op="call_function", target=getattr(torch.ops.dsv3c, self.operator).default):
            if isinstance(given := node.args[self.argument], fx.Node):
                node.update_arg(self.argument, None if self.none else insert(node, aten.roll.default, given, [1], [0]))
                sites += 1
        return sites


@pytest.fixture
def mutant():
    return Mutant


@pytest.fixture
def step():
    """step(module, x): its output, and the gradients of x and of the parameters that have one."""

    def run_step(module, x):
        module.zero_grad()
        x = x.detach().requires_grad_()
        out = module(x)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
        return out.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)

    return run_step
