"""A request on its way: its choices, and where its events go."""

from collections.abc import Callable
from dataclasses import dataclass, field

from gossamer.server.engine.choice import Choice
from gossamer.server.engine.request import Event, Request
from gossamer.server.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class InFlight:
    """Touched by the engine thread alone, once submitted."""

    request: Request
    publish: Callable[[Event], None]
    choices: dict[Sequence, Choice]
    arrived: float  # monotonic seconds
    started: bool = False  # whether `Started` has been published
    prompt_counted: bool = True  # whether its prompt tokens still count as waiting
    unqueued: set[int] = field(default_factory=set)  # choices that no longer count as waiting
