"""What only a GPU can prove, one trial after the other: see scripts/gpu_check.sh."""
