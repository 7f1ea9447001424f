"""A forward and a backward of the real code without numbers: on the meta device, to see what memory they would hold.

Every storage that is made is noted when it appears and when it goes, so activations, the loss head, recomputation under
checkpointing and gradients are those of the code itself, for any architecture, at any size: 405 billion parameters take
no memory here. Attention is played by one that keeps what flash kernels keep (queries, keys, values, output and a
float32 per row), which is also what torch's own kernels on CPUs keep. Not seen: what kernels use inside (workspaces of
matrix products), fragmentation of the allocator. Does not know of engines or workers.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_ft.model.trainable_model import TrainableModel

HEAD, LAYERS = "logits", "activations"


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes alive at the moment most are, beyond weights and the gradients that stay.

    Attributes:
        logits: of what the output layer made (chunks of logits, its own gradients under way).
        activations: all else.
    """

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.logits


def trace_peaks(
    module: TrainableModel, inputs: dict[str, Any], *, keep_gradients: bool, on_cpu: bool = False
) -> tuple[MemoryPeak, MemoryPeak]:
    """Return the peaks of a forward and of its backward of `module`, on the meta device, as of a later lane of a step.

    Args:
        module: its parameters are left without gradients.
        inputs: what its forward takes, tensors on the meta device.
        keep_gradients: gradients of earlier lanes lie in `.grad` (they are not counted) and new ones are added to them;
            else each is handed on as soon as it is there, as ZeRO-2 and 3 do.
        on_cpu: of a run on CPUs, where `head_loss` makes its softmax in place.
    """
    hooks = (
        []
        if keep_gradients
        else [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in module.parameters()
            if p.requires_grad
        ]
    )
    given = [value for value in inputs.values() if torch.is_tensor(value)]
    ledger = _Ledger([*module.parameters(), *module.buffers(), *given], on_cpu)
    try:
        with ledger, _kernels(on_cpu), _marked(module, ledger):
            for lane in range(2 if keep_gradients else 1):
                if lane:
                    ledger.forget(p.grad for p in module.parameters() if p.grad is not None)
                loss = module(**inputs)
                forward = MemoryPeak(ledger.most[LAYERS], ledger.most[HEAD])
                ledger.anew()
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad(set_to_none=True)
    return forward, MemoryPeak(ledger.most[LAYERS], ledger.most[HEAD])


def trace_module_order(module: TrainableModel, inputs: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the weights of each module that has some, in the order modules run forward."""
    names = {
        id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()
    }
    found: list[tuple[str, ...]] = []

    def note(inner: nn.Module, *_: Any) -> None:
        found.append(tuple(names[id(parameter)] for parameter in inner.parameters(recurse=False)))

    handles = [
        inner.register_forward_pre_hook(note)
        for inner in module.modules()
        if next(inner.parameters(recurse=False), None) is not None
    ]
    try:
        ledger = _Ledger((), False)
        with torch.no_grad(), ledger, _kernels(True), _marked(module, ledger):
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


@contextlib.contextmanager
def _marked(module: TrainableModel, ledger: _Ledger) -> Iterator[None]:
    """Let the ledger know what is made inside the output layer."""
    head = module.model.get_output_embeddings()
    if head is None:
        yield
        return
    handles = [
        head.register_forward_pre_hook(lambda *_: ledger.to(HEAD), prepend=True),
        head.register_forward_hook(lambda *_: ledger.to(LAYERS), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Ledger(TorchDispatchMode):
    """Counts the bytes of storages that were made while it is on and are still alive; `there` is not counted."""

    def __init__(self, there: Iterable[torch.Tensor], on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self._kind = LAYERS
        self._live = {LAYERS: 0, HEAD: 0}
        self.most = dict(self._live)
        self._known = {tensor.untyped_storage()._cdata: (LAYERS, 0) for tensor in there}

    def to(self, kind: str) -> None:
        """Count what is made from now on as `kind`."""
        self._kind = kind
        self._note()

    def forget(self, tensors: Any) -> None:
        """Count these no more."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            kind, size = self._known[key]
            self._live[kind] -= size
            self._known[key] = kind, 0
        self.anew()

    def anew(self) -> None:
        """Begin anew with the peak."""
        self.most = dict(self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        if self._on_cpu and self._kind == HEAD and func is torch.ops.aten._softmax.default:
            return args[0]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._seen(leaf)
        self._note()
        return result

    def _number(self, tensor: torch.Tensor) -> Any:
        """Answer what code asks of values: yes, and one; but of what came after the output layer, not a number.

        So `CausalLM`, which asks whether a 1.0 of its output layer comes out as such, finds models that change logits.
        """
        if not tensor.is_floating_point():
            return tensor.dtype == torch.bool or 1
        kind, _ = self._known.get(tensor.untyped_storage()._cdata, (HEAD, 0))
        return 1.0 if kind == HEAD else math.nan

    def _seen(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and tensor.device.type == "meta":
            self._known[key] = self._kind, storage.nbytes()
            self._live[self._kind] += storage.nbytes()
            weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        kind, size = self._known.pop(key, (LAYERS, 0))
        self._live[kind] -= size

    def _note(self) -> None:
        if sum(self._live.values()) > sum(self.most.values()):
            self.most = dict(self._live)


@contextlib.contextmanager
def _kernels(on_cpu: bool) -> Iterator[None]:
    """Let kernels be played by their names (modes are off in recomputation): what one is kept of differs by device.

    Attention keeps no (T, T) matrix. Dropout on GPUs keeps a mask of one byte an element; on CPUs, as on the meta
    device, factors in the type of its input.
    """
    functional: Any = nn.functional
    plain = functional.scaled_dot_product_attention, functional.dropout

    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Attention.apply(
        query, key, value
    )
    if not on_cpu:
        functional.dropout = dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = plain


class _Attention(torch.autograd.Function):
    """Output and log-sum-exp forward; three gradients backward."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        # the kernels write (B, T, heads, D) in memory, whatever shape they tell
        batch, heads, tokens, width = *query.shape[:3], value.shape[-1]
        out = query.new_empty((batch, tokens, heads, width)).transpose(1, 2)
        rows = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
