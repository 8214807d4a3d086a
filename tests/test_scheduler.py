"""The scheduler over a real cache and no model: random lives of requests, and the rules for chunks one by one."""

import itertools
from zlib import crc32

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gossamer.attention.policy import dense_policy
from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention
from gossamer.server.engine.logits import SampleRow
from gossamer.server.engine.pace import Pace
from gossamer.server.engine.request import Request, SamplingParams
from gossamer.server.engine.scheduler import PROMPT_LOGPROB_TOKENS, Limits, Part, Scheduler
from gossamer.server.engine.sequence import Sequence

PAGE = 4
LONGEST = 48  # tokens of a prompt and its answer in the random lives
GROUPS = group_heads([["all", "streaming"]])
POINT = dense_policy(1, 2).points[0]
ALL: tuple[Retention, ...] = (KeepAll(), KeepAll())
STREAMING: tuple[Retention, ...] = (KeepAll(), KeepSinkRecent(3, 6))


def make_scheduler(
    pages: tuple[int, int] = (4096, 4096),
    *,
    sequences: int = 8,
    step_tokens: int = 64,
    pace: Pace | None = None,
    prefix_caching: bool = True,
    page_size: int = PAGE,
) -> Scheduler:
    cache = KVCache(
        GROUPS,
        pages,
        ratio=1,
        head_dim=1,
        dtype=torch.float32,
        page_size=page_size,
        prefix_caching=prefix_caching,
    )
    return Scheduler(cache, Limits(sequences, step_tokens, 1.0), pace or Pace(1000.0), prefix_caching)


_arrivals = itertools.count()


def make_request(
    scheduler: Scheduler,
    prompt: list[int],
    *,
    max_tokens: int = 4,
    n: int = 1,
    priority: int = 0,
    rules: tuple[Retention, ...] = ALL,
    salt: bytes = b"",
    prompt_logprobs: int | None = None,
) -> list[Sequence]:
    """The choices of a request, as the engine makes them, added to the scheduler."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    request = Request(id="r", prompt=prompt, params=params, n=n, priority=priority, prompt_logprobs=prompt_logprobs)
    arrival, choices = next(_arrivals), list[Sequence]()
    for index in range(n):
        table, row = scheduler.cache.table(rules, salt), SampleRow(params, seed=0)
        leader = choices[0] if choices else None
        choices.append(Sequence(request, index, arrival, POINT, table, row, list(prompt), leader))
    for sequence in choices:
        scheduler.add(sequence)
    return choices


def run_step(scheduler: Scheduler) -> list[Part]:
    """Plan, compute and sample one step the way the engine's loop does; the next token is always 1."""
    parts = scheduler.plan()
    for sequence, first, new, _ in parts:
        if sequence.lacks_prompt_logprobs:
            known = len(sequence.prompt_logprobs) or 1
            sequence.prompt_logprobs = [None] * max(known, min(first + new + 1, sequence.prompt_length))
    scheduler.launched(parts)
    scheduler.arrived(parts)
    for part in parts:
        if part.samples:
            part.sequence.append(1)
            if part.sequence.generated >= part.sequence.request.params.max_tokens:
                scheduler.remove(part.sequence)
    scheduler.cache.audit()
    return parts


def shares(parts: list[Part]) -> dict[Sequence, int]:
    return {part.sequence: part.new for part in parts}


