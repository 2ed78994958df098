"""The passes, in order: one line each, one list a level and precision. Nothing is added or reordered elsewhere."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dsv3c.numerics import Recipe
from dsv3c.passes.absorb_attention import AbsorbAttention
from dsv3c.passes.cast_heads import CastHeads
from dsv3c.passes.choose_saved import ChooseSaved, Memory
from dsv3c.passes.contract import Level, Pass, select
from dsv3c.passes.drop_sentinels import DropSentinels
from dsv3c.passes.fold_linear import FoldLinear
from dsv3c.passes.fuse_latent import FuseLatent
from dsv3c.passes.fuse_norm_backward import FuseNormBackward
from dsv3c.passes.fuse_permute import FusePermute
from dsv3c.passes.fuse_quantize import FuseQuantize
from dsv3c.passes.fuse_routing import FuseRouting
from dsv3c.passes.fuse_swiglu_backward import FuseSwiGLUBackward
from dsv3c.passes.hoist_shared_expert import HoistSharedExpert
from dsv3c.passes.join_keys import JoinKeys
from dsv3c.passes.merge_linear import MergeLinear
from dsv3c.passes.narrow_product import NarrowProduct
from dsv3c.passes.order_sums import OrderSums
from dsv3c.passes.place_keys import PlaceKeys
from dsv3c.passes.quantize_before_gather import QuantizeBeforeGather
from dsv3c.passes.quantize_both import QuantizeBoth
from dsv3c.passes.quantize_linear import QuantizeGroupedLinear, QuantizeLinear, WeightInput
from dsv3c.passes.raise_attention import RaiseAttention
from dsv3c.passes.raise_grouped_linear import RaiseGroupedLinear
from dsv3c.passes.raise_rotary import RaiseRotary
from dsv3c.passes.rotate_in_place import RotateInPlace
from dsv3c.passes.share_equal import ShareEqual
from dsv3c.passes.transpose_permuted import TransposePermuted
from dsv3c.passes.transpose_saved import TransposeSaved
from dsv3c.passes.weigh_activations import WeighActivations


def default(
    precision: str, recipe: Recipe = Recipe(), memory: Memory = "default", deterministic: bool = False
) -> tuple[Pass, ...]:
    """The passes of a precision, `"exact"` or `"fp8"`. Each knows its level: the captured graph (L0), or the joint
    graph of forward and backward, in inference the forward graph (L1)."""
    ordered = (OrderSums(),) if deterministic else ()
    if precision == "exact":
        return (RaiseAttention(), RaiseGroupedLinear(), DropSentinels(), *ordered, ChooseSaved.of(memory))
    return (
        RaiseAttention(),
        JoinKeys(),
        RaiseRotary(),
        RaiseGroupedLinear(),
        MergeLinear(),
        FoldLinear(),
        AbsorbAttention(),
        DropSentinels(),
        QuantizeLinear(recipe),
        QuantizeGroupedLinear(recipe),
        QuantizeBeforeGather(),
        ShareEqual(),
        FuseRouting(),
        FusePermute(),
        FuseNormBackward(),
        FuseQuantize(),
        FuseLatent(),
        FuseSwiGLUBackward(),
        WeighActivations(),
        TransposeSaved(),
        TransposePermuted(),
        NarrowProduct(),
        QuantizeBoth(),
        CastHeads(),
        PlaceKeys(),
        RotateInPlace(),
        HoistSharedExpert(),
        *ordered,
        ChooseSaved.of(memory),
    )


@dataclass(frozen=True)
class Pipeline:
    """The passes of one compiled model, split by the level they run at."""

    captured: tuple[Pass, ...]
    joint: tuple[Pass, ...]

    @classmethod
    def of(cls, passes: Sequence[Pass], skip: Collection[str] = ()) -> "Pipeline":
        """Raises PassError for an unknown name in `skip`."""
        chosen = select(passes, skip)
        return cls(*(tuple(step for step in chosen if step.level is level) for level in Level))

    @property
    def quantizes(self) -> bool:
        return any(hasattr(step, "weights") for step in self.joint)

    @property
    def memory(self) -> ChooseSaved:
        """What is saved for backward."""
        return next((step for step in self.joint if isinstance(step, ChooseSaved)), ChooseSaved("none"))

    def with_weights(self, weights: tuple[WeightInput, ...]) -> "Pipeline":
        """The same passes, told where in the graph's inputs the quantised weights are."""
        joint = tuple(replace(step, weights=weights) if hasattr(step, "weights") else step for step in self.joint)
        return replace(self, joint=joint)
