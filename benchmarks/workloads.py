"""What the model benchmarks call: an eager model with weights, and `run(model)` for it and everything compiled from it.

forward: all tokens in, logits of the last one out. backward: forward and backward of the body, the loss is the mean of
squares of the final hidden state; the head is left out, gradients have the parameters' dtype. moe: the last layer's MoE
alone, forward and backward, of normal values and with normal gradients of its output. decode: one token a sequence,
with a cache filled with normal values; of our model compiled on a GPU the step that `generate` replays, a CUDA graph
with the choice of the token in it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsv3c import families
from dsv3c.cache import LatentCache, PagedCache
from dsv3c.checkpoint import load
from dsv3c.config import PRESETS, ModelConfig
from dsv3c.decoding import Choice, Step, step_of
from dsv3c.errors import Dsv3cError
from dsv3c.model import DeepseekV3
from dsv3c.passes.regions import REGIONS
from dsv3c.source import model_config

LARGER = "a machine with more"  # a checkpoint's layers and experts are its own
Model = Any  # dsv3c.DeepseekV3 or transformers' DeepseekV3ForCausalLM; or the MoE of one


def place() -> tuple[torch.device, torch.dtype]:
    """Where models run here, and in what."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def configured(source: str, layers: int | None, experts: int | None) -> ModelConfig:
    """The config of a checkpoint, or of a preset with so many layers and experts. Raises Dsv3cError."""
    config = model_config(source)
    for option, number in (("layers", layers), ("experts", experts)):
        if number is not None and source not in PRESETS:
            raise Dsv3cError(f"--{option}: expected a preset, found the checkpoint {source}; try {', '.join(PRESETS)}")
    config = config if layers is None else config.with_layers(layers)
    return config if experts is None else config.with_experts(experts)


def build(source: str, config: ModelConfig, family: str, dtype: torch.dtype, device: torch.device) -> Model:
    """The eager model; a preset's weights are normal, std = its initializer_range.

    Raises:
        Dsv3cError: bad input, or less memory than the weights take, before any is taken.
    """
    model = outline_of(config, dtype)
    needed = model.num_parameters() * dtype.itemsize
    hint = "--layers 2" if source in PRESETS else LARGER
    check_memory(source, needed, device, "of {} memory for the weights alone", hint)
    if source in PRESETS:
        torch.manual_seed(0)
        model.to_empty(device=device).init_weights()
    else:
        model = load(source, dtype=dtype, device=device)
    return (model if family == "ours" else _transformers(model, device)).eval()


def outline_of(config: ModelConfig, dtype: torch.dtype) -> DeepseekV3:
    """The model without weights."""
    with torch.device("meta"):
        return DeepseekV3(config).to(dtype)


def check_memory(where: str, needed: int, device: torch.device, what: str, hint: str) -> None:
    """Raises Dsv3cError if `device` has less than `needed` bytes free; `what` they are, with the device as {}."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info()[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise Dsv3cError(
            f"{where}: expected {needed / 1e9:.1f} GB {what.format(device.type)}, found {room / 1e9:.1f} GB; try {hint}"
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


def zipf(E: int, R: int) -> Tensor:
    """R rows to E experts as 1, 1/2, 1/3, ..., in an order drawn from a fixed seed; the last 5 % get none."""
    share = 1 / torch.arange(1, E + 1, dtype=torch.float64)
    share[E - E // 20 :] = 0
    share = share[torch.randperm(E, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(share.device)]
    sizes = (share / share.sum() * R).long()
    sizes[sizes.argmax()] += R - sizes.sum()
    return sizes


def skew_routing(model: Model, batch: int, tokens: int) -> list[int]:
    """Has the rows of `batch` sequences computed by each MoE layer's experts in Zipf's proportions, each sequence's
    alike; returns how many each expert gets.

    For models whose tokens go to all experts, as in a GPU's share: its router decides weights alone, and what it calls
    an expert of a token is another one's work now, or the same one's twice. To the experts a row is a row.

    Raises:
        Dsv3cError: there is a choice.
    """
    experts, top_k = model.config.n_routed_experts, model.config.num_experts_per_tok
    if experts != top_k:
        raise Dsv3cError(
            f"--routing zipf: expected {top_k} experts, all a token's, found {experts}; try --experts {top_k}"
        )
    sizes = zipf(experts, tokens * top_k)
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(0))
    idx_TE = torch.arange(experts).repeat_interleave(sizes)[order].view(tokens, experts)
    # One row more than is taken, or torch would compile for this many tokens.
    idx_TE = torch.cat((idx_TE.repeat(batch, 1), idx_TE[:1]))
    for module in model.modules():
        if REGIONS.get(type(module).__name__) == "experts":
            module.register_buffer("injected_idx", idx_TE.to(module.down_proj.device), persistent=False)
            module.register_forward_pre_hook(_inject)
    return (batch * sizes).tolist()


def _inject(experts: Any, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """By the expert, not its place: routers list the same experts in different orders."""
    x_TD, topk_idx_TK, topk_weights_TK = arguments
    return x_TD, experts.injected_idx[: len(topk_idx_TK)].gather(1, topk_idx_TK), topk_weights_TK


@dataclass(frozen=True)
class Prepared:
    """Calls of a model: `run` is timed, `warm` is what comes before it the first time, and again after weights_changed;
    `checked` shows the gate what layers are called with; `loss` (or output) is where backward begins."""

    run: Callable[[Model], object]
    warm: Callable[[Model], object]
    checked: Callable[[Model], object]
    loss: Callable[[Model], Tensor] | None = None


def moe_of(model: Model) -> Model:
    """The last layer's. Raises Dsv3cError if that is dense."""
    *_, layer = (layer for _, layer in families.layers(model))
    if REGIONS.get(type(layer.mlp).__name__) != "moe":
        raise Dsv3cError("--mode moe: expected a MoE layer at the end, found a dense one; try --layers 2")
    return layer.mlp


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
        """For `model` (in moe, its MoE) and what is compiled from it meanwhile; in backward they have no head."""
        if self.mode == "moe":
            yield self._moe(model)
            return
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

    def _moe(self, moe: Model) -> Prepared:
        like = moe.experts.down_proj
        generator = torch.Generator(like.device).manual_seed(1)
        shape = (self.batch, self.tokens, moe.config.hidden_size)
        x_BTD, dout_BTD = (like.new_empty(shape).normal_(generator=generator) for _ in range(2))
        x_BTD.requires_grad_()

        def output(moe: Model) -> Tensor:
            out = moe(x_BTD)
            return out[0] if isinstance(out, tuple) else out

        def run(moe: Model) -> None:
            output(moe).backward(dout_BTD)
            moe.zero_grad(set_to_none=True)
            x_BTD.grad = None

        return Prepared(run, run, run, output)

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
