"""Quantize the weights of linear layers to 8-bit integers, by torchao, in a new model folder.

Weight only, with one scale per row. Guarantees: the files are safetensors; `from_pretrained` of
plain transformers loads them (torchao is needed); loaded again they give the logits of the model
that was written. Embeddings and the output layer stay unchanged, and so does the computation:
products use the weights' own dtype.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.core.logs import quiet_third_parties
from dist_ft.model import heads
from dist_ft.model.loading.load import extra_model_kwargs, probe_outputs
from dist_ft.pretrained import pretrained_model
from dist_ft.pretrained.pretrained_model import Source

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Allowed difference of logits, relative to the largest.

The memory address of a mapped file affects the last bits.
"""


def require_torchao() -> None:
    """Raise ConfigError unless torchao is installed."""
    import importlib.util

    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            ["--int8: needs torchao, which is not installed. Run pip install 'dist-ft[int8]'."],
            "export",
        )


def quantize_int8(source: Path, target: Path, task: TaskSection) -> None:
    """Write the model of the folder `source` with int8 weights, and its other files, to `target`.

    Raises:
        ConfigError: torchao is not installed.
        ModelError: the written model gives other logits when it is loaded again.
    """
    import torch
    from transformers import TorchAoConfig

    quiet_third_parties()
    require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig

    source_folder = Source(str(source), str(source))
    config = pretrained_model.read_config(source_folder)
    model_class = heads.auto_class(task)
    kwargs = extra_model_kwargs(config, task)

    # transformers leaves embeddings and the output layer out by itself.
    dtype = config.dtype or torch.float32
    quantization = TorchAoConfig(Int8WeightOnlyConfig())
    model: Any = pretrained_model.read_model(
        source_folder, model_class, dtype=dtype, quantization_config=quantization, **kwargs
    ).eval()
    model.save_pretrained(target)

    # The rest of the folder, such as the tokenizer, but not what `save_pretrained` has just
    # written, and not the weights before quantization.
    for item in source.iterdir():
        is_weights = item.name.startswith("model")
        if item.is_file() and not is_weights and not (target / item.name).exists():
            shutil.copy2(item, target)

    # Against the quantized model, not the source: rounding changes the logits, writing must not.
    target_folder = Source(str(target), str(target))
    loaded: Any = pretrained_model.read_model(
        target_folder, model_class, dtype=dtype, **kwargs
    ).eval()
    expected, outputs = probe_outputs(model), probe_outputs(loaded)
    if (expected - outputs).abs().max() > MAX_RELATIVE_DIFFERENCE * expected.abs().max():
        raise ModelError(
            f"{target}: loaded again with int8 weights, the model does not give the same logits. "
            "Nothing was exported. Export without --int8."
        )
