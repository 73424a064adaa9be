"""The loss of a linear layer's result against its definition, written a second time."""

from collections.abc import Callable
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from liger_fx.kernels import linear_cross_entropy as module
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.linear_cross_entropy import Form, chunk_rows, linear_cross_entropy
from tests.kernels.accuracy import DTYPES, relative_error


def textbook(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    form: Form,
    items: torch.Tensor | None = None,
) -> torch.Tensor:
    """As transformers spells it: logits in h's dtype, the loss in float32."""
    logits = F.linear(h, weight, bias)
    if form.scale != 1:
        logits = logits * form.scale
    if form.softcap:
        logits = torch.tanh(logits / form.softcap) * form.softcap
    logits = logits.flatten(0, -2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(
        logits, labels.flatten(), ignore_index=form.ignore_index,
        label_smoothing=form.smoothing, reduction=form.reduction,
    )  # fmt: skip
    if form.z_loss:
        count = labels.flatten() != form.ignore_index
        squares = form.z_loss * logits.logsumexp(-1).square()[count]
        loss = loss + (squares.mean() if form.reduction == "mean" else squares.sum())
    return loss if items is None else loss / items


def sample(
    rows: int, vocab: int, width: int, dtype: torch.dtype, device: str, bias: bool = True
) -> tuple[list[Any], torch.Tensor]:
    """h, weight and bias or None; and labels, of which a third is ignored."""
    h = torch.randn(rows, width, device=device)
    weight = torch.randn(vocab, width, device=device) / width**0.5
    made = [h, weight, torch.randn(vocab, device=device) if bias else None]
    labels = torch.randint(0, vocab, (rows,), device=device)
    labels[::3] = -100
    return [None if t is None else t.to(dtype) for t in made], labels


def with_gradients(
    function: Callable[..., torch.Tensor], tensors: list[Any], factor: float = 1.0
) -> list[torch.Tensor]:
    """The loss, and the gradients of those of the tensors that are there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves)
    return [loss, *torch.autograd.grad(loss * factor, [t for t in leaves if t is not None])]


def exactly(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


Draws = list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]]


def assert_as_accurate(draws: Draws, times: float = 1.1) -> None:
    """Errors of ours, over draws of (ours, eager, exact), at most `times` the eager ones. One
    number can be right by luck: the loss, and a gradient of few elements, may be off by a tenth of
    a rounding of the inputs."""
    dtype = draws[0][0][-1].dtype
    slack = 2e-6 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
    if INTERPRETED and dtype == torch.bfloat16:  # it cuts bfloat16 off instead of rounding it
        times = 12
    errors = []
    for ours, eager, exact in draws:
        for value, plain, true in zip(ours, eager, exact, strict=True):
            assert value.shape == true.shape and value.dtype == plain.dtype
            errors.append((relative_error(value, true), relative_error(plain, true)))
    for i in range(len(draws[0][0])):
        ours_errors, eager_errors = zip(*errors[i :: len(draws[0][0])], strict=True)
        assert mean(ours_errors) <= times * mean(eager_errors) + slack


# How often a comparison of few numbers is drawn: one draw says more of luck than of accuracy.
FEW_NUMBERS_DRAWN = 24


def compared(
    tensors: list[Any],
    labels: torch.Tensor,
    form: Form,
    items: torch.Tensor | None = None,
    factor: float = 1.0,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Loss and gradients: ours, eager, and in float64."""

    def ours(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, labels, b, items, form)

    def plain(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return textbook(h, w, b, labels, form, items)

    return (
        with_gradients(ours, tensors, factor),
        with_gradients(plain, tensors, factor),
        with_gradients(plain, exactly(tensors), factor),
    )


FORMS = {
    "mean": Form(),
    "sum": Form(reduction="sum"),
    "scaled": Form(scale=0.0625),
    "soft-capped": Form(softcap=5.0),
    "scaled, soft-capped": Form(scale=1.5, softcap=5.0),
    "smoothed": Form(smoothing=0.1),
    "z-loss": Form(z_loss=1e-2),
    "all": Form(0.5, 5.0, 0.1, 1e-2, -100, "sum"),
    "another ignored label": Form(ignore_index=3),
}
SHAPES = {"one row": (1, 5, 8), "odd": (7, 1000, 33), "many": (33, 257, 16)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape: str, form: str, dtype: torch.dtype, device: str) -> None:
    kind, draws = FORMS[form], []
    for _ in range(FEW_NUMBERS_DRAWN if shape == "one row" else 1):
        tensors, labels = sample(*SHAPES[shape], dtype, device)
        if shape == "one row" or kind.ignore_index != -100:
            labels = labels.clamp(min=0) % 5
            labels[0] = 1
        draws.append(compared(tensors, labels, kind))
    assert_as_accurate(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 16, 40])
def test_chunks(
    size: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks: the weight's gradient is as exact as that of one product."""
    tensors, labels = sample(40, 300, 24, dtype, device)
    labels[20:] = 7  # one whose row is a long sum
    monkeypatch.setattr(module, "chunk_rows", lambda *args: size)
    ours = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors)
    eager = with_gradients(lambda h, w, b: textbook(h, w, b, labels, Form()), tensors)
    exact = with_gradients(lambda h, w, b: textbook(h, w, b, labels, Form()), exactly(tensors))
    assert_as_accurate([(ours, eager, exact)], 1.25)


def test_a_large_vocabulary(device: str) -> None:
    tensors, labels = sample(3, 50257, 8, torch.float32, device, bias=False)
    run = lambda f: with_gradients(lambda h, w, b: f(h, w, b), tensors)  # noqa: E731
    ours = run(lambda h, w, b: linear_cross_entropy(h, w, labels))
    exact = with_gradients(lambda h, w, b: textbook(h, w, b, labels, Form()), exactly(tensors))
    assert_as_accurate([(ours, ours, exact)])
    assert max(map(relative_error, ours, exact)) < 1e-5


def test_float64_is_computed_in_float64(device: str) -> None:
    tensors, labels = sample(6, 11, 4, torch.float64, device)
    for form in FORMS.values():
        labels[labels < 0] = form.ignore_index
        assert torch.autograd.gradcheck(
            lambda h, w, b, form=form: linear_cross_entropy(
                h, w, labels, b, form=form, out_dtype=torch.float64
            ),
            [t.requires_grad_() for t in tensors if t is not None],
        )


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows apart": lambda x: x[:, ::2, :],
    "shifted": lambda x: x[:, :-1],
    "width first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch second": lambda x: x.transpose(0, 1),
    "part of the width": lambda x: torch.cat((x, x), -1)[..., 3 : 3 + x.shape[-1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_h_and_weight(layout: str, device: str) -> None:
    h = LAYOUTS[layout](torch.randn(3, 8, 12, device=device))
    weight = torch.randn(12, 50, device=device).t()
    labels = torch.randint(0, 50, h.shape[:-1], device=device)
    ours = with_gradients(lambda h, w: linear_cross_entropy(h, w, labels), [h, weight])
    exact = with_gradients(lambda h, w: textbook(h, w, None, labels, Form()), exactly([h, weight]))
    assert max(map(relative_error, ours, exact)) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored(reduction: str, dtype: torch.dtype, device: str) -> None:
    tensors, labels = sample(5, 9, 4, dtype, device)
    labels.fill_(-100)
    form = Form(reduction=reduction)
    ours = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b, form=form), tensors)
    eager = with_gradients(lambda h, w, b: textbook(h, w, b, labels, form), tensors)
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert ours[0].isnan() == (reduction == "mean")
    assert not any(grad.any() for grad in ours[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divided_by_the_items_of_a_batch(dtype: torch.dtype, device: str) -> None:
    items, form = torch.tensor(37, device=device), Form(reduction="sum")
    draws = [
        compared(*sample(6, 20, 8, dtype, device), form, items, 3.0)
        for _ in range(FEW_NUMBERS_DRAWN)
    ]
    assert_as_accurate(draws, 1.6)  # a factor other than 1 is a rounding more


def test_float16_gradients_survive_a_scaled_loss(device: str) -> None:
    """As eager: what vanishes in float16 before it is scaled up is lost."""
    tensors, labels = sample(64, 2000, 16, torch.float16, device, bias=False)
    items, form = torch.tensor(1e5, device=device).long(), Form(reduction="sum")
    exact = with_gradients(
        lambda h, w, b: textbook(h, w, b, labels, form, items), exactly(tensors), 2.0**16
    )
    ours = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b, items, form), tensors, 2.0**16
    )
    assert max(map(relative_error, ours, exact)) < 2e-3


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_wanted_gradients(wanted: tuple[int, ...], device: str) -> None:
    tensors, labels = sample(6, 20, 8, torch.float32, device)
    expected = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors)[1:]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors) if t is not None]
    h, weight, bias = leaves
    loss = linear_cross_entropy(h, weight, labels, bias)
    found = torch.autograd.grad(loss, [leaves[i] for i in wanted])
    for i, grad in zip(wanted, found, strict=True):
        torch.testing.assert_close(grad, expected[i])


