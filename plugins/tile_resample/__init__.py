"""Turns a decoded image on the GPU into normalised tiles, as nvlm_trt.image.tiling does with Pillow on the CPU.

Nothing in the product imports this package: lab/gpu_check and the tests call it. A backend that decodes images on the
GPU would.
"""
