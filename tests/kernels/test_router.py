"""The gate against a choice written out expert by expert, its gradient against float64, and the sort against lists."""

import pytest
import torch

import dsv3c
import dsv3c.operators
from dsv3c.kernels.reference import router as reference
from dsv3c.layers import Router
from dsv3c.numerics import positive_sum_bound, routing_weight_bound

ops = torch.ops.dsv3c
# E, n_group, topk_group, top_k, norm_topk_prob, biased (V3's gate) or not (V2's)
GATES = [
    (256, 8, 4, 8, True, True),
    (384, 1, 1, 8, True, True),
    (72, 6, 2, 5, False, True),
    (160, 8, 3, 6, False, False),
    (64, 1, 1, 6, True, False),
    (8, 2, 1, 1, True, True),
    (16, 8, 1, 4, True, True),  # more experts than the kept groups have
    (3, 1, 1, 3, True, True),
]
FACTOR = 2.5


def make(T, gate, device="cpu"):
    """(arguments of `gate`): every token's logits have their own magnitude."""
    E, n_group, topk_group, top_k, norm, biased = gate
    logits = torch.randn(T, E, device=device) * torch.exp2(torch.randint(-3, 3, (T, 1), device=device))
    bias = 0.2 * torch.randn(E, device=device) if biased else None
    return logits, bias, n_group, topk_group, top_k, norm, FACTOR


