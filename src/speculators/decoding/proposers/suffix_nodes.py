"""The nodes of a suffix index: counted strings whose children stay in order (see `suffix_index.py` for the order)."""

from __future__ import annotations

from dataclasses import dataclass, field


class Node:
    """A string that occurs: its count, and what follows it. A leaf (children None) has one occurrence: seq[start:]."""

    __slots__ = (
        "children",
        "count",
        "depth",
        "first_of_count",
        "head",
        "left",
        "parent",
        "right",
        "sequence",
        "start",
        "token",
    )

    def __init__(self, depth: int, parent: Node | None = None, token: int = -1):
        self.depth, self.parent, self.token, self.count = depth, parent, token, 1
        self.left: Node | None = None  # siblings in order
        self.right: Node | None = None
        self.children: dict[int, Node] | None = None
        self.head: Node | None = None  # first child
        self.first_of_count: dict[int, Node] = {}
        self.sequence: Text | None = None
        self.start = 0

    def add_child(self, token: int) -> Node:
        """A new child of count 1, last of all."""
        assert self.children is not None
        child = Node(self.depth + 1, self, token)
        last = self.first_of_count.get(0)  # key 0: the last child of all
        if last is None:
            self.head = child
        else:
            last.right, child.left = child, last
        self.first_of_count[0] = child
        self.first_of_count.setdefault(1, child)
        self.children[token] = child
        return child

    def _unlink(self, child: Node) -> None:
        if self.first_of_count.get(child.count) is child:
            same = child.right is not None and child.right.count == child.count
            if same:
                self.first_of_count[child.count] = child.right  # type: ignore[assignment]
            else:
                del self.first_of_count[child.count]
        if self.first_of_count[0] is child:
            if child.left is None:
                del self.first_of_count[0]
            else:
                self.first_of_count[0] = child.left
        if child.left is None:
            self.head = child.right
        else:
            child.left.right = child.right
        if child.right is not None:
            child.right.left = child.left
        child.left = child.right = None

    def _insert_before(self, child: Node, place: Node | None) -> None:
        """Before `place`, or last."""
        left = self.first_of_count.get(0) if place is None else place.left
        child.left, child.right = left, place
        if left is None:
            self.head = child
        else:
            left.right = child
        if place is None:
            self.first_of_count[0] = child
        else:
            place.left = child

    def increment(self, child: Node) -> None:
        """Count one more occurrence: a group's first child moves to the front of the next group, others to its end."""
        first = self.first_of_count[child.count]
        group_above = self.first_of_count.get(child.count + 1)
        place = first if first is not child else group_above or child.right
        self._unlink(child)
        child.count += 1
        self._insert_before(child, place)
        if group_above is None or place is group_above:
            self.first_of_count[child.count] = child

    def decrement(self, child: Node) -> None:
        """Count one occurrence less: the child moves before those of its new count, and is removed at 0."""
        assert self.children is not None
        count = child.count
        place = child.right
        while place is not None and place.count >= count:
            place = place.right
        self._unlink(child)
        child.count -= 1
        if child.count == 0:
            del self.children[child.token]
            return
        self._insert_before(child, place)
        self.first_of_count[child.count] = child


@dataclass
class Text:
    """A growing text, and the nodes at which its suffixes end (those that are not leaves)."""

    tokens: list[int] = field(default_factory=list)
    open_nodes: list[Node] = field(default_factory=list)
