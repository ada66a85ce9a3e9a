"""Runs stages of an engine with OpenVINO on the CPU, from the ONNX files that the backend onnxruntime builds."""

NAME = "openvino"
