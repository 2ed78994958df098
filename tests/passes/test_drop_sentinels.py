"""DropSentinels: transformers 5.17 masks what experts of other machines would be; what may be true stays masked."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from dsv3c.passes import DropSentinels
from dsv3c.passes.contract import run, text

E = 8


def step(x_TD, scores_TE, limit=E, topk=True):
    """As in transformers' grouped_mm_experts_forward, with its gradient."""
    idx = scores_TE.topk(2, dim=-1).indices if topk else scores_TE[:, :2].long()
    sorted_R, order_R = torch.sort(idx.reshape(-1))
    mask_R1 = (sorted_R >= limit).unsqueeze(-1)
    rows_RD = x_TD[order_R // 2]
    rows_RD = rows_RD.masked_fill(mask_R1, 0.0)
    y_RD = (rows_RD * sorted_R[:, None]).masked_fill(mask_R1, 0.0)
    return y_RD, *torch.autograd.grad(y_RD.square().sum(), x_TD)


def traced(*inputs, **settings):
    with torch.enable_grad():
        gm = make_fx(
            lambda x, scores: step(x.detach().requires_grad_(), scores, **settings),
            decomposition_table=select_decomp_table(),
            tracing_mode="fake",
        )(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.rand(6, E)


def test_all_of_them_go_and_no_bit_changes(inputs):
    gm = traced(*inputs)
    before = gm(*inputs)
    assert text(gm).count("aten.where") == 4
    (record,) = run(gm, [DropSentinels()])
    assert record.sites == 4
    assert "aten.where" not in text(gm)
    assert "aten.ge" not in text(gm)
    assert all(map(torch.equal, gm(*inputs), before))
    assert run(gm, [DropSentinels()])[0].sites == 0


@pytest.mark.parametrize("settings", [{"limit": E - 1}, {"topk": False}])
def test_numbers_that_may_be_that_large_stay(inputs, settings):
    gm = traced(*inputs, **settings)
    before = text(gm)
    (record,) = run(gm, [DropSentinels()])
    assert (record.sites, text(gm)) == (0, before)


@pytest.mark.parametrize("wide", [{"shape": (4,)}, {"dtype": torch.bfloat16}], ids=["shape", "dtype"])
def test_a_mask_that_widens_stays(inputs, wide):
    x = torch.randn(wide.get("shape", (6, 2, 4))).to(wide.get("dtype", torch.float32))
    gm = make_fx(
        lambda x, s: torch.where(s.topk(2).indices[..., None] >= E, torch.zeros(6, 2, 4), x), tracing_mode="fake"
    )(x, inputs[1])
    gm.graph.eliminate_dead_code()
    assert run(gm, [DropSentinels()])[0].sites == 0


def test_a_limit_that_varies_stays():
    def masked(x, w):
        scores = torch.rand(6, E)
        return x.sum().expand(6, 2).masked_fill(scores.topk(2).indices >= w.shape[0], 0.0)

    gm = make_fx(masked, tracing_mode="symbolic")(torch.randn(4), torch.randn(E + 3))
    gm.graph.eliminate_dead_code()
    assert run(gm, [DropSentinels()])[0].sites == 0
