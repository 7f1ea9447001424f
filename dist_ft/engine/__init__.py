"""One training step: plain PyTorch or DeepSpeed ZeRO behind one interface."""
