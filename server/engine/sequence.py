"""One choice of one request on its way through the engine: its tokens, its pages, how far it is."""

from dataclasses import dataclass, field

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.reads import SpanReads
from gossamer.kvcache.cache import PageTable
from gossamer.server.engine.logits import SampleRow
from gossamer.server.engine.request import Request, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """Touched by the engine thread alone.

    Progress is one number, `computed`: prompt chunks, generated tokens, prefix hits and recomputation after a
    preemption all move it towards `chosen`.
    """

    request: Request
    index: int  # of the choice
    arrival: int  # count of requests: who came first
    point: OperatingPoint
    table: PageTable  # empty while waiting
    row: SampleRow  # how its tokens are chosen
    tokens: list[int]  # the prompt, then what was generated, as far as the host knows
    leader: "Sequence | None" = None  # the choice of the same request whose prompt pages this one waits to reuse
    unread: int = 0  # tokens behind `tokens` that steps under way choose: only the device knows them
    settled: int = 0  # tokens whose computation has come to its end
    running: bool = False
    cached: int = 0  # tokens found in the prefix cache at first admission
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    preemptions: int = 0
    reads: SpanReads = SpanReads(0.0, 0.0, 0.0, 0.0)  # so far
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # known so far; the first is None
    ended: bool = False
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    def append(self, token: int) -> None:
        """`token` has been sampled."""
        self.tokens.append(token)
        self.row.append(token)

    @property
    def chosen(self) -> int:
        """Length of the prompt and all that was generated, on the host or not."""
        return len(self.tokens) + self.unread

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache, or will be after the step under way."""
        return self.table.length

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be sampled; none when no next one may come."""
        last = self.prompt_length + max(0, self.request.params.max_tokens - 1)
        return min(self.chosen, last) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: lower priority number, earlier arrival, lower choice."""
        return self.request.priority, self.arrival, self.index

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are wanted and not all known; the first choice computes them."""
        if self.request.prompt_logprobs is None or self.index > 0:
            return False
        return len(self.prompt_logprobs) < self.prompt_length
