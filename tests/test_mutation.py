"""Patterns of mutants: what they find, and that a renaming leaves them alone."""

import pytest

from .mutation import mutated, places

LOAD = "$h = tl.load($first + $rows[:, None], mask=$live & $inside)"


@pytest.mark.parametrize(
    "source", ["h = tl.load(first + rows[:, None], mask=live & inside)", "a=tl.load( b + c[:,None],\n  mask = d & e )"]
)
def test_names_and_white_space_are_free(source):
    result = mutated(f"x = 1\n{source}\ny = 2\n", LOAD, "$h = tl.load($first + $rows[:, None], mask=$inside)")
    h, inside = ("h", "inside") if "inside" in source else ("a", "e")
    assert result.startswith(f"x = 1\n{h} = tl.load(") and f"mask={inside})" in result and result.endswith("\ny = 2\n")


def test_a_name_is_the_same_wherever_it_comes_again():
    assert places("a + a * b; a + b * b", "$x + $x * $y") == 1


def test_words_are_whole():
    assert places("return int(x); returned = uint(x)", "int($x)") == places("if ab: pass", "if $name:") == 1
    assert places("ifab: pass", "if $name:") == places("xa + b", "a + $b") == 0


@pytest.mark.parametrize(("source", "count"), [("a * b; c * d", 2), ("a + b", 0)])
def test_a_pattern_without_one_place_is_refused(source, count):
    with pytest.raises(ValueError, match=f"expected one place of '\\$x \\* \\$y', got {count}"):
        mutated(source, "$x * $y", "$y")
