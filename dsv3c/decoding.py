"""One step of decoding: the next token of each sequence of a batch. Of a compiled model on a GPU, one CUDA graph.

A step of V3 is some forty kernels a layer, each a few microseconds long, which the host alone could not launch that
fast. The graph is captured once for a batch size and a way to choose tokens, over buffers that stay where they are
(tokens, cache, lengths), and replayed for each token. It holds addresses: when a weight moved, or its FP8 copy was made
anew, it is captured again.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3c.cache import PagedCache
from dsv3c.layers import at_least_float32
from dsv3c.model import DeepseekV3
from dsv3c.numerics import ceil_div
from dsv3c.operators.mla_decode import PAGE
from dsv3c.weights import QuantizedWeights


@dataclass(frozen=True)
class Choice:
    """How a token is chosen from logits, with transformers' names and order of filters."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    ends: tuple[int, ...] = ()  # tokens that end a sequence
    pad: int = 0  # what follows them

    def __call__(self, logits_BV: Tensor, seen_BV: Tensor | None = None) -> Tensor:
        """One token per row, [B, 1]; drawn with torch's global generator, without a word to the host. seen: bool, the
        tokens that the penalty is for."""
        if seen_BV is not None:
            logits_BV, penalty = logits_BV.to(at_least_float32(logits_BV.dtype)), self.repetition_penalty
            penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
            logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
        if not self.do_sample:
            return _argmax(logits_BV)
        logits_BV = logits_BV.float() / self.temperature
        if self.top_k is not None:
            smallest_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
        if self.top_p < 1.0:
            sorted_BV, order_BV = logits_BV.sort(descending=True)
            probability_BV = sorted_BV.softmax(dim=-1)
            # A token is dropped if those before it already reach top_p; so the first one never is.
            dropped_BV = probability_BV.cumsum(dim=-1) - probability_BV >= self.top_p
            logits_BV = logits_BV.masked_fill(dropped_BV.scatter(1, order_BV, dropped_BV), -torch.inf)
        # As torch.multinomial draws, which asks the host whether the probabilities are sane.
        waits_BV = torch.empty_like(logits_BV).exponential_()
        return _argmax(logits_BV.softmax(dim=-1) / waits_BV)


def _argmax(x_BV: Tensor) -> Tensor:
    """[B, 1]: the place of the largest, of the first if there are several. By parts: torch gives each row to one
    multiprocessor, which takes 35 µs for V3's vocabulary."""
    part = 256 if x_BV.shape[1] % 256 == 0 else x_BV.shape[1]
    largest_BP, place_BP = x_BV.unflatten(1, (-1, part)).max(dim=-1)
    part_B1 = largest_BP.argmax(dim=-1, keepdim=True)
    return part_B1 * part + place_BP.gather(1, part_B1)


class Step:
    """`step()` appends the last token of each sequence to the cache and chooses the next. Of a compiled model on a GPU
    it is captured after the prompt, and again when the graph is stale."""

    def __init__(self, model: DeepseekV3, cache: PagedCache, choice: Choice, decoder: "Decoder | None" = None) -> None:
        self.model, self.cache, self.choice, self.decoder = model, cache, choice, decoder
        self.graph: torch.cuda.CUDAGraph | None = None
        batch, room = cache.batch_size, cache.table_BM.shape[1] * PAGE
        self.ends = torch.tensor(choice.ends, dtype=torch.int64, device=cache.lengths_B.device)
        self.tokens_B1 = self.ends.new_zeros(batch, 1)  # the last ones
        self.out_BS = self.ends.new_zeros(batch, room)  # all new ones
        self.count_B1 = self.ends.new_zeros(batch, 1)  # how many of them
        self.limit = self.ends.new_zeros(1)
        self.ended_B1 = self.ends.new_zeros(batch, 1, dtype=torch.bool)
        penalized = choice.repetition_penalty != 1.0
        self.seen_BV = self.ended_B1.new_zeros(batch, model.config.vocab_size) if penalized else None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, limit: int) -> None:
        """The first token after prompts [B, T], of up to `limit`. The cache is empty before."""
        self.limit.fill_(limit)
        self.count_B1.zero_()
        self.ended_B1.zero_()
        if self.seen_BV is not None:
            last_B1 = input_ids[:, -1:]  # never padding, so that it may stand for it
            real_BT = input_ids if attention_mask is None else torch.where(attention_mask != 0, input_ids, last_B1)
            self.seen_BV.zero_().scatter_(1, real_BT, True)
        logits = self.model(input_ids, attention_mask=attention_mask, cache=self.cache, logits_to_keep=1)
        self._choose(logits[:, -1])
        if limit > 1:
            self.make_fresh()

    def __call__(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def run(self) -> None:
        """A step, kernel by kernel."""
        self._choose(self.model(self.tokens_B1, cache=self.cache, logits_to_keep=1)[:, -1])

    def done(self) -> Tensor:
        """Which sequences have met an end or the limit, bool [B, 1]."""
        return self.ended_B1 | (self.count_B1 >= self.limit)

    def tokens(self) -> Tensor:
        """The new tokens, [B, n], n at most the limit, and smaller if all sequences ended before."""
        new_Bn = self.out_BS[:, : int(torch.minimum(self.count_B1.max(), self.limit))]
        ends_Bn = torch.isin(new_Bn, self.ends).int()
        new_Bn = new_Bn.masked_fill(ends_Bn.cumsum(dim=1) > ends_Bn, self.choice.pad)
        if not bool(self.ended_B1.all()):
            return new_Bn
        return new_Bn[:, : int(ends_Bn.argmax(dim=1).max()) + 1]

    def _choose(self, logits_BV: Tensor) -> None:
        self.tokens_B1.copy_(self.choice(logits_BV, self.seen_BV))
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, self.tokens_B1, True)
        self.out_BS.scatter_(1, self.count_B1, self.tokens_B1)
        self.count_B1 += 1
        if self.choice.ends:
            self.ended_B1 |= torch.isin(self.tokens_B1, self.ends)

    def state(self) -> tuple[Tensor, ...]:
        """What a step changes, but for the latents."""
        seen = () if self.seen_BV is None else (self.seen_BV,)
        return self.tokens_B1, self.out_BS, self.count_B1, self.ended_B1, self.cache.lengths_B, *seen

    def make_fresh(self) -> None:
        """Captures the step if it was not, or not with the weights as they are. Not for every step: it looks at each
        weight."""
        if self.decoder is not None and (self.decoder.forget_stale() or self.graph is None):
            self.graph = self._captured(self.decoder)

    def _captured(self, decoder: "Decoder") -> torch.cuda.CUDAGraph | None:
        """None, with a warning, if a step asks the host. Leaves state and generator as they were."""
        kept, length, seed = [tensor.clone() for tensor in self.state()], self.cache.length, torch.cuda.get_rng_state()

        def restore() -> None:
            for tensor, before in zip(self.state(), kept, strict=True):
                tensor.copy_(before)
            self.cache.length = length

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()  # compiles, quantises weights, makes libraries allocate
            restore()
            capturable = not _waits(self.run)
        torch.cuda.current_stream().wait_stream(side)
        graph = None
        if capturable:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=decoder.pool()):
                self.run()
        else:
            reason = "a step waits for the GPU (a hook that looks at values, or experts that are not bfloat16)"
            warnings.warn(f"dsv3c.generate: launches kernels one by one, without CUDA graph: {reason}", stacklevel=4)
        restore()
        torch.cuda.set_rng_state(seed)
        decoder.note_weights()
        return graph


