"""Which part of the model a node belongs to, read from the module stack that Dynamo keeps on every node.

Identity, not pattern: the stack names the module call a node came from, on our model and on transformers' unmodified
one, and survives AOTAutograd into the backward graph.
"""

from dataclasses import dataclass, field

from torch import fx

# Class of a module -> kind of its region. The first block is ours, the second transformers'.
REGIONS = {
    "DecoderLayer": "layer",
    "Attention": "attention",
    "MLP": "mlp",
    "MoE": "moe",
    "Router": "router",
    "Experts": "experts",
    "RMSNorm": "norm",
    "Rotary": "rotary",
    "MTPLayer": "mtp",
    "Float8Experts": "experts",
    "Float8Linear": "linear",
    "Linear": "linear",
    "DeepseekV3DecoderLayer": "layer",
    "DeepseekV3Attention": "attention",
    "DeepseekV3MLP": "mlp",
    "DeepseekV3MoE": "moe",
    "DeepseekV3TopkRouter": "router",
    "DeepseekV3Experts": "experts",
    "DeepseekV3RMSNorm": "norm",
    "DeepseekV3RotaryEmbedding": "rotary",
}


@dataclass(frozen=True)
class Region:
    """One module call: `kind` from REGIONS, `path` relative to the unit, such as `mlp.shared_experts.up_proj`."""

    kind: str
    path: str
    within: tuple[str, ...] = field(default=(), compare=False)  # kinds of the regions around it, innermost first


def region_of(node: fx.Node) -> Region | None:
    """The innermost recognised region of `node`; None for a node of no recognised module."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    found = [(kind, path) for path, module_class in reversed(stack.values()) if (kind := _kind(module_class))]
    if not found:
        return None
    (kind, path), *around = found
    path = path.partition("]")[2].removeprefix(".")
    kind = "head" if kind == "linear" and not path else kind  # the linear that is a unit of its own
    return Region(kind, path or kind, tuple(kind for kind, _ in around))


def _kind(module_class: type | str) -> str | None:
    name = module_class if isinstance(module_class, str) else module_class.__name__
    return REGIONS.get(name.rpartition(".")[2])
