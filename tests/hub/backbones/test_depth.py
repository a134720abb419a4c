"""`--text_layers auto`: the fewest layers by which related items find each other."""

import json

import pytest
import torch

from hub.assemble import main
from hub.backbones import depth
from hub.backbones.depth import Depths, measure_depths, recall_of, whitened
from tests.support.models import make_backbones, make_image_processor, make_tokenizer


GROUPS, MEMBERS, WIDTH = 40, 8, 24
PAIRS = [
    (group * MEMBERS + one, group * MEMBERS + other)
    for group in range(GROUPS)
    for one in range(MEMBERS)
    for other in range(MEMBERS)
    if one != other
]


def states_by_depth():
    """Noise up to two layers; from three on a group's code, small beside what differs between its members."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(GROUPS * MEMBERS, WIDTH, generator=generator)
    code = torch.randn(GROUPS, WIDTH // 2, generator=generator).repeat_interleave(MEMBERS, 0)
    told = noise.clone()
    told[:, : WIDTH // 2] = 0.2 * code + 0.02 * noise[:, : WIDTH // 2]
    return torch.stack([noise, noise, noise, told, told])


def test_the_map_finds_what_partners_share_under_what_they_do_not():
    told, pairs = states_by_depth()[-1], torch.tensor(PAIRS)
    raw, _ = recall_of(torch.nn.functional.normalize(told, dim=-1), pairs)
    mapped, error = recall_of(whitened(told, pairs), pairs)
    assert mapped > raw + 0.3
    assert 0 < error < 0.05


def test_the_fewest_layers_that_are_as_good_as_the_best(monkeypatch):
    def in_read_order(model, processor, items, readout):
        return states_by_depth()[:, torch.tensor([item["number"] for item in items])]

    monkeypatch.setattr(depth, "frozen_states", in_read_order)
    items = [{"number": number} for number in range(GROUPS * MEMBERS)]
    depths = measure_depths(None, None, items, torch.tensor(PAIRS).numpy(), "mean", seed=0)
    assert depths.chosen == 3
    assert "the first 3 of 4 layers" in str(depths)
    with pytest.raises(ValueError, match="needs 50 pairs"):
        measure_depths(None, None, items, torch.tensor(PAIRS[:20]).numpy(), "mean", seed=0)


@pytest.mark.parametrize(("recall", "chosen"), [([0.9, 0.2, 0.5, 0.51, 0.4], 2), ([0.9, 0.8, 0.5], 1)])
def test_no_layer_at_all_is_never_chosen(recall, chosen):
    assert Depths(recall, [0.02] * len(recall)).chosen == chosen


def test_equal_vectors_find_nothing():
    vectors = torch.ones(GROUPS * MEMBERS, 4)
    assert recall_of(vectors, torch.tensor(PAIRS)) == (0.0, 0.0)


def test_the_command_cuts_an_llm(tmp_path, capsys):
    vision, text = make_backbones()
    vision.save_pretrained(tmp_path / "vision")
    make_image_processor().save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    make_tokenizer().save_pretrained(tmp_path / "text")
    items = [{"item_id": str(number), "title": "abcdefgh"[number % 8] * 3} for number in range(64)]
    pairs = [{"query_id": str(n), "target_id": str(m)} for n in range(64) for m in range(n % 8, 64, 8) if n != m]
    for name, rows in (("items", items), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = ["--items", str(tmp_path / "items.jsonl"), "--train_pairs", str(tmp_path / "pairs.jsonl")]
    sizes = ["--qformer_layers", "1", "--qformer_hidden_size", "32", "--qformer_heads", "2"]
    halves = ["--text", str(tmp_path / "text"), "--vision", str(tmp_path / "vision")]
    options = ["--output", str(tmp_path / "out"), "--text_layers", "auto", "--readout", "mean", *halves, *sizes]
    with pytest.raises(SystemExit):
        main(options)
    assert "--items and --train_pairs" in capsys.readouterr().err
    assert main([*options, *tables]) == 0
    assert "text_layers auto: the first 1 of 2 layers" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 1
    assert config["readout"] == "mean"