class Lives(RuleBasedStateMachine):
    """Requests come, compute, are preempted, cancelled and finish, in a cache that is nearly too small for them. Where
    steps are launched `ahead`, each is planned before the one before it has said whether its choices go on."""

    @initialize(
        spare=st.tuples(st.integers(0, 8), st.integers(0, 8)),
        sequences=st.integers(1, 5),
        step_tokens=st.integers(5, 24),
        seconds_per_unit=st.sampled_from([None, 0.001, 0.1, 10.0]),
        prefix_caching=st.booleans(),
        ahead=st.booleans(),
    )
    def start(
        self,
        spare: tuple[int, int],
        sequences: int,
        step_tokens: int,
        seconds_per_unit: float | None,
        prefix_caching: bool,
        ahead: bool,
    ) -> None:
        least = KeepAll().most_pages(LONGEST, step_tokens, PAGE)
        self.scheduler = make_scheduler(
            (least + spare[0], least + spare[1]),
            sequences=sequences,
            step_tokens=step_tokens,
            pace=Pace(20.0, seconds_per_unit),
            prefix_caching=prefix_caching,
        )
        self.ahead = ahead
        self.under_way: list[list[Part]] = []
        self.whole = True  # no step broke off in the middle
        self.alive: list[Sequence] = []
        self.salts: dict[Sequence, bytes] = {}
        self.ends: dict[Sequence, int] = {}  # tokens after which the choice turns out to have ended
        self.computed: set[tuple[bytes, tuple[int, ...]]] = set()  # every prefix of whole pages computed so far
        self.queried = self.hits = 0

    @rule(
        shared=st.sampled_from([0, 0, 5, 8, 17, 40]),
        own=st.integers(1, 9),
        variant=st.integers(2, 3),
        max_tokens=st.integers(1, 30),
        n=st.sampled_from([1, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        rules=st.sampled_from([ALL, STREAMING]),
        salted=st.booleans(),
        scored=st.sampled_from([None, None, None, 0]),
        early=st.sampled_from([0, 0, 1, 2, 7]),
    )
    def submit(
        self,
        shared: int,
        own: int,
        variant: int,
        max_tokens: int,
        n: int,
        priority: int,
        rules: tuple[Retention, ...],
        salted: bool,
        scored: int | None,
        early: int,
    ) -> None:
        prompt = ([0] * shared + [variant] * own)[: LONGEST - max_tokens]
        salt = repr((rules, salted)).encode()
        choices = make_request(
            self.scheduler,
            prompt,
            max_tokens=max_tokens,
            n=n,
            priority=priority,
            rules=rules,
            salt=salt,
            prompt_logprobs=scored,
        )
        self.alive += choices
        self.salts.update(dict.fromkeys(choices, salt))
        self.ends.update(dict.fromkeys(choices, max(1, max_tokens - early)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)
        assert sequence.ended and sum(sequence.table.held) == 0
        self.check()

    @precondition(lambda self: self.alive)
    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        while count and self.alive:
            self.step()
            count -= 1

    def step(self) -> None:
        scheduler, self.whole = self.scheduler, False
        before = {s: (s.running, s.computed, s.preemptions) for s in self.alive}
        due = {s for s in self.alive if s.pending}
        waited_first = [s for s in scheduler.waiting if s.admitted_at is None]
        parts = scheduler.plan()
        assert parts or self.under_way, "there was work, and nothing was planned"
        self.check()
        preempted = [s for s in self.alive if s.preemptions > before[s][2]]
        for sequence, first, new, _ in parts:
            ran, done, _ = before[sequence]
            assert sequence.running and new >= 1
            assert first == (done if ran else sequence.cached if sequence.preemptions == 0 else first)
            assert first + new == sequence.computed <= sequence.chosen
            assert sequence.computed < sequence.prompt_length + sequence.request.params.max_tokens
        assert sum(part.new for part in parts) <= scheduler.limits.step_tokens
        assert len(scheduler.running) <= scheduler.limits.sequences
        for first_in_rank in scheduler.running[:1]:
            assert first_in_rank in shares(parts) or first_in_rank not in due, "the first in rank stood still"
        if preempted:
            assert max(s.rank for s in scheduler.running) < min(s.rank for s in preempted)
        self.admitted([s for s in waited_first if s.running or s in preempted])
        self.compute(parts)
        if parts:
            self.under_way.append(parts)
        while len(self.under_way) > (1 if self.ahead and parts else 0):
            self.finish(self.under_way.pop(0))
        self.whole = True

    def admitted(self, sequences: list[Sequence]) -> None:
        """Prefix hits are counted once per choice, and only what was computed before is found."""
        for sequence in sequences:
            sequence.admitted_at = 0.0
            self.queried += sequence.prompt_length
            self.hits += sequence.cached
            assert sequence.cached % PAGE == 0 and sequence.cached < sequence.prompt_length
            if sequence.cached:
                assert self.scheduler.prefix_caching
                assert sequence.request.prompt_logprobs is None or sequence.index > 0
                assert (self.salts[sequence], tuple(sequence.tokens[: sequence.cached])) in self.computed
        assert (self.scheduler.queried_tokens, self.scheduler.hit_tokens) == (self.queried, self.hits)

    def compute(self, parts: list[Part]) -> None:
        """Write a hash of the prefix where each new token's key belongs, and read back what its query may see."""
        if not parts:
            return
        views = self.scheduler.cache.views([part.sequence.table for part in parts])
        for row, (sequence, first, new, _) in enumerate(parts):
            salt, tokens = self.salts[sequence], sequence.tokens + [1] * sequence.unread
            expected = [float(crc32(salt + bytes(tokens[: i + 1])) & 0xFFFF) for i in range(sequence.computed)]
            for view in views.layer(0):
                table, last = view.table[row].tolist(), sequence.computed - 1
                for position in range(first, first + new):
                    view.k[0, table[position // PAGE], position % PAGE, 0] = expected[position]
                sink, window = int(view.sink[row, 0]), int(view.window[row, 0])
                for position in range(sequence.computed):
                    if position < sink or position > last - window:
                        page = table[position // PAGE]
                        assert page != NULL_PAGE
                        assert float(view.k[0, page, position % PAGE, 0]) == expected[position]
            for end in range(PAGE, sequence.computed + 1, PAGE):
                self.computed.add((salt, tuple(tokens[:end])))
        self.scheduler.launched(parts)
        self.check()

    def finish(self, parts: list[Part]) -> None:
        """The results are there. Choices may have ended meanwhile, or been preempted."""
        self.scheduler.arrived(parts)
        for part in parts:
            sequence = part.sequence
            if sequence.lacks_prompt_logprobs:
                known = max(part.first + part.new + 1, len(sequence.prompt_logprobs))
                sequence.prompt_logprobs = [None] * min(known, sequence.prompt_length)
            if part.samples and not sequence.ended:
                sequence.append(1)
                if sequence.generated >= self.ends[sequence]:
                    self.scheduler.remove(sequence)
                    self.alive.remove(sequence)
        self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.cache.audit()
        for queue in (scheduler.waiting, scheduler.running):
            assert [s.rank for s in queue] == sorted(s.rank for s in queue)
        assert not set(scheduler.waiting) & set(scheduler.running)
        assert set(scheduler.waiting) | set(scheduler.running) == set(self.alive)
        assert all(s.running == (s in scheduler.running) for s in self.alive)
        assert all(sum(s.table.held) == 0 for s in scheduler.waiting)

    def teardown(self) -> None:
        """Everything ends: each step brings the first in rank forward, so everyone's tokens bound the steps."""
        if not getattr(self, "whole", False):
            return
        bound = 10 + 2 * sum(s.prompt_length + s.request.params.max_tokens for s in self.alive)
        while self.alive or self.under_way:
            self.step()
            bound -= 1
            assert bound > 0, "the sequences do not come to an end"
        assert all(stats.pages_owned == 0 for stats in self.scheduler.cache.stats())
        assert all(sequence.unread == 0 for sequence in self.salts)


Lives.TestCase.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


def test_short_prompts_overtake_a_long_one() -> None:
    scheduler = make_scheduler(step_tokens=128, page_size=16)
    (long,) = make_request(scheduler, [1] * 3000)
    assert shares(run_step(scheduler)) == {long: 128}
    (short,) = make_request(scheduler, [2] * 20)
    (middle,) = make_request(scheduler, [3] * 100)
    assert shares(run_step(scheduler)) == {long: 64, short: 20, middle: 32}
    assert shares(run_step(scheduler)) == {short: 1, long: 64, middle: 48}


def test_first_in_rank_always_gets_a_page() -> None:
    """Even when the time that a step may take is long used up; the others then get nothing."""
    scheduler = make_scheduler(step_tokens=128, page_size=16, pace=Pace(1000.0, seconds_per_unit=100.0))
    (first,) = make_request(scheduler, [1] * 100)
    (second,) = make_request(scheduler, [2] * 30)
    for _ in range(6):
        assert shares(run_step(scheduler)) == {first: 16}
    assert shares(run_step(scheduler)) == {first: 4}
    assert shares(run_step(scheduler)) == {first: 1, second: 16}


def test_step_budget_holds_though_the_first_in_rank_must_move() -> None:
    """With all other sequences generating, one token of the budget is left for the prompt of the first."""
    scheduler = make_scheduler(sequences=4, step_tokens=4, page_size=16)
    others = [make_request(scheduler, [1], max_tokens=50)[0] for _ in range(3)]
    run_step(scheduler)
    (first,) = make_request(scheduler, [2] * 40, priority=-1)
    for _ in range(3):
        assert shares(run_step(scheduler)) == dict.fromkeys([first, *others], 1)


def test_step_budget_is_not_a_multiple_of_the_page() -> None:
    """The first gets its page although half of the budget is less than that; the rest stays within the budget."""
    scheduler = make_scheduler(step_tokens=20, page_size=16)
    (first,) = make_request(scheduler, [1] * 40)
    (second,) = make_request(scheduler, [2] * 20)
    got = shares(run_step(scheduler))
    assert got[first] == 16 and sum(got.values()) <= 20
    assert second not in got or got[second] == 4


def test_chunks_end_at_pages() -> None:
    scheduler = make_scheduler(step_tokens=50, page_size=16)
    (one,) = make_request(scheduler, [1] * 120)
    assert [run_step(scheduler)[0].new for _ in range(3)] == [48, 48, 24]
    assert one.generated == 1


def test_steps_are_bounded_in_time_while_others_wait() -> None:
    """One second allows 100 units: 100 tokens without context, less behind a long prefix, all of it when alone."""
    pace = Pace(crossover=500.0, seconds_per_unit=0.01)
    alone = make_scheduler(step_tokens=1000, page_size=16, pace=pace)
    make_request(alone, [1] * 1500)
    assert run_step(alone)[0].new == 992
    scheduler = make_scheduler(step_tokens=1000, page_size=16, pace=pace)
    (long,) = make_request(scheduler, [1] * 1500)
    make_request(scheduler, [1], max_tokens=200)
    seen = []
    while long.generated == 0:
        parts = run_step(scheduler)
        assert pace.predict((p.first, p.new) for p in parts) <= 1.0 + 1e-9
        seen.append(shares(parts)[long])
    assert seen[0] == 80 and seen == sorted(seen, reverse=True) and seen[-2] == 16


def test_generated_tokens_come_first() -> None:
    scheduler = make_scheduler(step_tokens=16)
    generating = [make_request(scheduler, [i], max_tokens=9)[0] for i in range(3)]
    run_step(scheduler)
    (prompt,) = make_request(scheduler, [9] * 100)
    assert shares(run_step(scheduler)) == {**dict.fromkeys(generating, 1), prompt: 12}


def test_choices_wait_for_the_prompt_of_the_first() -> None:
    scheduler = make_scheduler(step_tokens=12)
    choices = make_request(scheduler, [1] * 21, n=3)
    assert shares(run_step(scheduler)) == {choices[0]: 12}
    assert shares(run_step(scheduler)) == {choices[0]: 9}
    assert shares(run_step(scheduler)) == dict.fromkeys(choices, 1)
    assert [choice.cached for choice in choices] == [0, 20, 20]
    assert (scheduler.queried_tokens, scheduler.hit_tokens) == (63, 40)


def test_choices_do_not_wait_for_what_ended() -> None:
    scheduler = make_scheduler(step_tokens=12)
    choices = make_request(scheduler, [1] * 100, n=2)
    run_step(scheduler)
    scheduler.remove(choices[0])
    assert run_step(scheduler)[0].sequence is choices[1]


def test_choices_share_nothing_without_prefix_caching() -> None:
    scheduler = make_scheduler(step_tokens=64, prefix_caching=False)
    choices = make_request(scheduler, [1] * 21, n=3)
    assert shares(run_step(scheduler)) == dict.fromkeys(choices, 21)
    assert [choice.cached for choice in choices] == [0, 0, 0]


def test_scored_prompts_are_computed_whole_and_in_small_chunks() -> None:
    """Cached pages would leave their positions without logits; and logits of every position are large."""
    scheduler = make_scheduler(step_tokens=2048, page_size=64)
    make_request(scheduler, [1] * 600, max_tokens=1)
    run_step(scheduler)
    (scored,) = make_request(scheduler, [1] * 600, prompt_logprobs=0)
    steps = [shares(run_step(scheduler))[scored] for _ in range(4)]
    assert steps == [PROMPT_LOGPROB_TOKENS, PROMPT_LOGPROB_TOKENS, 600 - 2 * PROMPT_LOGPROB_TOKENS, 1]
    assert scored.cached == 0


def test_no_one_overtakes_whoever_finds_no_room() -> None:
    """A sequence that does not fit keeps those behind it waiting, so it cannot starve; whoever ends lets it in."""
    scheduler = make_scheduler((20, 20), step_tokens=64)
    (running,) = make_request(scheduler, [1] * 40)
    run_step(scheduler)
    (large,) = make_request(scheduler, [2] * 60)
    (small,) = make_request(scheduler, [3] * 4)
    run_step(scheduler)
    assert scheduler.running == [running] and scheduler.waiting == [large, small]
    scheduler.remove(running)
    assert list(shares(run_step(scheduler))) == [large, small]


def test_pages_are_taken_from_the_last_in_rank() -> None:
    """Both were admitted with room for what they hold; the first outgrows it and the other is recomputed later."""
    scheduler = make_scheduler((10, 10), step_tokens=64, prefix_caching=False)
    (first,) = make_request(scheduler, [1] * 19, max_tokens=12)
    (second,) = make_request(scheduler, [2] * 19, max_tokens=12)
    while not second.preemptions:
        assert run_step(scheduler)
    assert scheduler.waiting == [second] and scheduler.running == [first] and scheduler.preemptions == 1
    kept = second.generated
    assert kept > 0
    while first in scheduler.running:
        run_step(scheduler)
    parts = run_step(scheduler)
    assert parts == [Part(second, 0, 19 + kept, True)] and second.cached == 0
    assert first.preemptions == 0


def test_a_page_is_found_once_its_tokens_are_known() -> None:
    """Its last one is chosen by a step that is still under way when the next one fills the page."""
    scheduler = make_scheduler()
    (sequence,) = make_request(scheduler, [2, 3, 4], max_tokens=3)
    first = scheduler.plan()
    scheduler.launched(first)
    second = scheduler.plan()
    assert (first, second) == ([Part(sequence, 0, 3, True)], [Part(sequence, 3, 1, True)]) and sequence.unread == 1
    scheduler.launched(second)
    assert (sequence.computed, sequence.unread, sequence.table.num_sealed) == (PAGE, 2, 0)
    scheduler.arrived(first)
    sequence.append(1)
    assert sequence.table.num_sealed == 0
    third = scheduler.plan()
    assert third == [Part(sequence, 4, 1, True)]
    scheduler.launched(third)
    assert sequence.table.num_sealed == 1 and scheduler.plan() == [], "the last token that was asked for"
    scheduler.arrived(second)
    scheduler.remove(sequence)
    (again,) = make_request(scheduler, [2, 3, 4, 1, 1])
    assert shares(scheduler.plan()) == {again: 1} and again.cached == PAGE


def test_a_page_that_the_last_step_filled_is_found() -> None:
    scheduler = make_scheduler()
    (sequence,) = make_request(scheduler, [2, 3, 4], max_tokens=2)
    steps = list[list[Part]]()
    for _ in range(2):
        steps.append(scheduler.plan())
        scheduler.launched(steps[-1])
    assert scheduler.plan() == []
    for parts in steps:
        scheduler.arrived(parts)
        sequence.append(1)
    scheduler.remove(sequence)
    (again,) = make_request(scheduler, [2, 3, 4, 1, 1])
    assert shares(scheduler.plan()) == {again: 1} and again.cached == PAGE


def test_what_was_not_launched_is_not_found() -> None:
    """A prompt whose second chunk fails to be launched while the first is under way."""
    scheduler = make_scheduler(step_tokens=4)
    (sequence,) = make_request(scheduler, [2] * 12)
    first = scheduler.plan()
    scheduler.launched(first)
    assert scheduler.plan() == [Part(sequence, 4, 4, False)]
    scheduler.arrived(first)
    scheduler.remove(sequence)
    (again,) = make_request(scheduler, [2] * 12)
    assert shares(scheduler.plan()) == {again: 4} and again.cached == 4


@given(crossover=st.floats(50, 1e5), first=st.integers(0, 10**6), units=st.floats(0, 1e7))
def test_most_tokens_is_the_inverse_of_work(crossover: float, first: int, units: float) -> None:
    pace = Pace(crossover)
    most = pace.most_tokens(first, units)
    assert pace.work(first, most) <= units * (1 + 1e-6) + 1e-6
    assert pace.work(first, most + 1) >= units * (1 - 1e-6) - 1e-6


def test_pace_learns_from_large_steps() -> None:
    pace = Pace(1000.0)
    assert pace.predict([(0, 500)]) == 0.0
    pace.learn([(0, 100)], 50.0)
    assert pace.seconds_per_unit is None, "a small step is overhead, not work"
    pace.learn([(0, 500)], 2.0)
    assert abs(pace.predict([(0, 500)]) - 2.0) < 1e-9
    for _ in range(100):
        pace.learn([(0, 500)], 4.0)
    assert abs(pace.predict([(0, 500)]) - 4.0) < 1e-3
