"""`fuse` and `unfuse`: the fused kernels in models that other libraries define."""
