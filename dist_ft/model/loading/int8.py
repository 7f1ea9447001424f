"""Weights of linear layers as 8-bit integers, by torchao (weight only, one scale a row), in a folder of its own.

Guarantees: what is written is safetensors, `from_pretrained` of plain transformers loads it (torchao is needed), and
loaded again it gives the logits of the model that was written. Embeddings and the output layer stay as they
are, as does what is computed: products are of the weights' own number format.
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

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Logits may differ by this much of the largest: where a mapped file lies in memory decides the last bits."""


def require_torchao() -> None:
    """Raise ConfigError unless torchao is installed."""
    import importlib.util

    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            ["--int8: needs torchao, which is not installed; pip install 'dist-ft[int8]'"], "export"
        )


def quantize_int8(source: Path, target: Path, task: TaskSection) -> None:
    """Write the model of the folder `source` with int8 weights, and all else that lies there, as `target`.

    Raises ModelError if what was written is not what is loaded again.
    """
    import torch
    from transformers import AutoConfig, TorchAoConfig

    quiet_third_parties()
    require_torchao()
    from torchao.quantization import Int8WeightOnlyConfig

    config = AutoConfig.from_pretrained(source)
    kind, given = heads.auto_class(task), extra_model_kwargs(config, task)
    dtype = config.dtype or torch.float32
    model: Any = kind.from_pretrained(
        source, dtype=dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), **given
    ).eval()
    model.save_pretrained(target)
    for item in source.iterdir():
        if (
            item.is_file()
            and not (target / item.name).exists()
            and not item.name.startswith("model")
        ):
            shutil.copy2(item, target)
    again: Any = kind.from_pretrained(target, dtype=dtype, **given).eval()
    written, read = probe_outputs(model), probe_outputs(again)
    if (written - read).abs().max() > MAX_RELATIVE_DIFFERENCE * written.abs().max():
        raise ModelError(
            f"{target}: loaded again with int8 weights it does not give the same logits; nothing was "
            "exported; leave --int8 out"
        )
