"""Batches for the lanes of a worker: loader, masking, augmentation."""
