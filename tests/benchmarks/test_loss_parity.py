"""The comparison of loss curves: what it trains, what it accepts, and that a run of it works."""

import csv
import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from dsv3c.benchmarks import loss_parity, training
from dsv3c.benchmarks.loss_parity import SIZES, flops_in_fp8, verdict
from dsv3c.errors import Dsv3cError
from dsv3c.model import DeepseekV3
from dsv3c.numerics import positive_sum_bound

TINY = SIZES["tiny"]


def test_the_full_size_is_what_the_claim_needs():
    config = SIZES["full"].config
    assert loss_parity._parameters(config) >= 100e6
    assert config.n_routed_experts >= 32
    assert config.num_nextn_predict_layers == 1
    assert flops_in_fp8(config) >= 0.9
    sizes = (config.hidden_size, config.intermediate_size, config.moe_intermediate_size, config.kv_lora_rank)
    assert all(size % 128 == 0 for size in sizes)


def test_each_byte_of_the_text_is_used_at_most_once():
    ids, other = (training.batches(2, 16, 5, seed) for seed in (0, 1))
    whole, _ = training.text(2 * 16 * 5)
    assert not torch.equal(ids, other)
    for found in (ids, other):
        assert sorted(map(tuple, found.flatten(0, 1).tolist())) == sorted(map(tuple, whole.view(-1, 16).tolist()))