def chosen(scores, choice, n_group, topk_group, top_k):
    """The experts of one token, from lists: greater values first, of equal ones the lower index."""

    def best(values, count):
        return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]

    size = len(choice) // n_group
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    worth = [group[0] + group[1] if scores == "sigmoid" and n_group > 1 else group[0] for group in groups]
    kept = best(worth, topk_group)
    return best([c if e // size in kept else -torch.inf for e, c in enumerate(choice)], top_k)


@pytest.mark.parametrize("gate", GATES)
def test_gate(gate):
    logits, bias, n_group, topk_group, top_k, norm, factor = args = make(60, gate)
    weights, idx = ops.gate(*args)
    assert (weights.dtype, idx.dtype) == (torch.float32, torch.int32)
    scores = logits.sigmoid() if bias is not None else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    kind = "softmax" if bias is None else "sigmoid"
    assert idx.tolist() == [chosen(kind, row, n_group, topk_group, top_k) for row in choice.tolist()]
    assert_weights(weights, logits, idx, kind, norm, factor)


def assert_weights(weights, logits, idx, kind, norm, factor):
    logits = logits.double()
    scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
    expected = scores.gather(1, idx.long())
    if norm:
        expected = expected / expected.sum(-1, keepdim=True)
    expected = expected * factor
    terms = idx.shape[1] if kind == "sigmoid" else logits.shape[1]
    assert bool(((weights - expected).abs() <= routing_weight_bound(0, 0.0, terms, torch.float32, expected)).all())


def test_of_equal_experts_and_groups_the_lowest_win():
    _, idx = ops.gate(torch.zeros(2, 256), torch.zeros(256), 8, 4, 8, True, FACTOR)
    assert idx.tolist() == [list(range(8))] * 2
    logits = torch.zeros(1, 64)
    logits[0, [9, 30, 17, 50]] = 1.0  # groups 1, 3, 2 and 6 of 8, equal; two of them are kept
    _, idx = ops.gate(logits, torch.zeros(64), 8, 2, 4, True, FACTOR)
    assert idx.tolist() == [[9, 17, 8, 10]]


def test_any_logits_choose_experts():
    """NaN counts as more than any number; groups that are not kept fill up what the kept ones lack, lowest first."""
    logits, bias, *rest = make(6, GATES[0])
    logits[0] = torch.nan
    logits[1, 200:] = torch.nan
    logits[2] = torch.inf
    logits[3] = -torch.inf
    bias[7] = -torch.inf
    _, idx = ops.gate(logits, bias, *rest)
    assert bool(((idx >= 0) & (idx < 256)).all())
    assert all(len(set(row)) == 8 for row in idx.tolist())
    assert idx[1].tolist() == list(range(200, 208))
    _, idx = ops.gate(torch.arange(16.0)[None], torch.zeros(16), 8, 1, 4, True, FACTOR)
    assert idx.tolist() == [[15, 14, 0, 1]]


def test_chooses_as_the_model_does():
    config = dsv3c.preset("tiny")
    router = Router(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_(std=0.2)
    x = torch.randn(300, config.hidden_size)
    logits, weights, idx = router(x)
    found = ops.gate(logits, router.e_score_correction_bias, router.n_group, router.topk_group, router.top_k,
                     router.norm_topk_prob, router.routed_scaling_factor)  # fmt: skip
    order = idx.argsort(-1), found[1].argsort(-1)
    assert torch.equal(idx.gather(1, order[0]), found[1].gather(1, order[1]))
    weights, found = weights.gather(1, order[0]), found[0].gather(1, order[1])
    bound = routing_weight_bound(0, 0.0, router.top_k, torch.float32, weights)
    assert bool(((weights - found).abs() <= bound).all())


def expected_gradient(dweights, logits, idx, kind, norm, factor):
    """In float64 by autograd, and the same formula with every term positive."""
    x = logits.double().requires_grad_()
    scores = x.sigmoid() if kind == "sigmoid" else x.softmax(-1)
    s = scores.gather(1, idx.long())
    weights = (s / s.sum(-1, keepdim=True) if norm else s) * factor
    (dlogits,) = torch.autograd.grad(weights, x, dweights.double())
    s, scores, dw = s.detach(), scores.detach(), dweights.double().abs() * factor
    total = s.sum(-1, keepdim=True)
    ds = (dw + (dw * s).sum(-1, keepdim=True) / total) / total if norm else dw
    magnitude = torch.zeros_like(scores).scatter(1, idx.long(), ds) * scores
    if kind == "softmax":
        magnitude = magnitude + scores * (ds * s).sum(-1, keepdim=True)
    return dlogits, magnitude


def assert_gradient(found, dweights, logits, idx, kind, norm, factor):
    expected, magnitude = expected_gradient(dweights, logits, idx, kind, norm, factor)
    # sums over the experts chosen and, in a softmax, over all; each score's own error counts in every term
    terms = 4 * (idx.shape[1] + (logits.shape[1] if kind == "softmax" else 0) + 8)
    assert bool(((found - expected).abs() <= positive_sum_bound(terms, torch.float32, magnitude)).all())


@pytest.mark.parametrize("gate", GATES)
def test_gate_gradient(gate):
    logits, bias, *_, norm, factor = args = make(60, gate)
    weights, idx = ops.gate(*args)
    dweights = torch.randn_like(weights)
    dlogits = ops.gate_backward(dweights, logits, idx, bias is None, norm, factor)
    kind = "softmax" if bias is None else "sigmoid"
    assert_gradient(dlogits, dweights, logits, idx, kind, norm, factor)


IDX = {
    "plain": lambda: torch.stack([torch.randperm(16)[:4] for _ in range(150)]),
    "one expert takes all": lambda: torch.full((70, 3), 5),
    "one token": lambda: torch.tensor([[3, 0]]),
    "no token": lambda: torch.empty(0, 4),
}


@pytest.mark.parametrize("case", IDX)
def test_sort_by_expert(case):
    idx = IDX[case]().int()
    num_tokens, offs, permutation, inverse = ops.sort_by_expert(idx, 16)
    experts = idx.flatten().tolist()
    rows = [copy for e in range(16) for copy, expert in enumerate(experts) if expert == e]
    assert permutation.tolist() == rows
    assert inverse.flatten().tolist() == [rows.index(copy) for copy in range(len(rows))]
    assert num_tokens.tolist() == [experts.count(e) for e in range(16)]
    assert offs.tolist() == [sum(expert <= e for expert in experts) for e in range(16)]
    assert {x.dtype for x in (num_tokens, offs, permutation, inverse)} == {torch.int32}


@pytest.mark.parametrize("name", ["gate", "gate_backward", "sort_by_expert"])
def test_fake_agrees_with_real(name):
    logits, bias, *rest = make(40, GATES[2])
    weights, idx = ops.gate(logits, bias, *rest)
    arguments = {
        "gate": (logits, bias, *rest),
        "gate_backward": (weights, logits, idx, False, True, FACTOR),
        "sort_by_expert": (idx, 72),
    }
    torch.library.opcheck(getattr(ops, name).default, arguments[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, b, *n: (x.double(), b, *n), "dtype of logits: expected torch.float32, found torch.float64"),
        (lambda x, b, *n: (x, b[:8], *n), r"dtype and shape of bias: expected .*\(72,\)\), found .*\(8,\)\)"),
        (lambda x, b, *n: (x, b, 5, *n[1:]), "E modulo n_group: expected 0, found 2"),
        (lambda x, b, *n: (x, b, 72, *n[1:]), "experts a group: expected 2 to 72, found 1"),
        (lambda x, b, *n: (x, b, 6, 7, *n[2:]), "topk_group: expected 1 to 6, found 7"),
        (lambda x, b, *n: (x, b, 6, 2, 73, *n[3:]), "top_k: expected 1 to 72, found 73"),
    ],
)
def test_mismatched_operands_are_named(change, message):
    with pytest.raises(dsv3c.operators.OperatorError, match=message):
        ops.gate(*change(*make(4, GATES[2])))


# -- the kernels' indices, without a GPU: Triton's interpreter, which knows no libdevice --

PROGRAM = """
import torch, triton
import triton.language as tl
import dsv3c.operators
from dsv3c.kernels import router
from dsv3c.kernels.reference import router as reference
from dsv3c.numerics import distance, reordered_bound

@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))

@triton.jit
def nothing():
    pass

router._sigmoid, router.libdevice = sigmoid, tl
router.gdc_launch_dependents = router.gdc_wait = nothing
torch.manual_seed(0)

def launched(kernel, expected, *args):
    out = tuple(torch.empty_like(e).fill_(-1) for e in expected)
    kernel(*args, out)
    return out

for T, E, n_group, topk_group, K, biased in [
    (13, 256, 8, 4, 8, True), (10, 72, 6, 2, 5, True), (3, 16, 8, 1, 4, True), (5, 160, 8, 3, 6, False),
    (0, 16, 1, 1, 3, False),
]:
    args = torch.randn(T, E), torch.randn(E) if biased else None, n_group, topk_group, K, True, 2.5
    expected = reference.gate_ref(*args)
    weights, idx = launched(router.gate, expected, *args)
    assert torch.equal(idx, expected[1]), ("gate", E)
    dlogits = torch.empty_like(args[0])
    router.gate_backward(expected[0], args[0], idx, not biased, True, 2.5, dlogits)
    expected = reference.gate_backward_ref(expected[0], args[0], idx, not biased, True, 2.5)
    if T:
        assert distance(dlogits, expected)[1] <= reordered_bound(1, E, torch.float32), ("gate_backward", E)
    for most in (3, 128):  # tiles of several blocks, and of one
        router.MOST_TILES = most
        for idx in (idx, torch.randint(0, E // 3 + 1, (60, K), dtype=torch.int32)):
            expected = reference.sort_by_expert_ref(idx, E)
            found = launched(router.sort_by_expert, expected, idx, E)
            assert all(map(torch.equal, found, expected)), ("sort_by_expert", E, most)
"""


def test_indices_and_masks(interpreted):
    interpreted(PROGRAM)


# -- on a GPU --


def launched(name, *args):
    """(what the kernel writes into memory full of NaN or −1, the definition)."""
    kernels = pytest.importorskip("dsv3c.kernels.router", reason="needs Triton")
    expected = getattr(reference, f"{name}_ref")(*args)
    several = isinstance(expected, tuple)
    out = tuple(torch.empty_like(e) for e in (expected if several else (expected,)))
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    getattr(kernels, name)(*args, out if several else out[0])
    return (out if several else out[0]), expected


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 7, 1000])
@pytest.mark.parametrize("gate", GATES)
def test_gate_on_gpu(gate, T):
    """The same experts as torch's sigmoid gives, to the bit; a softmax sums in another order."""
    logits, bias, *rest = make(T, gate, "cuda")
    (weights, idx), (_, expected) = launched("gate", logits, bias, *rest)
    assert torch.equal(idx, expected)
    kind = "softmax" if bias is None else "sigmoid"
    assert_weights(weights, logits, idx, kind, *rest[3:])
    strided = torch.cat([logits, logits], 1)[:, : logits.shape[1]]
    assert torch.equal(ops.gate(strided, bias, *rest)[0], weights)
    assert torch.equal(ops.gate(logits.T.contiguous().T, bias, *rest)[0], weights)
    dweights = torch.randn_like(weights)
    found, _ = launched("gate_backward", dweights, logits, idx, bias is None, *rest[3:])
    assert_gradient(found, dweights, logits, idx, kind, *rest[3:])
    assert torch.equal(ops.gate_backward(dweights, strided, idx, bias is None, *rest[3:]), found)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
