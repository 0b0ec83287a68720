"""Build the compiled kernels of csrc where a compiler is found; everything else is pyproject.toml."""

from setuptools import setup

setup()
