"""parse_object agrees with the standard library on every object that both accept."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.server.api.body import parse_object
from gossamer.server.api.job import answer_length
from gossamer.server.api.schemas import CompletionRequest, read_fields
from gossamer.server.engine.request import InvalidRequest

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts | st.sampled_from(['"', '\\"', '": ', "\\\\", '{"a":1}', "\\u0000"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def refusal(call: Callable[[], object]) -> str | None:
    """What a refused request is told; None when it was accepted."""
    try:
        call()
    except InvalidRequest as error:
        return str(error)
    return None


@given(st.dictionaries(texts, values, max_size=6), st.booleans(), st.sampled_from([None, 2]))
def test_any_object_comes_back(value: dict[str, Any], escaped: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    assert parse_object(raw) == value


@given(st.dictionaries(texts, values, min_size=1, max_size=4), st.booleans())
def test_a_field_named_twice_is_refused(value: dict[str, Any], nested: bool) -> None:
    name = next(iter(value))
    raw = json.dumps(value)[:-1] + f",{json.dumps(name)} :1}}"
    with pytest.raises(InvalidRequest, match="twice"):
        parse_object((f'{{"outer":[{raw}]}}' if nested else raw).encode())


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(raw: bytes) -> None:
    message = refusal(lambda: parse_object(raw))
    assert message is None or len(message) < 300


@given(st.dictionaries(st.sampled_from(sorted(CompletionRequest.model_fields)), values, max_size=5))
def test_no_fields_do_harm(fields: dict[str, Any]) -> None:
    message = refusal(lambda: read_fields(CompletionRequest, fields))
    assert message is None or (len(message) < 500 and message.endswith("."))


@given(st.integers(1, 40), st.none() | st.integers(-2, 40), st.none() | st.just(16))
def test_answers_fit_the_context(prompt: int, asked: int | None, default: int | None) -> None:
    try:
        length = answer_length(prompt, asked, default, 32, "prompt")
    except InvalidRequest:
        assert (asked is not None and asked < 0) or prompt + (1 if asked is None else asked) > 32
    else:
        assert prompt + length <= 32
        assert length == asked if asked is not None else length >= 1
