"""The model repository that Triton loads.

Each config.pbtxt is a template that nvlm_trt.serving.triton.repository fills in. Clients call `nvlm`, which streams the
answer, and sends the tiles of new images to `vision_encoder`. The ensemble `nvlm_ensemble` chains `tiling`,
`vision_encoder` and `nvlm`; the ensemble `image_encoder` has its first two steps. A backend may name another folder for
`vision_encoder`: TensorRT's is vision_encoder_tensorrt.
"""
