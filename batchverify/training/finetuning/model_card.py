"""The model card of a fine-tuned backbone: what it comes from, what it learned from, what is known of it."""

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
| trained | {unfreeze} and what follows it: {trained:,} of {parameters:,} numbers |
| loss | {loss} |
| learned from | {training} |
| measured on | {dev} |

**How well it works.** {verdict}

| pairs | backbone | ROC AUC | TAR at FAR 1e-2 |
| --- | --- | --- | --- |
{figures}

Figures are those of cosines. TAR: the share of same pairs that are accepted where 1 % of different pairs are.

**How to use it.** Its vectors differ from its parent's: heads and cached embeddings of the parent do not fit. Fit a
head, then score with both:

```bash
batchverify train TRAIN --dev DEV --backbone {name}{flags} -o HEAD.safetensors
batchverify score MANIFEST --backbone {name}{flags} --head HEAD.safetensors -o OUT.parquet
```

**Known limits.** Those of its parent, and these:

- It moved towards the people and images that it learned from. On others it may be worse than its parent: measure it
  on labelled pairs of your own, and by groups of people (`batchverify evaluate --group-a … --group-b …`).
- The epoch was chosen on the dev pairs, so the figures on them flatter. Those of a test set do not.
- What the training images allow (consent, licence, law) holds for this file, too. Faces can be inferred from weights
  to some degree: share it as you would share the images.

**Licence.** The parent's licence, and the terms of the training images.
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card as Markdown. facts: a value for each name in `CARD`; `figures` a list of rows."""
    figures = "\n".join(f"| {' | '.join(row)} |" for row in facts["figures"])
    return CARD.format_map({**facts, "figures": figures})
