"""Training with labels: the loss and every gradient as the original's, and the output's logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import liger_fx
from liger_fx.errors import UsageError
from liger_fx.modules.lazy_logits import LazyLogits
from liger_fx.tiny import tiny_model

SMALL = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def masked_bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=96))


def t5() -> Any:
    config = transformers.T5Config(
        d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=200,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    sizes = {"layers": 2, "ffn_dim": 96, "attention_heads": 4}
    both = {f"{part}_{k}": v for part in ("encoder", "decoder") for k, v in sizes.items()}
    config = transformers.BartConfig(d_model=64, vocab_size=200, **both)
    return transformers.BartForConditionalGeneration(config)


def tiny(name: str) -> Callable[[], Any]:
    return lambda: tiny_model(name, layers=2)


TYPES = (
    "llama", "gemma2", "cohere", "granite", "gpt2", "qwen3_moe", "phi", "opt", "mamba", "distilbert"
)  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    **{name: tiny(name) for name in TYPES},
    "bert": masked_bert,
    "t5": t5,
    "bart": bart,
}


def pair(name: str) -> tuple[Any, Any]:
    """A model in train mode whose dropout does nothing, and one of the same weights, optimised."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        for attribute, value in vars(module).items():
            if isinstance(value, float) and (attribute == "p" or "drop" in attribute):
                setattr(module, attribute, 0.0)
    model.train()
    return model, liger_fx.optimize(copy.deepcopy(model))


def batch(ignored: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": ids, "labels": labels}


def site_of(opt: Any) -> Any:
    (site,) = {s for p in opt.plans for s in p.sites if s.rule == "linear_cross_entropy"}
    return site


def assert_same_gradients(model: nn.Module, opt: nn.Module) -> None:
    theirs = dict(model.named_parameters())
    for name, parameter in opt.named_parameters():
        wanted = theirs[name].grad
        torch.testing.assert_close(parameter.grad, wanted, atol=2e-6, rtol=2e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str) -> None:
    model, opt = pair(name)
    ours, theirs = opt(**batch()), model(**batch())
    assert site_of(opt).after_class == "LigerFusedLinearCrossEntropy"
    assert list(ours) == list(theirs) and type(ours) is type(theirs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(model, opt)
    assert type(ours.logits) is LazyLogits
    assert (ours.logits.shape, ours.logits.dtype) == (theirs.logits.shape, theirs.logits.dtype)
    torch.testing.assert_close(ours.logits + 0, theirs.logits + 0)
    assert list(opt.state_dict()) == list(model.state_dict())


READS: dict[str, Callable[[Any], torch.Tensor]] = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "index": lambda out: out[1],
    "tuple": lambda out: out.to_tuple()[1],
    "get": lambda out: dict(out.items())["logits"],
}


@pytest.mark.parametrize("read", READS)
def test_reading_with_the_gradient_of_both(read: str) -> None:
    model, opt = pair("gemma2")
    for one in (opt, model):
        out = one(**batch())
        (out.loss + READS[read](out).square().mean()).backward()
    assert_same_gradients(model, opt)


def test_reading_before_the_backward_and_after_it() -> None:
    model, opt = pair("llama")
    before, after, expected = opt(**batch()), opt(**batch()), model(**batch())
    torch.testing.assert_close(before.logits.argmax(-1), expected.logits.argmax(-1))
    before.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, opt)
    after.loss.backward()
    torch.testing.assert_close(after.logits + 0, expected.logits + 0)


def test_reading_after_a_step_is_refused() -> None:
    _, opt = pair("llama")
    out = opt(**batch())
    out.loss.backward()
    torch.optim.SGD(opt.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        out.logits.argmax(-1)


def test_a_tuple_is_given_where_one_is_asked_for() -> None:
    model, opt = pair("llama")
    ours, theirs = (one(**batch(), return_dict=False) for one in (opt, model))
    torch.testing.assert_close(ours[0], theirs[0])
    assert type(ours[1]) is LazyLogits
    torch.testing.assert_close(ours[1] + 0, theirs[1] + 0)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_divided_by_the_items_of_a_batch(items: Any) -> None:
    model, opt = pair("llama")
    for one in (opt, model):
        for _ in range(2):  # gradient accumulation
            one(**batch(), num_items_in_batch=items).loss.backward()
    assert_same_gradients(model, opt)


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_elsewhere_logits_are_as_ever(mode: str) -> None:
    model, opt = pair("gemma2")
    for one in (model, opt):
        one.train(mode != "eval")
    with torch.set_grad_enabled(mode == "eval"):
        ours, theirs = opt(**batch()), model(**batch())
    assert type(ours.logits) is torch.Tensor
    torch.testing.assert_close((ours.loss, ours.logits), (theirs.loss, theirs.logits))


def test_accelerates_conversion_reads_nothing() -> None:
    from accelerate.utils.operations import convert_to_fp32

    _, opt = pair("llama")
    opt = opt.to(torch.bfloat16)
    out = convert_to_fp32(opt(**batch()))
    assert type(out.logits) is LazyLogits and out.logits.dtype == torch.float32
    assert out.logits._reading.result is None
    (out.loss + out.logits.mean()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, opt = pair("llama")
    with torch.autocast("cpu", dtype):
        ours, theirs = opt(**batch()), model(**batch())
    assert site_of(opt).after and ours.logits.dtype == dtype
    assert ours.loss.dtype == theirs.loss.dtype
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-2, rtol=1e-2)
    ours.loss.backward()
    theirs.loss.backward()
    ours_w, theirs_w = (one.get_output_embeddings().weight.grad for one in (opt, model))
    assert ours_w.dtype == theirs_w.dtype
    torch.testing.assert_close(ours_w, theirs_w, atol=2e-3, rtol=0.1)


def test_frozen_head() -> None:
    model, opt = pair("llama")
    for one in (model, opt):
        one.get_output_embeddings().weight.requires_grad_(False)
        one(**batch()).loss.backward()
    assert_same_gradients(model, opt)


def test_an_adapter_on_the_head_leaves_it_as_it_is() -> None:
    peft = pytest.importorskip("peft")
    _, opt = pair("llama")
    opt(**batch())  # one graph with the fused loss
    options = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.0)
    adapted = peft.get_peft_model(opt, options).train()
    adapted(**batch()).loss.backward()
    reasons = [s.reason for p in opt.plans for s in p.sites if s.rule == "linear_cross_entropy"]
    assert "not a plain linear layer" in str(reasons[-1])
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_gradient_checkpointing() -> None:
    model, opt = pair("llama")
    for one in (model, opt):
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        one(**batch()).loss.backward()
    assert_same_gradients(model, opt)


