"""Results of all ranks: metrics, gathered predictions, ensembles, skew; what differs is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrix import examples

from mpiddl.data.evaluating.ensembling import ensemble
from mpiddl.data.evaluating.metrics import AUC, Accuracy, ConfusionMatrix, Mean
from mpiddl.data.evaluating.predictions import gather_predictions, gather_tensors
from mpiddl.data.shards.skewness import skew
from mpiddl.errors import DataError

pytestmark = pytest.mark.thorough


def refused(agree, words, call):
    """``call`` raises DataError on every rank, with all ``words`` and one message."""
    message = ""
    try:
        call()
    except DataError as error:
        message = str(error) if error.on_every_rank else f"alone: {error}"
    agree(message and all(word in message for word in words), f"{words} not in {message!r}")


def dealt(world, length, skip=()):
    """This rank's samples, uneven: rank 0 has most, those in ``skip`` none."""
    ranks = [rank for rank in range(world.size) if rank not in skip] or [world.size - 1]
    owners = [ranks[(index * index) % len(ranks)] for index in range(length)]
    return torch.tensor([i for i, owner in enumerate(owners) if owner == world.rank], dtype=int)


def in_batches(metric, *tensors):
    """Updates of three samples, and one of none."""
    for start in range(0, len(tensors[0]) + 1, 3):
        metric.update(*(tensor[start : start + 3] for tensor in tensors))
    return metric


def some_scores(length, classes, seed=1):
    """Few different values: many ties."""
    generator = torch.Generator("cpu").manual_seed(seed)
    scores = torch.randint(-2, 3, (length, classes), generator=generator, device="cpu")
    labels = torch.randint(0, classes, (length,), generator=generator, device="cpu")
    return scores.float(), labels


def test_mean_counts_samples_not_batches(world, agree):
    mean = Mean()
    mine = dealt(world, 20, skip=[0])
    for part in (mine[:4], mine[4:], mine[:0]):
        mean.update(part.double().mean(), len(part))  # of no samples: NaN
    agree(mean.compute() == sum(range(20)) / 20, mean.compute())
    mean.update(2.5, 10)
    expected = (sum(range(20)) + 25 * world.size) / (20 + 10 * world.size)
    agree(mean.compute() == mean.compute() == expected, mean.compute())
    mean.reset()
    mean.update(torch.tensor([world.rank], dtype=torch.float16), 1)
    agree(mean.compute() == (world.size - 1) / 2, mean.compute())
    mean.reset()
    for value in (2.0**24, 1.0):  # whose sum is no float32
        mean.update(torch.tensor(value, dtype=torch.float32, requires_grad=True), 1)
    agree(mean.compute() == (2**24 + 1) / 2, mean.compute())


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_accuracy_is_exact(world, agree, length, top_k):
    scores, labels = some_scores(length, 4)
    correct = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best = sorted(range(4), key=lambda name, row=row: (-row[name], name))
        correct += label in best[:top_k]
    mine = dealt(world, length, skip=[1]).cpu()

    metric = in_batches(Accuracy(top_k=top_k), scores[mine].to(world.device), labels[mine])

    agree(metric.compute() == correct / length, f"{metric.compute()}, not {correct}/{length}")
    if top_k == 1:
        metric.reset()
        in_batches(metric, scores[mine].argmax(1), labels[mine])
        agree(metric.compute() == correct / length)


@pytest.mark.parametrize("length", [1, 60])
def test_confusion_matrix_is_exact(world, agree, length):
    scores, labels = some_scores(length, 5)
    expected = torch.zeros(5, 5, dtype=torch.int64, device="cpu")
    for truth, guess in zip(labels.tolist(), scores.argmax(1).tolist(), strict=True):
        expected[truth, guess] += 1
    mine = dealt(world, length, skip=[0]).cpu()
    whole, sure = ConfusionMatrix(5), ConfusionMatrix(5)
    in_batches(whole, scores[mine].to(world.device), labels[mine])
    in_batches(sure, scores[mine].argmax(1), labels[mine])
    for metric in (whole, sure, whole):
        found = metric.compute()
        agree(found.dtype == torch.int64 and torch.equal(found, expected), found)


def pairs_in_order(scores, labels):
    """What AUC means, by counting pairs."""
    ones = [score for score, label in zip(scores, labels, strict=True) if label]
    zeros = [score for score, label in zip(scores, labels, strict=True) if not label]
    wins = sum(Fraction((one > zero) * 2 + (one == zero), 2) for one in ones for zero in zeros)
    return wins / (len(ones) * len(zeros))


@pytest.fixture(scope="session")
def everywhere(world):
    """hypothesis refuses fixtures of functions."""
    return world


