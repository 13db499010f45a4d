"""Checkpoints as files: what is whole, what is not, and which is taken."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mpiddl.base.compiled_names import in_names_of
from mpiddl.checkpoint import tensors
from mpiddl.checkpoint.folders import begin_folder, checkpoints, finish_folder, latest, remove_old
from mpiddl.checkpoint.index import Index, read_index, write_index
from mpiddl.checkpoint.model_file import check_model, write_model
from mpiddl.checkpoint.tensors import shares_of_writers, stored_tensors, write_tensors
from mpiddl.errors import CheckpointError

STRIDES = [[1], [1], [3, 1]]


def write(folder, step):
    """One with two files and three tensors."""
    path = begin_folder(folder, step)
    values = [torch.full((50,), float(step)), torch.arange(4), torch.empty(0, 3)]
    first = write_tensors(path / "part-000.safetensors", {"0": values[0], "2": values[2]})
    second = write_tensors(path / "part-001.safetensors", {"1": values[1]})
    files = [("part-000.safetensors", first), ("part-001.safetensors", second)]
    write_index(path, Index(step, {}, STRIDES, files, [[0, 1]], {}, {}))
    return finish_folder(path, folder, step)


def test_the_newest_is_found_by_number_and_comes_back(tmp_path):
    for step in (9, 10, 1_000_000_000, 200, 999_999_999):
        write(tmp_path, step)
    path = latest(tmp_path)
    index = read_index(path)
    assert index.step == 1_000_000_000
    found = {}
    for name, _ in index.files:
        found |= load_file(path / name)  # the library's own reader
    whole, numbers, nothing = (found[name] for name in "012")
    assert torch.equal(whole, torch.full((50,), 1e9))
    assert numbers.tolist() == [0, 1, 2, 3]
    assert nothing.shape == (0, 3)


def test_checksums_are_those_of_sha256sum(tmp_path):
    path = write(tmp_path, 1)
    for name, checksum in read_index(path).files:
        told = subprocess.run(
            ["sha256sum", path / name], capture_output=True, text=True, check=True
        )
        assert told.stdout.split()[0] == checksum


@pytest.mark.parametrize("name", ["index.json", "part-000.safetensors", "part-001.safetensors"])
@pytest.mark.parametrize("harm", ["truncated", "changed", "longer", "missing", "empty", "foreign"])
def test_a_broken_one_is_reported_and_the_one_before_it_is_taken(tmp_path, caplog, name, harm):
    write(tmp_path, 1)
    good = write(tmp_path, 2)
    file = write(tmp_path, 3) / name
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        content = content[:-1]
    elif harm == "changed":
        content[-3] ^= 1
    elif harm == "longer":
        content += b"0"
    elif harm == "empty":
        content = b""
    elif harm == "foreign":
        content = b'{"format": "another"}\n'
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(content)

    assert latest(tmp_path) == good
    assert str(file) in caplog.text


def test_an_index_with_other_contents_is_found_out(tmp_path):
    """Its own checksum: a step that was edited, say."""
    path = write(tmp_path, 7)
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match="another checksum"):
        read_index(path)


def test_another_version_is_told(tmp_path):
    path = write(tmp_path, 7)
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(
        text.replace('"mpiddl_checkpoint": 2', '"mpiddl_checkpoint": 3')
    )
    with pytest.raises(CheckpointError, match="version 3, this mpiddl reads 1 to 2"):
        read_index(path)


def test_where_nothing_is(tmp_path, caplog):
    (tmp_path / "step-000000001").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes.txt").touch()
    assert latest(tmp_path / "none") is None
    assert latest(tmp_path) is None
    assert "step-000000001" in caplog.text


def test_the_same_step_once_more_is_newer_and_takes_nothing_away(tmp_path):
    first, second = write(tmp_path, 5), write(tmp_path, 5)
    assert first != second
    assert checkpoints(tmp_path) == [first, second]
    assert latest(tmp_path) == second


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_only_the_newest_are_kept(tmp_path, keep):
    made = [write(tmp_path, step) for step in range(4)]
    remove_old(tmp_path, keep, made[-1])
    assert checkpoints(tmp_path) == made[-keep:]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("keep", [1, 3])
def test_later_steps_of_another_course_are_put_aside(tmp_path, caplog, keep):
    """A job that went on from step 100: what it had written later is not where it goes on."""
    before, _, _ = (write(tmp_path, step) for step in (100, 120, 140))
    just = write(tmp_path, 110)
    remove_old(tmp_path, keep, just)
    assert checkpoints(tmp_path) == [before, just][-keep:]
    aside = sorted(path.name[:24] for path in tmp_path.glob("abandoned-*"))
    assert aside == ["abandoned-step-000000120", "abandoned-step-000000140"]
    assert "another course" in caplog.text


def test_what_a_killed_job_began_goes_and_was_never_found(tmp_path):
    good = write(tmp_path, 1)
    left = begin_folder(tmp_path, 2)
    (left / "part-000.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == good
    begin_folder(tmp_path, 3)
    assert not left.exists()


EVERY_KIND = {
    "channels_last": torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "expanded": torch.arange(3, dtype=torch.int16).expand(5, 3),
    "part": torch.arange(9, dtype=torch.uint8)[3:8],
    "bool": torch.tensor([[True, False]]),
    "bfloat16": torch.arange(5).bfloat16(),
    "float8": torch.arange(5.0).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7.5, dtype=torch.float64),
    "empty": torch.empty(0, 3, dtype=torch.float16),
}


def test_the_library_reads_what_is_written(tmp_path, monkeypatch):
    """In pieces of five bytes: what no tensor's memory divides into, but one's."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", 5)
    monkeypatch.setattr(tensors, "FLUSH_BYTES", 7)
    ticks = []
    digest = write_tensors(tmp_path / "a.safetensors", EVERY_KIND, lambda: ticks.append(1))
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == EVERY_KIND.keys()
    for name, tensor in EVERY_KIND.items():
        expected = tensor.resolve_conj().resolve_neg()
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert found[name].tolist() == expected.tolist(), name
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert len(ticks) == sum(-(-tensor.nbytes // 5) for tensor in EVERY_KIND.values())


def test_what_the_library_writes_is_read(tmp_path):
    state = {name: t.resolve_conj().resolve_neg().contiguous() for name, t in EVERY_KIND.items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"by": "another"})
    stored = stored_tensors(tmp_path / "a.safetensors")
    assert stored.keys() == state.keys()
    for name, at in stored.items():
        found = torch.empty(at.kind.nbytes, dtype=torch.uint8)
        at.read(found[:3], 0)
        at.read(found[3:], 3)
        read = found.view(at.kind.dtype).view(tuple(at.kind.shape))
        assert read.tolist() == state[name].tolist()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        b"\2\0\0\0\0\0\0\0[]",
        *(
            len(header).to_bytes(8, "little") + header + b"\0" * 8
            for header in (
                b'{"0": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
                b'{"0": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}',
                b'{"0": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
                b'{"0": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}',
                b'{"0": 5}',
            )
        ),
    ],
)
def test_a_file_that_holds_no_such_tensors_is_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        stored_tensors(tmp_path / "a.safetensors")


