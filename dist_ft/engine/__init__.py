"""One step of learning: plain PyTorch or DeepSpeed ZeRO behind one interface."""
