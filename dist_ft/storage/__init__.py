"""The only door to fsspec: files and object stores behind one small `Store`."""
