"""Make every linear a product of two matrices."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.nn import functional as F

from dsv3c.passes.contract import Level, Tier


@dataclass(frozen=True)
class FoldLinear:
    """Before: `linear(x_BTK, w)` of an x that is not contiguous. After: the same on `x.reshape(B·T, K)`.

    AOTAutograd writes the former, in inference, as a batched product with the weight repeated B times, which hides
    that it is a linear. NUMERIC because another kernel may sum in another order. Leaves alone: what it folds by
    itself.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.CAPTURED

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not F.linear or not isinstance(node.args[0], fx.Node):
                continue
            x = node.args[0]
            example = x.meta["example_value"]
            if example.dim() == 2 or example.is_contiguous():
                continue
            with gm.graph.inserting_before(node):
                sizes = [gm.graph.call_method("size", (x, dim)) for dim in range(example.dim() - 1)]
                matrix = gm.graph.call_method("reshape", (x, -1, example.shape[-1]))
            with gm.graph.inserting_after(node):
                unfolded = gm.graph.call_method("view", (node, *sizes, -1))
            for new in (*sizes, matrix, unfolded):
                new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
            unfolded.meta["example_value"] = node.meta["example_value"]
            matrix.meta["example_value"] = example.reshape(-1, example.shape[-1])
            node.replace_all_uses_with(unfolded, delete_user_cb=lambda user, own=unfolded: user is not own)
            node.args = (matrix, *node.args[1:])
            node.meta["example_value"] = node.meta["example_value"].flatten(0, -2)
            sites += 1
        return sites
