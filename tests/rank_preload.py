"""Imports of the server that ranks are forked from."""

from __future__ import annotations

import contextlib
import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"
for name in (
    "dist_ft.runtime.bootstrap.training_run",
    "dist_ft.runtime.local",
    "dist_ft.engine.deepspeed_engine",
    "deepspeed",
    "yaml",
    "dist_ft.model.causal_lm",
    "dist_ft.model.loading.load",
    "dist_ft.engine.packing_check",
    "dist_ft.engine.weight_check",
    "xxhash",
    "transformers.modeling_utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.deepspeed",
    "torch._dynamo",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "filelock",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "safetensors.numpy",
    "transformers.generation.utils",
    "transformers.tokenization_utils_tokenizers",
    "pyarrow.parquet",
    "fsspec",
):
    with contextlib.suppress(ImportError):  # moved in another version; a rank imports what it needs
        importlib.import_module(name)
