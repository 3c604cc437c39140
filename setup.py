"""Build script. Metadata lives in pyproject.toml; this file is the place of the optional C++ extension."""

from setuptools import setup

setup()