@examples(25)
@given(
    scores=st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.1, 7.0, float("inf")]), min_size=2),
    data=st.data(),
)
def test_auc_is_exact_with_ties(everywhere, agree, scores, data):
    world = everywhere
    labels = [0, 1] + [data.draw(st.integers(0, 1)) for _ in scores[2:]]
    mine = dealt(world, len(scores))

    metric = in_batches(
        AUC(), torch.tensor(scores, dtype=torch.float64)[mine], torch.tensor(labels)[mine]
    )

    expected = float(pairs_in_order(scores, labels))
    agree(metric.compute() == expected, f"{metric.compute()}, not {expected}")


def test_against_scikit_learn(world, agree):
    reference = pytest.importorskip("sklearn.metrics")
    scores, labels = some_scores(200, 3)
    mine = dealt(world, 200).cpu()
    auc, matrix, accuracy = AUC(), ConfusionMatrix(3), Accuracy()
    in_batches(auc, scores[mine, 0], labels[mine] == 0)
    in_batches(matrix, scores[mine], labels[mine])
    in_batches(accuracy, scores[mine], labels[mine])

    guesses = scores.argmax(1)
    expected = reference.roc_auc_score(labels == 0, scores[:, 0])
    agree(abs(auc.compute() - expected) < 1e-12, auc.compute())
    expected = reference.confusion_matrix(labels, guesses)
    agree(numpy.array_equal(matrix.compute().numpy(), expected), matrix.compute())
    agree(accuracy.compute() == reference.accuracy_score(labels, guesses), accuracy.compute())


def one(values, dtype=None):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "batch", "words"),
    [
        (lambda: Accuracy(), (one([[1.0, 0.0]]), one([2])), ["label 2", "0 to 1"]),
        (lambda: Accuracy(), (one([[1.0, 0.0]]), one([-1])), ["label -1"]),
        (lambda: Accuracy(), (one([[float("nan"), 0.0]]), one([0])), ["1 of 2 scores", "NaN"]),
        (lambda: ConfusionMatrix(3), (one([3]), one([0])), ["prediction 3", "0 to 2"]),
        (lambda: ConfusionMatrix(3), (one([0]), one([-1])), ["label -1"]),
        (lambda: ConfusionMatrix(1), (one([[float("nan")]]), one([0])), ["NaN"]),
        (lambda: AUC(), (one([0.5]), one([2])), ["label 2", "0 to 1"]),
        (lambda: AUC(), (one([float("nan")]), one([1])), ["NaN"]),
    ],
)
def test_what_one_rank_cannot_count_fails_on_all(world, agree, make, batch, words):
    metric = make()
    if world.rank == world.size - 1:
        metric.update(*batch)
        metric.update(*(tensor[:0] for tensor in batch))
    words = [*words, *([f"rank {world.size - 1}"] if world.size > 1 else [])]
    refused(agree, words, metric.compute)
    metric.reset()
    refused(agree, ["no samples were counted on any rank"], metric.compute)


def test_no_samples_and_one_class(world, agree):
    for metric in (Mean(), Accuracy(), ConfusionMatrix(2), AUC()):
        if not isinstance(metric, Mean):
            metric.update(torch.empty(0, 2), torch.empty(0))
        refused(agree, ["no samples were counted on any rank"], metric.compute)
    for label in (0, 1):
        metric = AUC()
        metric.update(one([0.5]), one([label]))
        words = [f"all {world.size} samples are of class {label}"]
        refused(agree, words, metric.compute)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (lambda: Mean().update(one([1.0, 2.0]), 2), "one number"),
        (lambda: Mean().update(1.0, -1), "count"),
        (lambda: Accuracy(top_k=0), "top_k"),
        (lambda: Accuracy(top_k=2).update(one([1]), one([1])), "top_k=2 needs scores"),
        (lambda: Accuracy().update(one([0.5]), one([1])), "classes must be integers"),
        (lambda: Accuracy().update(one([[0.5, 1]]), one([1.0])), "classes must be integers"),
        (lambda: Accuracy().update(one([1, 2]), one([1])), "different numbers"),
        (lambda: Accuracy().update(one([[[1]]]), one([1])), "wrong shapes"),
        (lambda: ConfusionMatrix(0), "num_classes"),
        (lambda: ConfusionMatrix(3).update(one([[1, 2]]), one([1])), "2 classes, not of 3"),
        (lambda: AUC().update(one([[0.5, 0.5]]), one([1])), "wrong shapes"),
        (lambda: AUC().update(one([0.5]), one([[1]])), "wrong shapes"),
    ],
)
def test_wrong_shapes_fail_at_once(world, agree, update, words):
    with pytest.raises(DataError, match=words):
        update()
    agree(True)


