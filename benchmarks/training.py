"""A short pre-training in DeepSeek-V3's recipe, for measuring what it does to the loss: text, and one step.

Next-token and MTP loss, the sequence-wise balance loss, biases updated after each step, AdamW over float32 weights with
gradients summed in float32, their norm clipped at 1 (report §4.2). Bytes are the tokens. On a GPU the whole step is one
CUDA graph, since a model this small would wait for the host.
"""

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3c.errors import Dsv3cError
from dsv3c.layers import Router
from dsv3c.losses import mtp_loss, sequence_balance_loss, update_bias
from dsv3c.main_grad import MainGradOptimizer

VOCABULARY = 256
WARM_UP = 3  # steps in front of the capture: compilation, libraries' workspaces, the optimizer's state


def text(size: int) -> tuple[Tensor, str]:
    """`size` bytes of Python source, uint8, and their SHA-256: the standard library's files, then the installed
    packages', by name. Raises Dsv3cError if this machine has less."""
    found = bytearray()
    for file in _sources():
        if len(found) >= size:
            break
        found += file.read_bytes()
    if len(found) < size:
        raise Dsv3cError(f"text: expected {size} bytes of Python source, found {len(found)}; try fewer --steps")
    del found[size:]
    return torch.frombuffer(found, dtype=torch.uint8), hashlib.sha256(found).hexdigest()


def _sources() -> Iterator[Path]:
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (library, packages):
        for file in sorted(root.rglob("*.py")):
            if root is packages or not file.is_relative_to(packages):
                yield file


def batches(size: int, tokens: int, steps: int, seed: int) -> Tensor:
    """input_ids int64 [steps, size, tokens]: each byte of the text at most once, sequences in an order that `seed`
    chooses."""
    bytes_, _ = text(steps * size * tokens)
    order = torch.randperm(steps * size, generator=torch.Generator().manual_seed(seed))
    return bytes_.view(steps * size, tokens)[order].view(steps, size, tokens).long()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a 30th of the peak, where the report's rate ends."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    left = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
    return peak * (1 + 29 * left) / 30


class Trainer:
    """Trains `model`, compiled or eager, with MTP; `step` gives nothing back, `curve` holds the losses."""

    def __init__(self, model: Any, input_ids: Tensor, *, peak: float = 1e-3) -> None:
        self.model, self.input_ids, self.peak = model.train(), input_ids, peak
        device = next(model.parameters()).device
        self.routers: list[Any] = [module for module in model.modules() if isinstance(module, Router)]
        self.rate = torch.zeros((), device=device)
        self.optimizer = MainGradOptimizer(
            model,
            lambda weights: torch.optim.AdamW(
                weights, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.1, capturable=device.type == "cuda"
            ),
        )
        self.ids = torch.empty_like(input_ids[0], device=device)
        self.losses = torch.zeros(2, device=device)  # the next token's, and the heaviest expert's load over the mean
        self.curve = torch.zeros(len(input_ids), 2)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0

    def step(self) -> None:
        self.rate.fill_(learning_rate(self.done, len(self.input_ids), self.peak))
        self.ids.copy_(self.input_ids[self.done])
        if self.graph is not None:
            self.graph.replay()
        elif self.ids.is_cuda and self.done >= WARM_UP:
            self._capture()
        else:
            self._step()
        self.curve[self.done] = self.losses.cpu()
        self.done += 1

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
        self.graph.replay()

    def _step(self) -> None:
        batch = len(self.ids)
        logits, mtp_logits, routing = self.model(self.ids, return_mtp=True, return_routing=True)
        next_token = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())
        loss = next_token + mtp_loss(mtp_logits, self.ids)
        for router_logits, topk_idx in routing:
            shape = (batch, len(topk_idx) // batch, -1)
            loss = loss + sequence_balance_loss(router_logits.sigmoid().view(shape), topk_idx.view(shape))
        loss.backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        load = self._update_biases(routing)
        self.losses.copy_(torch.stack([next_token.detach(), load]))

    def _clip(self) -> None:
        gradients = [parameter.main_grad for parameter in self.optimizer.parameters]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, (1 / norm).clamp(max=1.0))

    @torch.no_grad()
    def _update_biases(self, routing: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Returns the load of the heaviest expert of all layers, over the mean."""
        heaviest = self.rate.new_ones(())
        for router, (_, topk_idx) in zip(self.routers, routing, strict=True):
            bias_E, chosen = router.e_score_correction_bias, topk_idx.flatten()
            load_E = torch.zeros_like(bias_E).scatter_add(0, chosen, torch.ones_like(chosen, dtype=bias_E.dtype))
            bias_E.copy_(update_bias(bias_E, load_E))
            heaviest = torch.maximum(heaviest, load_E.max() / load_E.mean())
        return heaviest
