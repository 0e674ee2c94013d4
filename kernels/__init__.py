"""Triton kernels of the GPU backends; installed as `fusedmoe.kernels`."""

if __name__ != "fusedmoe.kernels":
    # A package on PyPI is called `kernels` too: with this folder's parent on the path, `import
    # kernels` would find this one.
    raise ImportError(
        f"this folder is imported as fusedmoe.kernels, got {__name__}; the package `kernels` of PyPI needs "
        f"another working directory"
    )
