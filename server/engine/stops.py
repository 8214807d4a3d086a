"""Stop strings: found across token boundaries, with no more text held back than could still become one."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A prefix of a stop string (Aho and Corasick, 1975)."""

    depth: int
    next: dict[str, "_Node"] = field(default_factory=dict)
    fail: "_Node | None" = None  # the longest shorter suffix that is a prefix of a stop string too
    found: str | None = None  # the longest stop string that ends here


class StopStrings:
    """All stop strings of a request as one automaton: a character costs the same however many there are. Choices may
    share it.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.root = _Node(0)
        for stop in stops:
            node = self.root
            for char in stop:
                node = node.next.setdefault(char, _Node(node.depth + 1))
            if stop:
                node.found = stop
        queue = deque(self.root.next.values())
        for node in queue:
            node.fail = self.root
        while queue:
            node = queue.popleft()
            for char, child in node.next.items():
                child.fail = self._follow(node.fail, char)
                if child.found is None:
                    child.found = child.fail.found
                queue.append(child)

    def step(self, node: _Node, char: str) -> _Node:
        """The longest prefix of a stop string with which the text ends, after one more character."""
        following = node.next.get(char)
        return following if following is not None else self._follow(node.fail, char)

    def _follow(self, node: _Node | None, char: str) -> _Node:
        while node is not None:
            if (following := node.next.get(char)) is not None:
                return following
            node = node.fail
        return self.root


class StopChecker:
    """Watches the text of one choice. The stop string that is complete first wins; of those that end at the same
    character, the longest.

    So the outcome depends on the text alone, never on how it was cut into tokens.
    """

    def __init__(self, stops: StopStrings | Iterable[str], *, include_stop_str_in_output: bool = False) -> None:
        self._stops = stops if isinstance(stops, StopStrings) else StopStrings(stops)
        self._include = include_stop_str_in_output
        self._node = self._stops.root
        self._held = ""  # always as long as self._node is deep

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that may be sent, and the stop string that ends the choice, if there is one now."""
        node, step, root = self._node, self._stops.step, self._stops.root
        if not root.next:
            return text, None
        for i, char in enumerate(text):
            node = step(node, char)
            if node.found is not None:
                whole = self._held + text[: i + 1]
                self._node, self._held = root, ""
                return (whole if self._include else whole[: len(whole) - len(node.found)]), node.found
        whole = self._held + text
        cut = len(whole) - node.depth
        self._node, self._held = node, whole[cut:]
        return whole[:cut], None

    def skip(self, text: str) -> str:
        """Text in which stop strings do not count (before min_tokens): sent as it is, after what was held back."""
        whole = self._held + text
        self._node, self._held = self._stops.root, ""
        return whole

    def flush(self) -> str:
        """What was held back, when the choice ends for another reason."""
        return self.skip("")
