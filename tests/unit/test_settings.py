"""MPIDDL_* variables: known ones are read, everything else is an error that helps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpiddl.base.settings import Settings, read
from mpiddl.collectives.choose import chunk_bytes_for
from mpiddl.errors import SettingsError
from mpiddl.strategies.options import options_from


def test_defaults_and_foreign_variables():
    assert read({"PATH": "/bin", "OMPI_X": "1"}) == Settings()


def test_all_settings_are_read():
    settings = read(
        {
            "MPIDDL_ALGORITHM": "ring",
            "MPIDDL_CHECK": "1",
            "MPIDDL_BUCKET_SIZE": "4MiB",
            "MPIDDL_CHUNK_SIZE": "64KiB",
            "MPIDDL_SINGLE_COPY": "off",
            "MPIDDL_TUNE": "table.json",
            "MPIDDL_ENGINE": "thread",
            "MPIDDL_ENGINE_THREADS": "2",
            "MPIDDL_TIMEOUT": "10m",
            "MPIDDL_STAGING": "host",
            "MPIDDL_TRACE": "traces",
            "MPIDDL_OFFER_RANK": "0",
        }
    )
    sizes, times = (4 << 20, 64 << 10), (2, 600.0)
    assert settings == Settings(
        *("ring", True, *sizes, False, "table.json", "thread", *times, "host", "traces", False)
    )


@pytest.mark.parametrize(
    ("environ", "bucket", "gpu_bucket", "chunk", "gpu_chunk"),
    [
        ({}, 4 << 20, 25 << 20, 512 << 10, 4 << 20),
        # What is the host's default counts on a GPU where it was asked for.
        (
            {"MPIDDL_BUCKET_SIZE": "4MiB", "MPIDDL_CHUNK_SIZE": "512KiB"},
            *(4 << 20, 4 << 20),
            *(512 << 10, 512 << 10),
        ),
        ({"MPIDDL_BUCKET_SIZE": "auto"}, None, None, 512 << 10, 4 << 20),
    ],
)
def test_what_is_set_counts_on_every_device(environ, bucket, gpu_bucket, chunk, gpu_chunk):
    settings = read(environ)
    unset = {"bucket_size": None, "algorithm": None, "engine": None}
    flags = {"nan_check": "off", "check_replicas_every": 0, "check": True}
    flags |= dict.fromkeys(
        ("find_unused_parameters", "static_graph", "broadcast_buffers", "rebuild_buckets"), False
    )
    for on_gpu, want in ((False, bucket), (True, gpu_bucket)):
        assert options_from(settings, on_gpu=on_gpu, **unset, **flags).bucket_size == want
    for late, want in ((False, chunk), (True, gpu_chunk)):
        device, world = SimpleNamespace(late=late), SimpleNamespace(settings=settings)
        assert chunk_bytes_for(device, world) == want


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MPIDDL_CHEK", "1", "did you mean MPIDDL_CHECK"),
        ("MPIDDL_XYZ", "1", "known are MPIDDL_ALGORITHM"),
        ("MPIDDL_CHECK", "maybe", "write 1 or 0"),
        ("MPIDDL_BUCKET_SIZE", "large", "not a size"),
        ("MPIDDL_CHUNK_SIZE", "1", "at least 4KiB"),
        ("MPIDDL_BUCKET_SIZE", "0", "at least 1B"),
        (
            "MPIDDL_ALGORITHM",
            "foo",
            "auto, shared, hierarchical, ring, direct, doubling, library, nccl, reference",
        ),
        ("MPIDDL_STAGING", "train", "auto, device, host"),
        ("MPIDDL_ENGINE", "steam", "auto, inline, after, thread"),
        ("MPIDDL_TIMEOUT", "soon", "write for example 90s, 10m"),
    ],
)
def test_mistakes_are_refused(name, value, words):
    with pytest.raises(SettingsError, match=words) as caught:
        read({name: value})
    assert f"{name}={value}" in str(caught.value)