def test_ties_and_bad_logits_on_gpu(biased):
    logits, bias, *rest = make(300, GATES[0], "cuda")
    logits = (4 * logits).round() / 4  # many equal experts, and groups
    bias = torch.zeros_like(bias) if biased else None
    logits[1, 200:] = torch.nan
    logits[2] = torch.inf
    logits[3] = -torch.inf
    logits[4, :100] = -torch.nan
    logits[5] = -0.0
    if not biased:
        logits = logits[5:]  # a softmax of those is NaN everywhere
    (_, idx), (_, expected) = launched("gate", logits, bias, *rest)
    assert torch.equal(idx, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [0, 1, 1000, 5000])
@pytest.mark.parametrize(("E", "K"), [(256, 8), (384, 8), (16, 3), (1, 1)])
def test_sort_by_expert_on_gpu(T, E, K):
    """Distinct experts, as a gate chooses them, and any at all, of few experts: ragged and empty groups."""
    distinct = torch.rand(T, E, device="cuda").argsort(-1)[:, :K].int()
    any_ = torch.randint(E // 3 + 1, (T, K), device="cuda").int()
    for idx in (distinct, any_, any_.T.contiguous().T):
        found, expected = launched("sort_by_expert", idx, E)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    logits, bias, *rest = make(500, GATES[0], "cuda")
    call = lambda: (w_idx := ops.gate(logits, bias, *rest), ops.sort_by_expert(w_idx[1], 256))  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    logits.copy_(make(500, GATES[0], "cuda")[0])
    graph.replay()
    for found, expected in zip(captured, call(), strict=True):
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
