"""The model before training: weights that already hold the circuits which training finds last.

A transformer learns to look back one token, and from that to find what followed an earlier occurrence, only after a
long plateau. Both are a few outer products, so they are written down instead: heads of the first layer copy the
tokens 1 to 3 places back into slots of the residual stream of their own, and heads of later layers compare the
present token and its slots with the slots of all keys. Dimensions that RoPE turns slowly carry the comparison, so that
distance does not blur it: with a base of 1e12, 19 of 32 pairs turn less than half a radian over 32K tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, HEADS, GROUPS, WIDTH, LAYERS = 256, 8, 4, 64, 4
BASE = 1e12
CONTENT = slice(1, 96)  # residual dimensions of the token itself; dimension 0 is the same for all tokens
SLOTS = (slice(96, 120), slice(120, 144), slice(144, 168))  # what stood 1, 2, 3 places back
SIZE = 95
BAGS = (slice(168, 212), slice(212, 256))  # the mean of the last few tokens, and of some more
SLOW = tuple(range(13, 32)) + tuple(range(45, 64))  # rotary pair i is dimensions i and i + 32 of a head
FAST_PAIRS = 8
NEAR = torch.arange(1, 9)  # pairs whose sum tells near keys from far ones


def new_model(vocabulary: int, eos: int, seed: int, smart: bool = True) -> LlamaForCausalLM:
    """A float32 model with random weights, or with the circuits above."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=640,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=WIDTH,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    if smart:
        with torch.no_grad():
            _write_circuits(model)
    return model


def _orthonormal(rows: int, columns: int) -> Tensor:
    """[rows, columns] with orthonormal rows, or columns where there are more rows."""
    square = torch.linalg.qr(torch.randn(max(rows, columns), max(rows, columns))).Q
    return square[:rows, :columns]


def _write_circuits(model: LlamaForCausalLM) -> None:
    table = model.model.embed_tokens.weight
    table.normal_(0.0, 0.01)
    table[:, 1:] *= 0.16 / table[:, 1:].norm(dim=1, keepdim=True)
    # equal norms for all tokens, else the norm of a key outweighs its place
    table[:, CONTENT] = torch.nn.functional.normalize(torch.randn(len(table), SIZE), dim=1) * SIZE**0.5 * 0.1
    table[:, 0] = 0.25
    layers = model.model.layers
    for layer in layers:
        layer.mlp.down_proj.weight.mul_(0.1)
        layer.self_attn.o_proj.weight.mul_(0.2)
    slot_of, bag_of = _orthonormal(24, SIZE), _orthonormal(44, SIZE)
    first = layers[0].self_attn
    for offset, slot in enumerate(SLOTS, 1):
        _look_back(first, Look(offset - 1, float(offset), 0, 3.5, slot_of, slot, 0.32))
    _look_back(first, Look(4, 4.0, 1, 0.9, bag_of, BAGS[0], 0.6))
    _look_back(first, Look(5, 9.0, 2, 1.1, bag_of, BAGS[1], 0.8))
    cuts = (
        Match(slots=(19, 19), bags=(0, 0), scale=2.0),
        Match(slots=(12, 0), bags=(13, 13), scale=1.6),
        Match(slots=(0, 0), bags=(19, 19), scale=1.6),
    )
    for depth in (1, 2, 3):
        for group, match in enumerate(cuts):
            _match(layers[depth].self_attn, group, match, slot_of)
        _find_assigned(layers[depth].self_attn, 3, slot_of, bag_of)


@dataclass(frozen=True)
class Match:
    """How many of the slow dimensions compare which part: tokens 1 and 2 back, the near bag and the far one."""

    slots: tuple[int, int]
    bags: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class Look:
    """A head of the first layer that looks `offset` tokens back, sharply or (from a slower `pair` on) over some."""

    head: int
    offset: float
    pair: int
    strength: float
    values: Tensor  # [n, SIZE], what of a token is carried
    into: slice  # of n residual dimensions
    gain: float


