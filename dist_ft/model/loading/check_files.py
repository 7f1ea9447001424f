"""Checks of a model's files before a run: of the folder, and of the base models of an adapter.

No weights are read, and nothing is downloaded: a model elsewhere is checked once it is here.
"""

from __future__ import annotations

import os

from dist_ft.config.schema import ModelSection
from dist_ft.model.loading.load import check_adapter_chain, model_source
from dist_ft.pretrained import export_info, pretrained_model
from dist_ft.storage import filesystem


def check_files(section: ModelSection, adapters: tuple[str, ...] = ()) -> None:
    """Check the files of a local model; `adapters` are folders of which it is the base model.

    Raises:
        ModelError: a file leads out of the folder or is damaged, or an adapter's info turns
            options on, or leads back to the adapter.
    """
    if not filesystem.is_local(section.path):
        return
    folder = filesystem.local_path(section.path)
    if not os.path.isdir(folder):
        return  # a name on the hub, or an error that reading the config reports

    source = model_source(section, folder)
    info = export_info.read_adapter_info(folder, source.shown)
    if info is None:
        pretrained_model.check_weights(source)
        return

    check_adapter_chain(folder, source.shown, adapters)
    base = section.model_copy(update={"path": info.base.path, "revision": info.base.revision})
    base_folder = filesystem.local_path(base.path)
    if filesystem.is_local(base.path) and os.path.isdir(base_folder):
        pretrained_model.read_config(model_source(base, base_folder))
    check_files(base, (*adapters, folder))
