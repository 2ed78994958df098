"""What the model benchmarks call: an eager model with weights, and `run(model)` for it and everything compiled from it.

forward: all tokens in, logits of the last one out. backward: forward and backward of the body, the loss is the mean of
squares of the final hidden state; the head is left out, gradients have the parameters' dtype. decode: one token a
sequence, with a cache filled with normal values; of our model compiled on a GPU the step that `generate` replays, a
CUDA graph with the choice of the token in it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3c.cache import LatentCache, PagedCache
from dsv3c.checkpoint import load
from dsv3c.config import PRESETS
from dsv3c.decoding import Choice, Step, step_of
from dsv3c.errors import Dsv3cError
from dsv3c.model import DeepseekV3
from dsv3c.source import model_config

Model = Any  # dsv3c.DeepseekV3 or transformers' DeepseekV3ForCausalLM


def build(
    source: str, layers: int | None, experts: int | None, family: str, dtype: torch.dtype, device: torch.device
) -> Model:
    """The eager model; a preset's weights are normal, std = its initializer_range.

    Raises:
        Dsv3cError: bad input, or less memory than the weights take, before any is taken.
    """
    config = model_config(source)
    for option, number in (("layers", layers), ("experts", experts)):
        if number is not None and source not in PRESETS:
            raise Dsv3cError(f"--{option}: expected a preset, found the checkpoint {source}; try {', '.join(PRESETS)}")
    config = config if layers is None else config.with_layers(layers)
    config = config if experts is None else config.with_experts(experts)
    with torch.device("meta"):
        model = DeepseekV3(config).to(dtype)
    _check_memory(source, model.num_parameters() * dtype.itemsize, device)
    if source in PRESETS:
        torch.manual_seed(0)
        model.to_empty(device=device).init_weights()
    else:
        model = load(source, dtype=dtype, device=device)
    return (model if family == "ours" else _transformers(model, device)).eval()


def _check_memory(source: str, needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise Dsv3cError(
            f"{source}: expected {needed / 1e9:.1f} GB of {device.type} memory for the weights alone, found "
            f"{room / 1e9:.1f} GB; try --layers 2"
        )


def _transformers(model: DeepseekV3, device: torch.device) -> Model:
    """transformers' DeepseekV3ForCausalLM over the tensors of ours."""
    try:
        import transformers
    except ImportError:
        raise Dsv3cError("--model hf: expected transformers, found none; try pip install 'dsv3c[hf]'") from None
    if model.config.scoring_func != "sigmoid":
        raise Dsv3cError(f"--model hf: expected DeepSeek-V3's gate, found {model.config.model_type}; try --model ours")
    config = transformers.DeepseekV3Config.from_dict(model.config.to_dict())
    with torch.device("meta"):
        theirs: Model = transformers.DeepseekV3ForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    with device:  # its frequencies are no part of the state
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs


@dataclass(frozen=True)
class Prepared:
    """Calls of a model: `run` is timed, `warm` is what comes before it the first time, and again after weights_changed;
    `checked` shows the gate what layers are called with; `loss` is where backward begins."""

    run: Callable[[Model], object]
    warm: Callable[[Model], object]
    checked: Callable[[Model], object]
    loss: Callable[[Model], Tensor] | None = None


