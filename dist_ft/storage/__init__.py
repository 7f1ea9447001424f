"""Access to files on disks, in object stores and in memory; the only package that uses fsspec."""
