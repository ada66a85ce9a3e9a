"""A decoded picture on the GPU to normalised tiles: what nvlm_trt.tiling does with Pillow on the CPU."""
