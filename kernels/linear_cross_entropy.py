"""A linear layer and the cross-entropy of its result, which is never in memory as a whole.

    logits = cap * tanh(scale * (h W^T + b) / cap);  loss = cross_entropy(logits, labels)
    ->  loss = linear_cross_entropy(h, W, labels, b)

With s the logits of a row, l = logsumexp(s), p = exp(s - l), V their number, e the label smoothing
(Szegedy et al., 2016), z the z-loss (Chowdhery et al., 2022) and y the label,

    loss = l - (1 - e) s_y - e mean(s) + z l^2
    dloss/ds_v = p_v (1 + 2 z l) - (1 - e) [v = y] - e / V

The rows go through in chunks: a product gives a chunk's logits, one kernel puts their gradient in
their place, and two products take it on to h and W. So the forward leaves the gradients, and the
backward has but to multiply them by that of the loss.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from liger_fx.kernels.launch import (
    Launch,
    ceil_div,
    compute_dtype,
    launch,
    power_of_two,
    uses_triton,
)
from liger_fx.kernels.library import (
    at_once,
    below_autograd,
    define_op,
    differentiable,
    differentiate,
    refused,
)
from liger_fx.kernels.products import linear_into

Tensors = tuple[torch.Tensor, ...]
REDUCTIONS = ("mean", "sum")


class Form(NamedTuple):
    """What is computed, but for the tensors.

    scale, softcap: logits = softcap * tanh(scale * (h W^T + b) / softcap); softcap 0 is none.
    smoothing, z_loss: e and z above. ignore_index: the label of rows that do not count.
    reduction: "mean" over the rows that count, or "sum".
    """

    scale: float = 1.0
    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    items: torch.Tensor | None = None,
    form: Form | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The cross-entropy of the logits of h, as `form` says, divided by `items` if given.

    h: (..., width), any strides; weight: (vocab, width) and bias: (vocab,), in h's dtype.
    labels: integers, one for each row of h, 0 to vocab - 1 or `form.ignore_index`.
    items: a tensor of one number. Returns a scalar of `out_dtype`, computed in float32 (float64 for
    float64) from logits that are rounded to h's dtype, as the layer alone would give them.
    ValueError for other shapes and an unknown reduction; IndexError for another label, which is a
    device-side assertion on a GPU.
    Gradients: of h, weight and bias, in their dtypes. What differentiates them raises
    RuntimeError.
    """
    form = form or Form()
    if form.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}")
    if weight.dim() != 2 or h.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: h of {tuple(h.shape)} and weight of {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
    rows = h.reshape(-1, h.shape[-1])
    if labels.numel() != rows.shape[0]:
        raise ValueError(f"{labels.numel()} labels for {rows.shape[0]} rows")
    return _loss(rows, weight, bias, labels.reshape(-1), items, *form, out_dtype)


def logits_of(z: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """The logits of what the linear layer gives, in z's dtype."""
    z = z * scale if scale != 1 else z
    return softcap * torch.tanh(z / softcap) if softcap else z


def linear_cross_entropy_reference(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    items: torch.Tensor | None,
    scale: float,
    softcap: float,
    smoothing: float,
    z_loss: float,
    ignore_index: int,
    reduction: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What `linear_cross_entropy` computes, in PyTorch's own operations."""
    logits = logits_of(F.linear(h, weight, bias).to(compute_dtype(h)), scale, softcap)
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum"
    )
    counts = labels != ignore_index
    if z_loss:
        loss = loss + (z_loss * logits.logsumexp(-1).square() * counts).sum()
    if reduction == "mean":
        loss = loss / counts.sum()
    return (loss if items is None else loss / items).to(out_dtype)


# How much memory a loss may take at most beside its inputs (gradients included), where chunks of
# SHORTEST rows and the gradients themselves leave that choice.
MEMORY = 1.3 * 2**30
SHORTEST = 512
# The labels whose rows of the weight's gradient are summed in one product, see `_Weights`.
MOST_LABELS = 512


@lru_cache
def chunk_rows(rows: int, vocab: int, width: int, itemsize: int, weight_grad: bool) -> int:
    """How many rows go through at a time.

    The product that gives dh has few results: 2^22 of them (1024 rows of 4096) are a wave of the
    tiles of 128 x 256 that an H100's 132 multiprocessors compute, and more rows gain little (3% at
    2048, width 4096). Fewer leave multiprocessors idle, and each chunk reads the weight twice and
    its gradient once more: 512 rows at least. In between, memory decides.
    """
    wave = max(2**22 // width, SHORTEST)
    taken = rows * width
    if weight_grad:
        taken += vocab * width + rows * min(rows, MOST_LABELS)
    room = int(MEMORY - taken * itemsize) // (vocab * itemsize) // 256 * 256
    return min(max(room, SHORTEST), wave, max(rows, 1))


@triton.jit
def _tanh(x):
    """tanh of a float32 tile: by the exponential, and near 0, where that cancels, by its series."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    return tl.where(square < 0.09, x * series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _logits(z, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits of a float32 tile, and their derivative."""
    s = z * scale
    if SOFTCAP:
        t = _tanh(s / softcap)
        return softcap * t, scale * (1.0 - t * t)
    else:
        return s, scale


@triton.jit
def _rows_kernel(
    z_ptr, labels_ptr, factor_ptr, losses_ptr, vocab, stride, ignore_index,
    scale, softcap, smoothing, z_loss,
    SOFTCAP: tl.constexpr, GRAD: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    label = tl.load(labels_ptr + row)
    col = tl.arange(0, COLS)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRAD:
            for start in range(0, vocab, COLS):
                zero = tl.zeros((COLS,), z_ptr.dtype.element_ty)
                tl.store(z_ptr + start + col, zero, start + col < vocab)
        return
    z_label = tl.load(z_ptr + label).to(tl.float32)  # before its gradient takes its place
    s_label, slope_label = _logits(z_label, scale, softcap, SOFTCAP)
    highest = -float("inf")
    total = 0.0
    plain = 0.0
    for start in range(0, vocab, COLS):
        mask = start + col < vocab
        z = tl.load(z_ptr + start + col, mask, other=0.0).to(tl.float32)
        s, slope = _logits(z, scale, softcap, SOFTCAP)
        plain += tl.sum(tl.where(mask, s, 0.0))
        s = tl.where(mask, s, -float("inf"))
        new = tl.maximum(highest, tl.max(s))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(s - new))
        highest = new
    lse = highest + tl.log(total)
    loss = lse - (1.0 - smoothing) * s_label - smoothing * plain / vocab + z_loss * lse * lse
    tl.store(losses_ptr + row, loss)
    if GRAD:
        factor = tl.load(factor_ptr)
        steep = 1.0 + 2.0 * z_loss * lse
        for start in range(0, vocab, COLS):
            mask = start + col < vocab
            z = tl.load(z_ptr + start + col, mask, other=0.0).to(tl.float32)
            s, slope = _logits(z, scale, softcap, SOFTCAP)
            g = tl.exp(s - lse) * steep - smoothing / vocab
            g = tl.where(start + col == label, g - (1.0 - smoothing), g) * slope * factor
            tl.store(z_ptr + start + col, g.to(z_ptr.dtype.element_ty), mask)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, COLS: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
        x = tl.load(x_ptr + i, i < count, other=0.0).to(tl.float32)
        tl.store(x_ptr + i, (x * factor).to(x_ptr.dtype.element_ty), i < count)


@lru_cache
def rows_launch(vocab: int) -> Launch:
    """One row a program, 16 elements to a thread and at most 8192 at a time: a row is read twice,
    the second time from the L2 cache."""
    cols = min(power_of_two(vocab), 8192)
    return Launch(1, cols, warps=max(1, min(cols // 512, 16)))


def _rows_by_triton(
    z: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor, form: Form, grad: bool
) -> torch.Tensor:
    losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    tile = rows_launch(z.shape[1])
    launch(
        _rows_kernel, z.shape[0], z.device,
        z, labels, factor, losses, z.shape[1], z.stride(0), form.ignore_index,
        form.scale, form.softcap, form.smoothing, form.z_loss,
        SOFTCAP=form.softcap != 0, GRAD=grad, COLS=tile.cols, num_warps=tile.warps,
    )  # fmt: skip
    return losses


def _rows_by_pytorch(
    z: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor, form: Form, grad: bool
) -> torch.Tensor:
    """The loss of each row; with `grad`, z becomes the gradient of their sum times `factor`."""
    s = logits_of(z.to(compute_dtype(z)), form.scale, form.softcap)
    counts = labels != form.ignore_index
    at_label = labels.where(counts, 0)[:, None]
    lse = s.logsumexp(-1, keepdim=True)
    loss = lse - (1 - form.smoothing) * s.gather(1, at_label) + form.z_loss * lse.square()
    if form.smoothing:
        loss -= form.smoothing * s.mean(-1, keepdim=True)
    if grad:
        g = (s - lse).exp_()
        if form.z_loss:
            g *= 1 + 2 * form.z_loss * lse
        if form.smoothing:
            g -= form.smoothing / s.shape[1]
        g.scatter_(1, at_label, g.gather(1, at_label) - (1 - form.smoothing))
        if form.softcap:
            g *= 1 - (s / form.softcap).square()
        g *= factor * form.scale
        z.copy_(g.masked_fill_(~counts[:, None], 0))
    return loss[:, 0].masked_fill(~counts, 0)


class _Weights:
    """The weight's gradient, summed over chunks in its own dtype.

    Each of n chunks rounds the sums again, and nearly all of that error is in the rows of frequent
    labels, where a sum is large: 1.44 times that of one rounding for n = 8 and labels drawn as the
    words of a text are (Zipf's law). The rows of the 512 most frequent labels are computed by one
    product over all rows at the end, for which their columns of the logits' gradients are kept
    (8 MiB for 8192 rows): 1.06 times. (Labels drawn evenly from a large vocabulary, as no text has
    them, stay at 2.5 times; keeping all 8192 would help, and take a tenth of the loss's time.)
    """

    def __init__(self, weight: torch.Tensor, labels: torch.Tensor, chunks: int) -> None:
        self.sums = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.begun = False
        self.labels: torch.Tensor | None = None
        if chunks > 2 and weight.element_size() == 2:
            vocab, rows = weight.shape[0], labels.shape[0]
            found = labels.clamp(0, vocab - 1)
            often = labels.new_zeros(vocab, dtype=torch.int32)
            often.scatter_add_(0, found, torch.ones_like(found, dtype=torch.int32))
            self.labels = often.topk(min(rows, vocab, MOST_LABELS), sorted=False).indices
            self.kept = weight.new_empty((rows, self.labels.shape[0]))

    def add(self, grad: torch.Tensor, h: torch.Tensor, start: int) -> None:
        """Take in a chunk that begins at row `start`: the gradient of its logits, and its h."""
        if self.begun:
            self.sums.addmm_(grad.t(), h)
        else:
            torch.mm(grad.t(), h, out=self.sums)
        self.begun = True
        if self.labels is not None:
            kept = self.kept[start : start + grad.shape[0]]
            torch.index_select(grad, 1, self.labels, out=kept)

    def done(self, h: torch.Tensor) -> torch.Tensor:
        """The gradient; h: all rows."""
        if not self.begun:
            self.sums.zero_()
        if self.labels is not None:
            self.sums.index_copy_(0, self.labels, torch.mm(self.kept.t(), h))
        return self.sums


def _check_labels(labels: torch.Tensor, ignore_index: int, vocab: int) -> None:
    wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if labels.is_cuda:
        torch._assert_async(~wrong.any(), "a label is out of bounds")
    elif wrong.any():
        raise IndexError(f"Target {labels[wrong][0].item()} is out of bounds.")


def _compute(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    items: torch.Tensor | None,
    form: Form,
    out_dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> Tensors:
    """The loss; the gradients of h, weight and bias, of no elements where not `wanted`; and the
    number that they are still to be multiplied by.

    In float16 that is a power of two, near to one over what the sum is divided by: there a loss is
    scaled up so that its gradients do not vanish, and here, before that, they would.
    """
    (rows, width), vocab = h.shape, weight.shape[0]
    _check_labels(labels, form.ignore_index, vocab)
    wide = compute_dtype(h)
    count = (labels != form.ignore_index).sum()
    divisor = count.to(wide) if form.reduction == "mean" else torch.ones_like(count, dtype=wide)
    if items is not None:
        divisor = divisor * items
    factor = torch.where(count > 0, 1 / divisor, 1)
    later = torch.ones_like(factor)
    if h.dtype == torch.float16:
        factor, exponent = torch.frexp(factor)
        later = torch.ldexp(later, exponent)
    _, dh, dw, _, _ = _fake(h, weight, bias, (wanted[0], False, False), wide)
    size = chunk_rows(rows, vocab, width, h.element_size(), wanted[1])
    # Rows that begin at a multiple of 16: products and kernels load them in whole vectors then.
    # Between two rows are zeros: a CPU with bfloat16 tiles takes odd rows with what stands behind.
    padded = h.new_empty((min(size, rows), ceil_div(vocab, 16) * 16))
    padded[:, vocab:] = 0
    buffer = z = padded[:, :vocab]
    weights = _Weights(weight, labels, ceil_div(rows, size)) if wanted[1] else None
    compute = _rows_by_triton if uses_triton(h, weight) else _rows_by_pytorch
    total, bias_sum = factor.new_zeros(()), factor.new_zeros(vocab if wanted[2] else 0)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        z = buffer[: min(size, rows - start)]
        linear_into(z, h[part], weight, bias)
        total += compute(z, labels[part], factor, form, any(wanted)).sum()
        if wanted[0]:
            torch.mm(z, weight, out=dh[part])
        if weights is not None:
            weights.add(z, h[part], start)
        if wanted[2]:
            bias_sum += z.sum(0, dtype=wide)
    del padded, buffer, z  # the last product needs memory of its own
    dw = dw if weights is None else weights.done(h)
    return (total / divisor).to(out_dtype), dh, dw, bias_sum.to(h.dtype), later


def _fake(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: tuple[bool, bool, bool],
    out_dtype: torch.dtype,
) -> Tensors:
    """Uninitialised results of `_compute`."""
    return (
        h.new_empty((), dtype=out_dtype),
        h.new_empty(h.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        h.new_empty(weight.shape[0] if wanted[2] else 0),
        h.new_empty((), dtype=compute_dtype(h)),
    )


def _forward(h: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    bias, labels, items, *form, out_dtype = rest
    wanted = False, False, False
    return _compute(h, weight, bias, labels, items, Form(*form), out_dtype, wanted)[0]


def _forward_with_gradients(h: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Tensors:
    bias, labels, items, *form, out_dtype, dh, dw, db = rest
    return _compute(h, weight, bias, labels, items, Form(*form), out_dtype, (dh, dw, db))


_ARGUMENTS = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor labels, Tensor? items, float scale,"
    " float softcap, float smoothing, float z_loss, int ignore_index, str reduction,"
    " ScalarType out_dtype"
)
_loss = define_op(
    f"linear_cross_entropy({_ARGUMENTS}) -> Tensor",
    _forward,
    lambda h, *rest: h.new_empty((), dtype=rest[-1]),
)
_loss_and_gradients = define_op(
    f"linear_cross_entropy_and_gradients({_ARGUMENTS}, bool h_grad, bool weight_grad,"
    " bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_with_gradients,
    lambda h, weight, bias, *rest: _fake(h, weight, bias, rest[-3:], rest[-4]),
)


def _times(x: torch.Tensor, factor: torch.Tensor, keep: bool) -> torch.Tensor:
    """x * factor, a number on x's device; in x's own memory unless it is to be kept."""
    if keep or not at_once((x, factor)):
        return (x * factor).to(x.dtype)
    if not uses_triton(x):
        return x if factor == 1 else x.mul_(factor)
    if x.numel():  # a factor of 1, which the host does not know of, costs next to nothing
        launch(
            _scale_kernel, ceil_div(x.numel(), 8192), x.device,
            x, factor, x.numel(), COLS=8192, num_warps=8,
        )  # fmt: skip
    return x


def _scaled(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients that the forward made, times that of the loss."""
    *grads, later = ctx.saved_tensors
    factor = grad.to(later.dtype) * later
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    made = (
        _times(g, factor, keep) if wanted else None
        for g, wanted in zip(grads, ctx.wanted, strict=True)
    )
    return *made, *[None] * 10


_NO_SECOND = (
    "linear_cross_entropy has no second derivative: its gradients are made in the forward pass. "
    "Compute the loss from the logits with torch.nn.functional.cross_entropy"
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        *args, _ = args  # type: ignore[assignment]  # what computes the loss alone
        ctx.wanted = ctx.needs_input_grad[:3]
        loss, *saved = below_autograd(_loss_and_gradients, *args, *ctx.wanted)
        ctx.save_for_backward(*saved)
        return loss

    backward = staticmethod(differentiable(refused(_scaled, _NO_SECOND))(_scaled))


differentiate(_loss, _LinearCrossEntropy, linear_cross_entropy_reference)