def test_more_text_than_there_is(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(training, "_sources", lambda: iter([tmp_path / "a.py"]))
    with pytest.raises(Dsv3cError, match="expected 7 bytes of Python source, found 6"):
        training.text(7)


def test_learning_rate():
    rates = [training.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[0] == 1 / 10
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[100] == 1 / 30
    assert rates[10:] == sorted(rates[10:], reverse=True)


def curve(level=2.0, spike=0.0):
    losses = torch.full((100,), level, dtype=torch.float64)
    losses[50] += spike
    return losses


@pytest.mark.parametrize(
    ("fp8", "passed"),
    [
        (curve(2.0 * 1.0024), True),
        (curve(2.0 * 1.0026), False),
        (curve(2.0 * 0.9974), False),  # learning faster is another training, too
        (curve(spike=0.2), True),
        (curve(spike=0.21), False),
        (curve(float("nan")), False),
    ],
)
def test_verdict(fp8, passed):
    rows = verdict({"eager-0": curve(spike=0.1), "fp8-0": fp8})
    assert [row["passed"] for row in rows] == [True, passed]


def test_verdict_compares_within_a_seed():
    rows = verdict({"eager-0": curve(2.0), "eager-1": curve(3.0), "fp8-1": curve(3.0)})
    assert rows[2]["relative_difference"] == 0.0


@pytest.fixture
def trainer():
    torch.manual_seed(0)
    model = DeepseekV3(TINY.config, mtp=True)
    ids = training.batches(TINY.batch, TINY.tokens, 3, seed=0)
    return training.Trainer(model, ids, peak=TINY.peak)


def test_a_step_trains_everything(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    assert [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])] == []
    assert abs(trainer.curve[0, 0].item() - math.log(training.VOCABULARY)) < 0.5
    # A layer's and MTP's router; every bias one step up or down, or at the mean.
    assert len(trainer.routers) == 2
    steps = {torch.tensor(sign * 0.001).item() for sign in (-1, 0, 1)}
    for router in trainer.routers:
        bias = router.e_score_correction_bias
        assert set(bias.unique().tolist()) <= steps
        assert bias.any()


def test_gradients_are_clipped(trainer):
    big = [torch.full_like(p, 3.0) for p in trainer.optimizer.parameters]
    for parameter, gradient in zip(trainer.optimizer.parameters, big, strict=True):
        parameter.main_grad.copy_(gradient)
    trainer._clip()
    norm = torch.nn.utils.get_total_norm([p.main_grad.double() for p in trainer.optimizer.parameters])
    values = sum(p.numel() for p in trainer.optimizer.parameters)
    assert abs(norm - 1) <= positive_sum_bound(values, torch.float32, 1.0)


def test_a_whole_run(without_codegen, monkeypatch, tmp_path, capsys):
    """Three steps say nothing about learning: the verdict is not looked at, everything else is. Of a dense layer and
    MTP's, whose MoE is the only one."""
    monkeypatch.setitem(loss_parity.SIZES, "tiny", replace(TINY, config=TINY.config.with_layers(1)))
    with suppress(loss_parity.typer.Exit):
        loss_parity.loss_parity(steps=3, seeds=1, size="tiny", only="", output=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["run"] for row in summary["runs"]] == ["eager-0", "exact-0", "fp8-0", "shifted-0"]
    assert summary["tokens"] == 3 * TINY.batch * TINY.tokens
    assert summary["text_sha256"] == training.text(summary["tokens"])[1]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    losses = {}
    for run in ("eager", "exact", "fp8", "shifted"):
        with (tmp_path / f"tiny-3-{run}-0.csv").open() as file:
            losses[run] = [float(row["loss"]) for row in csv.DictReader(file)]
    # The same weights and batches, other roundings.
    first = {run: abs(found[0] - losses["eager"][0]) for run, found in losses.items()}
    assert first["exact"] < min(first["fp8"], first["shifted"])
    assert first["fp8"] != first["shifted"]
    assert losses["eager"][2] < losses["eager"][0]
    assert "FLOPs in FP8" in capsys.readouterr().out


def test_a_run_is_not_run_again(tmp_path, monkeypatch):
    """That is there with the same model and number of steps."""
    trained = []
    monkeypatch.setattr(loss_parity, "train", lambda size, run, steps, path: trained.append(path.name))
    (tmp_path / "tiny-1-fp8-0.csv").write_text("step,loss,heaviest_expert\n0,1.5,1.0\n")
    for steps in (1, 2):
        loss_parity.loss_parity(steps=steps, seeds=1, size="tiny", only="fp8-0", output=tmp_path)
    assert trained == ["tiny-2-fp8-0.csv"]
    assert loss_parity.read(tmp_path / "tiny-1-fp8-0.csv").tolist() == [1.5]


def test_runs_on_another_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_parity, "train", lambda size, run, steps, path: path.touch())
    (tmp_path / "tiny-1.sha256").write_text("0" * 64)
    with pytest.raises(
        Dsv3cError, match=r"tiny-1.sha256: expected [0-9a-f]{64}, this machine's text, found 0{64}; try"
    ):
        loss_parity.loss_parity(steps=1, seeds=1, size="tiny", only="fp8-0", output=tmp_path)
    assert not (tmp_path / "tiny-1-fp8-0.csv").exists()


def test_the_recorded_verdict(tmp_path, monkeypatch):
    """From the curves in the repository, on any machine."""
    results = loss_parity.Path(loss_parity.__file__).parent / "results" / "loss_parity"
    for file in (*results.glob("full-2000-*.csv"), results / "full-2000.sha256"):
        (tmp_path / file.name).symlink_to(file.resolve())
    monkeypatch.setattr(loss_parity, "draw", lambda curves, path: None)
    loss_parity.loss_parity(steps=2000, seeds=3, size="full", only="", output=tmp_path)
    found, recorded = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, results))
    for summary in (found, recorded):
        for row in summary["runs"]:
            row |= {what: round(row[what], 9) for what in ("mean_loss", "relative_difference", "spike")}
    assert found == recorded
    assert recorded["passed"]


@pytest.mark.parametrize(
    "options", [{"size": "huge"}, {"only": "fp9-0"}, {"only": "shifted-1"}, {"steps": 0}, {"seeds": 0}]
)
def test_unknown_options(options, tmp_path):
    arguments = {"steps": 1, "seeds": 2, "size": "tiny", "only": "", "output": tmp_path} | options
    with pytest.raises(Dsv3cError, match="expected"):
        loss_parity.loss_parity(**arguments)
