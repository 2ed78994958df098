"""The embedding's gradient, against float64 row by row."""

from importlib import import_module

import pytest
import torch

import dsv3c.operators
from dsv3c import embedding
from dsv3c.embedding import embedding_forward, is_plain
from dsv3c.kernels.reference import embedding as reference
from dsv3c.numerics import rounded_sum_bound

ops = torch.ops.dsv3c
TOKENS = {
    "none": lambda R, V: torch.empty(0, dtype=torch.int64),
    "few": lambda R, V: torch.randint(min(V, 9), (R,)),
    "any": lambda R, V: torch.randint(V, (R,)),
    "one": lambda R, V: torch.full((R,), V - 1),
    "outside": lambda R, V: torch.randint(-3, V + 3, (R,)),
    "ends": lambda R, V: torch.tensor([0, V - 1]).repeat(R)[:R],
}
SIZES = [(1, 1, 16), (37, 100, 200), (300, 1009, 384)]  # R, V, H


def make(check, size, tokens, dtype=torch.bfloat16, device="cpu"):
    R, V, H = size
    input_ids = TOKENS[tokens](R, V).to(device)
    return check.varied(len(input_ids), H, dtype, device=device), input_ids, V


def assert_gradient(found, dy, input_ids, V):
    inside = (input_ids >= 0) & (input_ids < V)
    dy, input_ids = dy[inside], input_ids[inside]
    rows = torch.zeros(V, dy.shape[1], dtype=torch.float64, device=dy.device)
    expected = rows.index_add(0, input_ids, dy.double())
    magnitude = rows.index_add(0, input_ids, dy.double().abs())
    most = int(input_ids.bincount(minlength=1).max())
    bound = rounded_sum_bound(expected, magnitude, most, dy.dtype)
    assert found.dtype == dy.dtype
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_definition(check, size, tokens, dtype):
    arguments = make(check, size, tokens, dtype)
    assert_gradient(ops.embedding_backward(*arguments), *arguments)


def test_fake_agrees_with_real(check):
    arguments = make(check, SIZES[1], "any")
    torch.library.opcheck(ops.embedding_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dy", "ids", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "number of dimensions of dy"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), "dtype of input_ids"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), "shape of input_ids"),
    ],
)
def test_bad_input(dy, ids, message):
    with pytest.raises(dsv3c.operators.OperatorError, match=message):
        ops.embedding_backward(dy, ids, 5)


def test_the_gradient_is_torch_s():
    """Of whole numbers, whose sums are exact."""
    module = torch.nn.Embedding(50, 8)
    forward, input_ids = embedding_forward(module), torch.randint(50, (3, 40))
    weights = torch.randint(-8, 9, (3, 40, 8)).float()
    assert torch.equal(forward(input_ids), module(input_ids))
    found, expected = (torch.autograd.grad((f(input_ids) * weights).sum(), module.weight) for f in (forward, module))
    assert torch.equal(found[0], expected[0])


def test_which_calls_are_torch_s(monkeypatch):
    class Never:
        def apply(self, *args):
            raise AssertionError("our gradient was asked for")

    monkeypatch.setattr(embedding, "_Embedding", Never())
    module = torch.nn.Embedding(50, 8)
    forward, input_ids = embedding_forward(module), torch.arange(5)
    with torch.no_grad():
        forward(input_ids)
    forward(input_ids.int())
    with pytest.raises(AssertionError, match="our gradient"):
        forward(input_ids)
    module.double()
    forward(input_ids)  # sums in float32 would not do
    module.float().requires_grad_(False)
    forward(input_ids)
    assert is_plain(module)
    for settings in ({"padding_idx": 0}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        assert not is_plain(torch.nn.Embedding(50, 8, **settings))
    assert not is_plain(None)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("size", [*SIZES, (4096, 129280, 7168)])
    def test_kernel(self, check, poisoned, size, tokens, dtype):
        """The definition's bits: the sums have one order."""
        if size[1] > 100000 and dtype == torch.float32:
            size = (4096, 20000, 7168)
        dy, input_ids, V = make(check, size, tokens, dtype, device="cuda")
        found = ops.embedding_backward(dy, input_ids, V)
        for rows in torch.arange(V).split(16384):
            within = torch.isin(input_ids, rows.cuda())
            expected = reference.embedding_backward_ref(dy[within].cpu(), input_ids[within].cpu() - rows[0], len(rows))
            assert torch.equal(found[rows[0] : rows[-1] + 1].cpu(), expected)

    def test_nothing_is_written_outside(self, check):
        dy, input_ids, V = make(check, SIZES[2], "outside", device="cuda")
        memory = torch.full((V + 6, dy.shape[1]), torch.nan, dtype=dy.dtype, device="cuda")
        import_module("dsv3c.kernels.embedding").embedding_backward(dy, input_ids, V, memory[3:-3])
        assert bool(memory[:3].isnan().all() & memory[-3:].isnan().all() & ~memory[3:-3].isnan().any())

    def test_strides_and_capture(self, check):
        dy, input_ids, V = make(check, SIZES[1], "few", device="cuda")
        expected = ops.embedding_backward(dy, input_ids, V)
        wide = torch.cat([dy, dy], 1)[:, : dy.shape[1]]
        assert torch.equal(ops.embedding_backward(wide, input_ids, V), expected)
        assert torch.equal(ops.embedding_backward(dy.t().contiguous().t(), input_ids, V), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.embedding_backward(dy, input_ids, V)
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
