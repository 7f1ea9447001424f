"""How much memory a worker will need: model state after the ZeRO paper's table, activations of a Llama-like decoder.

Source of the former: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054, section 3.1 and figure 1. What a step holds besides (buffers, gathered weights) is `worker`'s; where
the model's code can be rehearsed, its activations are measured there and not estimated. Pure.
"""

from __future__ import annotations

_BYTES = {"float32": 4, "bfloat16": 2}
_MOMENT_BYTES = {"adamw": 8, "sgd": 4, "adafactor": 0}
_MASTER_BYTES = 4


def model_state_bytes(
    num_parameters: int,
    world: int,
    stage: int,
    dtype: str,
    optimizer: str = "adamw",
    num_learned: int | None = None,
    num_guards: int = 0,
) -> dict[str, int]:
    """Return bytes a worker holds of weights, gradients and optimizer state.

    Per parameter: weights and gradients 4 + 4 in float32, 2 + 2 in bfloat16; two float32 moments of AdamW 8 (4 for
    SGD's momentum, next to nothing for Adafactor); a float32 master 4. In bfloat16 that is the paper's K = 12. In
    float32 at stage 0 the weights are their own masters; from stage 1 on DeepSpeed clones them all the same.

    Args:
        num_parameters: of the whole model.
        world: number of workers.
        stage: ZeRO stage; 0 also for the plain engine.
        dtype: float32 or bfloat16.
        optimizer: adamw, sgd (with momentum) or adafactor.
        num_learned: parameters that learn; none: all. The others have neither gradients nor optimizer state.
        num_guards: float32 copies kept beside the optimizer's own state (anchor, Fisher information, average).
    """
    num_learned = num_parameters if num_learned is None else num_learned
    size = _BYTES[dtype]
    has_master = dtype != "float32" or stage > 0
    state = _MOMENT_BYTES[optimizer] + (_MASTER_BYTES if has_master else 0) + 4 * num_guards
    share, learned = -(-num_parameters // world), -(-num_learned // world)
    return {
        "weights": size * (share if stage >= 3 else num_parameters),
        "gradients": size * (learned if stage >= 2 else num_learned),
        "optimizer": state * (learned if stage >= 1 else num_learned),
    }


def activation_bytes(
    *,
    num_layers: int,
    hidden: int,
    intermediate: int,
    vocab: int,
    micro_batch: int,
    sequence_length: int,
    checkpointing: bool,
    dtype: str = "bfloat16",
    kv_hidden: int | None = None,
) -> int:
    """Estimate the bytes that one forward pass of a Llama-like decoder keeps for backward, at its peak.

    A layer keeps, per token: the input and output of two norms (4 × hidden), rotated queries and the attention's
    output (2 × hidden), keys and values (2 × kv_hidden), and four tensors of the gated MLP (4 × intermediate);
    attention itself is SDPA or flash, which keep no (T, T) matrix. With checkpointing only the layers' inputs stay, and
    one layer at a time is recomputed. Logits are counted in `dtype`, then in float32 with their gradient.

    Args:
        num_layers, hidden, intermediate, vocab: of the model.
        micro_batch: sequences a forward pass.
        sequence_length: tokens a sequence.
        checkpointing: `model.activation_checkpointing`.
        dtype: of activations.
        kv_hidden: key heads × head size under grouped-query attention; none: as `hidden`.
    """
    tokens, size = micro_batch * sequence_length, _BYTES[dtype]
    per_token = 6 * hidden + 2 * (hidden if kv_hidden is None else kv_hidden) + 4 * intermediate
    kept = num_layers * hidden + per_token if checkpointing else num_layers * per_token
    return tokens * (kept * size + vocab * (size + 2 * 4))


def summary(state: dict[str, int], activations: int = 0) -> str:
    """Return one line: the total a worker and what it is made of, in GiB."""
    parts = {**state, **({"activations about": activations} if activations else {})}
    listed = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"{_gib(sum(parts.values()))} GiB a worker = {listed}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
