"""Sizes and dtypes that the fused kernels and passes do not take: right results all the same, and a reason in the
report."""

import pytest
import torch

import dsv3c
from dsv3c.benchmarks import gate

# Nothing is a multiple of 8, and rows are no multiple of 16 bytes in any dtype.
ODD = {
    "hidden_size": 250, "intermediate_size": 390, "moe_intermediate_size": 102, "q_lora_rank": 70, "kv_lora_rank": 90,
    "qk_nope_head_dim": 42, "qk_rope_head_dim": 22, "v_head_dim": 42, "num_attention_heads": 3,
}  # fmt: skip
# Every token goes to all of them: no rounding sends one elsewhere.
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
REASONS = {
    "odd": "MergeLinear left self_attn.kv_a_proj_with_mqa (linear): its weight's rows are no multiple of 128",
    "float16": "RaiseRotary left self_attn (attention): queries of another dtype than BF16",
    "float32": "NarrowProduct left mlp.gate (router): its right operand is no BF16 matrix",
}


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "backward"),
    [
        ("odd", ODD, torch.bfloat16, False),
        ("odd", ODD, torch.bfloat16, True),
        ("float16", {}, torch.float16, True),
        ("float32", ODD, torch.float32, False),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers_against_a_wider_evaluation(device, name, sizes, dtype, backward, make_model, compiled, request):
    if device == "cpu":
        request.getfixturevalue("without_codegen")
    model = make_model(dtype, num_hidden_layers=1, first_k_dense_replace=0, **EXPERTS, **sizes).to(device)
    contenders = {precision: compiled(model, precision) for precision in ("fp8", "exact")}
    tokens = torch.randint(0, 256, (3, 77), device=device)

    def run():
        with torch.set_grad_enabled(backward):
            model(tokens)

    calls = gate.record_calls(model, run)
    for precision, found in gate.check(model, contenders, calls, backward=backward).items():
        assert found
        assert not [check for check in found if not check.passed], precision
    assert REASONS[name] in str(dsv3c.explain(contenders["fp8"]))
