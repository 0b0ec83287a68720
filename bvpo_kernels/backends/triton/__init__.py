"""Triton kernels: helpers, kernel, launcher. Nothing here chooses or allocates more than outputs.

Imported only where `backends.MISSING["triton"]` is empty: the modules need triton at import.
"""
