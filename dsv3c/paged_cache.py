"""The KV cache of generation: written in place, in pages, each sequence with a length that the device alone knows.

A step's launches then depend on nothing that changes from step to step, so that it can be captured in a CUDA graph.
Padding is dropped when the prompt is written, and no mask is needed afterwards. Letters as in `model.py`; N pages, of
which a sequence has M.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import dsv3c.operators  # noqa: F401  (defines dsv3c::read_pages)
from dsv3c.config import ModelConfig
from dsv3c.numerics import ceil_div
from dsv3c.operators.mla_decode import PAGE


class Pages(NamedTuple):
    """One layer's part of the cache: what a layer's new tokens are written to and attend over."""

    latents_NPL: Tensor  # [N, PAGE, L]
    table_BM: Tensor  # int32, a sequence's pages in order
    lengths_B: Tensor  # int32, tokens cached before

    def append(self, latent_BTL: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens behind each sequence's last. Returns all latents [B, M * PAGE, L] and which of them
        each new token sees, bool [B, 1, T, M * PAGE]."""
        num_new = latent_BTL.shape[1]
        put(self.latents_NPL, self.table_BM, positions(self.lengths_B, num_new), latent_BTL)
        return torch.ops.dsv3c.read_pages(self.latents_NPL, self.table_BM, self.lengths_B + num_new, num_new)


def positions(lengths_B: Tensor, num_new: int) -> Tensor:
    """int64 [B, T]: the places of new tokens in their sequences."""
    first_B1 = lengths_B[:, None].long()
    return first_B1 if num_new == 1 else first_B1 + torch.arange(num_new, device=lengths_B.device)


def put(latents_NPL: Tensor, table_BM: Tensor, position_BT: Tensor, latent_BTL: Tensor) -> None:
    page_BT = table_BM.gather(1, position_BT // PAGE).long()
    latents_NPL[page_BT, position_BT % PAGE] = latent_BTL.detach()


class PagedCache:
    """Latents of all layers in pages of 64 tokens; for `model(…, cache=…)` as LatentCache is.

    The first call writes the prompt, of which attention_mask may drop tokens; later calls take no attention_mask.
    `length` is what the host knows: tokens of each sequence if none was dropped.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        *,
        mtp: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        columns = ceil_div(max_tokens, PAGE)
        latents = [
            torch.empty(batch_size * columns, PAGE, config.latent_dim, device=device, dtype=dtype)
            for _ in range(config.num_hidden_layers + mtp)
        ]
        self._take(latents, batch_size, columns)

    @classmethod
    def over(cls, latents: list[Tensor], batch_size: int, columns: int) -> "PagedCache":
        """A cache in pages that are there already, of up to so many columns of them a sequence."""
        cache = cls.__new__(cls)
        cache._take(latents, batch_size, columns)
        return cache

    def _take(self, latents: list[Tensor], batch_size: int, columns: int) -> None:
        device = latents[0].device
        self.latents, self.batch_size = latents, batch_size
        self.table_BM = torch.zeros(batch_size, columns, device=device, dtype=torch.int32)
        self.lengths_B = torch.zeros(batch_size, device=device, dtype=torch.int32)
        self.reset(min(columns, len(latents[0]) // batch_size) * PAGE)

    def reset(self, max_tokens: int) -> None:
        """Empties the cache and gives each sequence pages for so many tokens."""
        columns = ceil_div(max_tokens, PAGE)
        pages = torch.arange(self.batch_size * columns, device=self.table_BM.device, dtype=torch.int32)
        self.table_BM[:, :columns] = pages.view(self.batch_size, columns)
        self.lengths_B.zero_()
        self.max_tokens, self.length = columns * PAGE, 0

    def past(self, layer: int) -> Pages | None:
        """What a layer attends to and writes to; None while nothing is cached."""
        return Pages(self.latents[layer], self.table_BM, self.lengths_B) if self.length else None

    def write(self, layer: int, latent_BTL: Tensor, attention_mask: Tensor | None) -> None:
        """Stores a prompt's latents; later tokens' are there already."""
        if self.length:
            return
        if attention_mask is not None:  # real tokens first, in order; what follows them lies behind the sequence's end
            order_BT = (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
            latent_BTL = latent_BTL.gather(1, order_BT[..., None].expand_as(latent_BTL))
        put(self.latents[layer], self.table_BM, positions(self.lengths_B, latent_BTL.shape[1]), latent_BTL)

    def advance(self, num_new: int, attention_mask: Tensor | None) -> None:
        """After the last layer: the new tokens are cached now."""
        self.lengths_B += num_new if attention_mask is None else (attention_mask != 0).sum(dim=1)
        self.length += num_new
