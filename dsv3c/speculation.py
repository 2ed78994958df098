"""Speculative decoding with the multi-token prediction layer: up to two tokens a step, the same ones as without it.

A step puts two tokens of each sequence through the main model: the last one, and a guess of the next. The first's
logits say what the next token is; if that was the guess, the second's say the one after it. Then the MTP layer, over a
latent cache of its own, guesses what follows. A wrong guess has written latents behind the sequence's end, where the
next step overwrites them. How many tokens a sequence got, only the device knows, so that a step can be captured.

The tokens are those of greedy decoding up to the order of sums: a step of two tokens a sequence may split its products
otherwise than a step of one. Source: DeepSeek-V3 report, section 2.2 and 5.4.3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dsv3c.cache import PagedCache
from dsv3c.decoding import Choice, Decoder, Step
from dsv3c.model import DeepseekV3

SPARE = 3  # places behind the last token that a finished sequence goes on writing to


class Accepted(NamedTuple):
    """What became of the guesses."""

    guesses: int
    accepted: int

    @property
    def rate(self) -> float:
        return self.accepted / max(self.guesses, 1)


class SpeculativeStep(Step):
    """`step()` adds one or two tokens to each sequence that is not done."""

    def __init__(self, model: DeepseekV3, cache: PagedCache, choice: Choice, decoder: Decoder | None = None) -> None:
        super().__init__(model, cache, choice, decoder)
        self.guess_B1 = torch.zeros_like(self.tokens_B1)
        self.counters = torch.zeros(2, dtype=torch.int64, device=cache.lengths_B.device)  # guesses, accepted

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, limit: int) -> None:
        self.limit.fill_(limit)
        self.count_B1.fill_(1)
        self.counters.zero_()
        x_BTD = self.model.hidden(input_ids, attention_mask, self.cache)
        self.tokens_B1.copy_(self._best(x_BTD[:, -1:]))
        self.out_BS[:, :1] = self.tokens_B1
        self.ended_B1.copy_(torch.isin(self.tokens_B1, self.ends))
        next_BT = torch.cat((input_ids[:, 1:], self.tokens_B1), dim=1)
        x_BTD = self.model.draft(x_BTD, next_BT, attention_mask, self.cache)
        self.guess_B1.copy_(self._best(x_BTD[:, -1:]))
        self.cache.advance(input_ids.shape[1], attention_mask)
        if limit > 1:
            self.make_fresh()

    def run(self) -> None:
        x_B2D = self.model.hidden(torch.cat((self.tokens_B1, self.guess_B1), dim=1), None, self.cache)
        new_B2 = self._best(x_B2D)
        right_B1, active_B1 = new_B2[:, :1] == self.guess_B1, ~self.done()
        x_B2D = self.model.draft(x_B2D, new_B2, None, self.cache)
        last_B1 = right_B1.long()
        guess_B1 = self._best(x_B2D.gather(1, last_B1[..., None].expand(-1, -1, x_B2D.shape[2])))

        self.out_BS.scatter_(1, torch.cat((self.count_B1, self.count_B1 + 1), dim=1), new_B2)
        end_B2 = torch.isin(new_B2, self.ends)
        self.ended_B1 |= active_B1 & (end_B2[:, :1] | right_B1 & end_B2[:, 1:])
        self.tokens_B1.copy_(torch.where(active_B1, new_B2.gather(1, last_B1), self.tokens_B1))
        self.guess_B1.copy_(torch.where(active_B1, guess_B1, self.guess_B1))
        added_B1 = active_B1 * (1 + last_B1)
        self.count_B1 += added_B1
        self.cache.lengths_B += added_B1[:, 0]
        self.counters += torch.stack((active_B1.sum(), (active_B1 & right_B1).sum()))

    def accepted(self) -> Accepted:
        return Accepted(*self.counters.tolist())

    def state(self) -> tuple[Tensor, ...]:
        return *super().state(), self.guess_B1, self.counters

    def _best(self, x_BTD: Tensor) -> Tensor:
        logits_BTV = self.model.lm_head(x_BTD)
        return self.choice(logits_BTV.flatten(0, 1)).view(logits_BTV.shape[:2])
