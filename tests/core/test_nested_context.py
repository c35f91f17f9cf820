"""A nested context sets up once, restores once, and undoes what it had done when setting up fails."""

import pytest

from speculators.utils.util import NestedContext


class Recorder(NestedContext):
    def __init__(self, fails: bool = False):
        self.events: list[str] = []
        self.fails = fails

    def set_up(self, stack):
        self.events.append("set up")
        stack.callback(self.events.append, "restored")
        if self.fails:
            raise OSError("half way")


def test_inner_entries_neither_set_up_nor_restore():
    context = Recorder()
    with context as outer, context as inner:
        assert outer is inner is context
        assert context.events == ["set up"]
    assert context.events == ["set up", "restored"]
    with context:
        assert context.events == ["set up", "restored", "set up"]
    assert context.events == ["set up", "restored"] * 2


def test_leaving_the_inner_block_by_an_error_keeps_the_outer_one_set_up():
    context = Recorder()
    with context:
        with pytest.raises(KeyError), context:
            raise KeyError
        assert context.events == ["set up"]
    assert context.events == ["set up", "restored"]


def test_a_failed_set_up_is_undone_and_may_be_tried_again():
    context = Recorder(fails=True)
    with pytest.raises(OSError, match="half way"), context:
        raise AssertionError("not reached")
    assert context.events == ["set up", "restored"]
    context.fails = False
    with context:
        assert context.events[2:] == ["set up"]
    assert context.events[2:] == ["set up", "restored"]
