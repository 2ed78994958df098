"""Running out of GPU memory inside a compiled module: the error says who has the memory, and which setting helps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3c.passes import ChooseSaved
from dsv3c.weights import QuantizedWeights


def explain(
    error: torch.OutOfMemoryError,
    where: str,
    parameters: Iterable[nn.Parameter],
    copies: QuantizedWeights | None,
    memory: ChooseSaved,
    node: Any,
) -> None:
    """Adds one line to `error`: the consumers, largest first, and what to try.

    node: the backward node of a layer, whose saved tensors stand for each layer's; None, or another one's, if no layer
    has run. memory: what `dsv3c.compile` was told to save.
    """
    parameters = list(parameters)
    copied = [t for copy in copies.copies.values() for t in copy.tensors] if copies else []
    held = {
        "weights": _bytes(parameters),
        "their FP8 copies": _bytes(copied),
        "gradients": _bytes(p.grad for p in parameters if p.grad is not None),
    }
    lasting = {t.untyped_storage().data_ptr() for t in (*parameters, *copied)}
    each = _bytes(t for t in _saved(node) if t.untyped_storage().data_ptr() not in lasting)
    if torch.cuda.is_available():
        held["activations, optimizer and all else"] = torch.cuda.memory_allocated() - sum(held.values())
    sizes = [f"{name} {size / 1e9:.2f} GB" for name, size in sorted(held.items(), key=lambda x: -x[1]) if size > 0]
    if each:
        sizes.append(f"{each / 1e9:.2f} GB saved for backward by each layer")
    less = "dsv3c.compile(…, memory='low'), " if each and not memory.is_lowest else ""
    line = f"dsv3c: in {where}: {', '.join(sizes)}; try {less}fewer tokens a call"
    error.args = (f"{error.args[0] if error.args else ''}\n{line}", *error.args[1:])


def watch_backward(outputs: Iterable[Tensor], explained: Callable[[torch.OutOfMemoryError, Any], None]) -> None:
    """Has `explained` called, with the node that would follow, where the backward of what computed `outputs` runs out
    of memory. torch offers no hook around a node: the method of the node's class, which AOTAutograd made for this
    compilation, is wrapped."""
    for out in outputs:
        node: Any = out.grad_fn
        while node is not None and not _is_layer(node):  # a view of a result
            node = next((parent for parent, _ in node.next_functions if parent is not None), None)
        if node is not None and not hasattr(node._forward_cls, "watched"):
            _watch(node._forward_cls, explained)


def _watch(function: Any, explained: Callable[[torch.OutOfMemoryError, Any], None]) -> None:
    run = function.backward

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        try:
            return run(ctx, *gradients)
        except torch.OutOfMemoryError as error:
            before = [parent for parent, _ in ctx.next_functions if _is_layer(parent)]
            explained(error, before[0] if before else None)  # its own saved tensors are gone
            raise

    function.backward, function.watched = staticmethod(backward), True


def _is_layer(node: Any) -> bool:
    """Whether the backward node is a compiled module's: of a class that AOTAutograd made."""
    return getattr(getattr(node, "_forward_cls", None), "__name__", "") == "CompiledFunction"


def _saved(node: Any) -> list[Tensor]:
    if not _is_layer(node):
        return []
    try:
        return [tensor for tensor in getattr(node, "saved_tensors", ()) if tensor is not None]
    except RuntimeError:  # freed
        return []


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each once; what has none (sparse gradients) is left out."""
    dense = (t.untyped_storage() for t in tensors if t.layout is torch.strided)
    return sum({storage.data_ptr(): storage.nbytes() for storage in dense}.values())
