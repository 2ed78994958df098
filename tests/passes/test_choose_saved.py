"""ChooseSaved: what backward computes again, by policy and by region."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch._inductor import config

import dsv3c.attention
import dsv3c.operators  # noqa: F401
from dsv3c import backend
from dsv3c.artifact import MODES, unit_of
from dsv3c.backend import JointPasses, lower
from dsv3c.config import preset
from dsv3c.fp8_weights import recipe_of
from dsv3c.passes import ChooseSaved, PassError, Pipeline, default
from dsv3c.passes.contract import run, text
from dsv3c.pricing import saved
from dsv3c.weights import QuantizedWeights

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.dsv3c

# Path and class of each call around a node: ours, and, for the MoE, transformers'.
ATTENTION = [("", "DecoderLayer"), ("self_attn", "Attention")]
QUERIES = [*ATTENTION, ("self_attn.q_b_proj", "Linear")]
THEIRS = [("", "DeepseekV3DecoderLayer")]
MOE = [*THEIRS, ("mlp", "DeepseekV3MoE")]
GATE = [*MOE, ("mlp.gate", "DeepseekV3TopkRouter")]
SHARED = [*MOE, ("mlp.shared_experts", "DeepseekV3MLP"), ("mlp.shared_experts.up_proj", "Linear")]


def joint(training=True, copied=False):
    """A layer's joint graph in short: a norm and a product of queries, keys put together, attention, the MoE's norm,
    a cast in its router, a norm in its shared expert, and, in training, a norm in the backward of each. `copied`: keys
    as transformers puts them together, functionalized."""
    graph = fx.Graph()

    def add(where, target, *args, dtype=torch.bfloat16, **meta):
        node = graph.call_function(target, args)
        stack = {path: (f"L['template'].{path}", module_class) for path, module_class in where}
        node.meta = {"val": torch.empty(1, dtype=dtype, device="meta"), "nn_module_stack": stack, **meta}
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, dtype=torch.bfloat16, device="meta")
    queries = add(QUERIES, ops.gemm.default, add(QUERIES, ops.rms_norm_quantize.default, x))
    heads = add(ATTENTION, aten.view.default, queries, [-1])
    if copied:
        keys = add(ATTENTION, aten.empty.memory_format, [1])
        for part in (x, x):
            part = add(ATTENTION, aten.copy.default, add(ATTENTION, aten.slice.Tensor, keys), part)
            keys = add(ATTENTION, aten.slice_scatter.default, keys, part)
    else:
        keys = add(ATTENTION, aten.cat.default, [x, x])
    keys = add(ATTENTION, aten.permute.default, keys, [0])
    results = [
        add(ATTENTION, ops.attention.default, heads, keys, x),
        add(THEIRS, ops.add_rms_norm_quantize.default, x),
        add(GATE, prims.convert_element_type.default, x, torch.float32, dtype=torch.float32),
        add(GATE, prims.convert_element_type.default, x, torch.bfloat16),  # no wider
        add(SHARED, ops.rms_norm_quantize.default, x),
    ]
    if training:
        backward = {"partitioner_tag": "is_backward"}
        results += [add(where, ops.rms_norm_quantize.default, x, **backward) for where in (QUERIES, THEIRS, SHARED)]
    graph.output(results)
    return fx.GraphModule({}, graph)


QUERY_NORM, KEYS = "rms_norm_quantize in self_attn.q_b_proj", "cat in self_attn"
PRODUCT = {"gemm in self_attn.q_b_proj", "view in self_attn", "permute in self_attn"}
LAYER_NORM = "add_rms_norm_quantize in layer"
CAST, SHARED_NORM = "convert_element_type in mlp.gate", "rms_norm_quantize in mlp.shared_experts.up_proj"
ALL = {QUERY_NORM, KEYS, LAYER_NORM, CAST, SHARED_NORM}
EXPECTED = [
    ("default", ALL),
    ("low", ALL | PRODUCT),
    ("none", set()),
    ({}, ALL),
    ({"attention": "low"}, ALL | PRODUCT),
    ({"attention": "none"}, ALL - {QUERY_NORM, KEYS}),
    ({"moe": "none"}, ALL - {CAST, SHARED_NORM}),
    ({"moe": "low"}, ALL),
    ({"router": "none"}, ALL - {CAST}),
    ({"mlp": "none"}, ALL - {SHARED_NORM}),
    ({"moe": "none", "mlp": "default"}, ALL - {CAST}),  # the innermost counts, in whatever order they are written
    ({"mlp": "default", "moe": "none"}, ALL - {CAST}),
    ({"layer": "none"}, set()),
    ({"layer": "none", "attention": "low"}, {QUERY_NORM, KEYS} | PRODUCT),
    ({"experts": "none", "mtp": "none"}, ALL),
]


@pytest.mark.parametrize(("memory", "expected"), EXPECTED)
def test_what_is_computed_again(memory, expected):
    gm, before = joint(), text(joint())
    (record,) = run(gm, [ChooseSaved.of(memory)])
    again = re.findall(r"= \w+\.(\w+)\.default\(.*computed again in backward\)  # (\S+) ", text(gm))
    assert {f"{operator} in {where}" for operator, where in again} == expected
    assert record.sites == len(again) == len(expected)
    assert text(gm).replace(" (computed again in backward)", "") == before
    assert run(gm, [ChooseSaved.of(memory)])[0].sites == 0


def test_copies_of_which_keys_are_put_together():
    gm = joint(copied=True)
    run(gm, [ChooseSaved()])
    again = [str(node.target).split(".")[1] for node in gm.graph.nodes if "recompute" in node.meta]
    assert again == ["rms_norm_quantize", "empty", *["copy", "slice_scatter"] * 2, *again[-3:]]
    assert run(gm, [ChooseSaved()])[0].sites == 0


def test_inference_saves_nothing():
    assert run(joint(training=False), [ChooseSaved("low")])[0].sites == 0


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("high", "memory: expected one of default, low, none, found 'high'"),
        (None, "memory: expected one of default, low, none, found None"),
        (["low"], r"memory: expected one of default, low, none, found \['low'\]"),
        ({"moe": "high"}, "memory of moe: expected one of default, low, none, found 'high'"),
        ({"attn": "low", 3: "low"}, "memory: expected regions among layer, mtp, attention, .*, experts, found "),
        ({"linear": "low"}, "memory: expected regions among layer, .* found 'linear'"),
    ],
)
def test_unknown_words_are_refused_in_one_line(memory, message):
    with pytest.raises(PassError, match=f"^{message}") as error:
        default("fp8", memory=memory)
    assert "\n" not in str(error.value)


def test_the_policy_is_in_the_cache_key():
    memories = [*("default", "low", "none"), {"attention": "low"}, {"attention": "none"}, {"moe": "low"}]
    keys = {JointPasses((ChooseSaved.of(memory),)).uuid() for memory in memories}
    assert len(keys) == len(memories)
    one, other = {"moe": "none", "attention": "low"}, {"attention": "low", "moe": "none"}
    assert ChooseSaved.of(one) == ChooseSaved.of(other)
    assert repr(ChooseSaved.of(one)) == repr(ChooseSaved.of(other))
    kept = ChooseSaved.of(one)
    one["moe"] = "low"
    assert kept == ChooseSaved.of(other)


@pytest.mark.parametrize(
    ("memory", "is_lowest"),
    [
        ("low", True), ("default", False), ("none", False), ({}, False), ({"attention": "low"}, True),
        ({"layer": "low"}, True), ({"layer": "low", "attention": "default"}, False), ({"moe": "low"}, False),
        ({"attention": "low", "moe": "none"}, False),
    ],
)  # fmt: skip
def test_whether_low_would_save_less(memory, is_lowest):
    assert ChooseSaved.of(memory).is_lowest == is_lowest


SMALL = replace(preset("tiny"), num_hidden_layers=2, first_k_dense_replace=1)
(TRAINING,) = (mode for mode in MODES if mode.training)


def saved_by(kind, precision, memories, monkeypatch):
    """Bytes that a layer's forward keeps in its attention, in its MLP or MoE, and around them, on fake tensors; by each
    of `memories`, of one capture: it takes most of the time, and the policies come behind it."""
    recipe, found, partition = recipe_of(SMALL), [], backend.partition_fn
    pipeline = Pipeline.of(default(precision, recipe))
    weights = QuantizedWeights(recipe) if pipeline.quantizes else None

    def partition_by_each(gm, inputs, **kwargs):
        given = config.joint_custom_pre_pass
        assert sum(isinstance(step, ChooseSaved) for step in given.steps) == 1
        for memory in memories:
            steps = (ChooseSaved.of(memory) if isinstance(step, ChooseSaved) else step for step in given.steps)
            with config.patch(joint_custom_pre_pass=JointPasses(tuple(steps))):
                halves = partition(copy.deepcopy(gm), inputs, **kwargs)
            bytes_of = {"attention": 0, "mlp": 0, "layer": 0}
            for region, size in saved(*halves).items():
                where = {"self_attn": "attention", "mlp": "mlp"}.get(region.path.partition(".")[0], "layer")
                bytes_of[where] += size
            found.append(bytes_of)
        return partition(gm, inputs, **kwargs)

    monkeypatch.setattr(backend, "partition_fn", partition_by_each)
    lower(unit_of(SMALL, kind, TRAINING), pipeline, weights)
    return found


@pytest.mark.parametrize(("precision", "around"), [("fp8", "layer"), ("exact", "moe")])
def test_saved_bytes_follow_the_policy_of_their_region(precision, around, monkeypatch):
    """The norm in front of a MoE, in FP8 with its cast, is the layer's; the router's casts are the MoE's."""
    memories = "default", {"attention": "low"}, {around: "none", "attention": "default"}
    default, low, more = saved_by("moe_layer", precision, memories, monkeypatch)
    assert low["attention"] < default["attention"]
    assert {**low, "attention": default["attention"]} == default
    where = "mlp" if around == "moe" else around
    assert more[where] > default[where]
    assert more["attention"] <= default["attention"]
    assert sum(more.values()) > sum(default.values())
