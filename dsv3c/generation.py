"""Text generation with the latent cache: greedy by default; sampling has transformers' names and order of filters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3c.errors import Dsv3cError
from dsv3c.model import DeepseekV3, LatentCache


@torch.no_grad()
def generate(
    model: DeepseekV3,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """input_ids [B, T] continued by up to max_new_tokens: int64 [B, T + n]; n is smaller if every sequence ended.

    eos_token_id: by default the config's; () never ends. What follows an end is the config's pad_token_id, else the
    first eos_token_id. attention_mask: [B, T], nonzero = a real token; padding stands on the left. Sampling: logits
    over temperature, of these the top_k largest, of these the smallest set whose probability reaches top_p. Raises
    Dsv3cError.
    """
    _check(input_ids, max_new_tokens, temperature, top_k, top_p, attention_mask)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None  # the unpadded model needs no mask
    ends = _end_tokens(model, eos_token_id, input_ids.device)
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else ends[:1]
    weight = model.model.embed_tokens.weight
    batch, num_prompt = input_ids.shape
    cache = LatentCache(model.config, batch, num_prompt + max_new_tokens, device=weight.device, dtype=weight.dtype)
    ended_B1 = torch.zeros(batch, 1, dtype=torch.bool, device=input_ids.device)
    tokens = new = input_ids
    for _ in range(max_new_tokens):
        logits_BV = model(new, attention_mask=attention_mask, cache=cache, logits_to_keep=1)[:, -1].float()
        if do_sample:
            new = sample(logits_BV, temperature, top_k, top_p)
        else:
            new = logits_BV.argmax(dim=-1, keepdim=True)
        if len(ends):
            new = torch.where(ended_B1, pad, new)
            ended_B1 = ended_B1 | torch.isin(new, ends)
        tokens = torch.cat((tokens, new), dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(batch, 1)), dim=1)
        if len(ends) and bool(ended_B1.all()):
            break
    return tokens


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """One token per row, [B, 1], drawn with torch's global generator."""
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probability_BV = sorted_BV.softmax(dim=-1)
        # A token is dropped if those before it already reach top_p; so the first one never is.
        dropped_BV = probability_BV.cumsum(dim=-1) - probability_BV >= top_p
        logits_BV = logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1)


def _end_tokens(model: DeepseekV3, eos_token_id: int | Sequence[int] | None, device: torch.device) -> Tensor:
    ids = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ids = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _check(
    input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, mask: Tensor | None
) -> None:
    for name, ok, expected, found in (
        ("input_ids", input_ids.ndim == 2 and input_ids.shape[1] > 0, "[B, T], T at least 1", list(input_ids.shape)),
        ("max_new_tokens", max_new_tokens >= 0, "at least 0", max_new_tokens),
        ("temperature", temperature > 0, "more than 0, or do_sample=False", temperature),
        ("top_k", top_k is None or top_k >= 1, "at least 1, or None", top_k),
        ("top_p", 0 < top_p <= 1, "more than 0 and at most 1", top_p),
    ):
        if not ok:
            raise Dsv3cError(f"{name}: expected {expected}, found {found}")
    if mask is not None and mask.shape != input_ids.shape:
        raise Dsv3cError(f"attention_mask: expected {list(input_ids.shape)}, found {list(mask.shape)}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise Dsv3cError("attention_mask: expected padding on the left, found some at the end; try padding_side='left'")
