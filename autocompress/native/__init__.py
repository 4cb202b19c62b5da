"""Kernels in C, compiled on the machine that they run on: see `build`."""
