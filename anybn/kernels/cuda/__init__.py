"""CUDA kernels, and how they are planned and launched."""
