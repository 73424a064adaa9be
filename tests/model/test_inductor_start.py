"""What gets ready beside Dynamo is done once, and leaves PyTorch as it was."""

import functools
import threading

import pytest
from torch._inductor import cpu_vec_isa

from liger_fx.model import inductor_start
from liger_fx.model.inductor_start import InductorStart


def test_vector_instructions_are_tried_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[threading.Thread] = []
    may_end = threading.Event()

    @functools.cache
    def try_out() -> list[str]:
        tried.append(threading.current_thread())
        assert may_end.wait(30)
        return ["avx2"]

    monkeypatch.setattr(inductor_start, "maybe_warm_pool", lambda: None)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", try_out)
    start = InductorStart(for_cpu=True)
    with pytest.raises(KeyError), start.awaited():
        threading.Timer(0.1, may_end.set).start()
        assert cpu_vec_isa.valid_vec_isa_list() == ["avx2"]  # asked while it is being found
        raise KeyError
    assert len(tried) == 1 and tried[0] is not threading.current_thread()
    assert cpu_vec_isa.valid_vec_isa_list is try_out


def test_for_a_gpu_none_are_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(inductor_start, "maybe_warm_pool", lambda: asked.append(1))
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: asked.append(2))
    with InductorStart(for_cpu=False).awaited():
        assert asked == [1]
