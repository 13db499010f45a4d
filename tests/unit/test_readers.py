"""Files are read exactly, or refused with one error that names them."""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import zipfile
from multiprocessing.reduction import ForkingPickler

import numpy
import pytest
import torch

from mpiddl.data.reading import files
from mpiddl.data.reading.idx import read_idx
from mpiddl.data.reading.images import ImageFolder
from mpiddl.data.reading.npy import read_npy, read_npz
from mpiddl.data.reading.table import read_csv
from mpiddl.data.reading.text import TextLines
from mpiddl.errors import DataError

READERS = [read_npy, read_npz, read_idx, read_csv, TextLines, ImageFolder]


def in_another_process(thing):
    """What a loader worker gets, and how many bytes it is sent."""
    sent = bytes(ForkingPickler.dumps(thing))
    return ForkingPickler.loads(sent), len(sent)


def idx(array):
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
    kind = array.dtype.str[1:]
    header = struct.pack(f">HBB{array.ndim}I", 0, codes[kind], array.ndim, *array.shape)
    return header + array.astype(f">{kind}").tobytes()


# --- all of them


@pytest.mark.parametrize("read", READERS)
def test_a_path_that_is_no_such_file_is_named(tmp_path, read):
    with pytest.raises(DataError, match=r"cannot read .*nowhere: No such file"):
        read(tmp_path / "nowhere")
    if read is not ImageFolder:
        with pytest.raises(DataError, match="Is a directory"):
            read(tmp_path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\x93NUMPY", b"PK\x03\x04", b"\x1f\x8bxxx\xff" * 3],
)
def test_foreign_files_are_named(tmp_path, read, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    if read is TextLines and content == b"PK\x03\x04":
        return  # that is a line
    with pytest.raises(DataError, match=str(path)) as caught:
        _ = read(path)[0]  # text shows its encoding when a line is read
    assert "None" not in str(caught.value)


# --- .npy and .npz

ARRAYS = {
    "bytes": numpy.arange(24, dtype=numpy.uint8).reshape(2, 3, 4),
    "columns": numpy.asfortranarray(numpy.arange(12, dtype=numpy.int32).reshape(3, 4)),
    "big_endian": numpy.arange(5, dtype=">f8"),
    "scalar": numpy.array(7),
    "no_rows": numpy.empty((0, 3), numpy.float32),
    "text": numpy.array(["a", "bcd"]),
    "fields": numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_npy_is_mapped_and_exact(tmp_path, name):
    numpy.save(tmp_path / "a.npy", ARRAYS[name])

    array = read_npy(tmp_path / "a.npy")

    assert array.dtype == ARRAYS[name].dtype
    assert array.shape == ARRAYS[name].shape
    assert numpy.array_equal(array, ARRAYS[name])
    assert not array.flags.writeable
    assert array.size == 0 or isinstance(array, numpy.memmap)


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_npz_is_exact_and_mapped_where_it_can_be(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)

    arrays = read_npz(tmp_path / "a.npz")

    assert list(arrays) == list(ARRAYS)
    for name, array in arrays.items():
        assert array.dtype == ARRAYS[name].dtype
        assert array.shape == ARRAYS[name].shape
        assert numpy.array_equal(array, ARRAYS[name])
        assert not array.flags.writeable
        assert isinstance(array, numpy.memmap) == (save is numpy.savez and array.size > 0)


def test_npz_arrays_are_found_behind_other_bytes(tmp_path):
    packed = io.BytesIO()
    numpy.savez(packed, a=ARRAYS["bytes"], b=ARRAYS["columns"])
    (tmp_path / "a.npz").write_bytes(b"x" * 777 + packed.getvalue())

    arrays = read_npz(tmp_path / "a.npz")

    assert numpy.array_equal(arrays["a"], ARRAYS["bytes"])
    assert numpy.array_equal(arrays["b"], ARRAYS["columns"])


def test_npy_cut_anywhere_is_refused(tmp_path):
    numpy.save(tmp_path / "whole.npy", ARRAYS["bytes"])
    whole = (tmp_path / "whole.npy").read_bytes()
    path = tmp_path / "cut.npy"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cut off"):
            read_npy(path)
    path.write_bytes(whole + b"!")
    with pytest.raises(DataError, match="longer than its array: 25 bytes of data, not the 24"):
        read_npy(path)


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
def test_npz_cut_anywhere_is_refused(tmp_path, save):
    save(tmp_path / "whole.npz", a=ARRAYS["bytes"])
    whole = (tmp_path / "whole.npz").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.npz"):
            read_npz(tmp_path / "cut.npz")


def test_bits_that_changed_never_end_in_another_error(tmp_path):
    """Every byte of the headers, and of packed data, made another one."""
    for save, read in [(numpy.save, read_npy), (numpy.savez, read_npz)]:
        save(tmp_path / "whole.np", ARRAYS["bytes"])
        whole = next(tmp_path.glob("whole.np*")).read_bytes()
        for place in range(len(whole)):
            for bits in (0x01, 0x80):
                spoilt = bytearray(whole)
                spoilt[place] ^= bits
                (tmp_path / "spoilt").write_bytes(spoilt)
                try:
                    read(tmp_path / "spoilt")
                except DataError as error:
                    assert "spoilt" in str(error)  # noqa: PT017
        next(tmp_path.glob("whole.np*")).unlink()


def test_packed_data_that_changed_is_refused(tmp_path):
    numpy.savez_compressed(tmp_path / "a.npz", a=numpy.arange(1000))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    info = zipfile.ZipFile(tmp_path / "a.npz").infolist()[0]
    whole[info.compress_size - 100] ^= 0x10
    (tmp_path / "a.npz").write_bytes(whole)

    with pytest.raises(DataError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", [object, [("a", object)]])
def test_objects_are_never_loaded(tmp_path, dtype):
    array = numpy.array([None], dtype=dtype)
    numpy.save(tmp_path / "a.npy", array, allow_pickle=True)
    numpy.savez(tmp_path / "a.npz", a=array)
    numpy.savez_compressed(tmp_path / "b.npz", a=array)

    for read, name in [(read_npy, "a.npy"), (read_npz, "a.npz"), (read_npz, "b.npz")]:
        with pytest.raises(DataError, match="Python objects"):
            read(tmp_path / name)


def test_shapes_that_cannot_be_are_refused(tmp_path):
    numpy.save(tmp_path / "a.npy", ARRAYS["bytes"])
    whole = (tmp_path / "a.npy").read_bytes()
    for shape in [b"(-2,-12) ", b"(9**9, 1)", b"(2, 12.0)", b"(2, 3, 4 ", b"'abcdefg'"]:
        (tmp_path / "a.npy").write_bytes(whole.replace(b"(2, 3, 4)", shape))
        with pytest.raises(DataError, match=r"a\.npy"):
            read_npy(tmp_path / "a.npy")
    huge = whole.replace(b"(2, 3, 4), }" + b" " * 20, b"(99999999999, 99999999999), }   ")
    assert huge != whole
    (tmp_path / "a.npy").write_bytes(huge)
    with pytest.raises(DataError, match="cut off"):
        read_npy(tmp_path / "a.npy")


def test_workers_are_sent_a_place_in_the_file(tmp_path):
    rows = numpy.arange(3 * files.SENT_AS_DATA, dtype=numpy.uint32).reshape(-1, 64)
    numpy.save(tmp_path / "a.npy", rows)
    numpy.savez(tmp_path / "a.npz", first=rows[:5], second=rows)
    for array in [read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz")["second"]]:
        views = [
            (array, rows),
            (array[1000:-1], rows[1000:-1]),
            (array.reshape(-1)[7:], rows.reshape(-1)[7:]),
            (array.T, rows.T),
            (array.view(numpy.int16), rows.view(numpy.int16)),
        ]
        for view, expected in views:
            received, nbytes = in_another_process(view)
            assert nbytes < 1000
            assert isinstance(received, numpy.memmap)
            assert not received.flags.writeable
            assert numpy.array_equal(received, expected)

    array = read_npy(tmp_path / "a.npy")
    for part, expected in [(array[:3], rows[:3]), (array[::2], rows[::2]), (array + 1, rows + 1)]:
        received, nbytes = in_another_process(part)
        assert nbytes > expected.nbytes
        assert numpy.array_equal(received, expected)

    sent = bytes(ForkingPickler.dumps(array))
    os.truncate(tmp_path / "a.npy", 1 << 20)
    with pytest.raises(DataError, match=r"a\.npy"):
        ForkingPickler.loads(sent)


def test_copies_of_mapped_arrays_and_other_maps_are_sent_as_data(tmp_path):
    rows = numpy.arange(files.SENT_AS_DATA, dtype=numpy.int32).reshape(-1, 64)
    numpy.save(tmp_path / "a.npy", rows)
    rows.tofile(tmp_path / "raw")
    array = read_npy(tmp_path / "a.npy")
    own = numpy.memmap(tmp_path / "raw", numpy.int32, "r+", shape=rows.shape)
    for part, expected in [
        (array.astype("float32"), rows.astype("float32")),
        (array.copy(), rows),
        (array.copy()[5:-1], rows[5:-1]),
        (own, rows),
        (own[1:], rows[1:]),
        (own.astype("int64"), rows.astype("int64")),
    ]:
        received, nbytes = in_another_process(part)
        assert nbytes > expected.nbytes
        assert received.dtype == expected.dtype
        assert received.flags.writeable
        assert numpy.array_equal(received, expected)

    received, nbytes = in_another_process(array[5:])  # but this is still a place in the file
    assert nbytes < 1000
    assert numpy.array_equal(received, rows[5:])


# --- IDX


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_is_exact_and_native(tmp_path, kind, pack):
    expected = (numpy.arange(60) - (0 if kind == "u1" else 30)).astype(kind).reshape(3, 4, 5)
    (tmp_path / "images").write_bytes(pack(idx(expected)))

    array = read_idx(tmp_path / "images")

    assert array.dtype == expected.dtype
    assert array.dtype.isnative
    assert numpy.array_equal(array, expected)
    assert not array.flags.writeable
    assert isinstance(array, numpy.memmap) == (pack is bytes and kind in ("u1", "i1"))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", ["u1", "i4"])
def test_idx_cut_anywhere_or_too_long_is_refused(tmp_path, pack, kind):
    content = idx(numpy.ones((2, 5), kind))
    whole = pack(content)
    path = tmp_path / "images"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="images"):
            read_idx(path)
    path.write_bytes(pack(content + b"!"))
    with pytest.raises(DataError, match="too long"):
        read_idx(path)
    path.write_bytes(pack(b"\0\1" + content[2:]))
    with pytest.raises(DataError, match="not an IDX file"):
        read_idx(path)
    path.write_bytes(pack(content[:2] + b"\x0a" + content[3:]))
    with pytest.raises(DataError, match="not an IDX file"):
        read_idx(path)


def test_idx_without_samples(tmp_path):
    whole = idx(numpy.empty((0, 28, 28), "u1"))
    (tmp_path / "images").write_bytes(whole)

    assert read_idx(tmp_path / "images").shape == (0, 28, 28)
    for length in range(len(whole)):
        (tmp_path / "images").write_bytes(whole[:length])
        with pytest.raises(DataError, match="images"):
            read_idx(tmp_path / "images")


# --- CSV


def csv(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_numbers_and_labels(tmp_path):
    path = csv(tmp_path, '\ufeffa, b,kind,"c, d"\r\n1,-2.5,x,1e3\r\n\r\n 4 ,nan,"y ""z""",inf\r\n')

    table = read_csv(path, label="kind")

    assert table.names == ("a", "b", "c, d")
    expected = [[1, -2.5, 1000], [4, numpy.nan, numpy.inf]]
    assert numpy.array_equal(table.values, expected, equal_nan=True)
    assert table.values.dtype == numpy.float64
    assert table.classes == ("x", 'y "z"')
    assert table.labels.tolist() == [0, 1]
    assert table.labels.dtype == numpy.int64


def test_csv_chosen_columns_in_the_order_chosen(tmp_path):
    path = csv(tmp_path, "a;2;c\n1;oops;3\n4;5;6")

    table = read_csv(path, columns=["c", "a"], dtype="float32", delimiter=";")

    assert table.names == ("c", "a")
    assert table.values.tolist() == [[3, 1], [6, 4]]
    assert table.values.dtype == numpy.float32
    assert table.labels is None


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", ">i8", "u8", "?"])
def test_csv_whole_numbers_are_exact(tmp_path, dtype):
    kind = numpy.dtype(dtype)
    low, high = (0, 1) if dtype == "?" else (numpy.iinfo(kind).min, numpy.iinfo(kind).max)

    table = read_csv(csv(tmp_path, f"a,b\n{low},{high}\n 1 ,+0\n"), dtype=dtype)

    assert table.values.dtype == kind
    assert table.values.tolist() == [[low, high], [1, 0]]
    for number in (low - 1, high + 1):
        text = f"a,b\n1,1\n\n0,{number}\n"
        with pytest.raises(DataError, match=rf"line 4, column 'b': '{number}' is not a whole .*"):
            read_csv(csv(tmp_path, text), dtype=dtype)


def test_csv_numbers_beyond_float64_stay_what_they_are(tmp_path):
    path = csv(tmp_path, "a\n9007199254740993\n-9007199254740993\n")

    assert read_csv(path, dtype="int64").values.tolist() == [[2**53 + 1], [-(2**53) - 1]]


def test_csv_labels_mean_the_same_in_every_table(tmp_path):
    path = csv(tmp_path, "x,y\n1,10\n2,9\n3,10\n")

    numbers = read_csv(path, label="y")
    other = read_csv(path, label="y", classes=["10", "0", "9"])

    assert numbers.classes == ("9", "10")  # by number, not by letter
    assert numbers.labels.tolist() == [1, 0, 1]
    assert other.classes == ("10", "0", "9")
    assert other.labels.tolist() == [0, 2, 0]
    with pytest.raises(DataError, match=r"line 3, column 'y': '9' is none of the classes 10, 0"):
        read_csv(path, label="y", classes=["10", "0"])


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "is empty"),
        ("\n\n", {}, "is empty"),
        ("a,b\n", {}, "no rows"),
        ("1,2\n3,4\n", {}, "line 1 is all numbers"),
        ("a,,c\n1,2,3\n", {}, "column 2 has no name"),
        ("a,b, a\n1,2,3\n", {}, "two columns are called 'a'"),
        ("a,b\n1,2\n3\n", {}, "line 3: 1 fields, but 2 names"),
        ("a,b\n1,2\n\n3,4,5\n", {}, "line 4: 3 fields, but 2 names"),
        ("a,b\n1,2\n3,x4\n", {}, "line 3, column 'b': 'x4' is not a number"),
        ("a,b\n1,2\n,4\n", {}, "line 3, column 'a': '' is not a number"),
        ("a,b\n1,1_0\n", {}, "line 2, column 'b': '1_0' is not a number"),
        ("a,b\n1,1.7\n", {"dtype": "int64"}, "line 2, column 'b': '1.7' is not a whole number"),
        ("a,b\n1,2\n300,4\n", {"dtype": "u1"}, "line 3, column 'a': .* 0 to 255, as uint8"),
        ("a,b\n1,nan\n", {"dtype": "int8"}, "line 2, column 'b': 'nan' is not a whole number"),
        ("a,b\n1,1_0\n", {"dtype": "int8"}, "line 2, column 'b': '1_0' is not a whole number"),
        ("a,b\n1,\n", {"dtype": "int8"}, "line 2, column 'b': '' is not a whole number"),
        ("a,b\n1,2\n", {"dtype": "U1"}, "floats, integers or booleans, got <U1"),
        ("a,b\n1,2\n", {"columns": ["b", "z"]}, "no column 'z'; it has a, b"),
        ("a,b\n1,2\n", {"columns": ["b", "b"]}, "wanted twice"),
        ("a,b\n1,2\n", {"columns": ["b"], "label": "b"}, "wanted twice"),
        ("a,b\n1,2\n", {"label": "z"}, "no column 'z'"),
        ("a,b\n1,2\n3, \n", {"label": "b"}, "line 3, column 'b': '' is no label"),
        ('a,b\n1,"2\n3,4\n', {}, "quotation mark"),
        ('a,b\n1,"2"3\n', {}, "line 2: .*mend"),
        ("a,b\n1,2\n3,\0004\n", {}, "line 3: a NUL byte"),
        ("a,b\n1,2\n", {"encoding": "utf-16"}, "cannot be found in utf-16"),
        ("a,b\n1,2\n", {"encoding": "nonsense"}, "'nonsense' is unknown"),
    ],
)
def test_csv_errors_name_line_and_column(tmp_path, text, options, words):
    with pytest.raises(DataError, match=words):
        read_csv(csv(tmp_path, text), **options)


def test_csv_in_another_encoding(tmp_path):
    path = csv(tmp_path, "größe,b\n1,2\n", "latin-1")

    with pytest.raises(DataError, match=r"line 1: byte 0xf6 is not utf-8"):
        read_csv(path)
    assert read_csv(path, encoding="latin-1").names == ("größe", "b")
    with pytest.raises(DataError, match="NUL byte.*UTF-16"):
        read_csv(csv(tmp_path, "a,b\n1,2\n", "utf-16-le"))


# --- images


@pytest.fixture
def folder(tmp_path):
    """Two classes; images of one colour each, with the number of the pixel in the red channel."""
    image = pytest.importorskip("PIL.Image")
    for place, name in enumerate(["dog/b.png", "dog/a.PNG", "cat/deep/c.png", "cat/z.bmp"]):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = numpy.full((2, 3, 3), 51 * place, numpy.uint8)
        pixels[:, :, 0] = numpy.arange(6).reshape(2, 3)
        image.fromarray(pixels).save(path)
    for name in ["notes.txt", "dog/notes.txt", "dog/._a.png", ".hidden/x.png", "dog/.x/y.png"]:
        (tmp_path / "root" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / name).write_text("no image")
    return tmp_path / "root"


def test_images_in_the_order_of_their_names(folder):
    images = ImageFolder(folder)

    assert images.classes == ["cat", "dog"]
    assert [os.path.relpath(path, folder) for path in images.paths] == [
        "cat/deep/c.png",
        "cat/z.bmp",
        "dog/a.PNG",
        "dog/b.png",
    ]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.labels.dtype == torch.int64
    assert len(images) == 4
    assert [label for _, label in (images[i] for i in range(4))] == [0, 0, 1, 1]
    image, _ = images[2]
    expected = torch.full((3, 2, 3), 51.0)
    expected[0] = torch.arange(6.0).reshape(2, 3)
    assert image.dtype == torch.float32
    assert torch.equal(image, expected / 255)
    with pytest.raises(IndexError):
        images[4]


def test_images_scaled_converted_and_transformed(folder):
    assert ImageFolder(folder, size=(4, 5))[0][0].shape == (3, 4, 5)
    assert ImageFolder(folder, size=7, mode="L")[0][0].shape == (1, 7, 7)
    assert ImageFolder(folder, mode="RGBA")[0][0][3].eq(1).all()
    assert ImageFolder(folder, transform=torch.Tensor.argmax)[0][0].ndim == 0
    copy, _ = in_another_process(ImageFolder(folder, size=7))
    assert copy[1][0].shape == (3, 7, 7)
    for options in [{"mode": "1"}, {"size": 0}, {"size": (3, -1)}]:
        with pytest.raises(DataError, match="must be"):
            ImageFolder(folder, **options)


@pytest.mark.parametrize(
    ("place", "tail"),
    [(1, 3), (3, 24)],  # these end in padding, checksums and a mark, not in pixels
)
def test_images_cut_anywhere_are_named(folder, place, tail):
    images = ImageFolder(folder)
    with open(images.paths[place], "rb+") as stream:
        for length in reversed(range(os.path.getsize(images.paths[place]) - tail)):
            stream.truncate(length)
            with pytest.raises(DataError, match=images.paths[place]):
                images[place]


def test_images_of_16_bits_are_refused(folder):
    from PIL import Image

    Image.fromarray(numpy.full((2, 3), 999, numpy.uint16)).save(folder / "dog" / "b.png")

    with pytest.raises(DataError, match=r"b\.png has more than 8 bits"):
        ImageFolder(folder)[3]


def test_folders_without_images_are_refused(folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none has no folders"):
        ImageFolder(tmp_path / "none")
    (folder / "ant").mkdir()
    with pytest.raises(DataError, match="class 'ant' has no image"):
        ImageFolder(folder)


def test_pillow_is_asked_for_when_it_is_needed(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it were not installed

    with pytest.raises(DataError, match=r"needs Pillow: pip install 'mpiddl\[images\]'"):
        ImageFolder(folder)


# --- text


@pytest.mark.parametrize(
    "text", ["one", "one\n", "\n", "one\r\ntwo\n\nfour", "\ufeffone\ntwo\n", "ä\nπ\u2028\x0b\x85\n"]
)
@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_lines_are_what_python_reads(tmp_path, monkeypatch, text, piece):
    monkeypatch.setattr("mpiddl.data.reading.text._PIECE", piece)
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    with path.open(encoding="utf-8-sig") as stream:
        expected = [line.removesuffix("\n") for line in stream]

    lines = TextLines(path)

    assert len(lines) == len(expected)
    assert [lines[i] for i in range(len(lines))] == expected
    assert [lines[numpy.int64(i) - len(lines)] for i in range(len(lines))] == expected
    assert list(lines) == expected
    for index in (len(lines), -len(lines) - 1):
        with pytest.raises(IndexError):
            lines[index]


def test_lines_in_another_encoding(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("one\nzwölf\nthree\n".encode("latin-1"))

    lines = TextLines(path)

    assert lines[0] + lines[2] == "onethree"
    with pytest.raises(DataError, match=r"text, line 2: byte 0xf6 is not utf-8"):
        lines[1]
    assert TextLines(path, "latin-1")[1] == "zwölf"
    for encoding in ("utf-16", "utf-32", "nonsense", "hex"):
        with pytest.raises(DataError, match="UTF-8|utf-8"):
            TextLines(path, encoding)


def test_workers_open_the_text_again(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("".join(f"line {i}\n" for i in range(50_000)))
    monkeypatch.chdir(tmp_path)
    lines = TextLines("text")
    monkeypatch.chdir("/")

    copy, nbytes = in_another_process(lines)

    assert nbytes < 1000
    assert copy[49_999] == "line 49999"
    assert len(copy) == 50_000
    sent = bytes(ForkingPickler.dumps(lines))
    with path.open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DataError, match="do not change it"):
        ForkingPickler.loads(sent)
