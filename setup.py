"""Puts `conf/` into a package that is built. All else is in pyproject.toml; an editable install reads `conf/` where it lies."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfiguration(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for file in Path("conf").rglob("*.yaml"):
                to = Path(self.build_lib, "leanlm", file)
                self.mkpath(str(to.parent))
                self.copy_file(str(file), str(to))


setup(cmdclass={"build_py": WithConfiguration})