def _look_back(attention: nn.Module, look: Look) -> None:
    """Query head `look.head` attends back by position alone and writes what it carries into its own dimensions."""
    group = look.head // (HEADS // GROUPS)
    q, k = attention.q_proj.weight, attention.k_proj.weight
    v, o = attention.v_proj.weight, attention.o_proj.weight
    pairs = torch.arange(look.pair, look.pair + FAST_PAIRS)
    angle = look.offset * BASE ** (-pairs.float() / 32)
    q[look.head * WIDTH : (look.head + 1) * WIDTH] = 0.0
    if look.head % 2 == 0:
        k[group * WIDTH : (group + 1) * WIDTH] = 0.0
    # turned by -angle, so that after RoPE the product peaks at a distance of `offset`
    q[look.head * WIDTH + pairs, 0] = look.strength * torch.cos(angle)
    q[look.head * WIDTH + 32 + pairs, 0] = -look.strength * torch.sin(angle)
    k[group * WIDTH : group * WIDTH + 13, 0] = 3.0
    size = len(look.values)
    v[group * WIDTH : (group + 1) * WIDTH].normal_(0.0, 0.005)
    v[group * WIDTH : group * WIDTH + size, CONTENT] = look.values
    o[:, look.head * WIDTH : (look.head + 1) * WIDTH].normal_(0.0, 0.005)
    o[look.into, look.head * WIDTH : look.head * WIDTH + size] = torch.eye(size) * look.gain * 0.1


def _match(attention: nn.Module, group: int, match: Match, slot_of: Tensor) -> None:
    """Both query heads of `group` compare what precedes a key with the present token and the one before (the
    induction head), and bags with bags; there, neighbours being alike, near keys are pushed away. They copy."""
    q, k = attention.q_proj.weight, attention.k_proj.weight
    v, o = attention.v_proj.weight, attention.o_proj.weight
    key, query = torch.zeros(2, len(SLOW), HIDDEN)
    at = 0
    for count, slot, source, lift in zip(
        match.slots, SLOTS, (CONTENT, SLOTS[0]), (slot_of, torch.eye(24)), strict=False
    ):
        turn = _orthonormal(count, 24) * match.scale
        key[at : at + count, slot] = turn
        query[at : at + count, source] = turn @ lift
        at += count
    for count, bag in zip(match.bags, BAGS, strict=True):
        turn = _orthonormal(count, 44) * match.scale
        key[at : at + count, bag] = query[at : at + count, bag] = turn
        at += count
    k[group * WIDTH + torch.tensor(SLOW)] = key
    if any(match.bags):
        k[group * WIDTH + NEAR] = 0.0
        k[group * WIDTH + NEAR, 0] = 1.2
    into = _orthonormal(WIDTH, SIZE)
    v[group * WIDTH : (group + 1) * WIDTH, CONTENT] += into
    for head in (2 * group, 2 * group + 1):
        if any(match.bags):
            q[head * WIDTH + NEAR] = 0.0
            q[head * WIDTH + NEAR, 0] = -1.2
        q[head * WIDTH + torch.tensor(SLOW)] = query
        o[CONTENT, head * WIDTH : (head + 1) * WIDTH] += into.T * 0.05


def _find_assigned(attention: nn.Module, group: int, slot_of: Tensor, bag_of: Tensor) -> None:
    """Both query heads of `group` find the token before the present one where it stands elsewhere, and bring what
    stands before it there: after "b," in an answer, the a of "VAR a = VAR b"."""
    q, k = attention.q_proj.weight, attention.k_proj.weight
    v, o = attention.v_proj.weight, attention.o_proj.weight
    turns = _orthonormal(19, 24) * 2.0, _orthonormal(19, 24) * 1.5
    slow = torch.tensor(SLOW)
    k[group * WIDTH + slow] = 0.0
    k[group * WIDTH + slow[:19], CONTENT] = turns[0] @ slot_of
    k[group * WIDTH + slow[19:], SLOTS[0]] = turns[1]
    k[group * WIDTH + NEAR] = 0.0
    k[group * WIDTH + NEAR, 0] = 1.2
    v[group * WIDTH : (group + 1) * WIDTH] *= 0.1
    for bag in BAGS:
        v[group * WIDTH : group * WIDTH + 44, bag] = torch.eye(44)
    for head in (2 * group, 2 * group + 1):
        q[head * WIDTH + slow] = 0.0
        q[head * WIDTH + slow[:19], SLOTS[0]] = turns[0]
        q[head * WIDTH + slow[19:], SLOTS[1]] = turns[1]
        q[head * WIDTH + NEAR] = 0.0
        q[head * WIDTH + NEAR, 0] = -1.2
        o[CONTENT, head * WIDTH : head * WIDTH + 44] += bag_of.T * 0.15
