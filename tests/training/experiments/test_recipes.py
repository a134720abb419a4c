"""The statements that turn public data sets into our tables, on hand-made rows of their documented forms."""

import json
import re
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.mine import main
from training.tables.items import load_items


README = Path(__file__).parents[3] / "training" / "experiments" / "README.md"


def statements() -> dict[str, str]:
    """SQL by the name of the data set."""
    text = README.read_text(encoding="utf-8")
    return {match[1]: match[2] for match in re.finditer(r"^\*\*\[([^\]]+)\].*?^```sql\n(.*?)^```", text, re.M | re.S)}


def picture(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(path)


def lines(path: str, rows: list) -> None:
    """JSON lines of dicts, or a text file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def microlens() -> None:
    lines("MicroLens-50k_titles.csv", ["item,title", "1,A cat", '2,"Red, hot"', "3,Stairs"])
    lines(
        "MicroLens-50k_pairs.csv",
        ["user,item,timestamp", *(f"{user},{item},158337862{item}552" for user in "78" for item in "123")],
    )
    picture("MicroLens-50k_covers/1.jpg")


def pixelrec() -> None:
    head = "item_id,view_number,comment_number,thumbup_number,share_number,coin_number,favorite_number,barrage_number"
    rows = [f'i{number},1,1,1,1,1,1,1,Title {number},"a,b",About {number}' for number in (1, 2, 3)]
    lines("pixelrec_iteminfo/part.csv", [f"{head},title,tag,description", *rows])
    log = [f"i{item},u{user},158845121{item}" for user in (1, 2) for item in (1, 2, 3)]
    lines("pixelrec_interaction/part.csv", ["item_id,user_id,timestamp", *log])
    picture("cover/i1.jpg")


def amazon() -> None:
    image = [{"thumb": "https://x/t.jpg", "large": "https://x/l.jpg", "variant": "MAIN", "hi_res": None}]
    items = [
        {
            "main_category": "All Beauty",
            "title": f"Spray {number}",
            "features": ["Soft"],
            "description": ["Smells", "good"],
            "price": None,
            "images": image,
            "categories": ["Beauty", "Hair"],
            "parent_asin": f"B0{number}",
        }
        for number in (1, 2, 3)
    ]
    lines("meta_All_Beauty.jsonl", items)
    reviews = [
        {
            "rating": rating,
            "parent_asin": f"B0{item}",
            "asin": "x",
            "user_id": user,
            "timestamp": 1588687728923 + 1000 * item,
        }
        for user in ("A", "B")
        for item, rating in ((1, 5.0), (2, 4.0), (3, 5.0))
    ]
    lines("All_Beauty.jsonl", [*reviews, {**reviews[0], "user_id": "C", "rating": 1.0}])
    picture("images/B01.jpg")


def hm() -> None:
    head = "article_id,product_code,prod_name,product_type_name,product_group_name,colour_group_name,detail_desc"
    rows = [f'010877501{number},108775,Strap top,Vest top,Upper body,Black,"Jersey, soft"' for number in (1, 2, 3)]
    lines("articles.csv", [head, *rows])
    log = [f"2018-09-2{item},c{user},010877501{item},0.05,2" for user in (1, 2) for item in (1, 2, 3)]
    lines("transactions_train.csv", ["t_dat,customer_id,article_id,price,sales_channel_id", *log])
    picture("images/010/0108775011.jpg")


FORMS = {
    "MicroLens": (microlens, {"item_id": "1", "title": "A cat"}),
    "PixelRec": (pixelrec, {"item_id": "i1", "title": "Title 1", "topics": ["a", "b"], "content": "About 1"}),
    "Amazon Reviews 2023": (
        amazon,
        {"item_id": "B01", "title": "Spray 1", "topics": ["Beauty", "Hair"], "content": "Soft Smells good"},
    ),
    "H&M": (
        hm,
        {
            "item_id": "0108775011",
            "title": "Strap top",
            "topics": ["Vest top", "Upper body", "Black"],
            "content": "Jersey, soft",
        },
    ),
}


def test_every_recipe_is_tested():
    assert statements().keys() == FORMS.keys()


@pytest.mark.parametrize("name", FORMS)
def test_a_data_set_becomes_items_and_pairs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, first = FORMS[name]
    make()
    with duckdb.connect() as connection:
        connection.execute(statements()[name])

    items, rejects = load_items("items.parquet")
    assert len(rejects) == 0 and len(items) == 3
    by_id = {item["item_id"]: item for item in items}
    assert ["image" in by_id[item_id] for item_id in sorted(by_id)] == [True, False, False]
    read = by_id[first["item_id"]]
    assert {key: value for key, value in read.items() if key != "image"} == first

    assert pq.read_table("log.parquet").num_rows == 6
    assert main(["--interactions", "log.parquet", "--output", "pairs.parquet", "--window_days", "3"]) == 0
    pairs = pq.read_table("pairs.parquet").to_pylist()
    assert {pair["query_id"] for pair in pairs} | {pair["target_id"] for pair in pairs} == by_id.keys()
