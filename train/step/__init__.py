"""One optimiser step: precision, CUDA graphs, optimisers, several GPUs."""
