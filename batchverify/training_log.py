"""What training tells while it runs: a line an epoch, TensorBoard if asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from batchverify.errors import UsageError
from batchverify.network import Epoch


class TrainingLog:
    """Takes epochs as they end; a context that writes out what it holds. tensorboard: its folder, or None.

    Raises `UsageError` where TensorBoard is asked for and not installed, or its folder cannot be made.
    """

    def __init__(self, epochs: int, *, quiet: bool = False, tensorboard: str | None = None) -> None:
        self._epochs = epochs
        self._quiet = quiet
        self._writers: dict[str, Any] = {}
        self._open_writer = _tensorboard(tensorboard) if tensorboard is not None else None
        self.seed = 0

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._open_writer is not None and not self._writers and kind is None:
            self.say("warning: --tensorboard: nothing was written, for only networks have epochs to log")

    def say(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self._quiet:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def epoch(self, name: str, epoch: Epoch) -> None:
        """Show and keep one epoch of the network called `name`."""
        self.say(
            f"{name}  epoch {epoch.epoch}/{self._epochs}  loss {epoch.loss:.4f}  dev loss {epoch.dev_loss:.4f}  "
            f"dev F1 {epoch.dev_f1:.4f}  dev AUC {epoch.dev_auc:.5f}  lr {epoch.lr:.2g}"
        )
        if self._open_writer is None:
            return
        run = f"{name.replace(':', '-')}-seed{self.seed}"
        if run not in self._writers:
            self._writers[run] = self._open_writer(run)
        for tag, value in vars(epoch).items():
            if tag not in ("epoch", "seconds"):
                self._writers[run].add_scalar(tag, value, epoch.epoch)


def _tensorboard(folder: str) -> Callable[[str], Any]:
    """What opens TensorBoard's writer for a run; the folder for its files is made: local ones are tried at once."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise UsageError("--tensorboard needs TensorBoard: pip install tensorboard") from exc
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--tensorboard {folder}: the folder cannot be made: {exc.strerror}") from exc
    return lambda run: SummaryWriter(f"{folder}/{run}")
