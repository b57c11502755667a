"""Products and sums as each platform does them best.

What serves one platform alone says so in its name: ``cpu_`` is XLA's CPU backend, ``gpu_`` NVIDIA
GPUs, ``tpu_`` TPUs; ``benchmarks/cpu_kernels.py`` and ``benchmarks/kernels.py`` measure whether the
first two pay.
``contraction`` is what any compiler takes. The other modules choose between them:

- ``reductions``: the two passes over the gradients, Gram matrices and weighted sums;
- ``product``: activations times weights; ``bin_product``: rows in bins, each times its own weights;
- ``cross_entropy``: the loss over a large vocabulary, chunk by chunk;
- ``launch``, ``linear``: solvers of small problems as one kernel, on GPUs and TPUs.

``folded`` gives a kernel its ``vmap``.
"""
