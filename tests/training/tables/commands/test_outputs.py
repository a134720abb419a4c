"""Where commands may write: the user's files stay, a second process is refused, and our own results are replaced."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from hub.cards.writing import write_card
from tests.support.models import make_model
from training.mine import main as mine
from training.reporting.figures import write_figure
from training.tables.commands.files import write_json
from training.tables.commands.handler import FileError, OptionError
from training.tables.commands.outputs import GENERATOR, Output, check_inputs, claimed, stranger_at


PRECIOUS = "the user's own\n"
IN = "mine/data.csv"
"""An input, in a folder of the user's with a note."""

# Command, options, and the option that names its output: OUT stands for the place, "mine/" is the user's.
COMMANDS = [
    ("training.run", f"--model mine --items {IN} --train_pairs {IN} --use_cpu --output_dir OUT", "model"),
    ("training.run", f"--model mine --items {IN} --train_pairs {IN} --use_cpu --output_dir OUT", "metrics.json"),
    (
        "training.run",
        f"--model m --items {IN} --train_pairs {IN} --validate_only true --output_dir OUT",
        "rejects.jsonl",
    ),
    ("training.mine", f"--interactions {IN} --output OUT", ""),
    ("training.mine", f"--interactions {IN} --output a.parquet --split_time 5 --test_output OUT", ""),
    ("training.hard_negatives", f"--model mine --items {IN} --pairs {IN} --output OUT", ""),
    ("training.evaluate", f"--model mine --items {IN} --pairs {IN} --output OUT", "evaluation.json"),
    ("training.evaluate", f"--model mine --items {IN} --pairs {IN} --output OUT", "plots/recall.png"),
    ("training.experiments.emoji", "--output OUT", "items.parquet"),
    ("training.experiments.openmoji", "--output OUT", "rejects.jsonl"),
    ("training.experiments.movielens", "--output OUT", "log.parquet"),
    ("hub.assemble", "--text mine --vision mine --output OUT", ""),
    ("hub.convert_official", f"--config {IN} --weights {IN} --output OUT", ""),
    ("hub.gallery", f"--model mine --items {IN} --output OUT", ""),
    ("hub.index", f"--embeddings mine --items {IN} --output OUT", ""),
    ("hub.index", f"export --format qdrant --embeddings mine --items {IN} --output OUT", ""),
    ("hub.publish", f"--repo a/b --dataset --items {IN} --pairs {IN} --dry_run --rejects OUT", ""),
]
READING = [case for case in COMMANDS if IN in case[1] and not case[2]]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with the user's data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / IN).write_text(PRECIOUS)
    (tmp_path / "mine" / "notes.txt").write_text(PRECIOUS)
    return tmp_path


def refused(module: str, options: str, capsys) -> tuple[int, str]:
    """Exit code and error line of a command."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(options.split())
    code, line = end.value.code, capsys.readouterr().err
    return (1, code) if isinstance(code, str) else (code, line)


def name_of(case: tuple[str, str, str]) -> str:
    return " ".join(filter(None, (case[0], case[2])))


@pytest.mark.parametrize("case", COMMANDS, ids=name_of)
def test_the_users_file_at_the_place_of_an_output_stays(case, place, capsys):
    module, options, part = case
    output = place / "results" / part
    output.parent.mkdir(parents=True, exist_ok=True)
    if part == "model" or module in (
        "hub.assemble",
        "hub.convert_official",
        "hub.index",
    ):  # folders that are replaced as a whole
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(place / "mine", output)
        (output / "config.json").write_text('{"model_type": "notellm2"}')
        precious = output / "notes.txt"
    else:
        if not part:
            output.rmdir() if output.is_dir() else None
        output.write_text(PRECIOUS)
        precious = output

    code, line = refused(module, options.replace("OUT", "results"), capsys)

    assert code == 1, line
    assert "was not made by this program" in line
    assert precious.read_text() == PRECIOUS


@pytest.mark.parametrize("way", ["relative", "link", "around"])
@pytest.mark.parametrize("case", READING, ids=name_of)
def test_an_output_is_never_an_input(case, way, place, capsys):
    (place / "link").symlink_to(place / IN)
    output = {"relative": f"mine/../{IN}", "link": "link", "around": "mine"}[way]

    code, line = refused(case[0], case[1].replace("OUT", output), capsys)

    assert (code, "which is read" in line) == (2, True), line
    assert (place / IN).read_text() == (place / "mine" / "notes.txt").read_text() == PRECIOUS


def test_encode_and_card_spare_their_inputs(place, capsys):
    assert refused("hub.encode", f"--model mine --items {IN} --output mine --device cpu", capsys)[0] == 2
    (place / "mine" / "README.md").write_text(PRECIOUS)
    assert refused("hub.card", "--model mine --metrics mine/README.md", capsys)[0] == 2
    assert (place / "mine" / "README.md").read_text() == PRECIOUS


def test_two_outputs_in_one_place(place, capsys):
    assert refused("training.mine", f"--interactions {IN} --output a --split_time 5 --test_output ./a", capsys)[0] == 2
    with pytest.raises(OptionError, match="two places"):
        check_inputs([Output("--a", place / "a"), Output("--b", place / "a" / "b")], [])


def test_our_own_results_are_replaced_wherever_they_went(place, capsys):
    log = "user_id,item_id,timestamp\n" + "".join(f"u{u},i{i},{u + i}\n" for u in range(3) for i in range(3)) + "u,,1\n"
    (place / "log.csv").write_text(log)
    assert mine(["--interactions", "log.csv", "--output", "pairs.parquet"]) == 3
    os.rename("pairs.parquet", "moved")
    os.rename("pairs.rejects.jsonl", "moved.rejects.jsonl")
    assert mine(["--interactions", "log.csv", "--output", "moved"]) == 3
    pq.write_table(pq.read_table("moved").replace_schema_metadata(None), "others.parquet")
    assert refused("training.mine", "--interactions log.csv --output others.parquet", capsys)[0] == 1

    write_figure(Figure(), place / "plot.png")
    write_json({**GENERATOR, "a": 1}, place / "metrics.json")
    (place / "empty").touch()
    for name in ("moved", "moved.rejects.jsonl", "plot.png", "metrics.json", "empty", "nothing"):
        assert stranger_at(place / name) is None, name

    model, processor = make_model()
    for part in (model, processor):
        part.save_pretrained(place / "model")
    write_card(place / "model", plots=[place / "plot.png"])
    assert stranger_at(place / "model") is None
    (place / "model" / "README.md").write_text(PRECIOUS)
    assert stranger_at(place / "model") == place / "model" / "README.md"


HOLD = """
import sys, time
from pathlib import Path
from training.tables.commands.outputs import Output, claimed
with claimed([Output("--output", Path(sys.argv[1]), tuple(sys.argv[2:]))], []):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("parts", [(), ("metrics.json",)], ids=["whole", "parts"])
def test_a_second_process_is_refused_until_the_first_is_gone(parts, tmp_path):
    place = tmp_path / "deep" / "result"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(place), *parts], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(FileError, match="another process is writing there"),
            claimed([Output("--output", place, parts)], []),
        ):
            pass
        first.send_signal(signal.SIGKILL)
    with claimed([Output("--output", place, parts)], []):
        pass
    assert not list(tmp_path.rglob("*lock"))
