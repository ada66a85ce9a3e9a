"""Computes nvlm::GatedCrossAttention for prompts on Hopper (compute capability 9.0), in Gluon.

Nothing in the product runs this kernel: only lab/gpu_check and the tests call it, mostly through ../launcher.py. A
backend that runs the decoder in torch would do so. TensorRT has another kernel, because this one takes 224 KB of shared
memory.

The kernel computes what kernel.py computes, but takes products and exponentials at the same time. One program per
multiprocessor walks tiles of 128 rows of one key head. A program has three partitions: one has the copy engine fetch
blocks of keys and values (loader.py), and two warpgroups attend with 64 rows each (attender.py). While one warpgroup
takes exponentials or stores, the tensor cores multiply for the other. After J. Shah and others, FlashAttention-3
(arXiv 2407.08608). docs/gpu_tuning.md has the times of all variants tried.

Triton's interpreter does not run Gluon: lab/gpu_check.sh checks this kernel, on a GPU.
"""
