"""What the documentation shows, runs; what it copies, is current."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def block(text: str, start: str) -> str:
    """The first Python block after `start`."""
    return re.search(r"```python\n(.*?)```", text.partition(start)[2], re.DOTALL)[1]


def test_the_worked_example_of_a_pass():
    """The program in docs/architecture.md is a pass: it keeps the contract, and keeps every bit."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from dsv3c.passes import run

    source = block((ROOT / "docs" / "architecture.md").read_text(), "worked example")
    assert len(source.splitlines()) <= 30
    namespace: dict = {"__name__": "example"}
    exec(compile(source, "docs/architecture.md", "exec"), namespace)
    step = namespace["DropRoundTrip"]()

    def before(x):
        return x.float().bfloat16() * 2, x.float() + 1, x.half().bfloat16()

    x = torch.randn(4, 4, dtype=torch.bfloat16)
    gm = make_fx(before, tracing_mode="fake")(x)
    (record,) = run(gm, [step])
    assert (record.sites, record.removed) == (1, {"aten._to_copy.default": 2})  # there and back
    assert all(torch.equal(out, expected) for out, expected in zip(gm(x), before(x), strict=True))
    assert run(gm, [step])[0].sites == 0


def test_the_readme_example_runs(without_codegen):
    source = block((ROOT / "README.md").read_text(), "## Example")
    exec(compile(source, "README.md", "exec"), {"__name__": "example"})


def test_the_readme_table_is_made_of_the_recorded_results():
    from dsv3c.benchmarks.readme_table import updated

    readme = (ROOT / "README.md").read_text()
    assert updated(readme) == readme, "try make readme"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/tuning.md"])
def test_links_and_paths_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for path in re.findall(r"`((?:dsv3c|passes|schedules|kernels|tuning|benchmarks|tests|docs)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
