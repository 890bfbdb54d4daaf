"""pyproject.toml says all but this: configurations lie in the repository's root and, built, inside
the package.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies ``configs`` and ``ds_configs`` into the built package; an editable install finds them
    in the repository.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "ds_configs"):
                shutil.copytree(folder, Path(self.build_lib, "diffmoe", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
