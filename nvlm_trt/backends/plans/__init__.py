"""Holds what the backends for TensorRT and TensorRT-RTX share: graphs, their check, profiles, and running plans.

A plan is what NVIDIA's builder makes of one stage's graph. A backend's own room has its builder's configuration, its
targets, its record in the manifest and its `PlanRuntime`.
"""

PREFILL_CHUNK = 1024  # longer prompts run in chunks: the largest chunk decides the memory of the activations
