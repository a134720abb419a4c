"""The app's page: a form for an item, its neighbours as pictures and as a table, and items to start from.

What users wrote goes into components that show plain text alone, so no markup of theirs is run.
"""

import os
from pathlib import Path
from typing import Any, Literal


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from PIL import Image, ImageOps

from hub.pages.app_search import Hit, ItemSearch, QueryError
from modeling_notellm2.images_notellm2 import image_sources
from training.tables.images import first_picture


SAMPLE = 24
MOST_NEIGHBOURS = 60
SIDE = 256
"""Pixels of a picture's sides in a gallery."""
COLUMNS = ["#", "score", "multimodal", "visual", "item_id", "title"]
EMPTY = "Nothing to search with: give a picture or some text, and leave its switch on."
CSS = "footer {display: none !important}"


class App:
    """The page's functions over a catalogue.

    Args:
        search: the catalogue.
    """

    def __init__(self, search: ItemSearch):
        self.search = search

    def find(
        self,
        item_id: str | None,
        image: str | None,
        title: str | None,
        topics: str | None,
        content: str | None,
        use_image: bool,
        use_text: bool,
        weight: float,
        k: int,
    ) -> tuple[list[tuple[Image.Image, str]], list[list[Any]], str]:
        """Neighbours of an item as it stands in the form: gallery, table, and a line on what was done.

        Args:
            item_id: of an item of the catalogue, which is then not found itself; or nothing.
            image: path of a picture.
            topics: separated by commas.
            use_image, use_text: the switches.
            weight: of the multimodal similarity against the visual one.
        """
        text = {"title": title, "topics": topics, "content": content}
        item: dict[str, Any] = {key: value for key, value in text.items() if use_text and value and value.strip()}
        if use_image and image:
            item["image"] = Path(image).read_bytes()
        if not item:
            return [], [], EMPTY
        try:
            query = self.search.embed(item)
        except QueryError as error:
            return [], [], f"This item can't be searched with: {error}"
        hits = self.search.search(query, float(weight), int(k), leave_out=item_id or None)
        items = [self.search.item(hit.item_id) for hit in hits]
        shown = [(picture_of(item), caption(hit, item)) for hit, item in zip(hits, items, strict=True)]
        rows = [table_row(rank, hit, item) for rank, (hit, item) in enumerate(zip(hits, items, strict=True), 1)]
        return shown, rows, self._describe(item, query.visual is not None, weight)

    def load(self, item_id: str | None) -> tuple[Image.Image | None, str, str, str, str]:
        """Picture, title, topics and content of an item of the catalogue for the form, and a line on it."""
        if not (item_id or "").strip():
            return None, "", "", "", "Type an item's id, or pick one of the pictures."
        try:
            item = self.search.item(str(item_id).strip())
        except QueryError as error:
            return None, "", "", "", str(error)
        sources = image_sources(item.get("image"))
        note = f"It has {len(sources)} pictures, of which the form holds the first." if len(sources) > 1 else ""
        return (
            first_picture(item),
            item.get("title", ""),
            ", ".join(item.get("topics", [])),
            item.get("content", ""),
            note,
        )

    def start(self, request: gr.Request) -> str:
        """Id of the first item to show: that of the link, or the first of the sample."""
        return request.query_params.get("item") or self.search.sample(SAMPLE)[0]

    def samples(self) -> list[tuple[Image.Image, str]]:
        """Some items to start from."""
        items = [self.search.item(item_id) for item_id in self.search.sample(SAMPLE)]
        return [(picture_of(item), name_of(item)) for item in items]

    def picked(self, event: gr.SelectData) -> str:
        """Id of the sample that was clicked."""
        return self.search.sample(SAMPLE)[event.index]

    def _describe(self, item: dict[str, Any], seen: bool, weight: float) -> str:
        parts = [*(["picture"] if "image" in item else []), *(["text"] if len(item.keys() - {"image"}) else [])]
        line = f"{len(self.search.positions):,} items compared by {' and '.join(parts)}"
        if self.search.visual_index is None:
            return f"{line}."
        if not seen:
            return f"{line}; without a picture there is no visual similarity to weigh."
        return f"{line}: {weight:.2f} x multimodal + {1 - weight:.2f} x visual similarity."


