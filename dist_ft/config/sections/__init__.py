"""The sections of a run's config: fields with types, defaults and bounds.

The checks of one section are in its module (`CHECKS`): functions from the section to lines. A check
that reads a field which is broken, hence absent, raises AttributeError and is skipped.
"""
