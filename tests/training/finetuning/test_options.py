"""Options of fine-tuning that are refused, and those that belong together."""

from pathlib import Path
from typing import Any

import pytest

from batchverify.errors import UsageError
from batchverify.options import LOSSES, MARGINS, FinetuneOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": "softmax"},
            "--loss must be one of pair, contrastive, triplet, supcon, arcface, distillation, got",
        ),
        ({"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ({"dtype": "int8"}, "--dtype must be one of"),
        ({"seed": -1}, "--seed must lie between 0 and 4294967295, got -1"),
        ({"dropout": 1.0}, "--dropout must be a share from 0 to below 1"),
        ({"lr_decay": 0.0}, "--lr-decay must be above 0 and at most 1, got 0.0"),
        ({"lr_decay": 1.5}, "--lr-decay must be above 0"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative"),
        ({"teacher_weight": float("nan")}, "--teacher-weight must not be negative, got nan"),
        ({"max_lr": 0.0}, "--max-lr must be positive"),
        ({"max_lr": float("inf")}, "--max-lr must be positive"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"patience": 0}, "--patience must be at least 1"),
        ({"accumulate": 0}, "--accumulate must be at least 1"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"checkpoint_steps": 0}, "--checkpoint-steps must be at least 1"),
        ({"augment": -1}, "--augment must be at least 0"),
        ({"batch_images": 4}, "--batch-images must be at least 8, got 4"),
        (
            {"margin_loss": 0.5, "loss": "pair"},
            "--margin-loss is for the losses contrastive, triplet, supcon, arcface, not for pair",
        ),
        ({"margin_loss": -0.5, "loss": "triplet"}, "--margin-loss must be positive"),
        ({"loss": "distillation"}, "--loss distillation learns the vectors of a --teacher"),
        ({"teacher": ""}, "--teacher must not be empty"),
        # Those of all commands that embed are checked, too.
        ({"engine": "none"}, "--engine must be one of"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(**changes)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    options = FinetuneOptions(loss=loss, teacher="compact", margin_loss=0.3 if loss in MARGINS else None)
    assert options.as_record()["teacher"] == "compact"


def test_defaults_and_paths():
    assert FinetuneOptions().as_record() == {}
    changes: Any = {"teacher": Path("a") / "b.safetensors"}
    assert FinetuneOptions(**changes).teacher == "a/b.safetensors"
