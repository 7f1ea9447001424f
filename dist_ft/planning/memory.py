"""How much memory a worker needs: model state by the ZeRO paper, activations of a Llama-like model.

Source of the former: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", arXiv:1910.02054, section 3.1 and figure 1. `worker_memory` adds what else a step
holds (buffers, gathered weights). Where the model's code can be traced, activations are measured by
`model.memory_trace` rather than estimated here. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENT_BYTES = {"adamw": 8, "sgd": 4, "adafactor": 0}
_MASTER_BYTES = 4


def model_state_bytes(
    num_parameters: int,
    world: int,
    stage: int,
    dtype: str,
    optimizer: str = "adamw",
    num_trainable: int | None = None,
    num_weight_copies: int = 0,
) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state on a worker.

    Per parameter: weights and gradients 4 + 4 in float32, 2 + 2 in bfloat16; two float32 moments of
    AdamW 8 (4 for SGD's momentum, almost none for Adafactor); a float32 master 4. In bfloat16 that
    is the paper's K = 12. In float32 at stage 0 the weights are their own masters; from stage 1 on,
    DeepSpeed clones them all the same.

    Args:
        num_parameters: parameters of the whole model.
        world: number of workers.
        stage: ZeRO stage; 0 also for the plain engine.
        dtype: float32 or bfloat16.
        optimizer: adamw, sgd (with momentum) or adafactor.
        num_trainable: trainable parameters; None: all. Others have no gradients and no optimizer
            state.
        num_weight_copies: float32 copies next to the optimizer's own state (anchor, Fisher
            information, average).
    """
    # A float32 master is a copy of weights in bfloat16, whose updates would be rounded away.
    if num_trainable is None:
        num_trainable = num_parameters

    weight_bytes = _BYTES[dtype]
    has_master = dtype != "float32" or stage > 0
    master_bytes = _MASTER_BYTES if has_master else 0
    optimizer_bytes = _MOMENT_BYTES[optimizer] + master_bytes + 4 * num_weight_copies

    # Each stage partitions one kind more. Rounded up, as the largest share decides what fits.
    weights = num_parameters
    gradients = optimizer_states = num_trainable
    if stage >= 1:
        optimizer_states = -(-num_trainable // world)
    if stage >= 2:
        gradients = -(-num_trainable // world)
    if stage >= 3:
        weights = -(-num_parameters // world)
    return {
        "weights": weight_bytes * weights,
        "gradients": weight_bytes * gradients,
        "optimizer": optimizer_bytes * optimizer_states,
    }


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder.

    Attributes:
        num_layers: number of layers.
        hidden: width of the residual stream, H.
        intermediate: width of the MLP.
        vocab: size of the vocabulary, V.
        kv_hidden: key heads × head size with grouped-query attention; None: `hidden`.
    """

    num_layers: int
    hidden: int
    intermediate: int
    vocab: int
    kv_hidden: int | None = None


def activation_bytes(
    shape: DecoderShape,
    micro_batch: int,
    sequence_length: int,
    checkpointing: bool,
    dtype: str = "bfloat16",
) -> int:
    """Estimate the peak bytes that a forward pass stores for the backward pass.

    A layer stores, per token: the input and output of two norms (4 × hidden), rotated queries and
    the attention's output (2 × hidden), keys and values (2 × kv_hidden), and four tensors of the
    gated MLP (4 × intermediate). Attention is SDPA or flash, which store no (T, T) matrix. With
    checkpointing, only the layers' inputs are stored and one layer at a time is recomputed. Logits
    are counted in `dtype`, then in float32 with their gradient.

    Args:
        shape: shape of the model.
        micro_batch: sequences of a forward pass.
        sequence_length: tokens of a sequence.
        checkpointing: `model.activation_checkpointing`.
        dtype: type of activations.
    """
    kv_hidden = shape.kv_hidden
    if kv_hidden is None:
        kv_hidden = shape.hidden

    layer_elements = 6 * shape.hidden + 2 * kv_hidden + 4 * shape.intermediate  # per token

    # while one layer is recomputed, its stored tensors exist next to the inputs of all layers
    if checkpointing:
        stored_elements = shape.num_layers * shape.hidden + layer_elements
    else:
        stored_elements = shape.num_layers * layer_elements

    num_tokens = micro_batch * sequence_length
    size = _BYTES[dtype]
    logit_bytes = shape.vocab * (size + 2 * 4)  # per token
    return num_tokens * (stored_elements * size + logit_bytes)


def describe_memory(state: dict[str, int], activations: int = 0) -> str:
    """Return one line in GiB: a worker's total and its parts."""
    # a copy: the caller's mapping stays as it is
    parts = dict(state)
    if activations:
        parts["activations about"] = activations

    listed = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"{_gib(sum(parts.values()))} GiB per worker = {listed}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
