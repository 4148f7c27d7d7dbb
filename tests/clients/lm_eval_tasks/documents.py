"""A handful of documents for lm-eval: sums that the demo model has not seen in training."""

import json
from pathlib import Path

from datasets import Dataset

EVAL = Path(__file__).parents[2] / "fixtures" / "demo" / "eval.json"
NUM_DOCUMENTS = 12


def sums(**_: object) -> dict[str, Dataset]:
    """Question, answer, and three answers that are near it and wrong."""
    documents = []
    for sample in json.loads(EVAL.read_text())["tasks"]["add"][:NUM_DOCUMENTS]:
        left, right = sample["answer"].split(" = ")
        wrong = [f"{left} = {int(right) + off}" for off in (1, -10, 3)]
        documents.append(
            {"question": sample["messages"][-1]["content"], "answer": sample["answer"], "choices": [sample["answer"], *wrong]}
        )
    return {"test": Dataset.from_list(documents)}
