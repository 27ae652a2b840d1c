"""Compiled extensions; everything else is declared in pyproject.toml."""

from setuptools import setup

setup(ext_modules=[])
