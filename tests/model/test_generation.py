"""generate(): greedy, ends, padding, sampling. Against transformers: test_against_transformers.py."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3c import decoding
from dsv3c.config import preset
from dsv3c.decoding import Choice
from dsv3c.errors import Dsv3cError
from dsv3c.generation import generate
from dsv3c.model import DeepseekV3

CONFIG = replace(
    preset("tiny").with_layers(2), vocab_size=32, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    initializer_range=0.2, eos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return DeepseekV3(CONFIG).double().eval()


@pytest.fixture
def prompt():
    torch.manual_seed(4)
    return torch.randint(CONFIG.vocab_size, (3, 5))


@torch.no_grad()
def test_greedy_is_the_argmax_of_a_full_pass(model, prompt):
    expected = prompt
    for _ in range(7):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(generate(model, prompt, max_new_tokens=7), expected)
    assert torch.equal(generate(model, prompt, max_new_tokens=0), prompt)


def test_no_step_keeps_gradients(model, prompt):
    """A compiled model would run its training form, which takes other kernels and saves activations."""
    kept = []
    handle = model.model.norm.register_forward_hook(lambda module, args, out: kept.append(out.requires_grad))
    generate(model, prompt, max_new_tokens=3)
    handle.remove()
    assert kept == [False] * 3


def test_padding_on_the_left_changes_nothing(model, prompt):
    padded = torch.cat([F.pad(prompt[i : i + 1, i:], (i, 0)) for i in range(3)])
    mask = torch.cat([F.pad(torch.ones(1, 5 - i), (i, 0)) for i in range(3)])
    tokens = generate(model, padded, max_new_tokens=6, attention_mask=mask)
    for i in range(3):
        assert torch.equal(tokens[i, i:], generate(model, prompt[i : i + 1, i:], max_new_tokens=6)[0])


def test_ends(model, prompt):
    """A row that met an end goes on with padding; when all have, generation stops. The config's ends are default."""
    free = generate(model, prompt, max_new_tokens=8)[:, 5:]
    ends = sorted({int(row[2]) for row in free})
    tokens = generate(model, prompt, max_new_tokens=8, eos_token_id=ends)[:, 5:]
    stops = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    assert tokens.shape[1] == max(stops) + 1 < 8
    for row, new, stop in zip(free, tokens, stops, strict=True):
        assert torch.equal(new[: stop + 1], row[: stop + 1])
        assert new[stop + 1 :].eq(ends[0]).all()
    model.config = replace(CONFIG, eos_token_id=tuple(ends), pad_token_id=31)
    try:
        by_config = generate(model, prompt, max_new_tokens=8)[:, 5:]
        endless = generate(model, prompt, max_new_tokens=8, eos_token_id=())[:, 5:]
    finally:
        model.config = CONFIG
    assert torch.equal(endless, free)
    for new, old, stop in zip(by_config, tokens, stops, strict=True):
        assert torch.equal(new[: stop + 1], old[: stop + 1])
        assert new[stop + 1 :].eq(31).all()


def test_sampling_is_torchs_and_reproducible(model, prompt):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, prompt, max_new_tokens=8, do_sample=True, temperature=2.0))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    one = generate(model, prompt, max_new_tokens=8, do_sample=True, top_k=1)
    assert torch.equal(one, generate(model, prompt, max_new_tokens=8))


# Probabilities .4, .3, .2, .1: what the filters leave.
@pytest.mark.parametrize(
    ("top_k", "top_p", "left"),
    [(None, 1.0, {0, 1, 2, 3}), (2, 1.0, {0, 1}), (9, 1.0, {0, 1, 2, 3}), (None, 0.75, {0, 1, 2}), (None, 0.65, {0, 1}),
     (None, 1e-9, {0}), (3, 0.7, {0, 1}), (1, 0.9, {0})],
)  # fmt: skip
def test_filters(top_k, top_p, left):
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])  # the tokens are not in order of probability
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[order]
    drawn = Choice(True, 1.0, top_k, top_p)(logits.expand(2000, -1))
    assert {int(order[token]) for token in drawn.flatten()} == left


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [(0.7, None, 1.0, 1.4), (1.0, 5, 1.0, 1.0), (1.0, None, 0.8, 1.0), (1.3, 50, 0.9, 1.2), (0.5, 20, 0.6, 0.8)],
)
def test_tokens_are_drawn_as_transformers_draws_them(temperature, top_k, top_p, penalty, monkeypatch):
    """From the same probabilities, bit for bit; and the settings have transformers' names."""
    theirs = pytest.importorskip("transformers")
    logits, before, drawn_from = 3 * torch.randn(4, 300), torch.randint(300, (4, 40)), []
    monkeypatch.setattr(decoding, "_argmax", drawn_from.append)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda waits: waits.fill_(1.0))
    seen = torch.zeros(4, 300, dtype=torch.bool).scatter_(1, before, True)
    Choice(True, temperature, top_k, top_p, penalty)(logits, seen)
    processors = theirs.LogitsProcessorList([theirs.RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(theirs.TemperatureLogitsWarper(temperature))
    processors += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    processors += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    assert torch.equal(*drawn_from, processors(before, logits.clone()).softmax(dim=-1))
    ours = set(inspect.signature(generate).parameters) - {"model", "input_ids", "attention_mask", "mtp", "on_accepted"}
    assert ours <= theirs.GenerationConfig().to_dict().keys()


@pytest.mark.parametrize("vocabulary", [1, 101, 256, 1024])
def test_greedy_takes_the_first_of_the_largest(vocabulary):
    logits = torch.randint(-3, 4, (50, vocabulary)).bfloat16()
    assert torch.equal(Choice()(logits), logits.argmax(dim=-1, keepdim=True))


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_tokens_that_were_there_are_penalized(model, prompt, penalty):
    expected, greedy = prompt, generate(model, prompt, max_new_tokens=9)
    for _ in range(9):
        logits = model(expected)[:, -1]
        for row, tokens in zip(logits, expected, strict=True):
            for token in set(tokens.tolist()):
                row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
        expected = torch.cat((expected, logits.argmax(dim=-1, keepdim=True)), dim=1)
    tokens = generate(model, prompt, max_new_tokens=9, repetition_penalty=penalty)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, greedy)
    assert torch.equal(generate(model, prompt, max_new_tokens=9, repetition_penalty=1), greedy)
    padded, mask = F.pad(prompt, (2, 0), value=int(tokens[0, 5])), F.pad(torch.ones_like(prompt), (2, 0))
    left = generate(model, padded, max_new_tokens=9, repetition_penalty=penalty, attention_mask=mask)
    assert torch.equal(left[:, 2:], tokens)


def test_temperature_sharpens():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0]).expand(4000, -1)
    share = [Choice(True, temperature)(logits).float().mean() for temperature in (0.25, 1.0, 4.0)]
    assert share[0] < share[1] < share[2] < 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected at least 0, found -1"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"top_p": 0.0}, "top_p: expected more than 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected more than 0"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}, "attention_mask: expected padding on the left"),
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask: expected \[3, 5\]"),
    ],
)
def test_misuse_is_named(model, prompt, kwargs, message):
    with pytest.raises(Dsv3cError, match=message):
        generate(model, prompt, **{"max_new_tokens": 2, "do_sample": True, **kwargs})
