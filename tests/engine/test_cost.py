"""What a site is said to move and to keep is what PyTorch really moves and keeps, for one token."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import liger_fx
from liger_fx.engine.drawing import Cost
from liger_fx.model.block import Block
from tests.support.families import OWN, build

_VIEWS = {
    "view", "t", "transpose", "unsqueeze", "slice", "expand", "_unsafe_view", "alias", "detach",
    "permute", "split", "select", "squeeze", "split_with_sizes",
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that operators are given and give; views are free."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _VIEWS:
            leaves = pytree.tree_leaves((args, kwargs, result))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
            self.bytes += sum(map(_stored, tensors.values()))
        return result


def _stored(tensor: torch.Tensor) -> int:
    """Bytes in memory: what is broadcast lies there once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


class Measuring(fx.Interpreter):
    """Runs a graph of ``opt`` and notes, for each node, its traffic and what autograd keeps."""

    def __init__(self, opt: Block) -> None:
        super().__init__(opt, graph=opt.graph)
        self.traffic: dict[str, int] = {}
        self.kept: dict[str, dict[int, int]] = defaultdict(dict)
        self.owned = {t.untyped_storage().data_ptr() for t in (*opt.parameters(), *opt.buffers())}

    def run_node(self, n: fx.Node) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.owned:
                self.kept[n.name][storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), Traffic() as traffic:
            result = super().run_node(n)
        self.traffic[n.name] = traffic.bytes
        return result

    def of(self, names: Iterable[str]) -> tuple[int, int]:
        """(traffic, kept) of some nodes taken together."""
        names = list(names)
        kept = {key: size for name in names for key, size in self.kept[name].items()}
        return sum(self.traffic[name] for name in names), sum(kept.values())


def measured(opt: Block) -> Measuring:
    run = Measuring(opt)
    given = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    run.run(*(given[str(node.target)] for node in opt.graph.find_nodes(op="placeholder")))
    return run


# In float32 the casts go, and with them the copies that they make: one family of each kind.
CASES = [(family, torch.bfloat16) for family in OWN]
CASES += [(family, torch.float32) for family in ("llama", "gemma2", "glm4")]


@pytest.mark.parametrize("family, dtype", CASES, ids=str)
def test_bytes_are_those_that_pytorch_moves_and_keeps(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    opt = liger_fx.optimize(model, blocks=())
    before, after = measured(liger_fx.trace(model, blocks=())), measured(opt)
    made: dict[int, list[fx.Node]] = defaultdict(list)
    for node in opt.graph.nodes:
        if "rewrite" in node.meta:
            made[node.meta["rewrite"].site].append(node)
    assert len(made) == len(opt.report.rewritten) > 0
    for index, nodes in made.items():
        drawing = opt.report.sites[index].drawing
        if opt.report.sites[index].rule == "experts":  # no node is inside
            assert drawing.cost_before == drawing.cost_after
            continue
        replaced = nodes[0].meta["rewrite"].replaced
        assert told(drawing.cost_before) == before.of(replaced)
        traffic, kept = told(drawing.cost_after)
        really, really_kept = after.of(node.name for node in nodes)
        assert kept == really_kept
        # glm4 reads half of a table of angles, which counts as read in full
        assert really <= traffic <= 1.05 * really


def told(cost: Cost) -> tuple[int, ...]:
    """(traffic, kept) for one token."""
    return tuple(amount.per_token + amount.fixed for amount in (cost.traffic, cost.saved))