def picture_of(item: dict[str, Any]) -> Image.Image:
    """An item's first picture, small and square; a grey tile for an item without one that can be read."""
    picture = first_picture(item)
    if picture is None:
        return Image.new("RGB", (SIDE, SIDE), "#dddddd")
    return ImageOps.pad(picture, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")  # else it is cropped


def name_of(item: dict[str, Any]) -> str:
    """What to call an item."""
    return (item.get("title") or item.get("content") or ", ".join(item.get("topics", [])) or item["item_id"])[:80]


def caption(hit: Hit, item: dict[str, Any]) -> str:
    """Below a neighbour's picture."""
    return f"{hit.score:.3f}  {name_of(item)}"


def table_row(rank: int, hit: Hit, item: dict[str, Any]) -> list[Any]:
    """A neighbour in the table, with both similarities."""
    visual = "" if hit.visual is None else f"{hit.visual:.4f}"
    return [rank, f"{hit.score:.4f}", f"{hit.multimodal:.4f}", visual, hit.item_id, item.get("title", "")]


def build_page(app: App, title: str) -> gr.Blocks:
    """The page. What users wrote goes into components that show plain text alone, so no markup of theirs is run."""
    visual = app.search.visual_index is not None
    with gr.Blocks(title=title) as page:
        gr.Markdown(
            f"## Related items\n{len(app.search.positions):,} items. Pick one, or bring your own picture and text."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                item_id = gr.Textbox(label="Item of the catalogue (its id); empty for your own", elem_id="item_id")
                image = gr.Image(
                    label="Picture", type="filepath", format="png", height=220, sources=["upload", "clipboard"]
                )
                text = [
                    gr.Textbox(label=name, lines=lines) for name, lines in (("Title", 1), ("Topics", 1), ("Content", 2))
                ]
                with gr.Row():
                    use_image = gr.Checkbox(True, label="Use the picture", elem_id="use_image")
                    use_text = gr.Checkbox(True, label="Use the text", elem_id="use_text")
                weight = gr.Slider(
                    0,
                    1,
                    1,
                    step=0.05,
                    label="Weight of the multimodal embedding; the rest is the visual one's",
                    visible=visual,
                )
                k = gr.Slider(1, MOST_NEIGHBOURS, 12, step=1, label="Neighbours")
                search = gr.Button("Find neighbours", variant="primary")
                status = gr.Textbox(show_label=False, container=False, interactive=False, elem_id="status", lines=2)
            with gr.Column(scale=2):
                gallery = gr.Gallery(
                    label="Neighbours, best first", columns=4, object_fit="contain", height=620, elem_id="neighbours"
                )
                table = gr.Dataframe(
                    headers=COLUMNS,
                    datatype=["number", "str", "str", "str", "str", "str"],
                    interactive=False,
                    label="Scores",
                    wrap=True,
                )
        samples = gr.Gallery(
            app.samples(),
            label="Items to start from",
            columns=8,
            object_fit="contain",
            height=330,
            allow_preview=False,
            elem_id="samples",
        )

        form = [item_id, image, *text, use_image, use_text, weight, k]
        find = app.find, form, [gallery, table, status]
        load = app.load, item_id, [image, *text, status]
        quiet: Literal["private"] = "private"
        search.click(*find, api_name="find")
        gr.on([use_image.input, use_text.input, weight.release, k.release], *find, api_visibility=quiet)
        opened = item_id.submit(*load, api_name="load")
        picked = samples.select(app.picked, None, item_id, api_visibility=quiet).then(*load, api_visibility=quiet)
        started = page.load(app.start, None, item_id, api_visibility=quiet).then(*load, api_visibility=quiet)
        for event in (opened, picked, started):
            event.then(*find, api_visibility=quiet)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve the page until it is stopped. It asks nothing of the network, fonts included."""
    page.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        ssr_mode=False,
        max_file_size="20mb",
    )
