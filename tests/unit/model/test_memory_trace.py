"""Traced memory equals published formulas, and the memory of the same code with values."""

import numpy as np
import pytest
import torch

from dist_ft.data.batch import Batch
from dist_ft.model import memory_trace
from dist_ft.model.causal_lm import CausalLM

ROWS, TOKENS = 2, 128


def make_module(device="meta", checkpointing=False, kind="llama", attention="sdpa", **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        **sizes,
    }
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **given), attn_implementation=attention, dtype=torch.float32
        )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalLM(model).train()


def batch():
    ids = np.ones((ROWS, TOKENS), dtype=np.int64)
    return Batch(
        ids, ids, np.tile(np.arange(TOKENS), (ROWS, 1)), np.zeros((0, 4), dtype=np.int64), 0
    )


def largest(peaks):
    return max(peaks, key=lambda one: one.total)


def peak(keep_gradients=True, on_cpu=True, **given):
    module = make_module(**given)
    return largest(
        memory_trace.trace_peaks(
            module,
            module.prepare_inputs(batch(), "meta"),
            keep_gradients=keep_gradients,
            on_cpu=on_cpu,
        )
    )


def measured(**given):
    """Return the peak of torch's allocator in the second of two lanes, beyond its start."""
    module = make_module("cpu", **given)
    inputs = module.prepare_inputs(batch(), "cpu")
    module(**inputs).backward()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        module(**inputs).backward()
    moves = sorted(
        (e.start_ns(), e.nbytes())
        for e in profile.kineto_results.events()
        if e.name() == "[memory]"
    )
    return int(np.cumsum([size for _, size in moves]).max())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_key_value_heads": 2},
        {"checkpointing": True},
        {"kind": "qwen2"},
        {"kind": "mistral", "head_dim": 16},
        {"kind": "opt", "word_embed_proj_dim": 64, "ffn_dim": 96},
    ],
    ids=["llama", "grouped", "checkpointing", "qwen2", "mistral", "opt"],
)
def test_peak_equals_memory_from_allocator(given):
    assert peak(**given).total == pytest.approx(measured(**given), rel=0.03)


def test_gpt2_layer_matches_megatron_formula():
    """s b h (34 + 5 a s / h) bytes a layer in 16 bits.

    Korthikanti et al., arXiv:2205.05198, equation 1.
    With dropout, and attention that stores its (T, T) matrices, as there.
    """
    from transformers import AutoModelForCausalLM, GPT2Config

    held = []
    for layers in (2, 6):
        config = GPT2Config(
            n_embd=256,
            n_layer=layers,
            n_head=8,
            vocab_size=64,
            n_positions=512,
            activation_function="gelu",
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.bfloat16
            )
        module = CausalLM(model).train()
        ids = np.ones((2, 512), dtype=np.int64)
        one = Batch(ids, ids, np.tile(np.arange(512), (2, 1)), np.zeros((0, 4), dtype=np.int64), 0)
        held.append(
            largest(
                memory_trace.trace_peaks(
                    module, module.prepare_inputs(one, "meta"), keep_gradients=False
                )
            ).total
        )
    s, b, h, a = 512, 2, 256, 8
    assert (held[1] - held[0]) / 4 == pytest.approx(s * b * h * (34 + 5 * a * s / h), rel=0.1)


def test_checkpointing_stores_layer_inputs_only():
    """2 s b h bytes a layer in 16 bits, here 4 in float32 (the same paper, section 4.2)."""
    small, large = (peak(checkpointing=True, num_hidden_layers=layers).total for layers in (4, 12))
    assert (large - small) / 8 == pytest.approx(ROWS * TOKENS * 64 * 4, rel=0.02)


def test_logits_are_chunked_unless_the_model_changes_them():
    """Granite divides its logits: the loss then needs all of them."""
    vocabulary = 2**19
    chunked = peak(vocab_size=vocabulary, on_cpu=False)
    whole = peak(kind="granite", vocab_size=vocabulary, logits_scaling=8.0, on_cpu=False)
    assert (
        chunked.total < 3 * 2**27 + 4 * 64 * vocabulary + 2**22
    )  # a chunk's logits, its shares and those before
    assert whole.total > 2 * 4 * ROWS * TOKENS * vocabulary


def test_released_gradients_do_not_add_to_the_peak():
    retained, released = (peak(keep_gradients=keep) for keep in (True, False))
    assert released.total <= retained.total + 1024


def test_module_order_lists_weights_in_forward_order():
    module = make_module(num_hidden_layers=1)
    order = memory_trace.trace_module_order(module, module.prepare_inputs(batch(), "meta"))
    assert order[0] == ("model.embed_tokens.weight",)
    assert order[-1] == ("lm_head.weight",)
    assert sum(order, ()) and set(sum(order, ())) == {
        name.removeprefix("model.") for name, _ in module.named_parameters()
    }
