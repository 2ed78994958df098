"""A compiled model as its user may treat it: copied, pickled, compiled again, hooked into, parts of it replaced.

A forward of ours computes with the parameters of one module, as its parts were when it was compiled. So a copy of a
compiled module, deep or pickled, is a copy of its eager twin, and a module whose parts have changed runs eagerly.
"""

import copy
from collections.abc import Callable
from operator import eq
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SET_BY_COMPILE = ("forward", "__deepcopy__", "__reduce_ex__", "weights_changed", "_dsv3c")  # the last two: on models


def give_forward(module: nn.Module, forward: Callable) -> None:
    """Has `module`, of a compiled model, computed by `forward`; and not so its copies."""
    module.forward = forward
    copied_as(module, _same)


def copied_as(module: nn.Module, made: Callable[[nn.Module], nn.Module]) -> None:
    """Deep copies and pickles of `module` are `made(a copy of its eager twin)`."""
    vars(module)["__deepcopy__"] = lambda memo: made(copy.deepcopy(eager_twin(module), memo))
    vars(module)["__reduce_ex__"] = lambda protocol: (made, (eager_twin(module),))


def _same(module: nn.Module) -> nn.Module:
    return module


def has_ours(module: nn.Module) -> bool:
    """Whether its forward is ours."""
    return "__reduce_ex__" in vars(module)


def eager_twin(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """The same tree of modules over the same tables of parameters and buffers: whatever is assigned to a parameter of
    one is seen by the other, but hooks and forwards are their own. Nothing of it is compiled."""
    memo = {} if memo is None else memo
    if id(module) not in memo:
        new = memo[id(module)] = module.__class__.__new__(module.__class__)
        shared, ours = ("_parameters", "_buffers"), SET_BY_COMPILE if has_ours(module) else ()
        new.__dict__.update(
            {
                k: v if k in shared or not isinstance(v, dict) else v.copy()
                for k, v in module.__dict__.items()
                if k not in ours
            }
        )
        new.__dict__["_modules"] = {name: child and eager_twin(child, memo) for name, child in module._modules.items()}
    return memo[id(module)]


def unchanged(module: nn.Module) -> Callable[[], bool]:
    """Asks, in each call of a compiled module, whether inside it all is as it is now: no part replaced or added, and
    nobody else's hook or forward on a part."""
    parts = list(module.modules())
    children = [part._modules for part in parts]
    before = [table.copy() for table in children]
    attributes = [vars(part) for part in parts[1:]]
    hooks = [getattr(part, name) for part in parts[1:] for name in HOOKS]

    def ask() -> bool:
        if not all(map(eq, children, before)):
            return False
        for own in attributes:
            if "forward" in own:
                return False
        return not any(hooks) or all(_only_collects(hook) for table in hooks for hook in table.values())

    return ask


def _only_collects(hook: Any) -> bool:
    """One of those that transformers leaves on a model it was asked hidden states of: it does nothing in a call that
    asks for none."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
