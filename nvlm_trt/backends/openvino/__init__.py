"""Runs stages of an engine with OpenVINO on the CPU, from the ONNX files that the backend onnxruntime builds."""

NAME = "openvino"
# Tiles in one run. More rows share each weight that is read; the activations of InternViT-6B take 0.1 GB a tile.
ENCODE_TILES = 8
