"""Kernels in three tiers: ``reference`` (torch, any device, the truth), ``triton`` (memory-bound parts, portable),
``sm90`` (CUDA C++).
"""
