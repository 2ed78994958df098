"""`dsv3c.compile`: a model in, the same model with compiled modules out."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from dsv3c import families
from dsv3c.backend import Backend
from dsv3c.capture import Unit, Units
from dsv3c.debug import debug_config
from dsv3c.errors import CompileError
from dsv3c.files import make_folder
from dsv3c.fp8_weights import recipe_of
from dsv3c.out_of_memory import explain
from dsv3c.passes import OrderSums, Pass, Pipeline, default
from dsv3c.passes.choose_saved import Memory
from dsv3c.tuning.targets import Target, load, resolve
from dsv3c.twin import copied_as, eager_twin, give_forward
from dsv3c.weights import QuantizedWeights

if TYPE_CHECKING:
    from dsv3c.decoding import Decoder

Model = TypeVar("Model", bound=nn.Module)

PRECISIONS = ("auto", "exact", "fp8")


@dataclass
class Compilation:
    """What belongs to one compiled model besides its modules."""

    precision: str
    target: Target
    pipeline: Pipeline
    weights: QuantizedWeights | None
    units: Units
    backends: dict[Unit, Backend]
    notes: list[str]
    decoder: "Decoder | None" = None  # made by the first generate() on a GPU


def compile(  # the name users type
    model: Model,
    *,
    target: str = "auto",
    precision: str = "auto",
    memory: Memory = "default",
    deterministic: bool = False,
    skip: Collection[str] = (),
    passes: Sequence[Pass] | None = None,
) -> Model:
    """The same model with all but its embedding compiled; `model` itself stays eager.

    The result is of the same class, with the same call, config, `generate`, `state_dict` and Parameter objects.
    Nothing is compiled before the first call. A layer that gets a hook inside, or a part replaced, runs eagerly from
    then on, with a warning. `result.weights_changed()` says that weights were written behind torch's back (through
    `.data`), so that their FP8 copies are made again.

    Args:
        model: a dsv3c.DeepseekV3, or transformers' DeepseekV3ForCausalLM as it is; or one MoE module of either.
        target: "auto" (this machine), or a name in tuning/targets; decides what the report predicts.
        precision: "exact" (the model's own dtype, nothing quantised), "fp8" (DeepSeek-V3's recipe; on a CPU emulated),
            or "auto": fp8 on a Hopper GPU (compute capability 9.0), else exact.
        memory: what is saved for backward: "default" (FP8 copies; norms, permuted tokens, keys and values are computed
            again), "low" (queries too), "none" (what torch's partitioner chooses); or these by kind of region, such as
            {"attention": "low", "mlp": "none"}: the innermost that is named counts, the rest is "default". See
            `ChooseSaved`; `dsv3c.explain` shows what each region saves.
        deterministic: two equal steps have equal bits, gradients included, on one machine and with the same versions
            (without it attention's gradient, and in exact precision the experts' too, differ in their last bits).
            What is not compiled here, such as the loss, is the caller's: see torch.use_deterministic_algorithms.
        skip: names of passes to leave out.
        passes: replaces the default list of passes.

    Raises:
        CompileError: an unknown model, target or precision, "fp8" on a GPU that is no Hopper, or a model set up so that
            it cannot be captured whole.
        PassError: an unknown name in `skip`, or an unknown region or word in `memory`.
        Dsv3cError: graphs cannot be written to DSV3C_DUMP.
    """
    families.check(model)
    resolved, notes = _precision(precision, model)
    recipe = recipe_of(model.config)
    chosen = default(resolved, recipe, memory, deterministic) if passes is None else passes
    pipeline = Pipeline.of(chosen, (*skip, *debug_config().skip))
    if deterministic and not any(isinstance(step, OrderSums) for step in pipeline.joint):
        raise CompileError(
            "deterministic=True: expected OrderSums among the passes, found none; try leaving them alone"
        )
    weights = QuantizedWeights(recipe) if pipeline.quantizes else None
    dump = debug_config().dump
    if dump:
        make_folder("DSV3C_DUMP", dump)
    backends: dict[Unit, Backend] = {}

    def backend(unit: Unit) -> Backend:
        folder = dump and dump / unit.name
        backends[unit] = Backend(unit, pipeline, weights, folder, deterministic=deterministic)
        return backends[unit]

    def out_of_memory(where: str, error: torch.OutOfMemoryError, node: Any) -> None:
        explain(error, where, model.parameters(), weights, pipeline.memory, node)

    units = Units(backend, out_of_memory)
    compiled = eager_twin(model)
    for path, module in families.compiled_modules(compiled):
        if "forward" in vars(module):
            _runs_eagerly(path, notes)
        else:
            eagerly = partial(_runs_eagerly, path, notes)
            give_forward(module, families.forward_of(module, units.runner(module), eagerly))
    families.adapt(compiled)
    compiled._dsv3c = Compilation(resolved, _target(target, notes), pipeline, weights, units, backends, notes)
    compiled.weights_changed = weights.forget if weights else lambda: None
    again = partial(
        compile, target=target, precision=precision, memory=memory, deterministic=deterministic, skip=skip,
        passes=passes,
    )  # fmt: skip
    copied_as(compiled, again)
    return compiled


def _target(name: str, notes: list[str]) -> Target:
    """What the report predicts; on a GPU that is not known, an H100's times."""
    try:
        return resolve(name)
    except CompileError as error:
        if name != "auto":
            raise
        note = f"{error}; until then times are predicted for h100"
        notes.append(note)
        warnings.warn(f"dsv3c.compile: {note}", stacklevel=3)
        return load("h100")


def _runs_eagerly(path: str, notes: list[str]) -> None:
    note = f"{path or 'the model'} runs eagerly: a part of it was replaced, or has somebody's hook or forward"
    if note not in notes:
        notes.append(note)
        warnings.warn(f"dsv3c.compile: {note}", stacklevel=2)


def compilation_of(model: nn.Module) -> Compilation:
    """Raises CompileError for a model that `compile` did not return."""
    found = model.__dict__.get("_dsv3c")
    if found is None:
        raise CompileError(f"expected a model returned by dsv3c.compile, found an eager {type(model).__name__}")
    return found


def _precision(precision: str, model: nn.Module) -> tuple[str, list[str]]:
    if precision not in PRECISIONS:
        raise CompileError(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}")
    device = next(model.parameters()).device
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if precision == "auto":
        return ("fp8" if hopper else "exact"), []
    if precision == "fp8" and device.type == "cuda" and not hopper:
        name = torch.cuda.get_device_name(device)
        raise CompileError(f"precision='fp8': expected a Hopper GPU, or a CPU, found {name}; try precision='exact'")
    if precision == "fp8" and not hopper:
        note = f"FP8 is emulated on {device.type}: the numbers are those of the recipe, the speed is not"
        warnings.warn(f"dsv3c.compile: {note}", stacklevel=3)
        return precision, [note]
    return precision, []