class Allocations(TorchDispatchMode):
    """The most elements that memory has which any operation gives; what was `given` aside."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.given:
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.element_size())
        return out


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes copies of its own")
def test_no_tensor_of_rows_times_vocabulary(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda *args: 8)
    (h, weight, _), labels = sample(64, 500, 16, torch.float32, device)
    with Allocations(h, weight) as seen:
        module._forward_with_gradients(
            h, weight, None, labels, None, *Form(), torch.float32, True, True, False
        )
    assert seen.largest == max(8 * 500, 500 * 16)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter makes copies of its own")
def test_frozen_weight_makes_no_gradient_of_its_size(device: str) -> None:
    (h, weight, _), labels = sample(4, 500, 64, torch.float32, device)
    with Allocations(h, weight) as seen:
        module._forward_with_gradients(
            h, weight, None, labels, None, *Form(), torch.float32, True, False, False
        )
    assert 4 * 500 <= seen.largest < weight.numel()


def test_without_gradient(device: str) -> None:
    tensors, labels = sample(7, 40, 8, torch.float32, device)
    h, weight, bias = tensors
    expected = textbook(h, weight, bias, labels, Form())
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(h, weight, labels, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_backward_twice(device: str) -> None:
    tensors, labels = sample(7, 40, 8, torch.float32, device)
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    loss = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2])
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * 3, leaves)
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_the_weights_gradient_is_not_copied(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, labels = sample(7, 40, 8, torch.float32, device)
    made: list[int] = []
    whole = module._Weights.done
    monkeypatch.setattr(
        module._Weights, "done", lambda self, h: made.append(self.sums.data_ptr()) or whole(self, h)
    )
    h, weight, _ = tensors
    weight.requires_grad_()
    (linear_cross_entropy(h, weight, labels) * 2).backward()
    assert [weight.grad.data_ptr()] == made


def test_second_derivative_is_refused(device: str) -> None:
    (h, weight, _), labels = sample(7, 40, 8, torch.float32, device)
    h.requires_grad_()
    loss = linear_cross_entropy(h, weight, labels)
    (grad,) = torch.autograd.grad(loss.square(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("label", [40, -1, -101])
def test_label_out_of_range(label: int, device: str) -> None:
    if device == "cuda":
        pytest.skip("a device-side assertion ends the process")
    (h, weight, _), labels = sample(7, 40, 8, torch.float32, device)
    labels[4] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        linear_cross_entropy(h, weight, labels)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_do(rows: int, device: str) -> None:
    tensors, labels = sample(rows, 9, 4, torch.float32, device)
    labels.fill_(2)
    ours = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors)
    eager = with_gradients(lambda h, w, b: textbook(h, w, b, labels, Form()), tensors)
    torch.testing.assert_close(ours, eager, equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    h, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum"):
        linear_cross_entropy(h, weight, labels, form=Form(reduction="none"))
    with pytest.raises(ValueError, match=r"h of \(3, 4\) and weight of \(5, 3\)"):
        linear_cross_entropy(h, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
        linear_cross_entropy(h, weight, labels, torch.randn(4))
    with pytest.raises(ValueError, match="2 labels for 3 rows"):
        linear_cross_entropy(h, weight, labels[:2])


def test_chunks_of_what_is_known() -> None:
    """The rows a cost model gives, for 8192 rows in bfloat16 where nothing else is said."""
    assert chunk_rows(8192, 128256, 4096, 2, True) == 1024
    assert chunk_rows(8192, 128256, 2048, 2, True) == 2048
    assert chunk_rows(8192, 128256, 4096, 2, False) == 1024
    assert chunk_rows(100, 128256, 4096, 2, True) == 100
    assert chunk_rows(0, 10, 4, 4, True) == 1


@pytest.mark.skipif(INTERPRETED, reason="compiles; the PyTorch path says the same")
def test_compiled_as_one_operator(device: str) -> None:
    tensors, labels = sample(7, 40, 8, torch.float32, device)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    expected = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors, factor=2.0
    )
    found = with_gradients(lambda h, w, b: compiled(h, w, labels, b), tensors, factor=2.0)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()


def test_autocast_changes_nothing(device: str) -> None:
    tensors, labels = sample(7, 40, 8, torch.float32, device)
    expected = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors)
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b), tensors)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(INTERPRETED, reason="compiles the kernel, which is not one there")
@pytest.mark.parametrize("softcap", [False, True])
def test_the_kernel_compiles_for_an_h100(softcap: bool) -> None:
    """Without one: the interpreter takes code that Triton's compiler does not."""
    kernel: Any = module._rows_kernel
    kinds = {"z_ptr": "*bf16", "labels_ptr": "*i64", "factor_ptr": "*fp32", "losses_ptr": "*fp32"}
    kinds |= dict.fromkeys(("vocab", "stride", "ignore_index"), "i32")
    kinds |= dict.fromkeys(("scale", "softcap", "smoothing", "z_loss"), "fp32")
    constants = {"SOFTCAP": softcap, "GRAD": True, "COLS": 1024}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), places)
    made = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 2})
    assert "ptx" in made.asm
