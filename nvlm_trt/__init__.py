"""Engines and a server for NVLM-1.0 multimodal models: NVLM-D, NVLM-X and NVLM-H."""