def rows_of(indices, dtype, shape):
    """Small numbers that name their sample."""
    rows = torch.as_tensor(indices, device="cpu").view(-1, *(1 for _ in shape))
    return (rows * 3 % 101 + torch.zeros(shape, dtype=int, device="cpu")).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("root", [None, 0, -1])
def test_predictions_in_the_order_of_the_data_set(world, agree, dtype, shape, root):
    root = world.size - 1 if root == -1 else root
    mine = dealt(world, 37, skip=[0 if root is None else 1]).flip(0).cpu()
    rows = rows_of(mine, dtype, shape)
    if not len(mine):
        rows = torch.empty(0)  # whatever it is

    found = gather_predictions(mine, rows.to(world.device), 37, root=root)

    if root not in (None, world.rank):
        agree(found is None)
    else:
        expected = rows_of(range(37), dtype, shape)
        agree(found.dtype == dtype and torch.equal(found, expected), found)


def test_predictions_as_arrays_and_lists(world, agree):
    mine = dealt(world, 10).tolist()
    whole = numpy.arange(40, dtype=numpy.uint8).reshape(10, 4)[:, ::2]
    found = gather_predictions(mine, whole[mine], 10)
    agree(isinstance(found, numpy.ndarray) and found.dtype == whole.dtype, type(found))
    agree(numpy.array_equal(found, whole), found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, rows: (i[1:], rows[1:], 8), ["samples 0 of 8 have no prediction"]),
        (lambda i, rows: (i + 1, rows, 8), ["no sample 8", "data set of 8"]),
        (lambda i, rows: (i - 1, rows, 8), ["no sample -1"]),
        (lambda i, rows: ([*i[:-1], i[0]], rows, 8), ["samples 7 of 8", "0 came more than once"]),
        (lambda i, rows: (i, rows[1:], 8), ["indices for predictions of shape"]),
        (lambda i, rows: (i.astype(float), rows, 8), ["indices must be integers", "float64"]),
        (lambda i, rows: (i, [1.0] * len(i), 8), ["dense tensor or an array, got list"]),
        (lambda i, rows: (i, rows.to_sparse(), 8), ["to_dense"]),
        (lambda i, rows: (i, numpy.array(["a"] * len(i)), 8), ["array of <U1", "pass numbers"]),
        (lambda i, rows: (i, rows, 0), ["length must be positive"]),
        (lambda i, rows: (i, rows, 2.5), ["integer"]),
    ],
)
def test_predictions_that_are_refused(world, agree, change, words):
    """Rank 0 has samples 0 and 7; its call is wrong."""
    owners = [0, *(index % world.size for index in range(1, 7)), 0]
    mine = numpy.array([i for i, owner in enumerate(owners) if owner == world.rank])
    rows = rows_of(mine, torch.float32, (2,))
    args = change(mine, rows) if world.rank == 0 else (mine, rows, 8)
    refused(agree, words, lambda: gather_predictions(*args))


def test_predictions_that_differ_between_ranks(world, agree):
    if world.size == 1:
        pytest.skip("one rank cannot disagree")
    last = world.rank == world.size - 1
    for rows, words in [
        (torch.ones(1, 2 + last), ["'tensor float32[n, 2]' on rank 0", "[n, 3]"]),
        (torch.ones(1, 2, dtype=torch.float64 if last else torch.float32), ["float64"]),
        (numpy.ones((1, 2), "f4") if last else torch.ones(1, 2), ["array float32"]),
    ]:
        refused(
            agree, ["differ", *words], lambda rows=rows: gather_predictions([world.rank], rows, 9)
        )
    rows = torch.ones(1)
    refused(agree, ["length"], lambda: gather_predictions([world.rank], rows, world.size + last))
    refused(
        agree,
        ["root"],
        lambda: gather_predictions([world.rank], rows, world.size, root=0 if last else None),
    )
    refused(agree, ["root 9"], lambda: gather_predictions([world.rank], rows, world.size, root=9))


def test_many_missing_samples_are_not_all_named(world, agree):
    words = ["samples 1, 2, 3, 4, 5 and 94 more of 100", "ShardSampler"]
    words += [f"0 from ranks {list(range(world.size))}"] if world.size > 1 else []
    refused(agree, words, lambda: gather_predictions([0], torch.ones(1), 100))


def test_tensors_of_any_shape(world, agree):
    """Bytes of one dtype end where another's cannot begin."""
    for dtype in (torch.bool, torch.int64, torch.bfloat16):
        dtypes = [dtype, torch.uint8, torch.float32, torch.float64]
        shapes = [(3,), (1, 3), (), (2, 0)]
        every = [
            torch.arange(3).resize_(shapes[rank % 4]).to(dtypes[rank % 4])
            for rank in range(world.size)
        ]
        found = gather_tensors(every[world.rank].clone())
        agree([each.dtype for each in found] == [each.dtype for each in every], found)
        agree(all(map(torch.equal, found, every)), found)
        agree(all(each.device == every[0].device for each in found))


