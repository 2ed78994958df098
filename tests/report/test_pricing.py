"""What an operator costs, against counting by hand."""

import pytest
import torch

import dsv3c.operators  # noqa: F401  (defines torch.ops.dsv3c)
from dsv3c.numerics import E4M3
from dsv3c.pricing import FUSED, price, unrecognised
from dsv3c.tuning import targets

H800 = targets.load("h800")
BF16 = 2  # bytes


def costs(gm):
    return price(gm, H800)


def bf16(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def test_a_product_reads_its_operands_and_writes_its_result(trace):
    (cost,) = costs(trace(torch.mm, bf16(64, 96), bf16(96, 32)))
    assert (cost.operator, cost.nodes) == ("aten.mm.default", 1)
    assert cost.flops == 2 * 64 * 96 * 32
    assert cost.moved_bytes == BF16 * (64 * 96 + 96 * 32 + 64 * 32)
    assert cost.predicted_us == H800.roofline_us(cost.flops, cost.moved_bytes, "bf16")


def test_pointwise_operators_that_feed_each_other_are_one_group(trace):
    (cost,) = costs(trace(lambda x, y: ((x * y).relu() + 1).sum(-1), bf16(64, 96), bf16(64, 96)))
    assert cost.operator == FUSED
    assert cost.nodes == 4
    assert cost.flops == 0
    assert cost.moved_bytes == BF16 * (2 * 64 * 96 + 64)


def test_a_product_separates_groups_and_its_operand_is_written(trace):
    before, product, after = costs(trace(lambda x, w: torch.mm(x.relu(), w).relu(), bf16(64, 96), bf16(96, 32)))
    assert product.operator == "aten.mm.default"
    assert before.moved_bytes == BF16 * 2 * 64 * 96
    assert after.moved_bytes == BF16 * 2 * 64 * 32


def test_a_value_read_inside_and_outside_is_written_once(trace):
    def function(x, w):
        y = x.relu()
        return torch.mm(y, w), y + 1

    group, product = costs(trace(function, bf16(64, 64), bf16(64, 64)))
    assert product.flops
    assert group.moved_bytes == BF16 * 3 * 64 * 64  # reads x; writes y and y + 1


def test_views_are_free_and_read_what_they_show(trace):
    (cost,) = costs(trace(lambda x, y: x[:, :64].t() + y[:, :1].expand(64, 64), bf16(64, 128), bf16(64, 128)))
    assert cost.nodes == 1
    assert cost.moved_bytes == BF16 * (64 * 64 + 64 + 64 * 64)


def test_both_halves_of_a_tensor_are_the_tensor(trace):
    (cost,) = costs(trace(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1] * x.view(-1)[0], bf16(64, 128)))
    assert cost.moved_bytes == BF16 * (64 * 128 + 64 * 64)


def test_forward_and_backward_of_a_joint_graph_are_not_fused(trace):
    gm = trace(lambda x: x.relu().neg(), bf16(64, 96))
    *_, last, _ = gm.graph.nodes
    last.meta["partitioner_tag"] = "is_backward"
    forward, backward = costs(gm)
    assert (forward.backward, backward.backward) == (False, True)
    assert forward.moved_bytes == backward.moved_bytes == BF16 * 2 * 64 * 96
    (whole,) = price(gm, H800, backward=True)  # its nodes' tags do not count where it is one half
    assert whole.backward
    assert whole.moved_bytes == BF16 * 2 * 64 * 96


def test_constants_are_free(trace):
    (cost,) = costs(trace(lambda x: x + torch.ones(64, 64, dtype=torch.bfloat16), bf16(64, 64)))
    assert cost.moved_bytes == BF16 * 2 * 64 * 64


@pytest.mark.parametrize(("dtype", "rate"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_the_rate_is_the_operands_dtype(trace, dtype, rate):
    w = torch.empty(4096, 4096, dtype=dtype)
    (cost,) = costs(trace(torch.mm, w, w))
    assert cost.predicted_us == H800.roofline_us(cost.flops, 0, rate)  # compute-bound


def test_tf32_if_torch_is_told_to(trace):
    w = torch.empty(4096, 4096)
    torch.set_float32_matmul_precision("high")
    try:
        (cost,) = costs(trace(torch.mm, w, w))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert cost.predicted_us == H800.roofline_us(cost.flops, cost.moved_bytes, "tf32")


def test_an_fp8_product_runs_at_the_fp8_rate(trace):
    def gemm(x, x_scale_inv, w, w_scale_inv):
        return torch.ops.dsv3c.gemm(x, x_scale_inv, w, w_scale_inv, torch.bfloat16)

    x, w = torch.empty(4096, 7168, dtype=E4M3), torch.empty(2048, 7168, dtype=E4M3)
    (cost,) = costs(trace(gemm, x, torch.empty(56, 4096).t(), w, torch.empty(16, 56)))
    assert cost.flops == 2 * 4096 * 2048 * 7168
    assert cost.moved_bytes == 4096 * 7168 + 2048 * 7168 + 4 * 56 * (4096 + 16) + BF16 * 4096 * 2048
    assert cost.predicted_us == H800.roofline_us(cost.flops, cost.moved_bytes, "fp8")


@pytest.mark.parametrize(("rows", "read"), [(8, 8), (512, 64)])
def test_a_grouped_product_reads_no_more_experts_than_it_has_rows(trace, rows, read):
    def grouped(x, w, offs):
        return torch.ops.aten._grouped_mm(x, w.transpose(1, 2), offs)

    x, w, offs = bf16(rows, 256), bf16(64, 128, 256), torch.empty(64, dtype=torch.int32)
    (cost,) = costs(trace(grouped, x, w, offs))
    assert cost.flops == 2 * rows * 128 * 256
    assert cost.moved_bytes == BF16 * (rows * 256 + read * 128 * 256 + rows * 128) + 4 * 64


def test_a_gradient_of_experts_writes_them_all(trace):
    def wgrad(dy, x, offs):
        return torch.ops.aten._grouped_mm(dy.t(), x, offs)

    (cost,) = costs(trace(wgrad, bf16(8, 128), bf16(8, 256), torch.empty(64, dtype=torch.int32)))
    assert cost.flops == 2 * 8 * 128 * 256
    assert cost.moved_bytes == BF16 * (8 * 128 + 8 * 256 + 64 * 128 * 256) + 4 * 64


def test_costs_come_in_the_order_of_the_graph_and_all_nodes_are_counted(trace):
    gm = trace(lambda x, w: torch.mm(x.relu(), w).topk(4).values.relu(), bf16(64, 96), bf16(96, 32))
    assert [cost.operator for cost in costs(gm)] == [FUSED, "aten.mm.default", "aten.topk.default", FUSED]
    # No module was traced, so no region is recognised.
    assert [name.split(".")[1] for name in unrecognised(gm)] == ["relu", "mm", "topk", "relu"]
