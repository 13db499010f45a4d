"""How far ranks' classes are from the data set's: numbers, table and picture."""

from __future__ import annotations

import numpy
import pytest
import torch

from mpiddl.data.shards.plots import Balance, plot_report
from mpiddl.data.shards.skewness import skew_of
from mpiddl.errors import DataError


def test_counts_and_distances():
    found = skew_of([3, 5, 3, 5, 3, 3, 3, 9], [[0, 2, 4, 5], [1, 3, 7, 6]])

    assert found.classes == (3, 5, 9)
    assert found.counts.dtype == numpy.int64
    assert found.counts.tolist() == [[4, 0, 0], [1, 2, 1]]
    assert found.samples.tolist() == [4, 4]
    assert found.shares.tolist() == [[1, 0, 0], [0.25, 0.5, 0.25]]
    # The data set: 5/8, 2/8, 1/8. Of rank 0's samples 3/8 would have to be others, as of rank 1's.
    assert found.distances.tolist() == [0.375, 0.375]
    assert found.worst == (0, 0.375)


def test_the_worst_rank_is_named():
    found = skew_of(["a", "b"] * 4, [[0, 1, 2, 3], [4, 6], [5, 7, 7, 7]])
    # 4 of a, 6 of b in what the ranks have: (.4, .6), against (.5, .5), (1, 0), (0, 1).
    assert found.distances == pytest.approx([0.1, 0.6, 0.4])
    assert found.worst == (1, pytest.approx(0.6))


def test_a_rank_without_samples_pulls_nowhere():
    found = skew_of([0, 1], [[0, 1], []])
    assert found.distances.tolist() == [0, 0]
    assert found.shares.tolist() == [[0.5, 0.5], [0, 0]]


def test_what_labels_and_shards_may_be():
    expected = [[2, 0], [0, 2]]
    for labels in ([0, 0, 1, 1], torch.tensor([0, 0, 1, 1]), numpy.array(["a", "a", "b", "b"])):
        for shards in ([range(2), range(2, 4)], [numpy.arange(2), [2, 3]]):
            assert skew_of(labels, shards).counts.tolist() == expected


def test_a_table_of_few_classes():
    lines = str(skew_of(["cat", "cat", "dog", "cat"], [[0, 1], [2, 3], []])).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["rank", "samples", "distance", "cat", "dog"],
        ["0", "2", "0.250", "100.0%", "0.0%"],
        ["1", "2", "0.250", "50.0%", "50.0%"],
        ["2", "0", "0.000", "-", "-"],
        ["all", "4", "75.0%", "25.0%"],
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5:] == ["furthest from the data set's mix of classes: rank 0, 0.250"]


def test_a_table_of_many_ranks_and_classes():
    labels = numpy.repeat(numpy.arange(30), 10)
    shards = [range(rank, 300, 30) for rank in range(29)] + [range(10)]
    lines = str(skew_of(labels, shards)).splitlines()
    assert lines[0].split() == ["rank", "samples", "distance", "classes", "most", "frequent"]
    assert lines[20].split() == ["29", "10", "0.933", "1", "0:", "100.0%"]
    assert lines[22].startswith("10 more ranks, at most 0.")
    assert lines[23].endswith("rank 29, 0.933")
    assert len(lines) == 24


@pytest.mark.parametrize(
    ("labels", "shards", "words"),
    [
        ([0, 1], [], "no rank has any samples"),
        ([0, 1], [[], []], "no rank has any samples"),
        ([0, 1], [[0], [1, 2]], "rank 1: sample 2 has none of 2 labels"),
        ([0, 1], [[-1]], "rank 0: sample -1"),
        ([0.5, 1.5], [[0]], "integers or strings"),
        ([0, "a"], [[0]], "one kind"),
    ],
)
def test_bad_arguments(labels, shards, words):
    with pytest.raises(DataError, match=words):
        skew_of(labels, shards)


def test_a_picture_shows_every_class_and_panel(tmp_path):
    pytest.importorskip("matplotlib")
    labels = [r"$\no$", "_hidden", "dog", "a name that is far too long for a legend"]
    balance = Balance(
        numpy.array([[0.5, 0.5], [0.7, 0.3]]), numpy.array([[0.010, 0.04], [0.02, 0.02]])
    )
    plot_report(tmp_path / "a.svg", skew_of(labels, [[0, 1], [2, 3]]), balance)

    drawn = (tmp_path / "a.svg").read_text()
    for text in (
        *(r"$\no$", "_hidden", "dog", "a name that is far t..."),
        "4 samples: 2 to 2 on a rank",
        "classes: rank 0 is furthest from the data set's mix (0.500)",
        "shares: 50.0 to 50.0%, then 30.0 to 70.0%",
        "step times: the slowest rank takes 40 ms, then 20 ms",
    ):
        assert f"<!-- {text} -->" in drawn, text


def test_a_picture_of_many_classes_and_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    found = skew_of(numpy.arange(300) % 20, [range(rank, 300, 64) for rank in range(64)])
    found.plot(tmp_path / "a.svg")

    drawn = (tmp_path / "a.svg").read_text()
    assert "<!-- class, in sorted order -->" in drawn
    assert "<!-- busy in a step, ms -->" not in drawn


def test_one_round_is_drawn_without_an_after(tmp_path):
    pytest.importorskip("matplotlib")
    plot_report(tmp_path / "a.svg", None, Balance(numpy.ones((1, 1)), numpy.array([[0.5]])))
    drawn = (tmp_path / "a.svg").read_text()
    assert "<!-- step times: the slowest rank takes 500 ms -->" in drawn
    assert "<!-- before -->" in drawn
    assert "<!-- after -->" not in drawn