def test_a_rank_that_has_nothing(world, agree):
    has = world.rank == world.size - 1
    mine = torch.ones(2, 3, dtype=torch.int32) if has else torch.empty(0)
    found = gather_tensors(mine, group=world)
    expected = [(0, 3)] * (world.size - 1) + [(2, 3)]
    agree([tuple(each.shape) for each in found] == expected, found)
    agree(torch.cat(found).dtype == torch.int32)
    refused(agree, ["dense tensor"], lambda: gather_tensors("text" if has else torch.ones(1)))


def outputs_of(rank):
    """Quarters: sums are exact. Sample 0: everyone for class 1; 1: ties; 2: a class each."""
    scores = torch.zeros(3, 4)
    scores[0, 1] = 0.25 * (rank + 1)
    scores[2, (rank + 1) % 4] = 1
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ensembles(world, agree, dtype):
    every = [outputs_of(rank) for rank in range(world.size)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = every[world.rank].to(dtype).requires_grad_()
    before = mine.detach().clone()

    mean, votes = ensemble(mine), ensemble(mine, how="vote")

    expected = torch.stack(every).sum(0) / world.size
    agree(mean.dtype == wide and torch.allclose(mean, expected.to(wide), rtol=1e-6), mean)
    counts = torch.zeros(3, 4, dtype=wide)
    for scores in every:
        for row, values in enumerate(scores.tolist()):
            counts[row, values.index(max(values))] += 1
    agree(torch.equal(votes, counts / world.size), votes)
    smallest = min((rank + 1) % 4 for rank in range(world.size))
    agree(votes.argmax(1).tolist() == [1, 0, smallest], votes)
    agree(torch.equal(mine, before), "the outputs were changed")
    bits = gather_tensors(torch.cat([mean, votes]))
    agree(all(torch.equal(other, bits[0]) for other in bits), "ranks have other bits")
    transposed = torch.stack(every)[world.rank].T.contiguous().T
    agree(torch.equal(ensemble(transposed), ensemble(every[world.rank])))


def test_ensembles_that_are_refused(world, agree):
    last = world.rank == world.size - 1
    good = torch.ones(2, 3)
    for bad, words in [
        (torch.ones(2), ["(n, classes)"]),
        (torch.ones(2, 3, dtype=int), ["floats", "int64"]),
        (torch.tensor([[1.0, float("nan")], [1.0, 1.0]]), ["NaN for 1 of 2"]),
        ([1.0], ["list"]),
    ]:
        refused(agree, words, lambda bad=bad: ensemble(bad if last else good))
    refused(
        agree, ["'median'", "mean, vote"], lambda: ensemble(good, how="median" if last else "mean")
    )
    if world.size > 1:
        for bad, words in [(torch.ones(1, 3), ["[1, 3]"]), (good.double(), ["float64"])]:
            refused(agree, words, lambda bad=bad: ensemble(bad if last else good))
        refused(agree, ["mean", "vote"], lambda: ensemble(good, how="vote" if last else "mean"))


def test_skew_over_ranks(world, agree):
    """Rank r has r samples of class "a" and one of its own."""
    found = skew(["a"] * world.rank + [f"own {world.rank}"])
    names = ("a", *(f"own {rank}" for rank in range(world.size)))
    expected = numpy.zeros((world.size, world.size + 1), dtype=int)
    expected[:, 0] = range(world.size)
    for rank in range(world.size):
        expected[rank, 1 + rank] = 1
    agree(found.classes == (names if world.size > 1 else names[1:]), found.classes)
    agree(numpy.array_equal(found.counts, expected if world.size > 1 else [[1]]), found.counts)


def test_skew_of_numbers_and_empty_ranks(world, agree):
    mine = torch.tensor([7, -1, 7], device="cpu") if world.rank == world.size - 1 else []
    found = skew(mine)
    agree(found.classes == (-1, 7), found.classes)
    agree(found.counts.tolist() == [[0, 0]] * (world.size - 1) + [[1, 2]], found.counts)
    agree(not found.distances.any(), found.distances)


def test_skew_that_is_refused(world, agree):
    last = world.rank == world.size - 1
    refused(agree, ["no rank has any labels"], lambda: skew([]))
    refused(agree, ["one dimension"], lambda: skew([[1]] if last else [1]))
    if world.size > 1:
        words = ["several kinds", "int", "str"]
        refused(agree, words, lambda: skew(["a"] if last else [1]))
