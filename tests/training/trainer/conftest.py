"""Options of short runs on the coloured items."""

import pytest

from tests.support.training_runs import words


@pytest.fixture
def options(coloured_tables, tiny_model_folder, tmp_path):
    """Command line options of a short run on the coloured items, without config."""
    settings = {
        "model": tiny_model_folder,
        "items": coloured_tables / "items.parquet",
        "train_pairs": coloured_tables / "train.jsonl",
        "output_dir": tmp_path / "run",
        "vision_cache_dir": tmp_path / "vision",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "dtype": "float32",
        "report_to": "none",
        "distinct_column": "colour",
        "dataloader_num_workers": 0,
    }
    return lambda **changes: [word for k, v in (settings | changes).items() for word in (f"--{k}", *words(v))]