def _waits(run: Callable[[], None]) -> bool:
    """Whether `run` waits for the GPU. To be known before: a capture that fails leaves torch's allocator and generator
    in disorder."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch does not notice all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


class Decoder:
    """The captured steps of one compiled model, and the pages that they share; so one batch at a time."""

    def __init__(self, model: DeepseekV3, weights: QuantizedWeights | None) -> None:
        self.model, self.weights = model, weights
        self.latents: list[Tensor] = []
        self.steps: dict[tuple[type[Step], int, int, Choice], Step] = {}
        self.addresses: list[tuple[Any, int]] = []

    def step(self, kind: type[Step], batch_size: int, max_tokens: int, choice: Choice) -> Step:
        """A step with an empty cache of room for max_tokens a sequence."""
        columns = ceil_div(max_tokens, PAGE)
        if not self.latents or len(self.latents[0]) < batch_size * columns:
            self.steps.clear()
            self.latents.clear()  # before new ones are made
            weight = self.model.model.embed_tokens.weight
            shape = (batch_size * columns, PAGE, self.model.config.latent_dim)
            self.latents = [
                torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in self.model.model.layers
            ]
        # A graph has its table's number of columns; empty ones cost nothing.
        key = kind, batch_size, 1 << (columns - 1).bit_length(), choice
        if key not in self.steps:
            self.steps[key] = kind(self.model, PagedCache.over(self.latents, *key[1:3]), choice, self)
        self.steps[key].cache.reset(max_tokens)
        return self.steps[key]

    def pool(self) -> Any:
        """Where the graphs take their memory from: one for all, as only one runs at a time."""
        return next((step.graph.pool() for step in self.steps.values() if step.graph), None)

    def forget_stale(self) -> bool:
        """Drops all graphs if a weight or an FP8 copy is not where it was; says whether it did. After a call of the
        model, which makes stale copies anew."""
        fresh = self.addresses == self._addresses()
        if not fresh:
            for step in self.steps.values():
                step.graph = None
        return not fresh

    def note_weights(self) -> None:
        self.addresses = self._addresses()

    def _addresses(self) -> list[tuple[Any, int]]:
        """Of each tensor of the model and each FP8 copy."""
        copies = self.weights.copies.items() if self.weights else ()
        weights = [(None, t.data_ptr()) for t in (*self.model.parameters(), *self.model.buffers())]
        return weights + [(key, t.data_ptr()) for key, copy in copies for t in copy.tensors]


def step_of(model: DeepseekV3, kind: type[Step], batch_size: int, max_tokens: int, choice: Choice) -> Step:
    """A step of this kind, for sequences of up to max_tokens tokens."""
    weight = model.model.embed_tokens.weight
    compilation = model.__dict__.get("_dsv3c")
    if compilation is None or weight.device.type != "cuda":
        cache = PagedCache(
            model.config, batch_size, max_tokens, mtp=model.mtp, device=weight.device, dtype=weight.dtype
        )
        return kind(model, cache, choice)
    if compilation.decoder is None:
        compilation.decoder = Decoder(model, compilation.weights)
    return compilation.decoder.step(kind, batch_size, max_tokens, choice)
