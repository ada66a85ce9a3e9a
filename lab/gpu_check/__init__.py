"""What only a GPU can prove, one trial after the other: see lab/gpu_check.sh."""
