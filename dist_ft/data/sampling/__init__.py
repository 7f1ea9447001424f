"""Pure order: shuffle, mixture, packing, batch plan."""
