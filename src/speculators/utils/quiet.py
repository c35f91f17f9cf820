"""Keeps transformers and the hub from drawing progress bars of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turns progress bars of loading and downloading off inside the block, or in a function that it decorates."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()  # the hub's too
    try:
        yield
    finally:
        logging.enable_progress_bar()
