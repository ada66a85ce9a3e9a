"""Runs trials that need a GPU, one after the other: see lab/gpu_check.sh."""