def test_an_index_that_names_other_files_is_refused(tmp_path):
    path = begin_folder(tmp_path, 1)
    write_index(path, Index(1, {}, [], [("../secret", "0")], [], {}, {}))
    with pytest.raises(CheckpointError, match="files that are not beside it"):
        read_index(path)


@pytest.mark.parametrize("body", ["[" * 100_000, '{"files": 5}', "5"])
def test_an_index_of_another_shape_is_refused(tmp_path, body):
    digest = hashlib.sha256(body.encode()).hexdigest()
    head = json.dumps({"mpiddl_checkpoint": 1, "sha256": digest})
    (tmp_path / "index.json").write_text(f"{head}\n{body}\n")
    with pytest.raises(CheckpointError, match="no checkpoint of mpiddl's"):
        read_index(tmp_path)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 5))
def test_writers_share_evenly(nbytes, writers):
    owners = shares_of_writers(nbytes, writers)
    loads = [0] * writers
    for size, owner in zip(nbytes, owners, strict=True):
        loads[owner] += size
    assert len(owners) == len(nbytes)
    assert max(loads) - min(loads) <= max(nbytes, default=0)


def test_a_models_tied_and_transposed_weights_can_be_written(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    state = {"a": weight, "tied": weight, "turned": weight.T, "part": weight[:1]}
    write_model(state, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_index_is_json_in_two_lines(tmp_path):
    head, body = (write(tmp_path, 3) / "index.json").read_text().splitlines()
    assert json.loads(head)["mpiddl_checkpoint"] == 2
    assert json.loads(body)["step"] == 3


@pytest.mark.parametrize("name", ["__metadata__", "_orig_mod.__metadata__"])
def test_a_name_that_means_something_else_in_files_is_refused(tmp_path, name):
    """safetensors 0.8.0 writes it, and cannot read the file."""
    model = {"weight": torch.ones(2), name: torch.ones(3)}
    with pytest.raises(CheckpointError, match="is named '__metadata__', which means something"):
        write_model(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(3, dtype=torch.complex128), r"'a' of the model is complex128.*view_as_real"),
        (torch.eye(2).to_sparse(), "'a' of the model is no dense tensor"),
        (5, "'a' of the model is no dense tensor"),
    ],
)
def test_what_files_cannot_hold_is_refused_by_name(value, words):
    with pytest.raises(CheckpointError, match=words):
        check_model({"a": value})


def test_a_compiled_models_file_has_the_names_of_the_plain_one(tmp_path):
    model = torch.nn.Sequential(torch.nn.Module())
    model[0]._orig_mod = torch.nn.Linear(2, 2)  # as torch.compile wraps; quicker to import
    write_model(model.state_dict(), tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == {"0.weight", "0.bias"}


def test_names_change_where_compiling_alone_changed_them():
    assert in_names_of(["a.b"], {"_orig_mod.a.b": 1}) == {"a.b": 1}
    assert in_names_of(["a._orig_mod.b"], {"a.b": 1, "c": 2}) == {"a._orig_mod.b": 1, "c": 2}
    both = {"a": 1, "_orig_mod.a": 2}
    assert in_names_of(["a"], both) == both
    assert in_names_of(both, {"a": 1}) == {"a": 1}
