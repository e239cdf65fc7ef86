"""Select layers: all linear layers except some, by name or by regular expression."""

from __future__ import annotations

from transformers import BertConfig, BertForSequenceClassification

import hra_fx


def model() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def show(title: str, **fields: object) -> None:
    adapted = hra_fx.transform(model(), hra_fx.HRAConfig(r=4, **fields))
    paths = [row.path.removeprefix("bert.encoder.layer.") for row in hra_fx.report(adapted)]
    print(f"{title}: {len(paths)} layers\n  {', '.join(paths)}")


def main() -> None:
    show("all-linear without the feed-forward layers", target_modules="all-linear",
         exclude_modules=["intermediate.dense", "output.dense", "pooler.dense"])  # fmt: skip
    show("a regular expression without block 0", target_modules=r".*\.(query|key)", exclude_modules=r".*layer\.0\..*")


if __name__ == "__main__":
    main()
