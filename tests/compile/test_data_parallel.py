"""A compiled model in DistributedDataParallel: its hooks see every gradient, once, where a reduction is wanted."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def gradients(model, batches):
    """The sum of two micro-batches', of which the first is not reduced."""
    model.zero_grad()
    first, second = batches
    with model.no_sync():
        model(first).float().square().mean().backward()
    model(second).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.module.named_parameters()}


def work(rank, model, batches, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    parallel, seen = DistributedDataParallel(model), []

    def hook(_, bucket):
        seen.append(bucket.buffer().numel())
        summed = distributed.all_reduce(bucket.buffer() / RANKS, async_op=True).get_future()
        return summed.then(lambda done: done.value()[0])

    parallel.register_comm_hook(None, hook)
    reduced = gradients(parallel, batches[rank])
    assert sum(seen) == sum(p.numel() for p in model.parameters())
    with parallel.no_sync():
        own = gradients(parallel, batches[rank])
    torch.save((reduced, own), Path(folder) / str(rank))
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which autograd refuses where it has a GPU's threads")
@pytest.mark.usefixtures("without_codegen")
@pytest.mark.parametrize("precision", ["exact", "fp8"])
def test_gradients_are_the_mean_of_the_ranks(make_model, compiled, precision, tmp_path):
    """Bit for bit: a half is exact. Compiled in the first call within DDP, where Dynamo would cut a unit in parts."""
    model = compiled(make_model(torch.bfloat16, num_hidden_layers=1, first_k_dense_replace=0), precision)
    batches = torch.randint(0, 256, (RANKS, 2, 1, 16))
    multiprocessing.start_processes(work, (model, batches, str(tmp_path)), nprocs=RANKS, start_method="fork")
    (reduced, own), (others_reduced, others) = (torch.load(tmp_path / str(rank)) for rank in range(RANKS))
    for name, mean in reduced.items():
        assert mean.any(), name
        assert torch.equal(mean, own[name] / RANKS + others[name] / RANKS), name
        assert torch.equal(mean, others_reduced[name]), name
