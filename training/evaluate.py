"""Measure a model on pairs: `python training/evaluate.py --model PATH --items ITEMS --pairs PAIRS --output DIR`.

Writes DIR/evaluation.json, DIR/evaluation.md (the same as tables), DIR/plots/*.png and DIR/rejects.jsonl (rows that were
left out, with the reason). `evaluate_model` gives the same content to Python callers. The JSON is:

    {
      "model": str, "compared_with": str | null, "settings": {option: value},
      "counts": {"items": int, "pairs": int, "rejected_rows": int},
      "metrics": {EMBEDDING: {
          "published":      {"queries": int, "candidates": int, "unknown_pairs": int, "repeated_pairs": int,
                             "metrics": {METRIC: INTERVAL}, "rank_percentiles": {"50": float, ...},
                             "random": {"recall@10": float, ...}},
          "multi_positive": {"queries": int, "candidates": int, "targets": int, "unknown_pairs": int,
                             "repeated_pairs": int, "metrics": {METRIC: INTERVAL}, "rank_percentiles": {...}},
          "labels":         {"items": int, "metrics": {"precision@10": INTERVAL}, "random": {...}} | null}},
      "slices": [{"embedding": EMBEDDING, "group": str, "slice": str, "queries": int,
                  "metrics": {"recall@10": INTERVAL, ...}}],
      "examples": {"embedding": EMBEDDING, "best": [EXAMPLE], "worst": [EXAMPLE]},
      "comparison": {EMBEDDING: {"published" | "multi_positive": {METRIC: {"value": float, "other": float,
                     "difference": float, "low": float, "high": float, "p_value": float}}}} | null,
      "plots": {"recall": "plots/recall.png", "slices": "plots/slices.png", ...}
    }

EMBEDDING: "both", "image", "text" (what the model is shown) and "visual" (the visual embedding of a model with mICL); one
is missing where no pair has what it needs. PROTOCOL "published": each kept pair's target among all items that are no
query; "multi_positive": all known targets of a query among all items but itself (`training.retrieval`).
METRIC: "recall@k", "ndcg@k", "mrr", and "hit_rate@k" (multi-positive). INTERVAL: {"value": float, "low": float,
"high": float}, a bootstrap interval over queries. rank_percentiles: e.g. "90": nine of ten targets rank there or better.
Slices are of the published protocol's queries, "group" being e.g. "query text length", "target popularity",
"query fields", "category". EXAMPLE: {"query_id": str, "target_id": str, "rank": int, "score": float,
"neighbours": [{"item_id": str, "score": float}]} with the five nearest candidates, nearest first. Scores are cosines.
`difference` is this model's value minus the other's; p_value is of a sign-flip permutation test over queries.
"""
