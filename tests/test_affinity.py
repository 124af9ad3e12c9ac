"""Routing by prefixes: equal beginnings go to the engine that has them, and no engine is crowded for it."""

import random
from collections import Counter

import pytest

from jax_engine.affinity import PrefixAffinity
from serving.prefix_digests import prefix_digests

SYSTEM = {"role": "system", "content": "You are a patient teacher of physics. " * 20}


def turn(number):
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer " * 60}]


@pytest.mark.parametrize("field", ["messages", "input"])
def test_a_longer_conversation_begins_with_the_digests_of_the_shorter(field):
    short, long = [SYSTEM, *turn(1)], [SYSTEM, *turn(1), *turn(2)]
    first, second = (prefix_digests({field: messages}) for messages in (short, long))
    assert len(second) > len(first) >= 4 and second[: len(first)] == first
    other = prefix_digests({field: [SYSTEM, *turn(7), *turn(2)]})
    same = sum(a == b for a, b in zip(second, other, strict=False))
    assert 2 <= same < len(first), "equal up to the first question, and never after it"


def test_texts_and_token_ids():
    text, ids = "Once upon a time, " * 100, list(range(1000))
    for shorter, longer in ((text, text + text), (ids, [*ids, *ids])):
        first, second = prefix_digests({"prompt": shorter}), prefix_digests({"prompt": longer})
        assert len(first) >= 7 and second[: len(first)] == first
    assert prefix_digests({"prompt": "short"}) == () and prefix_digests({}) == ()


@pytest.mark.parametrize("field", ["cache_salt", "tools", "system", "instructions"])
def test_what_comes_before_the_conversation_counts(field):
    assert prefix_digests({"prompt": "x" * 999, field: "a"})[0] != prefix_digests({"prompt": "x" * 999, field: "b"})[0]


def test_a_text_of_lone_surrogates_has_digests():
    assert len(prefix_digests({"prompt": "\ud800" * 600})) == 2


def test_conversations_stay_where_they_are():
    """Random turns of 40 conversations on 4 engines: each goes on where it began, and engines share the work."""
    draw = random.Random(1)
    affinity, homes = PrefixAffinity(slack=40), {}
    talks = {number: [{"role": "user", "content": f"{number} " * 200}] for number in range(40)}
    loads = Counter(dict.fromkeys("abcd", 0))
    for _ in range(400):
        number = draw.randrange(40)
        chosen = affinity.choose(prefix_digests({"messages": talks[number]}), loads)
        assert homes.setdefault(number, chosen) == chosen
        talks[number] += turn(number)
        loads[chosen] += 1
        if draw.random() < 0.9:
            loads[max(loads, key=lambda name: loads[name])] -= 1
    assert max(Counter(homes.values()).values()) <= 16 and len(set(homes.values())) == 4


def test_a_popular_beginning_spreads_when_its_engine_is_busy():
    affinity, loads = PrefixAffinity(slack=4, ratio=1.5), Counter({"a": 0, "b": 0, "c": 0})
    digests = prefix_digests({"messages": [SYSTEM]})
    for _ in range(60):
        loads[affinity.choose(digests, loads)] += 1
    assert min(loads.values()) >= 14
    assert affinity.choose((), {"a": 6, "b": 0}) == "b"


def test_an_engine_that_is_gone_is_not_chosen():
    affinity = PrefixAffinity()
    digests = prefix_digests({"prompt": "x" * 999})
    home = affinity.choose(digests, {"a": 0, "b": 0})
    left = {"a": 0, "b": 0, "c": 0}
    del left[home]
    assert affinity.choose(digests, left) in left


def test_memory_is_bounded():
    affinity = PrefixAffinity(max_blocks=10)
    for number in range(50):
        affinity.choose(prefix_digests({"prompt": f"{number}" * 600}), {"a": 0})
    assert len(affinity._owners) == affinity._owned["a"] == 10
