"""The build. pyproject.toml says everything but one thing: an installed megamask carries copies of
the files that stand beside the package in the repository (megamask/shipped.py finds them).
"""

import glob
import os

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = os.path.dirname(os.path.abspath(__file__))
SHIPPED = ("configs/recipes/*.yaml", "configs/models/*.json", "launch/learn.*", "launch/env.sh")
SHIPPED += ("constraints.txt",)
TARGET = "megamask/shipped_files"


class BuildWithFiles(build_py):
    """``build_py`` that also copies the shipped files; an editable install reads them in place."""

    def run(self):
        """Build."""
        super().run()
        for source, target in self._shipped():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode=1):
        """The files that the build writes."""
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._shipped())]

    def get_source_files(self):
        """The files that the build reads, which a source distribution holds."""
        here = os.path.join(HERE, "")
        own = [source.removeprefix(here) for pattern in SHIPPED for source in _found(pattern)]
        return [*super().get_source_files(), *own]

    def _shipped(self):
        if self.editable_mode:
            return []
        return [
            (source, os.path.join(self.build_lib, TARGET, os.path.relpath(source, HERE)))
            for pattern in SHIPPED
            for source in _found(pattern)
        ]


def _found(pattern):
    return sorted(glob.glob(os.path.join(HERE, pattern)))


setup(cmdclass={"build_py": BuildWithFiles})
