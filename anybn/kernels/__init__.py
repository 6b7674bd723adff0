"""Compiled kernels, which see memory and know no library."""
