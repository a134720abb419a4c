"""What is refused, with every reason; and metrics and adapters made fit for others."""

import gzip
import json
import lzma
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from hub.publish import main
from hub.publishing.checks import RefusedError, file_faults, folder_files
from hub.publishing.model import ModelDetails, find_metrics, name_base, portable, prepare_model
from tests.support.hub_client import ROOT


SECRETS = {
    "token.md": "hf_" + "aB3" * 12,
    "aws.yaml": "key: AKIA" + "ABCDEFGH23456789",
    "key.txt": "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nabc",
    "git.py": "ghp_" + "a1B2" * 9,
    "service.json": '{"api_key": "0123456789' + 'abcdef0123"}',
    "cloud.env": "AWS_SECRET_ACCESS_KEY=abcdefgh" + "ijk0123456789\nx=1",
    "address.jinja": "https://me:" + "pass1234@example.org/x",
    "netrc": "machine example.org login me password x1",
    "jwt.md": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjMifQ.c2lnbmF0dXJl",
    "stripe.txt": "sk_" + "live_" + "a1B2" * 6,
}
PATHS = {
    "config.json": '{"_name_or_path": "/home/someone/models/base"}',
    "run.yaml": "output_dir: /mnt/disk/runs",
    "windows.md": "loaded from C:\\Users\\someone\\model",
    "code.py": 'PATH = "/Users/someone/x.py"',
    "link.md": "see file:///tmp/x.html",
    "prompt.jinja": "{% include '/data/prompts/a' %}",
}
FINE = {
    "README.md": "See https://example.org/home/page and docs/tmp/a; run `python hub/x.py --model models/base`. 3/4 of /all/",
    "tokenizer.json": '{"vocab": {"/home/user": 1, "hf_": 2, "password": 3, "api_key": 4}}',
    "code.py": 'token = token or "auto"\nsecret = None\napi_key = load_the_key_of_version_2()\npassword: str | None = None',
    "settings.py": 'API_KEY = "SERVICE_2_API_KEY"\nSECRET_KEY: "MY_SECRET_KEY_2"\n',
    "requirements.txt": "torch>=2.6\ntransformers>=5.24\npillow\nnumpy\nsafetensors\nrich\nN.\n0.\nl.\n",
}


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def faults_of(folder):
    files, faults = folder_files(folder)
    return {fault.file: fault.what for fault in [*faults, *file_faults(files, folder)]}


@pytest.mark.parametrize(("files", "reason"), [(SECRETS, "what looks like"), (PATHS, "a path of this machine")])
def test_secrets_and_paths_are_found_in_any_text(tmp_path, files, reason):
    found = faults_of(write(tmp_path / "model", files))
    assert set(found) == set(files)
    assert all(what.startswith("line 1: " + reason) for what in found.values()), found


