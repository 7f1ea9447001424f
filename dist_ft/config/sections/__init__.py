"""The sections of a run's config: types, defaults and bounds."""
