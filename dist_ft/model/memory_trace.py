"""Trace the memory of a forward and a backward of the real code on the meta device.

Every storage is counted from its creation to its release, so activations, the loss head,
recomputation under activation checkpointing and gradients are those of the code itself, for any
architecture, at any size: 405 billion parameters take no memory here. Attention is replaced by a
stand-in that stores what flash kernels store (queries, keys, values, output and a float32 per row),
which is also what torch's own kernels on CPUs store. Not included: memory inside kernels
(workspaces of matrix products), fragmentation of the allocator. Independent of engines and workers.

Dimensions: B rows of a batch, T tokens of a row, D width of a head.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_ft.model.trainable_model import WRAPPER_PREFIX, TrainableModel

HEAD, LAYERS = "logits", "activations"
"""Kinds of storages: created inside the output layer, or elsewhere."""


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes alive at the peak, in addition to the weights and the gradients that remain.

    Attributes:
        activations: all other storages.
        logits: storages created by the output layer (chunks of logits, its current gradients).
    """

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.logits


class PassPeaks(NamedTuple):
    """The peaks of a forward and of its backward."""

    forward: MemoryPeak
    backward: MemoryPeak


def trace_peaks(
    module: TrainableModel, inputs: dict[str, Any], *, keep_gradients: bool, on_cpu: bool = False
) -> PassPeaks:
    """Return the peaks of a forward and a backward of `module`, as in a later lane of a step.

    Args:
        module: on the meta device; its parameters end without gradients.
        inputs: arguments of its forward, tensors on the meta device.
        keep_gradients: gradients of earlier lanes are in `.grad` (they are not counted) and new
            ones are added to them; else each is released as soon as it exists, as under ZeRO-2 and
            3.
        on_cpu: whether the run is on CPUs, where `head_loss` computes its softmax in place.
    """
    hooks = []
    if not keep_gradients:
        for parameter in module.parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))

    input_tensors = [value for value in inputs.values() if torch.is_tensor(value)]
    existing = [*module.parameters(), *module.buffers(), *input_tensors]
    tracer = _Tracer(existing, on_cpu)

    # The second lane has the larger peak if gradients stay: autograd computes each new gradient in
    # memory of its own before it is added to the old one.
    num_lanes = 2 if keep_gradients else 1
    try:
        with tracer, _stand_in_kernels(on_cpu), _marked_head(module, tracer):
            for lane in range(num_lanes):
                if lane:
                    # Gradients of the earlier lane remain, and are not part of the peak.
                    gradients = (p.grad for p in module.parameters() if p.grad is not None)
                    tracer.stop_counting(gradients)

                loss = module(**inputs)
                forward_peak = tracer.peak()
                tracer.reset_peak()
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad(set_to_none=True)
    return PassPeaks(forward_peak, tracer.peak())


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def trace_module_order(
    module: TrainableModel, inputs: dict[str, Any]
) -> tuple[tuple[str, ...], ...]:
    """Return the names of the weights of each module, in the order of their forwards.

    Modules without weights are left out.
    """
    # By identity, because a module that shares a tied weight knows it under another name.
    names = {
        id(parameter): name.removeprefix(WRAPPER_PREFIX)
        for name, parameter in module.named_parameters()
    }
    order: list[tuple[str, ...]] = []

    def record(inner: nn.Module, *_: Any) -> None:
        order.append(tuple(names[id(parameter)] for parameter in inner.parameters(recurse=False)))

    handles = []
    for inner in module.modules():
        if next(inner.parameters(recurse=False), None) is not None:
            handles.append(inner.register_forward_pre_hook(record))

    try:
        # The tracer counts nothing here; it answers code that reads values of meta tensors.
        tracer = _Tracer((), False)
        with torch.no_grad(), tracer, _stand_in_kernels(True), _marked_head(module, tracer):
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(order)


