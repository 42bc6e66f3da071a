"""How deep back-propagation may go in a given number of bytes: the cut of truncated training.

Layers before the cut keep their weights and nothing of them is kept for the backward pass.  Freezing all but
batch normalisation saves next to nothing, because every activation after the first moving parameter is
needed; what saves memory is where the moving part *begins* (HAMLET's finding, Colomer et al., ICCV 2023).
The choice is by measurement: one training step of each candidate cut is run on torch's "meta" device, which
allocates nothing and computes nothing, and every allocation of it is counted.  What kernels allocate inside
(convolution workspaces) is not seen, and under bf16 autocast the float32 bytes are counted, an upper bound.

This module knows modules and bytes.  It may not know packs, frames or what the loss is.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["Cut", "Usage", "choose", "cuts", "execution_order", "usage"]

#: a training step's loss, as a function of the network alone
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Usage:
    """Bytes of one step beyond weights and inputs: the most at any moment, and what backward keeps."""

    peak: int
    saved: int


@dataclass(frozen=True)
class Cut:
    """A place where training begins.

    first: the first module, in order of execution, whose parameters move.  moving: names of the parameters
    that move.  share: of all parameter tensors that learn.  bytes: predicted peak of training beyond the
    weights: activations and gradients of a step, the optimiser's state, the teacher.  saved: of these, what
    the forward pass keeps for backward.
    """

    first: str
    moving: tuple[str, ...]
    share: float
    bytes: int
    saved: int

    def words(self) -> dict[str, Any]:
        """Without the list of names, for a report."""
        kept = asdict(self)
        kept["moving"] = len(self.moving)
        kept["share"] = round(self.share, 4)
        return kept


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages that operations create, until nothing holds them any more."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    size = storage.nbytes()
                    self._seen.add(storage)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def usage(network: nn.Module, loss: Loss, known: Iterable[Tensor] = ()) -> Usage:
    """Bytes of one forward and backward pass on whatever device the network is on.

    known: tensors that exist already (inputs, teacher) and count for nothing.  Gradients are cleared.
    """
    known = [*network.parameters(), *network.buffers(), *known]
    weights = {t.untyped_storage()._cdata for t in known}
    kept: dict[int, tuple[Any, int]] = {}  # the storage itself too, so that its address is not used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    network.zero_grad(set_to_none=True)
    counted = _Allocations(known)
    with counted:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(network)
        saved = sum(size for _, size in kept.values())
        kept.clear()
        torch.autograd.backward(value)
    network.zero_grad(set_to_none=True)
    return Usage(counted.peak, saved)


def execution_order(network: nn.Module, loss: Loss) -> list[str]:
    """Names of the modules that own parameters, as the forward pass first comes to them.

    A module that is never called as such (its parameters are used by another) comes last: frozen last.
    """
    owners = {m: name for name, m in network.named_modules() if any(True for _ in m.parameters(False))}
    met: dict[str, None] = {}

    def note(module: nn.Module, _: Any) -> None:
        met.setdefault(owners[module])

    handles = [module.register_forward_pre_hook(note) for module in owners]
    try:
        with torch.no_grad():
            loss(network)
    finally:
        for handle in handles:
            handle.remove()
    return [*met, *(name for name in owners.values() if name not in met)]


class _Dry:
    """A copy of the network on the meta device, with the cut at any of its modules."""

    def __init__(
        self, network: nn.Module, loss: Loss, known: Iterable[Tensor], states: int, ema: bool
    ) -> None:
        self.network = copy.deepcopy(network).to("meta")
        self.network.train(network.training)
        self.loss, self.known, self.states = loss, list(known), states
        self.parameters = dict(self.network.named_parameters())
        self.teacher = sum(p.nbytes for p in self.parameters.values()) if ema else 0
        torch.autograd.backward(loss(self.network))
        owned: dict[str, list[str]] = {}
        for name, p in self.parameters.items():
            if p.grad is not None:  # a head that the loss does not see learns nothing at any cut
                owned.setdefault(name.rpartition(".")[0], []).append(name)
        self.order = [name for name in execution_order(self.network, loss) if name in owned]
        self.owned = [owned[name] for name in self.order]
        self.learnt = sum(len(names) for names in self.owned)

    def cut(self, k: int) -> Cut:
        """The first k modules frozen."""
        moving = tuple(name for names in self.owned[k:] for name in names)
        chosen = set(moving)
        for name, p in self.parameters.items():
            p.requires_grad_(name in chosen)
        found = usage(self.network, self.loss, self.known)
        state = self.states * sum(self.parameters[name].nbytes for name in moving)
        return Cut(
            self.order[k],
            moving,
            len(moving) / self.learnt,
            found.peak + state + self.teacher,
            found.saved,
        )


def cuts(
    network: nn.Module,
    loss: Loss,
    *,
    known: Iterable[Tensor] = (),
    states: int = 2,
    ema: bool = False,
    points: int = 9,
) -> list[Cut]:
    """The curve of bytes by cut: `points` of them, from everything moving to the last module alone."""
    dry = _Dry(network, loss, known, states, ema)
    last = len(dry.order) - 1
    return [dry.cut(k) for k in sorted({round(i * last / max(points - 1, 1)) for i in range(points)})]


def choose(
    network: nn.Module,
    loss: Loss,
    budget: int,
    *,
    known: Iterable[Tensor] = (),
    states: int = 2,
    ema: bool = False,
) -> Cut:
    """The cut with the most moving parameters whose predicted peak is at most `budget` bytes.

    Args:
        network: on any device; not changed.
        loss: (network on the meta device) -> loss tensor; everything else that it uses must be there too.
        budget: bytes that training may take beyond the weights.
        known: tensors that the loss brings along (inputs); they count for nothing.
        states: optimiser tensors for each parameter that moves (AdamW: 2).
        ema: a teacher is kept too (the size of all parameters).

    Raises:
        ValueError: not even the last module alone fits.
    """
    dry = _Dry(network, loss, known, states, ema)
    low, high = 0, len(dry.order) - 1
    best = dry.cut(high)
    if best.bytes > budget:
        raise ValueError(
            f"a memory of {budget / 2**20:.1f} MiB is too little: training {best.first!r} alone, the last "
            f"module, takes {best.bytes / 2**20:.1f} MiB; allow more, or smaller crops or batches"
        )
    # Freezing more never takes more memory, so the deepest cut that fits is found by bisection.
    while low < high:
        middle = (low + high) // 2
        found = dry.cut(middle)
        if found.bytes <= budget:
            high, best = middle, found
        else:
            low = middle + 1
    return best