def test_secrets_are_found_in_metadata_other_encodings_and_archives(tmp_path):
    token = "hf_" + "aB3" * 12
    text = f"a line\ntoken {token}\n"
    folder = write(
        tmp_path / "model",
        {
            "utf16.txt": text.encode("utf-16"),
            "without_mark.txt": text.encode("utf-16-be"),
            "notes.txt.gz": gzip.compress(text.encode()),
            "notes.txt.xz": lzma.compress(text.encode()),
            "records.db": b"\0\1\2" + text.encode() + b"\0\xff",
        },
    )
    save_file({"a": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt", "note": token})
    comment = PngImagePlugin.PngInfo()
    comment.add_text("Comment", token, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "zipped.png", pnginfo=comment)
    exif = Image.Exif()
    exif[0x010E] = f"a picture {token}"
    Image.new("RGB", (8, 8)).save(folder / "described.jpg", exif=exif)
    with zipfile.ZipFile(folder / "archive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner/notes.txt.gz", gzip.compress(text.encode()))
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder / "notes.txt.gz", "notes.txt.gz")

    found = faults_of(folder)

    assert set(found) == {path.name for path in folder.iterdir()}
    assert all("what looks like a Hugging Face token" in what for what in found.values()), found
    assert found["utf16.txt"].startswith("line 2: ")
    assert found["model.safetensors"].startswith("metadata note, line 1")
    assert found["archive.zip"].startswith("inner/notes.txt.gz, compressed, line 2")


def test_logs_and_pickles_of_other_names_are_found(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, ("true",)

    folder = write(tmp_path / "model", {"events.out.tfevents.1700000000.my-host.12.0": b"\x18\0\0\0"})
    for protocol in (0, 1):
        (folder / f"notes{protocol}.txt").write_bytes(pickle.dumps(Runs(), protocol=protocol))
    (folder / "broken.txt").write_bytes(pickle.dumps(Runs(), protocol=0)[:-3] + b"\xff no pickle's end")
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "numbers.npy", np.arange(3))
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", pickle.dumps([Runs()], protocol=0))
    found = faults_of(folder)
    assert set(found) == {path.name for path in folder.iterdir()} - {"numbers.npy"}
    assert "state of a training" in found["events.out.tfevents.1700000000.my-host.12.0"]
    assert found["notes0.txt"] == found["notes1.txt"] == found["broken.txt"] == "a pickle by its content"
    assert found["objects.npy"] == "an array of Python objects, which is a pickle"
    assert found["archive.zip"] == "readme.txt: a pickle by its content"


def test_ordinary_files_pass(tmp_path, tiny_model_folder):
    assert faults_of(write(tmp_path / "model", FINE)) == {}
    assert faults_of(tiny_model_folder) == {}


def test_this_machines_folders_are_found_even_among_tokens(tmp_path):
    folder = write(tmp_path / "model", {"vocab.json": f'{{"a": 1,\n"{tmp_path}/model/x": 2}}'})
    assert faults_of(folder) == {"vocab.json": f"line 2: a path of this machine, {tmp_path}/model/x"}


def test_pickles_are_found_by_name_and_by_content(tmp_path):
    folder = write(tmp_path / "model", {f"weights{end}": b"" for end in (".bin", ".pt", ".pkl", ".ckpt")})
    for protocol in (2, 4, 5):
        (folder / f"data{protocol}.json").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=protocol))
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(folder / "archive.dat", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    found = faults_of(folder)
    assert set(found) == {path.name for path in folder.iterdir()}
    assert "is or may be a pickle" in found["weights.bin"]
    assert found["data4.json"] == "a pickle by its content"
    assert "not a readable safetensors file" in found["model.safetensors"]
    assert found["archive.dat"] == "an archive with the pickle archive/data.pkl"


def test_training_state_and_links_out_of_the_folder_are_found(tmp_path):
    state = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"]
    state += ["checkpoint-80/model.safetensors", "global_step80/x.json", "__0_0.distcp", "optimizer.safetensors"]
    folder = write(
        tmp_path / "model", dict.fromkeys(state, b"x") | {"sub/fine.json": b"{}", ".git/x": b"", "a.txt": b"a"}
    )
    outside = write(tmp_path / "outside", {"secret.txt": b"x"})
    links = {"out.txt": outside / "secret.txt", "folder": outside, "nowhere.txt": "missing", "inside.txt": "a.txt"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found = faults_of(folder)
    assert set(found) == {*state, "out.txt", "folder", "nowhere.txt"}
    assert "training checkpoint checkpoint-80" in found["checkpoint-80/model.safetensors"]
    assert "a link out of the folder" in found["out.txt"] and "a link out of the folder" in found["folder"]


@pytest.mark.slow
def test_the_command_names_every_fault_and_a_folder_that_does_not_load(tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "loss_notellm2.py").unlink()
    write(folder, {"training_args.bin": b"x", "notes.md": "hf_" + "x1Y" * 12})
    command = [sys.executable, "hub/publish.py", "--model", folder, "--repo", "org/x", "--dry_run"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "COLUMNS": "250"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "Refused; nothing was sent" in run.stderr
    for expected in (
        "training_args.bin",
        "notes.md",
        "a Hugging Face token",
        "AutoModel fails in a new process",
        "loss_notellm2",
    ):
        assert expected in run.stderr, run.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {path.name for path in tiny_model_folder.iterdir()} - {"loss_notellm2.py"} | {"training_args.bin", "notes.md"}
    )  # the user's folder is as it was


@pytest.mark.slow
def test_missing_weights_are_no_model(tiny_model_folder, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["reduction.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "staging").mkdir()
    with pytest.raises(RefusedError, match=r"AutoModel fails in a new process.*missing_keys.*reduction.weight"):
        prepare_model(folder, tmp_path / "staging", ModelDetails("org/x"))


def test_metrics_lose_paths_and_are_found_beside_the_model(tmp_path):
    content = {
        "settings": {"model": "/home/me/base", "items": ["/data/items.parquet", "org/data"]},
        "x": 0.5,
        "y": None,
    }
    expected = {"settings": {"model": "base", "items": ["items.parquet", "org/data"]}, "x": 0.5, "y": None}
    assert portable(content) == expected
    write(tmp_path / "model", {})
    assert find_metrics(tmp_path / "model", None) is None
    write(tmp_path, {"metrics.json": "{}"})
    assert find_metrics(tmp_path / "model", None) == tmp_path / "metrics.json"
    with pytest.raises(ValueError, match=r"nowhere.json: no such file"):
        find_metrics(tmp_path / "model", "nowhere.json")


def test_an_adapters_base_must_be_on_the_hub(tmp_path):
    config = write(tmp_path, {"adapter_config.json": json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4})})
    config = config / "adapter_config.json"
    (fault,) = name_base(config, None, "org/adapter")
    assert "found on this machine alone" in fault.what and "--base ORG/BASE" in fault.remedy
    with pytest.raises(ValueError, match="no id of the Hub"):
        name_base(config, "../base", "org/adapter")
    assert "one repository" in name_base(config, "org/base", "org/base")[0].what  # its weights would be deleted
    assert name_base(config, "org/base", "org/adapter") == []
    assert json.loads(config.read_text()) == {"base_model_name_or_path": "org/base", "r": 4}
    assert name_base(config, None, "org/adapter") == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "Missing: --model"),
        (["--dataset", "--items", "x.parquet"], "Missing: --pairs"),
        (["--space", "--model", "m"], "Missing: --index, --items"),
        (["--dataset", "--space"], "several publications"),
        (["--model", ".", "--create_pr", "--revision", "x"], "leave out --revision or --create_pr"),
    ],
)
def test_wrong_options_end_with_their_reason(options, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub/publish.py", "--repo", "org/x", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_missing_model_is_named():
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        main(["--repo", "org/x", "--model", "nowhere"])
