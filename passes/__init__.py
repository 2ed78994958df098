"""Graph rewrites: the contract and runner, the literal pipelines, one pass a file."""

from dsv3c.passes.absorb_attention import AbsorbAttention
from dsv3c.passes.cast_heads import CastHeads
from dsv3c.passes.choose_saved import ChooseSaved
from dsv3c.passes.contract import Pass, PassError, Record, Skipped, Tier, run, text
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
from dsv3c.passes.pipeline import Pipeline, default
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

__all__ = [
    "AbsorbAttention",
    "CastHeads",
    "ChooseSaved",
    "DropSentinels",
    "FoldLinear",
    "FuseLatent",
    "FuseNormBackward",
    "FusePermute",
    "FuseQuantize",
    "FuseRouting",
    "FuseSwiGLUBackward",
    "HoistSharedExpert",
    "JoinKeys",
    "MergeLinear",
    "NarrowProduct",
    "OrderSums",
    "Pass",
    "PassError",
    "Pipeline",
    "PlaceKeys",
    "QuantizeBeforeGather",
    "QuantizeBoth",
    "QuantizeGroupedLinear",
    "QuantizeLinear",
    "RaiseAttention",
    "RaiseGroupedLinear",
    "RaiseRotary",
    "Record",
    "RotateInPlace",
    "ShareEqual",
    "Skipped",
    "Tier",
    "TransposePermuted",
    "TransposeSaved",
    "WeighActivations",
    "WeightInput",
    "default",
    "run",
    "text",
]
