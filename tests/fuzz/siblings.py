"""Checks that two ways to read the same input agree, in the process of a case after its command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

READERS = ("train", "check", "plan", "preview", "evaluate", "decode")
"""Commands whose first word is a config, which must be one that `load_config` accepts."""


def disagreements(words: Sequence[str], code: int) -> Iterator[str]:
    """Yield what a command that succeeded should have refused.

    Args:
        words: the command line after `dist-ft`.
        code: its exit code.
    """
    # Options may stand anywhere, and would have to be parsed as the command line does.
    is_plain = len(words) > 1 and not any(word.startswith("-") for word in words)
    if code or not is_plain or words[0] not in READERS or not words[1].endswith((".yaml", ".yml")):
        return

    yield from _config_disagreements(words[1], words[2:])


def _config_disagreements(path: str, overrides: Sequence[str]) -> Iterator[str]:
    import yaml

    from dist_ft.config.load import load_config, resolved_yaml
    from dist_ft.core.errors import ConfigError

    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        yield f"the command accepts a config that load_config refuses: {error}"
        return

    # What a run stores is what it resumes from.
    try:
        again = load_config(yaml.safe_load(resolved_yaml(config)))
    except (ConfigError, yaml.YAMLError) as error:
        yield f"the resolved config cannot be loaded again: {error}"
        return
    if again != config:
        yield "the resolved config loads to another one"
