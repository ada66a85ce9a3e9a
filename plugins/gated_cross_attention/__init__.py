"""Gated cross-attention over ranges of image tokens: the one operator of NVLM-X and -H that no runtime has built in."""
