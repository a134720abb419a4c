"""transformers' own common tests of models and processors pass, but for those that are listed with a reason."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

from tests.support.machine import missing


SUPPORT = Path(__file__).parents[1] / "support"
LEFT_OUT_OF_THE_DISTRIBUTION = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin: pass",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin: pass",
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url): return url",
}
"""What the common tests import and the source distribution doesn't carry; no test of ours uses it."""


def pip(*arguments: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        missing(f"needs a package index: {done.stderr[-500:]}")


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_common_tests_pass_or_are_listed(tmp_path):
    name = f"transformers-{transformers.__version__}"
    source = f"transformers=={transformers.__version__}"
    pip("download", "-q", "--no-deps", "--no-binary", "transformers", source, folder=tmp_path)
    pip("install", "-q", "--no-deps", "--target", str(tmp_path / "packages"), "parameterized", folder=tmp_path)
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    for path, content in LEFT_OUT_OF_THE_DISTRIBUTION.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    (folder / "test_notellm2.py").write_text((SUPPORT / "common_tests.py").read_text())
    places = [folder, tmp_path / "packages", SUPPORT.parents[1]]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--noconftest",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "-W",
            "ignore",
            f"--rootdir={folder}",
            "test_notellm2.py",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OUR_SUPPORT": str(SUPPORT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = int(done.stdout.splitlines()[-1].partition(" passed")[0].split()[-1])
    assert passed > 90
