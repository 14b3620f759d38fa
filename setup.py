"""What pyproject.toml cannot say: models, scenarios and manifests go into the package, with the commit of the build."""

import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

TOP = Path(__file__).resolve().parent
# They stay at the top of a checkout, and are inside the package where it is installed: see harness/host/places.py.
BESIDE = {"harness.model_repository": "model_repository", "harness.scenarios": "scenarios", "harness.ops": "ops"}
DESCRIBE = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]


def write_commit(package: Path) -> None:
    """Note which commit this is; a source archive has its note already."""
    if not (TOP / ".git").exists():
        return
    try:
        said = subprocess.run(DESCRIBE, cwd=TOP, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return
    if said.returncode == 0:
        package.mkdir(parents=True, exist_ok=True)
        (package / "commit.txt").write_text(said.stdout)


class Build(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib) / "harness")


class Archive(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "harness")


setup(
    packages=[*find_packages(TOP, include=["harness", "harness.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "harness": ["commit.txt"],
        "harness.cards": ["*.yaml", "*.json"],
        "harness.drive": ["*.html"],
        "harness.report": ["*.html.j2", "*.css", "*.js"],
        "harness.service": ["page/*", "page/*/*", "templates/*"],
        "harness.model_repository": ["*/config.pbtxt", "*/1/*.py", "*/1/.gitkeep"],
        "harness.scenarios": ["*.py", "*.yaml", "*.txt", "mixes/*.yaml", "profiles/*.json"],
        "harness.ops": ["kubernetes/*/*", "kubernetes/*/*/*", "prometheus/rules/*.yml"],
    },
    cmdclass={"build_py": Build, "sdist": Archive},
)
