"""nvlm::GatedCrossAttention of prompts on Hopper (compute capability 9.0), in Gluon.

What kernel.py computes, but with products and exponentials at the same time. As many programs as multiprocessors walk
tiles of 128 rows of one key head. Of a program's three partitions one has the copy engine fetch blocks of keys and
values (loader.py), and two warpgroups attend with 64 rows each (attender.py): while one takes exponentials or stores,
the tensor cores multiply for the other. After J. Shah and others, FlashAttention-3 (arXiv 2407.08608). Times and what
was tried: docs/gpu_tuning.md.

Triton's interpreter does not run Gluon: lab/gpu_check.sh checks this kernel, on a GPU.
"""
