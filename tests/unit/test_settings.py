"""MPIDDL_* variables: known ones are read, everything else is an error that helps."""

from __future__ import annotations

import pytest

from mpiddl.errors import SettingsError
from mpiddl.settings import Settings, read


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
