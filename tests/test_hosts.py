"""Two hosts for real: they meet, compare notes, and name the link that is slow and what it costs."""

from __future__ import annotations

import re

import pytest
from net_lab import missing, two_hosts

from truthward.launch import torchrun
from truthward.recipe import load_recipe

LACK = missing()
pytestmark = pytest.mark.skipif(bool(LACK), reason=f"no two hosts here: {LACK}")
RECIPE = "recipes/tiny.toml"


def confer(hosts) -> str:
    """What the check of ranks says on two hosts of one rank each."""
    changes = ["launch.hosts=2", f"launch.rendezvous={hosts.rendezvous}"]
    recipe = load_recipe(RECIPE, changes)
    words = [*torchrun(recipe, "check"), "-m", "truthward.check.ranks", RECIPE, *changes]
    (code, first), (other, second) = hosts.both(*words)
    assert (code, other) == (0, 0), first + second
    return first + second


def test_a_clean_link_between_two_hosts_gives_no_warning():
    with two_hosts() as hosts:
        said = confer(hosts)
    assert re.search(r"note: launch.ranks: 1 links; slowest between ranks 0 \((alpha|beta)\) and 1 \((alpha|beta)\)", said)
    assert "link-slow" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ({"delay": 0.1}, r"a message takes [12]\d\d ms"),  # gloo asks before it sends
        ({"loss": 0.05}, r"GB/s"),
        ({"rate": "1mbit"}, r"0.0001\d GB/s"),
    ],
    ids=["late", "lossy", "narrow"],
)
def test_a_bad_link_is_named_with_both_hosts_and_what_it_costs(fault, told):
    with two_hosts(**fault) as hosts:
        said = confer(hosts)
    warned = re.findall(r"warning: launch.ranks: between (.*)\n  why: (.*)\n", said)
    assert [what for what, _ in warned if re.search(told, what)], said
    for what, why in warned:
        assert {"alpha", "beta"} <= set(re.findall(r"\w+", what))
        assert re.search(r"a step of sft [\d.]+ m?s instead of [\d.]+ m?s", why)
