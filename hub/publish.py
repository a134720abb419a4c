"""Publishes a model, an adapter, a data set, the demo app or the server on the Hub, in one commit.

    python hub/publish.py --model DIR --repo ORG/NAME [--dry_run] [--private] [--revision BRANCH | --create_pr]
    python hub/publish.py --model ADAPTER --base ORG/BASE --repo ORG/NAME
    python hub/publish.py --dataset --items ITEMS --pairs PAIRS [--test_pairs PAIRS] --repo ORG/DATA
    python hub/publish.py --space --model ORG/NAME --index INDEX --items ITEMS --repo ORG/APP
    python hub/publish.py --server --model ORG/NAME [--index INDEX] --repo ORG/SERVER

Before anything is sent, a model is loaded in a process of its own and every file is looked at; what must not be published
(pickles, secrets, paths of this machine, training state) is refused with all reasons at once. Log in with `hf auth login`.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hub.publishing.checks import RefusedError
from hub.publishing.dataset import DataDetails, prepare_dataset
from hub.publishing.docker_space import ServerDetails, prepare_server
from hub.publishing.model import ModelDetails, prepare_model
from hub.publishing.sending import Destination, Publication, listing, push, samples
from hub.publishing.space import SpaceDetails, prepare_space
from training.tables.commands.files import scratch_folder
from training.tables.commands.handler import DONE, FAILED, command, parse, plain_console
from training.tables.commands.options import allow_remote_option, encoding_option, split_option
from training.tables.commands.outputs import Output, claimed


@dataclass
class PublishArguments:
    """What to publish, where, and how."""

    repo: str = field(metadata={"help": "ORG/NAME on the Hub; made if it isn't there."})
    model: str | None = field(default=None, metadata={"help": "Folder of a model or adapter; for a Space a Hub id."})
    base: str | None = field(default=None, metadata={"help": "Hub id of an adapter's base model."})
    base_models: list[str] | None = field(
        default=None,
        metadata={"help": "Hub ids of a model's backbones for the card; none: those that its config names."},
    )
    metrics: str | None = field(
        default=None, metadata={"help": "metrics.json for the card; none: the one in the model's folder or beside it."}
    )
    dataset: bool = field(default=False, metadata={"help": "Publish item and pair tables as a data set."})
    items: str | None = field(default=None, metadata={"help": "Item table, with --dataset and --space."})
    pairs: str | None = field(default=None, metadata={"help": "Pair table to train on, with --dataset."})
    test_pairs: str | None = field(default=None, metadata={"help": "Pair table to measure on, with --dataset."})
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    pictures_anywhere: bool = field(
        default=False, metadata={"help": "With --dataset: also pictures that lie outside the item table's folder."}
    )
    made_by: str | None = field(
        default=None, metadata={"help": "How the data were made, a few sentences for the data set's card."}
    )
    rejects: str = field(
        default="publish_rejects.jsonl", metadata={"help": "Where rows that can't be published are listed."}
    )
    space: bool = field(default=False, metadata={"help": "Publish the demo app as a Gradio Space."})
    server: bool = field(default=False, metadata={"help": "Publish the server of hub/serve.py as a Docker Space."})
    index: str | None = field(
        default=None, metadata={"help": "Index folder of hub/index.py, with --space and --server."}
    )
    visual_index: str | None = field(
        default=None, metadata={"help": "Index of the visual embeddings, with --space; none: no weight to slide there."}
    )
    license: str | None = field(default=None, metadata={"help": "As the Hub names it, e.g. apache-2.0."})
    languages: list[str] | None = field(default=None, metadata={"help": "Codes of the texts' languages, e.g. en zh."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the data a model was trained on."})
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to, made if it isn't there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request in place of a commit to main."})
    commit_message: str = field(default=Destination.message, metadata={"help": "First line of the commit."})
    dry_run: bool = field(default=False, metadata={"help": "Check, list what would go, and send nothing."})

    def __post_init__(self) -> None:
        kinds = [f"--{name}" for name in ("dataset", "space", "server") if getattr(self, name)]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} are several publications: run the command once for each.")
        wanted = ("items", "pairs") if self.dataset else ("model", "index", "items") if self.space else ("model",)
        missing = [f"--{name}" for name in wanted if getattr(self, name) is None]
        if missing:
            raise ValueError(f"Missing: {', '.join(missing)}.")
        if self.create_pr and self.revision:
            raise ValueError("A pull request is made against main: leave out --revision or --create_pr.")


def prepare(arguments: PublishArguments, staging: Path) -> Publication:
    """What the arguments ask for, checked and put together in `staging`."""
    if arguments.dataset:
        assert arguments.items and arguments.pairs
        data = DataDetails(arguments.repo, arguments.license, arguments.languages, arguments.made_by)
        tables = {"train_pairs": arguments.pairs, "test_pairs": arguments.test_pairs}
        return prepare_dataset(
            arguments.items,
            tables,
            staging,
            data,
            Path(arguments.rejects),
            arguments.split,
            arguments.encoding,
            arguments.pictures_anywhere,
            arguments.allow_remote,
        )
    assert arguments.model
    if arguments.space:
        assert arguments.index and arguments.items
        space = SpaceDetails(
            arguments.repo,
            arguments.model,
            arguments.index,
            arguments.items,
            arguments.visual_index,
            arguments.split,
            arguments.encoding,
            arguments.allow_remote,
        )
        return prepare_space(space, staging, Path(arguments.rejects))
    if arguments.server:
        return prepare_server(ServerDetails(arguments.repo, arguments.model, arguments.index), staging)
    names = ("repo", "base", "base_models", "metrics", "license", "languages", "datasets")
    return prepare_model(
        Path(arguments.model), staging, ModelDetails(**{name: getattr(arguments, name) for name in names})
    )


def publish(arguments: PublishArguments, console: Console) -> None:
    """Prepares, lists, and sends unless it is a dry run."""
    destination = Destination(
        arguments.repo, arguments.private, arguments.revision, arguments.create_pr, arguments.commit_message
    )
    with scratch_folder(Path(tempfile.gettempdir()), "publish") as staging:
        publication = prepare(arguments, staging)
        console.print(listing(publication, destination))
        for table in samples(publication):
            console.print(table)
        if arguments.dry_run:
            console.print("Dry run: nothing was sent.")
            return
        commit = push(publication, destination)
    console.print(f"Published: {commit.pr_url or commit.commit_url}", soft_wrap=True)


def show_refusal(error: RefusedError, console: Console) -> None:
    """All faults in a table."""
    table = Table(title="Refused; nothing was sent", show_lines=True)
    for column in ("file", "what", "what to do"):
        table.add_column(column, overflow="fold")
    for fault in error.faults:
        table.add_row(fault.file, fault.what, fault.remedy)
    console.print(table)


@command("hub/publish.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point; what stands against publishing is a table on stderr."""
    (arguments,) = parse(PublishArguments, options=options)
    places = [Output("--rejects", Path(arguments.rejects))] if arguments.dataset or arguments.space else []
    tables = (arguments.items, arguments.pairs, arguments.test_pairs)
    inputs = (*tables, arguments.model, arguments.index, arguments.visual_index)
    try:
        with claimed(places, inputs):
            publish(arguments, plain_console())
    except RefusedError as error:
        show_refusal(error, plain_console(stderr=True))
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
