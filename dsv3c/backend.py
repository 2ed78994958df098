"""From a captured unit to code: our passes around Inductor, or, without generating code, to the graph of every level.

`Backend` is what torch.compile calls. It edits the captured graph (L0), adds the quantised weights to its inputs, and
hands it to `compile_fx` with our joint passes (L1) as a config patch of that one call. `lower` goes the same way on
fake tensors and keeps the graphs: the report, the artifact and the tests read those, so that a warm compile cache,
which skips the passes, hides nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import innermost_fn
from torch._dynamo.source import LocalSource
from torch._functorch import config as functorch_config
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, partition_fn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dsv3c import ahead, passes
from dsv3c.capture import Unit, quantizable, tensors_of, varying
from dsv3c.families import call_of
from dsv3c.kernels.attention import deterministic_algorithms
from dsv3c.passes.contract import fingerprint
from dsv3c.weights import QuantizedWeights

# The sum over a token's top-8 experts as straight-line code: as a reduction it reads rows of 8 scattered values, and
# took 1.0 ms where the bytes take 0.13 (H200, 4096 tokens). And no assertions about the sizes and strides of inputs and
# of what operators return, several an operator, while the GPU waits for the host: a call's signature says the former,
# and operators allocate by what made their fakes. (torch's own operators behind Inductor's graphs are trusted.)
# In Python, where `ahead.py` sees what it launches.
_INDUCTOR = {"unroll_reductions_threshold": 17, "size_asserts": False, "alignment_asserts": False, "cpp_wrapper": False}


class JointPasses(CustomGraphPass):
    """Our passes over a joint graph as the one composite pass that Inductor takes at that hook.

    Equal, and equal in the cache key, if sources, passes and knobs are.
    """

    def __init__(self, steps: tuple[passes.Pass, ...], dump: Path | None = None, price: Callable | None = None) -> None:
        self.steps, self.dump, self.price = steps, dump, price
        self.records: list[passes.Record] = []
        self.text = ""

    def __call__(self, graph: fx.Graph) -> None:
        gm = graph.owning_module
        self.records = passes.run(gm, self.steps, dump=self.dump, price=self.price)
        self.graph, self.text = gm, passes.text(gm)

    def uuid(self) -> tuple[str, ...]:
        return source_fingerprint(), *map(repr, self.steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointPasses) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)


@cache
def source_fingerprint() -> str:
    """Over every source file of ours: the compile cache must miss when a pass, an operator or a kernel changes."""
    folders = {Path(find_spec(name).origin).parent for name in ("dsv3c", "dsv3c.passes", "dsv3c.kernels")}
    return fingerprint(*sorted(folders))


Stack = tuple[int, ...]  # positions of inputs: a weight's, or those of several that are used as one


@dataclass(eq=False, repr=False)
class Backend:
    """Compiles one unit with Inductor."""

    unit: Unit
    pipeline: passes.Pipeline
    weights: QuantizedWeights | None
    dump: Path | None = None
    price: Callable[[fx.GraphModule], Any] | None = None
    deterministic: bool = False
    joint: JointPasses | None = field(default=None, init=False)
    captured_records: list[passes.Record] = field(default_factory=list, init=False)
    text: str = field(default="", init=False)
    calls: int = field(default=0, init=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.unit.name})"

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self.calls += 1
        gm = _own_copy(gm)
        stacks, example_inputs = self.prepare(gm, example_inputs)
        compiled = innermost_fn(self.lower(gm, example_inputs))  # Dynamo will wrap ours; once is enough

        def with_weights(*inputs):
            if stacks:
                inputs += tuple(self.copies_of([[inputs[i] for i in stack] for stack in stacks]))
            with ahead.begin(inputs):
                return compiled(*inputs)

        return with_weights

    def copies_of(self, stacks: list[list[Tensor]]) -> list[Tensor]:
        assert self.weights is not None
        return self.weights.copies_of(stacks, training=self.unit.variant.gradients)

    def prepare(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> tuple[list[Stack], list[Tensor]]:
        """Runs the L0 passes, adds the quantised weights' inputs, and binds the joint passes to them.

        Returns which weights have a quantised copy, alone or stacked, in order, and the extended example inputs.
        """
        self.captured_records = passes.run(gm, self.pipeline.captured, dump=self.dump and self.dump / "L0")
        self.text = passes.text(gm)
        stacks = self._stacks(gm) if self.weights else []
        inputs = list(example_inputs)
        fake_mode = detect_fake_mode(inputs)
        bound = []
        for stack in stacks:
            weights = [inputs[i] for i in stack]  # real ones, unlike other inputs: Dynamo passes parameters as they are
            with fake_mode:
                fakes = [torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) for weight in weights]
                copy = self.weights.quantize([fakes], training=self.unit.variant.gradients)
            added = range(len(inputs), len(inputs) + len(copy))
            bound.append(passes.WeightInput(stack, (added[0], added[1]), (added[-2], added[-1])))
            for tensor in copy:
                _add_input(gm, f"input_{len(inputs)}", tensor)
                inputs.append(tensor)
        gm.recompile()
        joint = self.pipeline.with_weights(tuple(bound)).joint
        self.joint = JointPasses(joint, self.dump and self.dump / "L1", self.price)
        return stacks, inputs

    def lower(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        patches = {**_INDUCTOR, "joint_custom_pre_pass": self.joint}
        if not self.deterministic:
            return compile_fx(gm, example_inputs, config_patches=patches)
        # Inductor then adds nothing up with atomics, and times no reduction to choose its form. The flag is in torch's
        # cache keys. Backward is compiled here too, not when it is first called.
        with deterministic_algorithms(), functorch_config.patch(force_non_lazy_backward_lowering=True):
            return compile_fx(gm, example_inputs, config_patches=patches | {"deterministic": True})

    def _stacks(self, gm: fx.GraphModule) -> list[Stack]:
        """The quantisable weights (Dynamo says which parameter an input is), together those that are used together."""
        names = set(quantizable(self.unit.template))
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        weights = {n: i for i, n in enumerate(inputs) if getattr(n._dynamo_source, "index", None) in names}
        stacks = {
            tuple(weights[weight] for weight in user.args[0]) if user.target is torch.cat else (position,)
            for node, position in weights.items()
            for user in node.users
        }
        return sorted(stacks)


def _own_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo goes on reading the graph it handed out, inputs above all, so we edit another."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copied in copies.items():
        if node.op == "placeholder":
            copied._dynamo_source = node._dynamo_source
    new = fx.GraphModule(gm, graph)
    new.meta = dict(gm.meta)
    return new


def _add_input(gm: fx.GraphModule, name: str, example: Tensor) -> None:
    """One more input behind the others."""
    *_, last = (node for node in gm.graph.nodes if node.op == "placeholder")
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    node.meta["example_value"] = example
    node._dynamo_source = LocalSource(name, is_input=True)  # AOTAutograd asks for it


@dataclass(frozen=True)
class Lowered:
    """A unit at every level, as canonical text, with what each pass did."""

    unit: Unit
    captured: str
    joint: str
    forward: str
    backward: str
    records: dict[str, list[passes.Record]]
    graph: fx.GraphModule  # the joint one
    halves: tuple[fx.GraphModule, ...]  # forward and, in training, backward
    memory: passes.ChooseSaved


class Recorder(Backend):
    """Goes as far as the partitioned graphs and generates no code."""

    def copies_of(self, stacks: list[list[Tensor]]) -> list[Tensor]:
        assert self.weights is not None
        return self.weights.quantize(stacks, training=self.unit.variant.gradients)

    def lower(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        self.halves: tuple[fx.GraphModule, ...] = ()

        def forward(graph: fx.GraphModule, inputs) -> Callable:
            self.halves = self.halves or (graph,)
            return make_boxed_func(graph.forward)

        def backward(graph: fx.GraphModule, inputs) -> Callable:
            return make_boxed_func(graph.forward)

        def inference(graph: fx.GraphModule, inputs) -> Callable:
            joint_graph_passes(graph)
            return forward(graph, inputs)

        def partition(graph: fx.GraphModule, inputs, **kwargs):
            self.halves = partition_fn(graph, inputs, **kwargs)
            return self.halves

        compiler = aot_autograd(
            fw_compiler=forward,
            bw_compiler=backward,
            inference_compiler=inference,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        with inductor_config.patch(joint_custom_pre_pass=self.joint):
            return compiler(gm, example_inputs)


def lower(
    unit: Unit,
    pipeline: passes.Pipeline,
    weights: QuantizedWeights | None,
    *,
    dump: Path | None = None,
    price: Callable[[fx.GraphModule], Any] | None = None,
) -> Lowered:
    """`unit` at every level, for the sizes it was first called with, on fake tensors: no memory, no code generation.
    `price` is asked about the joint graph between passes, for their records."""
    recorder = Recorder(unit, pipeline, weights, dump, price)
    again = Unit(unit.kind, unit.variant, unit.template, unit.shapes)  # a code object of its own: Dynamo starts afresh
    with FakeTensorMode(shape_env=ShapeEnv()), torch.set_grad_enabled(unit.variant.gradients):
        # Arguments say where the unit runs; parameters are there too.
        device = next(a.device for a in unit.variant.arguments if a is not None)
        parameters = {
            name: _fake(p.shape, p.dtype, device, trained, isinstance(p, nn.Parameter))
            for (name, p), trained in zip(tensors_of(unit.template).items(), unit.variant.trained, strict=True)
        }
        tensors = tuple(
            None if a is None else _fake(shape, a.dtype, device, a.requires_grad, False)
            for a, shape in zip(unit.variant.arguments, unit.shapes, strict=True)
        )
        with varying(tensors, call_of(unit.template).symbolic):
            again.compiled(recorder)(parameters, *tensors)
    records = {"L0": recorder.captured_records, "L1": recorder.joint.records}
    forward, backward = (*map(passes.text, recorder.halves), "")[:2]
    return Lowered(
        unit, recorder.text, recorder.joint.text, forward, backward, records, recorder.joint.graph, recorder.halves,
        pipeline.memory,
    )  # fmt: skip


def _fake(shape, dtype: torch.dtype, device: torch.device, requires_grad: bool, parameter: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    return nn.Parameter(tensor, requires_grad) if parameter else tensor.requires_grad_(requires_grad)
