"""The side that holds torch, Triton, the memory and one subject. Loaded by file location, never through the root."""
