"""The model repository that Triton loads.

Each config.pbtxt is a template that nvlm_trt.serving.triton.repository fills in. Clients call `nvlm`, which streams the
answer and sends new images through `image_encoder`, an ensemble of `tiling` and `vision_encoder`. The ensemble
`nvlm_ensemble` chains all three. A backend may name another folder for `vision_encoder`: TensorRT's is
vision_encoder_tensorrt.
"""
