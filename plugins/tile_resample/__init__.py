"""A decoded picture on the GPU to normalised tiles: what nvlm_trt.image.tiling does with Pillow on the CPU."""
