"""The model card of a fine-tuned backbone: what it comes from, what it was trained on, what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD = """# Model card: {name}

Written by `batchverify finetune` {version}. The record beside this file, `{record}`, has every option and figure.

| | |
| --- | --- |
| parent | `{parent}`, fingerprint `{parent_fingerprint}` |
| fingerprint | `{fingerprint}` |
| faces | {size} pixels, {settings} |
| vectors | {dimension} numbers |
| trained | {unfreeze} and the blocks after it: {trained:,} of {parameters:,} numbers |
| loss | {loss} |
| trained on | {training} |
| epoch chosen on | {dev} |

**How well it works.** {verdict}

| pairs | backbone | ROC AUC | TAR at FAR 1e-2 |
| --- | --- | --- | --- |
{figures}

Figures are of cosines. TAR: the share of same pairs accepted at a threshold that accepts 1 % of different pairs.

**How to use it.** Its vectors differ from its parent's, so heads and cached embeddings of the parent do not fit.
Train a head, then score with both:

```bash
batchverify train TRAIN --dev DEV --backbone {name}{flags} -o HEAD.safetensors
batchverify score MANIFEST --backbone {name}{flags} --head HEAD.safetensors -o OUT.parquet
```

**Known limits.** Those of its parent, and these:

- It was adapted to the people and images that it was trained on. On others it may be worse than its parent. Measure
  it on labelled pairs of your own, and by groups of people (`batchverify evaluate --group-a … --group-b …`).
- The epoch was chosen on the dev pairs, so the figures on them are optimistic. Those on a test set are not.
- What consent, licences and law allow for the training images holds for this file, too. To some degree, faces can be
  inferred from weights: share the file as you would share the images.

**Licence.** The parent's licence, and the terms of the training images.
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown. facts: a value for each name in `CARD`; `figures` a list of rows."""
    figures = "\n".join(f"| {' | '.join(row)} |" for row in facts["figures"])
    return CARD.format_map({**facts, "figures": figures})
