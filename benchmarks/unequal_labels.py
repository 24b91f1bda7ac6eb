"""Write the support desk's queries as a file that people have: intents with 2 to 12 queries, not with 12 each.

    python benchmarks/unequal_labels.py FOLDER

FOLDER/unequal_train.jsonl has 136 of the training queries, and FOLDER/unequal_test.jsonl, from the test and the
validation queries, twice as many of each intent. For benchmarks/studies/unequal_labels.yaml.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from bloblora import data

COUNTS = (2, 3, 4, 6, 9, 12)
"""How many queries an intent may have, each as likely."""


def by_label(*splits: str) -> dict[str, list[dict[str, Any]]]:
    """The queries of each intent, of some splits together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for split in splits:
        for record in data.support_desk(split):
            groups.setdefault(record["label"], []).append(record)
    return dict(sorted(groups.items()))


def main() -> None:
    """Write both files."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    folder, generator = Path(sys.argv[1]), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = by_label("train"), by_label("test", "validation")
    counts = {label: generator.choice(COUNTS) for label in train}
    for name, groups, times in (("train", train, 1), ("test", test, 2)):
        records = [r for label, group in groups.items() for r in generator.sample(group, times * counts[label])]
        lines = [json.dumps({"text": record["text"], "label": record["label"]}) for record in records]
        (folder / f"unequal_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / f'unequal_{name}.jsonl'}: {len(records)} records")


if __name__ == "__main__":
    main()