@contextlib.contextmanager
def _marked_head(module: TrainableModel, tracer: _Tracer) -> Iterator[None]:
    """Let the tracer distinguish storages that are created inside the output layer."""
    head = module.model.get_output_embeddings()
    if head is None:
        yield
        return

    def enter_head(*_: Any) -> None:
        tracer.set_kind(HEAD)

    def leave_head(*_: Any) -> None:
        tracer.set_kind(LAYERS)

    # Before the hook of `CausalLM`, which copies the hidden states at target positions. Also after
    # an error, so that no later storage counts as the head's.
    handles = [
        head.register_forward_pre_hook(enter_head, prepend=True),
        head.register_forward_hook(leave_head, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Storage(NamedTuple):
    """A known storage: its kind, and the bytes it counts."""

    kind: str
    num_bytes: int


class _Tracer(TorchDispatchMode):
    """Counts the bytes of storages that are created while it is active and still alive.

    Storages of the tensors `existing` are not counted.
    """

    def __init__(self, existing: Iterable[torch.Tensor], on_cpu: bool) -> None:
        super().__init__()
        self._on_cpu = on_cpu
        self._kind = LAYERS
        self._live = {LAYERS: 0, HEAD: 0}
        self._most = dict(self._live)

        # By the address of torch's storage object, since views of one storage are many tensors.
        self._known = {tensor.untyped_storage()._cdata: _Storage(LAYERS, 0) for tensor in existing}

    def peak(self) -> MemoryPeak:
        """Return the peak since the last `reset_peak`."""
        return MemoryPeak(self._most[LAYERS], self._most[HEAD])

    def set_kind(self, kind: str) -> None:
        """Count storages that are created from now on as `kind`."""
        self._kind = kind
        self._update_peak()

    def stop_counting(self, tensors: Iterable[torch.Tensor]) -> None:
        """Exclude the storages of `tensors` from the count, and start a new peak."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            storage = self._known[key]
            self._live[storage.kind] -= storage.num_bytes
            # Still known, with no bytes: a view of it must not count as a new storage.
            self._known[key] = _Storage(storage.kind, 0)
        self.reset_peak()

    def reset_peak(self) -> None:
        """Start a new peak from what is alive."""
        self._most = dict(self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `item` of a meta tensor would raise an error.
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._scalar(args[0])

        is_softmax = func is torch.ops.aten._softmax.default
        if self._on_cpu and self._kind == HEAD and is_softmax:
            return args[0]  # on CPUs the loss head computes it in place

        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        self._update_peak()
        return result

    def _scalar(self, tensor: torch.Tensor) -> Any:
        """Return the value of a scalar that code reads: True, or 1; computed outside the head, NaN.

        `CausalLM` checks that the marker 1.0, which its output layer returns, arrives unchanged. If
        the model computes something from it, the result is a storage from outside the head.
        """
        if not tensor.is_floating_point():
            return tensor.dtype == torch.bool or 1
        storage = self._known.get(tensor.untyped_storage()._cdata)
        is_from_head = storage is None or storage.kind == HEAD
        return 1.0 if is_from_head else math.nan

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and tensor.device.type == "meta":
            self._known[key] = _Storage(self._kind, storage.nbytes())
            self._live[self._kind] += storage.nbytes()

            # At exit nothing reads the count, so nothing needs to run then.
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        # Forgotten at once, because the address may be that of the next storage.
        storage = self._known.pop(key, _Storage(LAYERS, 0))
        self._live[storage.kind] -= storage.num_bytes

    def _update_peak(self) -> None:
        # Both kinds at the same moment: their separate peaks would sum up to more.
        if sum(self._live.values()) > sum(self._most.values()):
            self._most = dict(self._live)


@contextlib.contextmanager
def _stand_in_kernels(on_cpu: bool) -> Iterator[None]:
    """Replace attention and dropout kernels by stand-ins that store what the real ones do.

    By name, because dispatch modes are off in recomputation. Attention stores no (T, T) matrix.
    Dropout on GPUs stores a mask of one byte per element; on CPUs, as on the meta device, factors
    in the dtype of its input.
    """
    functional: Any = nn.functional
    original_attention = functional.scaled_dot_product_attention
    original_dropout = functional.dropout

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)

    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or not p:
            return input
        return torch.native_dropout(input, p, True)[0]

    functional.scaled_dot_product_attention = attention
    if not on_cpu:
        functional.dropout = dropout
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original_attention
        functional.dropout = original_dropout


class _Attention(torch.autograd.Function):
    """Allocates output and log-sum-exp in forward, three gradients in backward."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        # The kernels write (B, T, heads, D) in memory, whatever shape they return.
        batch, heads, tokens = query.shape[:3]
        width = value.shape[-1]
        out = query.new_empty((batch, tokens, heads, width)).transpose(1, 2)

        # Kernels keep the log of the softmax's sum for each row, to recompute weights in backward.
        log_sums = query.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
