"""Text generation with the latent cache: greedy by default; sampling settings have transformers' names."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv3c.decoding import Choice, Step, step_of
from dsv3c.errors import Dsv3cError
from dsv3c.model import DeepseekV3
from dsv3c.speculation import SPARE, Accepted, SpeculativeStep

LOOK = 8  # steps between looks at whether all sequences have ended, for each of which the GPU stands still


@torch.no_grad()
def generate(
    model: DeepseekV3,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    mtp: bool = False,
    on_accepted: Callable[[Accepted], object] | None = None,
) -> Tensor:
    """input_ids [B, T] continued by up to max_new_tokens: int64 [B, T + n]; n is smaller if every sequence ended.

    eos_token_id: by default the config's; () never ends. What follows an end is pad_token_id, by default the config's,
    else the first eos_token_id. attention_mask: [B, T], nonzero = a real token; padding stands on the left. Sampling:
    logits over temperature, of these the top_k largest, of these the smallest set whose probability reaches top_p.
    repetition_penalty: before all this, and in greedy decoding too, logits of the tokens in the sequence are divided by
    it if positive and multiplied if not. mtp: greedy, without penalty, with guesses by the MTP layer (speculation.py);
    on_accepted is called with what became of them. With a compiled model on a GPU each step is one CUDA graph. Raises
    Dsv3cError.
    """
    _check(input_ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, attention_mask)
    if mtp and (do_sample or repetition_penalty != 1.0 or not model.mtp):
        raise Dsv3cError("mtp: expected do_sample=False, repetition_penalty=1.0, and a model built with mtp=True")
    if max_new_tokens == 0:
        return input_ids
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # the unpadded model needs no mask
    ends = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    choice = Choice(repetition_penalty=float(repetition_penalty), ends=ends, pad=pad)
    if do_sample:
        choice = replace(choice, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)

    batch, room = len(input_ids), input_ids.shape[1] + max_new_tokens
    kind, spare = (SpeculativeStep, SPARE) if mtp else (Step, 0)
    step = step_of(model, kind, batch, room + spare, choice)
    step.prefill(input_ids, attention_mask, max_new_tokens)
    look = LOOK if step.graph else 1
    for number in range(1, max_new_tokens):
        if (ends or mtp) and number % look == 0 and bool(step.done().all()):
            break
        step()
    if isinstance(step, SpeculativeStep) and on_accepted:
        on_accepted(step.accepted())
    return torch.cat((input_ids, step.tokens()), dim=1)


def _check(
    input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, penalty: float,
    mask: Tensor | None,
) -> None:  # fmt: skip
    for name, ok, expected, found in (
        ("input_ids", input_ids.ndim == 2 and input_ids.shape[1] > 0, "[B, T], T at least 1", list(input_ids.shape)),
        ("max_new_tokens", max_new_tokens >= 0, "at least 0", max_new_tokens),
        ("temperature", temperature > 0, "more than 0, or do_sample=False", temperature),
        ("top_k", top_k is None or top_k >= 1, "at least 1, or None", top_k),
        ("top_p", 0 < top_p <= 1, "more than 0 and at most 1", top_p),
        ("repetition_penalty", penalty > 0, "more than 0", penalty),
    ):
        if not ok:
            raise Dsv3cError(f"{name}: expected {expected}, found {found}")
    if mask is not None and mask.shape != input_ids.shape:
        raise Dsv3cError(f"attention_mask: expected {list(input_ids.shape)}, found {list(mask.shape)}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise Dsv3cError("attention_mask: expected padding on the left, found some at the end; try padding_side='left'")
