"""Imported first by every command: takes the command's own folder off the path on which modules are looked for.

Python puts the folder of a script there, before all others. From `training/` and `hub/`, `import evaluate` or `import index`
would then find our command in place of the library of that name. With `python -m` nothing needs to be done.
"""

import sys
from pathlib import Path


def leave_own_folder() -> None:
    """Remove the folder of the script that runs, where Python has put it, if it is a package's folder."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or sys.modules["__main__"].__spec__ is not None:
        return
    folder = Path(script).resolve().parent
    if (folder / "__init__.py").exists() and Path(sys.path[0]).resolve() == folder:
        del sys.path[0]


leave_own_folder()