@dataclass(frozen=True)
class Workload:
    """What is called again and again: the mode, whose model ("ours" or "hf"), sequences, and tokens of each; in decode,
    cached ones."""

    mode: str
    family: str
    batch: int
    tokens: int

    @contextmanager
    def prepared(self, model: Model) -> Iterator[Prepared]:
        """For `model` and what is compiled from it meanwhile; in backward they have no head."""
        device, head = model.model.embed_tokens.weight.device, model.lm_head
        generator = torch.Generator(device).manual_seed(1)
        shape = (self.batch, 1 if self.mode == "decode" else self.tokens)
        ids = torch.randint(model.config.vocab_size, shape, device=device, generator=generator)
        arguments: dict[str, Any] = {} if self.family == "ours" else {"use_cache": False}
        reset: Callable[[], None] = _nothing
        if self.mode == "decode":
            arguments, reset = (_our_cache if self.family == "ours" else _their_cache)(model, self, generator)
        if self.mode == "backward":
            model.lm_head = nn.Identity()
        call: Any = partial(_train if self.mode == "backward" else _infer, ids=ids, arguments=arguments, reset=reset)
        try:
            if self.mode == "decode" and self.family == "ours":
                yield self._steps(model, call)
            else:
                loss = partial(_loss, ids=ids, arguments=arguments) if self.mode == "backward" else None
                yield Prepared(call, call, call, loss)
        finally:
            model.lm_head = head

    def _steps(self, model: Model, call: Any) -> Prepared:
        """`call` for models whose kernels are launched one by one; pages for those that `generate` captures, and for
        checks."""
        cache, steps = call.keywords["arguments"]["cache"], {}

        def filled(pages: PagedCache) -> PagedCache:
            pages.reset(self.tokens + 1)
            for index, latents in enumerate(cache.latents):
                pages.write(index, latents[:, : self.tokens], None)
            pages.advance(self.tokens, None)
            return pages

        @torch.no_grad()
        def warm(model: Model) -> None:
            step = steps[model] = step_of(model, Step, self.batch, self.tokens + 1, Choice())
            filled(step.cache)
            step.make_fresh()
            run(model)

        def run(model: Model) -> None:
            step = steps[model]
            if step.graph:
                step.cache.lengths_B.fill_(self.tokens)
                step.count_B1.zero_()
                step()
            else:
                call(model)

        def checked(model: Model) -> None:
            like = cache.latents[0]
            pages = PagedCache(model.config, self.batch, self.tokens + 1, device=like.device, dtype=like.dtype)
            with torch.no_grad():
                model(call.keywords["ids"], cache=filled(pages), logits_to_keep=1)

        return Prepared(run, warm, checked)


def _loss(model: Model, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    return _output(model(ids, **arguments)).float().square().mean()


def _train(model: Model, ids: Tensor, arguments: dict[str, Any], reset: Callable[[], None]) -> None:
    _loss(model, ids, arguments).backward()
    model.zero_grad(set_to_none=True)  # here, so that gradients count as memory of the call


def _infer(model: Model, ids: Tensor, arguments: dict[str, Any], reset: Callable[[], None]) -> Tensor:
    reset()
    with torch.no_grad():
        return _output(model(ids, logits_to_keep=1, **arguments))


def _output(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out


def _nothing() -> None:
    pass


def _our_cache(model: Model, workload: Workload, generator: torch.Generator):
    """The arguments that make a call a decode step, and what to do before each: the cache forgets the step before."""
    weight = model.model.embed_tokens.weight
    cache = LatentCache(model.config, workload.batch, workload.tokens + 1, device=weight.device, dtype=weight.dtype)
    for latent in cache.latents:
        latent.normal_(generator=generator)

    def reset() -> None:
        cache.length = workload.tokens

    return {"cache": cache}, reset


def _their_cache(model: Model, workload: Workload, generator: torch.Generator):
    from transformers import DynamicCache

    config, weight = model.config, model.model.embed_tokens.weight
    cache: Any = DynamicCache(config=config)
    for index in range(config.num_hidden_layers):
        latent, rope = (
            weight.new_empty(workload.batch, 1, workload.tokens, size).normal_(generator=generator)
            for size in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        cache.update(latent, rope, index)
    filled = [(layer.keys, layer.values) for layer in cache.layers]

    def reset() -> None:
        for layer, (keys, values) in zip(cache.layers, filled, strict=True):
            layer.keys, layer.values = keys.detach(), values.detach()  # objects that Dynamo has made no notes on

    return {"past_key_values": cache, "use_cache": True}, reset
