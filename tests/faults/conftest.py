"""What the jobs of `tests.support.jobs` read, and what they write when nothing goes wrong."""

from pathlib import Path

import pytest

from tests.support.jobs import JOBS, prepare, result_of, run_job, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, tiny_model_folder) -> Path:
    """The jobs' inputs. Don't write into it."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, tiny_model_folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(processes, inputs, tmp_path_factory):
    """Folder and result of a job that nothing disturbed, by its name; run once for all tests."""
    done: dict[str, tuple[Path, dict[str, bytes]]] = {}

    def of(name: str) -> tuple[Path, dict[str, bytes]]:
        if name not in done:
            place = tmp_path_factory.mktemp(name)
            prepare(name, inputs, place)
            code, lines = run_job(processes, name, inputs, place)
            assert code in (0, 3), lines
            done[name] = place, result_of(name, place)
            assert bool(done[name][1]) == bool(JOBS[name].result)
        return done[name]

    return of
