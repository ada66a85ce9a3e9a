"""The model repository that Triton loads. Each config.pbtxt is a template that
nvlm_trt.serving.triton.repository fills in.

tiling -> vision_encoder -> nvlm are the steps of nvlm_ensemble. Clients call `nvlm`, which streams the answer itself
and sends images that it has not seen yet through the ensemble.

An engine for TensorRT has its `vision_encoder` from vision_encoder_tensorrt.
"""
