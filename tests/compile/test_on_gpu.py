"""On a Hopper GPU: what `precision="auto"` compiles is right layer by layer, and attention takes cuDNN both ways."""

import pytest
import torch

import dsv3c
from dsv3c.benchmarks import gate
from dsv3c.compiler import compilation_of
from dsv3c.kernels import attention
from dsv3c.numerics import MODEL_DISTANCE_BF16, distance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backward", [False, True])
def test_each_layer_against_a_wider_evaluation(backward, gpu_model):
    model = gpu_model
    compiled = dsv3c.compile(model)
    assert compilation_of(compiled).precision == "fp8"
    tokens = torch.randint(0, 256, (2, 257), device="cuda")  # 514 rows: cuBLASLt takes multiples of 4 only

    def run():
        with torch.set_grad_enabled(backward):
            model(tokens)

    contenders = {"fp8": compiled, "exact": dsv3c.compile(model, precision="exact")}
    checks = gate.check(model, contenders, gate.record_calls(model, run), backward=backward)
    for precision, found in checks.items():
        assert found
        assert not [check for check in found if not check.passed], precision


@pytest.mark.parametrize("family", ["ours", "transformers"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_gpu(family, training, gpu_model, make_their_model, logits):
    """Calls after the first, of any number of tokens, and a step of the optimizer with what it makes stale."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "qk_rope_head_dim": 64}
    model = gpu_model if family == "ours" else make_their_model(torch.bfloat16, num_hidden_layers=2, **sizes).cuda()
    compiled = dsv3c.compile(model, precision="fp8")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    more = {} if family == "ours" else {"use_cache": False}

    def step(tokens):
        with torch.set_grad_enabled(training):
            out = logits(compiled, tokens, **more)
        if training:
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    batches = [torch.randint(0, 256, (1, count), device="cuda") for count in (257, 257, 64, 300, 123)]
    for tokens in batches:
        step(tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for tokens in batches:
            step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked, deterministic):
    """The operator against the textbook formulas in float64, no farther than torch's own attention is."""
    B, H, T, scale = 2, 16, 160, 0.1
    q, k, v = (torch.randn(B, T, H, size, device="cuda").transpose(1, 2) for size in (192, 192, 128))
    dout = torch.randn(B, T, H, 128, device="cuda").transpose(1, 2)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device="cuda").tril() if masked else None
    if masked:
        mask[0, :, :, :30] = torch.eye(T, dtype=torch.bool, device="cuda")[:, :30]  # left padding
    half = [x.bfloat16() for x in (q, k, v)]
    out, lse = torch.ops.dsv3c.attention(*half, mask, scale, not masked)
    rest = out, lse, mask, scale, not masked, deterministic
    gradients = torch.ops.dsv3c.attention_backward(dout.bfloat16(), *half, *rest)
    leaves = [x.clone().requires_grad_() for x in half]
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, mask, 0.0, not masked, scale=scale)
    their_gradients = torch.autograd.grad(theirs, leaves, dout.bfloat16())
    wide = [x.double() for x in half]
    scores = wide[0] @ wide[1].mT * scale
    allowed = torch.ones(T, T, dtype=torch.bool, device="cuda").tril() if mask is None else mask
    exact = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ wide[2]
    exact_gradients = attention._explicit_backward(dout.bfloat16().double(), *wide, mask, scale, not masked)
    for ours, reference, truth in zip(
        (out, *gradients), (theirs, *their_gradients), (exact, *exact_gradients), strict=True
    ):
        assert ours.stride() == torch.empty_like(ours.transpose(1, 2).contiguous()).transpose(1, 2).stride()
        assert distance(ours, truth)[0] <= MODEL_DISTANCE_BF16 * distance(reference, truth)[0]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_beside_torch_s_own(masked):
    """q, k and v as transformers lays them out, for which torch keeps one of cuDNN's plans: an eager step, one of ours
    and an eager one again. (Plans are a thread's; all three are asked for in autograd's.)"""
    B, H, T, scale = 1, 16, 192, 0.1
    q, k = (torch.randn(B, H, T, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(B, T, H, 256, device="cuda", dtype=torch.bfloat16)[..., 128:].transpose(1, 2)
    dout = torch.randn(B, T, H, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device="cuda").tril() if masked else None
    exact = attention._explicit_backward(*(x.double() for x in (dout, q, k, v)), mask, scale, not masked)

    def torch_s(*leaves):
        return torch.nn.functional.scaled_dot_product_attention(*leaves, mask, 0.0, not masked, scale=scale)

    def ours(*leaves):
        return torch.ops.dsv3c.attention(*leaves, mask, scale, not masked)[0]

    errors = []
    for function in (torch_s, ours, torch_s):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        gradients = torch.autograd.grad(function(*leaves), leaves, dout)
        errors.append([distance(found, truth)[0] for found, truth in zip(gradients, exact, strict=True)])
    for again in errors[1:]:
        assert all(error <= MODEL_DISTANCE_BF16 * first for error, first in zip(again, errors[0], strict=True))


def test_what_a_moe_layer_begins_with_is_started_first(gpu_model):
    """Up to its first long product, through Inductor's code; the same bits as in the call that went through Dynamo."""
    alone, x = dsv3c.compile(gpu_model.model.layers[-1].mlp, precision="fp8"), torch.randn(1, 640, 1024, device="cuda")
    x, results = x.bfloat16().requires_grad_(), []
    for _ in range(4):
        alone.zero_grad()
        out, *_ = alone(x)
        out.backward(x)
        results.append([out.detach(), *(p.grad for p in alone.parameters() if p.grad is not None)])
    ((way,),) = (ways.values() for ways in compilation_of(alone).units.ways.values())
    assert all(step.run for step in way.front.steps)  # without a look at their arguments, from the fourth call on
    names = [step.name for step in way.front.steps]
    assert names[:5] == ["quantize_tile", "gemm", "swiglu_quantize_save", "gemm", "wide_mm"]
    assert names[5:] == ["gate", "sort_by_expert", "permute", "grouped_gemm"]
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
