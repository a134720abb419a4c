"""Folders that hold no usable model: one line that names the folder and what to do."""

import json
import shutil

import pytest
from transformers import AutoModel

from training.tables.commands.handler import FileError
from training.tables.commands.model_folder import loading


def load(folder) -> None:
    with loading(folder):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_a_model_loads(tiny_model_folder):
    load(tiny_model_folder)


def test_faults_name_folder_and_remedy(tiny_model_folder, tmp_path):
    def spoiled(name: str):
        folder = tmp_path / name
        shutil.copytree(tiny_model_folder, folder)
        return folder

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "llama"}))
    cut = spoiled("cut")
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate(5000)
    edited = spoiled("edited")
    (edited / "config.json").write_text("{")
    lost = spoiled("lost")
    (lost / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    for folder, message in [
        (tmp_path / "none", "there is no such folder"),
        (tmp_path / "empty", "there is no config.json in it"),
        (plain, "is no NoteLLM-2 model but llama; hub/assemble.py joins"),
        (cut, "cut off or damaged"),
        (edited, "Copy or write the folder again"),
        (lost, "model.safetensors"),
    ]:
        with pytest.raises((FileError, OSError)) as raised:
            load(folder)
        assert message in str(raised.value)
        assert str(folder) in str(raised.value)
