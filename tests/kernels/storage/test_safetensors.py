"""Weights files: reallm and the safetensors package read them back, they are never half written, damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reallm.kernels.storage.layout import INDEX_FILE, WEIGHTS_FILE, LayoutError, TensorSpec, file_bytes
from reallm.kernels.storage.safetensors_reader import read_folder, read_header
from reallm.kernels.storage.safetensors_writer import write_weights

DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
tensors = st.dictionaries(
    st.from_regex(r"[a-z]{1,6}(\.[0-9]{1,2})?\.[a-z]{1,5}", fullmatch=True),
    st.sampled_from(sorted(DTYPES)).flatmap(
        lambda d: st.tuples(
            st.just(d), arrays.arrays(DTYPES[d], arrays.array_shapes(min_dims=0, min_side=0, max_side=9))
        )
    ),
    max_size=8,
)


def example_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        "a.codes": ("U8", (128,), bytes(range(128))),
        "b.norm": ("BF16", (3,), b"abcdef"),
        "c": ("F32", (), b"wxyz"),
    }


@settings(max_examples=50)
@given(tensors, st.sampled_from((1, 300, 4 << 30)))
def test_what_is_written_is_what_was_planned_and_reads_back(
    content: dict[str, tuple[str, np.ndarray]], max_bytes: int
) -> None:
    payloads = {name: (dtype, array.shape, array) for name, (dtype, array) in content.items()}
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in payloads.items()]
    with tempfile.TemporaryDirectory() as folder:
        files = write_weights(Path(folder), payloads, max_shard_bytes=max_bytes)
        assert sum(path.stat().st_size for path in files) == file_bytes(specs, max_shard_bytes=max_bytes)
        headers = read_folder(Path(folder)) if content else read_header(files[0])
        assert {(n, t.dtype, t.shape) for n, t in headers.items()} == {(s.name, s.dtype, s.shape) for s in specs}
        loaded: dict[str, np.ndarray] = {}
        for path in files:
            loaded |= safetensors.numpy.load_file(path)
        for name, (_, array) in content.items():
            stored = headers[name]
            with stored.path.open("rb") as stream:
                stream.seek(stored.start)
                assert stream.read(stored.stop - stored.start) == array.tobytes()
            assert loaded[name].tobytes() == array.tobytes() and loaded[name].shape == array.shape
        assert sorted(p.name for p in Path(folder).iterdir()) == sorted(
            [p.name for p in files] + ([INDEX_FILE] if len(files) > 1 else [])
        )


def test_torch_reads_it_too(tmp_path: Path) -> None:
    (path,) = write_weights(tmp_path, example_tensors())
    loaded = safetensors.torch.load_file(path)
    assert loaded["a.codes"].tolist() == list(range(128))
    assert loaded["b.norm"].shape == (3,) and loaded["c"].shape == ()


def test_functions_are_called_one_at_a_time_in_file_order(tmp_path: Path) -> None:
    calls: list[str] = []

    def source(name: str, size: int) -> Callable[[], bytes]:
        def read() -> bytes:
            calls.append(name)
            return bytes(size)

        return read

    lazy = {name: ("U8", (size,), source(name, size)) for name, size in (("z", 64), ("odd", 3), ("a", 128))}
    (path,) = write_weights(tmp_path, lazy)
    assert calls == ["a", "z", "odd"] == list(read_header(path))


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    content = example_tensors()
    (one,) = write_weights(tmp_path / "one", content)
    (two,) = write_weights(tmp_path / "two", dict(reversed(content.items())))
    assert one.read_bytes() == two.read_bytes()


def no_space() -> bytes:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted() -> bytes:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("failing", "error"), [(no_space, OSError), (interrupted, KeyboardInterrupt)])
def test_a_failure_leaves_nothing(tmp_path: Path, failing: Callable[[], bytes], error: type[BaseException]) -> None:
    content = {**example_tensors(), "x.late": ("U8", (64,), failing)}
    for max_bytes in (64, 4 << 30):
        with pytest.raises(error):
            write_weights(tmp_path, content, max_shard_bytes=max_bytes)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_on_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_weights(tmp_path, example_tensors())
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: no_space())
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path, {"new": ("U8", (64,), bytes(64))})
    assert [p.name for p in tmp_path.iterdir()] == [WEIGHTS_FILE]
    assert path.read_bytes() == before


def test_wrong_payloads_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="'a' of U8 \\[64\\] takes 64 contiguous bytes, got 63"):
        write_weights(tmp_path, {"a": ("U8", (64,), bytes(63))})
    strided = np.zeros((64, 2), np.uint8)[:, 0]
    with pytest.raises(LayoutError, match="contiguous"):
        write_weights(tmp_path, {"a": ("U8", (64,), strided)})
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"old")
    with pytest.raises(LayoutError, match="is in the way"):
        write_weights(tmp_path, example_tensors())


def test_a_changed_header_is_noticed_or_moves_no_tensor(tmp_path: Path) -> None:
    """Flip every fifth bit of the header: either one clear error, or tensors at unchanged places.

    The hashes of the manifest find what a header cannot show: a letter in a name, U8 read as I8, a tab for a space.
    """
    (path,) = write_weights(tmp_path, example_tensors())
    original, spans = path.read_bytes(), sorted((t.start, t.stop) for t in read_header(path).values())
    noticed = 0
    data_start = min(start for start, _ in spans)
    damaged = tmp_path / "damaged.safetensors"
    for bit in range(0, 8 * data_start, 5):
        content = bytearray(original)
        content[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(content)
        try:
            headers = read_header(damaged)
        except LayoutError as error:
            assert "\n" not in str(error) and str(damaged) in str(error)
            noticed += 1
        else:
            assert sorted((t.start, t.stop) for t in headers.values()) == spans
    assert noticed > 8 * data_start // 5 // 2


@pytest.mark.parametrize("keep", [0, 7, 8, 60, 300, -1])
def test_truncated_files_are_noticed(tmp_path: Path, keep: int) -> None:
    (path,) = write_weights(tmp_path, example_tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LayoutError, match=r"copy or download it again"):
        read_header(path)


def test_trailing_bytes_are_noticed(tmp_path: Path) -> None:
    (path,) = write_weights(tmp_path, example_tensors())
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(LayoutError, match=f"the file has {size + 1} bytes, its header describes {size}"):
        read_header(path)


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
HOSTILE: dict[str, tuple[str, str]] = {
    "an entry that is a number": (json.dumps({"a": 7}), "exactly dtype"),
    "a dtype that is a list": (json.dumps({"a": {**ENTRY, "dtype": ["U8"]}}), "cannot be read"),
    "an entry without a shape": (json.dumps({"a": {"dtype": "U8", "data_offsets": [0, 2]}}), "exactly dtype"),
    "half a byte": (json.dumps({"a": {**ENTRY, "dtype": "F4", "shape": [3]}}), "be stored"),
    "not an object": ("[1, 2]", "not a JSON object"),
    "leading space": (" {}", "not a JSON object"),
    "a repeated name": ('{"a": 1, "a": 2}', "a key appears twice"),
    "not an integer": (json.dumps({"a": {**ENTRY, "shape": [2.0]}}), "cannot be read"),
    "a truth value": (json.dumps({"a": {**ENTRY, "shape": [True]}}), "cannot be read"),
    "negative": (json.dumps({"a": {**ENTRY, "shape": [-2]}}), "cannot be read"),
    "unknown dtype": (json.dumps({"a": {**ENTRY, "dtype": "U3"}}), "unknown dtype"),
    "extra key": (json.dumps({"a": {**ENTRY, "code": "x"}}), "exactly dtype"),
    "huge shape": (json.dumps({"a": {**ENTRY, "shape": [2**62, 2**62]}}), "its offsets give 2"),
    "three offsets": (json.dumps({"a": {**ENTRY, "data_offsets": [0, 1, 2]}}), "offsets that cannot be read"),
    "backwards": (json.dumps({"a": {**ENTRY, "data_offsets": [2, 0]}}), "its offsets give -2"),
    "overlap": (json.dumps({"a": ENTRY, "b": ENTRY}), "starts at byte"),
    "hole": (json.dumps({"a": {**ENTRY, "data_offsets": [1, 3]}}), "starts at byte"),
    "metadata": ('{"__metadata__": {"a": 1}}', "strings to strings"),
    "endless digits": ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    "endless depth": ('{"a":' + "[" * 100_000, "not JSON"),
    "not text": ('{"\udcff"', "not JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_get_one_line(tmp_path: Path, case: str) -> None:
    text, expected = HOSTILE[case]
    header = text.encode("utf-8", "surrogateescape")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xy")
    with pytest.raises(LayoutError, match=expected) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_a_giant_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(LayoutError, match=f"its header should take {2**63} bytes"):
        read_header(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_never_crash_the_header_reader(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        try:
            tensors = read_header(path)
        except LayoutError as error:
            assert "truncated or damaged" in str(error)
        else:
            assert tensors == {}  # the only header that 200 random bytes can spell is an empty one


def test_four_bit_floats_take_half_a_byte_each(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xyz")
    assert read_header(path)["a"].nbytes == 3


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(LayoutError, match="holds neither"):
        read_folder(tmp_path)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = folder / INDEX_FILE
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda where: where.update(ghost="model-00001-of-00002.safetensors"), "names tensor 'ghost'"),
        (lambda where: where.pop("c"), "'c' is in"),
        (
            lambda where: where.update(c="../model-00002-of-00002.safetensors"),
            "expected a .safetensors file beside the index",
        ),
        (
            lambda where: where.update(c="model-00009-of-00002.safetensors"),
            "lacks the shard model-00009-of-00002.safetensors",
        ),
        (lambda where: where.clear(), "has no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: Callable[[dict[str, str]], None], expected: str) -> None:
    assert len(write_weights(tmp_path, example_tensors(), max_shard_bytes=128)) == 2
    assert set(read_folder(tmp_path)) == set(example_tensors())
    edit_index(tmp_path, change)
    with pytest.raises(LayoutError, match=expected):
        read_folder(tmp_path)


def test_tensors_that_the_index_does_not_list_are_read_if_allowed(tmp_path: Path) -> None:
    write_weights(tmp_path, example_tensors(), max_shard_bytes=128)
    edit_index(tmp_path, lambda where: where.pop("c"))
    assert set(read_folder(tmp_path, allow_unlisted=True)) == set(example_tensors())
    edit_index(tmp_path, lambda where: where.update(c="model-00001-of-00002.safetensors"))
    with pytest.raises(LayoutError, match="'c' is in"):
        read_folder(tmp_path, allow_unlisted=True)
