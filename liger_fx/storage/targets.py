"""All that a saved graph may call. What is not named here is neither saved nor loaded.

    torch.matmul    "torch.matmul"                F.silu      "torch.nn.functional.silu"
    operator.add    "operator.add"                attention   "liger_fx.attention"

The lists hold functions and methods that compute tensors from tensors and numbers: none opens a
file or a connection, imports, compiles, or takes a function to call.
"""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.tracing import leaves

# Of one tensor, elementwise.
_ELEMENTWISE = """
abs acos acosh asin asinh atan atanh bitwise_not ceil clamp clamp_max clamp_min clip cos cosh
deg2rad digamma erf erfc erfinv exp exp2 expm1 fix floor frac lgamma log log10 log1p log2
logical_not logit nan_to_num neg negative positive rad2deg reciprocal relu round rsqrt sigmoid
sign signbit sin sinc sinh sqrt square tan tanh trunc
"""
# Of two or three tensors, elementwise; most have an in-place method, too.
_BINARY = """
add addcdiv addcmul atan2 bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor
div divide eq floor_divide fmod ge greater greater_equal gt hypot le lerp less less_equal
logical_and logical_or logical_xor lt masked_fill mul multiply ne not_equal pow remainder sub
subtract true_divide xlogy
"""
_REDUCTIONS = """
all allclose amax amin aminmax any argmax argmin argsort bincount count_nonzero cummax cummin
cumprod cumsum diff histc kthvalue logcumsumexp logsumexp max maximum mean median min minimum mode
msort nanmean nansum norm prod quantile softmax log_softmax sort std std_mean sum topk trace
unique unique_consecutive var var_mean fmax fmin isclose
"""
_SHAPES = """
adjoint broadcast_to chunk clone concat detach diag diag_embed diagonal dsplit expand_copy flatten
flip fliplr flipud hsplit index_add index_copy index_fill index_select gather masked_scatter
masked_select moveaxis movedim narrow nonzero permute ravel repeat_interleave reshape roll rot90
scatter scatter_add scatter_reduce select select_scatter slice_scatter split squeeze swapaxes
swapdims t take take_along_dim tensor_split tile transpose tril triu unbind unflatten unsqueeze
view_as_complex view_as_real vsplit
"""
_ALGEBRA = """
addbmm addmm addmv addr baddbmm bmm cross dist dot inner kron matmul mm mv outer
tensordot vdot vecdot cdist einsum
"""
_BOTH = _ELEMENTWISE + _BINARY + _REDUCTIONS + _SHAPES + _ALGEBRA

_FUNCTIONS = """
arange as_tensor bernoulli block_diag broadcast_tensors bucketize cartesian_prod cat clone
column_stack combinations complex conv1d conv2d conv3d conv_transpose1d conv_transpose2d
cosine_similarity dropout dstack embedding empty empty_like eye full full_like hstack isfinite isin
isinf isnan layer_norm linspace logspace meshgrid multinomial normal ones ones_like polar rand
rand_like randint randint_like randn randn_like randperm real imag angle view_as_complex rms_norm
scalar_tensor searchsorted stack sym_float sym_int sym_ite sym_max sym_min sym_not tensor
tril_indices triu_indices vander vstack where zeros zeros_like group_norm batch_norm instance_norm
selu celu rrelu prelu
"""
_FUNCTIONALS = """
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d affine_grid
alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear binary_cross_entropy
binary_cross_entropy_with_logits celu conv1d conv2d conv3d conv_transpose1d conv_transpose2d
cosine_embedding_loss cosine_similarity cross_entropy dropout dropout1d dropout2d elu embedding
embedding_bag fold gelu glu grid_sample group_norm gumbel_softmax hardshrink hardsigmoid hardswish
hardtanh huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu linear
local_response_norm log_softmax logsigmoid margin_ranking_loss max_pool1d max_pool2d max_pool3d mish
mse_loss nll_loss normalize one_hot pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu
relu6 rms_norm rrelu scaled_dot_product_attention selu sigmoid silu smooth_l1_loss softmax softmin
softplus softshrink softsign tanh tanhshrink threshold unfold upsample
"""
_LINALG = """
cholesky cross det diagonal eigh eigvalsh inv lu_factor matmul matrix_exp matrix_norm multi_dot norm
pinv qr slogdet solve solve_triangular svd svdvals tensorsolve vector_norm
"""
_FFT = "fft fft2 fftn fftshift ifft ifft2 ifftn ifftshift irfft rfft rfft2 irfft2"
_OPERATORS = """
abs add and_ contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul
inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul ne neg not_
or_ pos pow rshift setitem sub truediv truth xor
"""
_LEAVES = (
    leaves.attention, leaves.build_mask, leaves.new_cache, leaves.encoder_decoder_cache,
    leaves.cache_call, leaves.model_output, leaves.check,
    leaves.check_result,
)  # fmt: skip

# Methods besides those that are functions too.
_METHODS = """
bfloat16 bool byte char clone contiguous copy_ cpu double expand expand_as fill_ float half
index_add_ index_copy_ index_fill_ index_put index_put_ int item long masked_scatter_ new_empty
new_full new_ones new_tensor new_zeros repeat requires_grad_ reshape_as scatter_add_
scatter_reduce_ short size squeeze_ sum_to_size swapaxes_ t_ to tolist transpose_ type type_as
unfold unsqueeze_ view view_as zero_ bernoulli_ normal_ uniform_ random_ exponential_ cumsum_
cumprod_ tril_ triu_ scatter_ dim numel stride is_floating_point
"""
_IN_PLACE = [f"{name}_" for name in (_ELEMENTWISE + _BINARY).split()]
METHODS = frozenset(
    ["get_seq_length"]  # of a cache; all others are a tensor's
    + [name for name in (*(_METHODS + _BOTH).split(), *_IN_PLACE) if hasattr(torch.Tensor, name)]
)
# Properties of tensors that a graph reads by builtins.getattr.
PROPERTIES = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
# And what it reads of caches.
CACHE_PARTS = frozenset(
    {"is_updated", "self_attention_cache", "cross_attention_cache", "layers", "keys", "values"}
)
SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
ENTER_AUTOCAST: Any = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Any = torch.amp.autocast_mode._exit_autocast


def _table() -> dict[str, Any]:
    groups: list[tuple[str, Any, str]] = [
        ("torch", torch, _BOTH + _FUNCTIONS),
        ("torch.nn.functional", F, _FUNCTIONALS),
        ("torch.linalg", torch.linalg, _LINALG),
        ("torch.fft", torch.fft, _FFT),
        ("torch.nn.init", nn.init, "kaiming_uniform_ uniform_ normal_ zeros_ ones_"),
        ("operator", operator, _OPERATORS),
        ("math", math, "ceil floor trunc"),
    ]
    # hasattr: an older PyTorch lacks a few
    found = {
        f"{prefix}.{name}": getattr(home, name)
        for prefix, home, names in groups
        for name in names.split()
        if hasattr(home, name)
    }
    return {
        **found,
        **{f"liger_fx.{leaf.__name__}": leaf for leaf in _LEAVES},
        "getattr": builtins.getattr,
        "round": builtins.round,
        "torch.set_grad_enabled": SET_GRAD_ENABLED,
        "torch.enter_autocast": ENTER_AUTOCAST,
        "torch.exit_autocast": EXIT_AUTOCAST,
    }


FUNCTIONS = _table()


OPERATORS = frozenset(getattr(operator, name) for name in _OPERATORS.split())
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


def name_of(function: Any) -> str | None:
    """The name under which a saved graph calls this function; None if it may not."""
    return _NAMES.get(function)
