"""Events as lines of text."""

from __future__ import annotations

import sys

from speculators.train.events import Event, Note, Saved, Started, StepDone, Stopped, Validated


def print_event(event: Event) -> None:
    print(line(event), file=sys.stderr, flush=True)


def line(event: Event) -> str:
    match event:
        case Note(text):
            return text
        case Started():
            return (
                f"{event.num_documents} documents of {event.num_tokens} tokens, {event.num_trainable_params:,} "
                f"trainable parameters, steps {event.first_step}..{event.num_steps}"
            )
        case StepDone():
            return f"step {event.step}/{event.num_steps} epoch {event.epoch} {numbers(event)} lr {event.lr:.2e} " + (
                f"{event.tokens_per_s:,.0f} tokens/s"
            )
        case Validated():
            return f"validation after step {event.step}: {numbers(event)}"
        case Saved(path, _):
            return f"saved {path}"
        case Stopped(path, signal_name):
            return f"{signal_name}: saved {path}"


def numbers(event: StepDone | Validated) -> str:
    length = "" if event.acceptance_length is None else f" acceptance length {event.acceptance_length:.2f}"
    return f"loss {event.metrics.get('loss', float('nan')):.4f}{length}"
