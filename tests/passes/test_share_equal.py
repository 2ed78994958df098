"""Equal values are computed once, and only equal ones."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dsv3c import passes
from dsv3c.passes.contract import run


def shared(function, *inputs) -> tuple[int, torch.fx.GraphModule]:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    (record,) = run(gm, [passes.ShareEqual()])
    assert run(gm, [passes.ShareEqual()])[0].sites == 0
    return record.sites, gm


def test_chains_of_equal_calls_become_one():
    sites, gm = shared(lambda x: x.sin().cos() + x.sin().cos(), torch.ones(3))
    assert sites == 2
    x = torch.randn(3)
    assert torch.equal(gm(x), x.sin().cos() + x.sin().cos())


def test_differing_arguments_stay_apart():
    assert shared(lambda x: x.add(1) + x.add(1.0), torch.ones(3, dtype=torch.int64))[0] == 0
    assert shared(lambda x: x[0] + x[1], torch.ones(3))[0] == 0


def test_random_numbers_stay_apart():
    assert shared(lambda x: torch.rand_like(x) + torch.rand_like(x), torch.ones(3))[0] == 0


def test_views_of_equal_shape_are_equal_however_it_is_written():
    def program(x):
        rows = x.shape[0] * x.shape[1]
        return x.view(-1, 4).exp(), x.view(rows, 4).exp(), x.view(-1, 8).exp()

    gm = make_fx(program, tracing_mode="symbolic")(torch.randn(3, 2, 4))
    before = gm(torch.ones(3, 2, 4))
    (record,) = run(gm, [passes.ShareEqual()])
    assert record.sites == 2  # a view and what is computed of it
    assert all(torch.equal(a, b) for a, b in zip(gm(torch.ones(3, 2, 4)), before, strict=True))
    assert run(gm, [passes.ShareEqual()])[0].sites == 0