def test_all_labels_ignored() -> None:
    model, opt = pair("llama")
    given = {**batch(), "labels": torch.full((2, 12), -100)}
    assert model(**given).loss.isnan() and opt(**given).loss.isnan()
    given["num_items_in_batch"] = torch.tensor(5)
    assert model(**given).loss == opt(**given).loss == 0


def test_label_out_of_range_is_an_error() -> None:
    _, opt = pair("llama")
    with pytest.raises(IndexError, match="Target 5000 is out of bounds"):
        opt(**{**batch(), "labels": torch.full((2, 12), 5000)})


def test_tied_weights_stay_tied() -> None:
    model, opt = pair("gemma2")
    assert opt.get_output_embeddings().weight is opt.get_input_embeddings().weight
    opt(**batch()).loss.backward()
    model(**batch()).loss.backward()
    assert_same_gradients(model, opt)


def test_a_hook_that_comes_later_runs() -> None:
    _, opt = pair("llama")
    opt(**batch())
    seen: list[Any] = []
    opt.lm_head.register_forward_hook(lambda *args: seen.append(args))
    opt(**batch())
    assert seen and any(s.reason and "hook" in s.reason for p in opt.plans for s in p.sites)


def test_logits_always() -> None:
    model, _ = pair("llama")
    opt = liger_fx.optimize(model, logits="always")
    assert type(opt(**batch()).logits) is torch.Tensor
    assert site_of(opt).reason == "excluded by 'linear_cross_entropy'"
    with pytest.raises(UsageError, match="'lazy' or 'always'"):
        liger_fx.optimize(model, logits="never")  # type: ignore[arg-type]


def test_a_saved_model_has_it_again(tmp_path: Any) -> None:
    _, opt = pair("gemma2")
    expected = opt(**batch())
    liger_fx.save(opt, tmp_path / "saved")
    loaded = liger_fx.load(tmp_path / "saved").train()
    plans = len(loaded.plans)
    out = loaded(**batch())
    assert len(loaded.plans) == plans and str(loaded) == str(opt)
    torch.testing.assert_close((out.loss, out.logits + 0), (expected.loss, expected.logits + 0))


def test_copies_and_restores() -> None:
    model, opt = pair("llama")
    opt(**batch())
    copied = copy.deepcopy(opt)
    torch.testing.assert_close(copied(**batch()).loss, model(**batch()).loss)
    plain = liger_fx.restore(opt)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]


def test_trainer_steps_with_accumulation_and_metrics(tmp_path: Any) -> None:
    data = [{k: v[0] for k, v in batch(ignored=i).items()} for i in range(8)]
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.predictions)
        return {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    pairs = pair("llama")
    for i, one in enumerate(pairs):
        options = transformers.TrainingArguments(
            str(tmp_path / str(i)), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True, save_strategy="no", seed=0,
            max_grad_norm=0.0, optim="sgd",
        )  # fmt: skip
        trainer = transformers.Trainer(
            one, options, train_dataset=data, eval_dataset=data, compute_metrics=metrics
        )
        trainer.train()
        trainer.evaluate()
    model, opt = pairs
    assert any(s.after for p in opt.plans for s in p.sites if s.rule == "linear_cross_entropy")
    torch.testing.assert_close(dict(opt.named_parameters()), dict(model.named_parameters()))
    assert abs(seen[0] - seen[1]).max() < 1e-4


def test_verified_in_train_mode() -> None:
    model, _ = pair("llama")
    opt = liger_fx.optimize(model)
    opt(**batch())
    found = liger_fx.verify(model, opt)
    assert found.ok, found
    assert any(check.path == "linear_cross_entropy" for check in found.sites)


def test_report_counts_what_is_saved() -> None:
    _, opt = pair("llama")
    opt(**batch())
    before, after = site_of(opt).drawing.cost_before, site_of(opt).drawing.cost_after
    logits, hidden = 4 * opt.config.vocab_size, 4 * opt.config.hidden_size
    assert before.saved.per_token >= logits and after.saved.per_token == hidden
    assert after.saved.fixed == 4 * opt.lm_head.weight.numel()


def test_compiled_logits_are_ordinary() -> None:
    model, opt = pair("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(opt, backend="eager")(**batch())
    assert type(out.logits) is torch.Tensor
    torch.testing.assert_close(out.loss, model(**batch()).loss)
    torch._dynamo.reset()
