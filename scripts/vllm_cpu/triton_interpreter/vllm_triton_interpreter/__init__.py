"""A Triton backend "cpu" that compiles nothing. With it the CPU build of vLLM takes Triton for usable, and under
TRITON_INTERPRET=1 Triton runs its kernels in Python: a hundred times slower, and the only way to model runner V2 (which
alone serves DSpark) without a GPU.
"""
