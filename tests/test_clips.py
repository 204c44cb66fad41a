"""Finding clips and captions in folders that may contain anything."""

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepa_cli.data.clips import ClipError, ClipScan, file_digest, find_clips
from crepa_cli.errors import UserError

FUZZ = settings(max_examples=1500, deadline=None, derandomize=True, database=None)


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def captions(scan: ClipScan, folder: Path) -> dict[str, str]:
    return {clip.path.relative_to(folder.resolve()).as_posix(): clip.caption for clip in scan.clips}


def reasons(scan: ClipScan) -> dict[str, str]:
    return {clip.name: clip.reason for clip in scan.skipped}


def test_captions_beside_the_clips_are_found_in_every_folder_and_sorted(tmp_path: Path) -> None:
    put(tmp_path, {"b.MP4": b"", "b.txt": "a bee\n", "a.webm": b"", "a.txt": "an ant", "sub/c.gif": b""})
    put(tmp_path, {"sub/c.txt": "  a cat ", "notes.txt": "no clip", "d.JPG": b"", "d.txt": "a dog"})
    scan = find_clips(tmp_path)
    assert list(captions(scan, tmp_path).items()) == [
        ("a.webm", "an ant"),
        ("b.MP4", "a bee"),
        ("d.JPG", "a dog"),
        ("sub/c.gif", "a cat"),
    ]
    assert scan.skipped == []
    assert all(clip.path.is_absolute() for clip in scan.clips)


def test_metadata_files_give_captions_relative_to_their_own_folder(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": b"", "deep/b.mp4": b"", "csv/c.mp4": b"", "csv/d.mp4": b""})
    lines = [
        {"file_name": "a.mp4", "text": "an ant", "extra": 1},
        {"file_name": "deep/b.mp4", "text": "two\u2028parts"},
    ]
    put(tmp_path, {"metadata.jsonl": "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)})
    put(tmp_path, {"csv/metadata.csv": 'text,file_name\r\n"a cat, ""big""\nand old",c.mp4\r\na dog,../csv/d.mp4\r\n'})
    scan = find_clips(tmp_path)
    assert scan.skipped == []
    assert captions(scan, tmp_path) == {
        "a.mp4": "an ant",
        "csv/c.mp4": 'a cat, "big"\nand old',
        "csv/d.mp4": "a dog",
        "deep/b.mp4": "two\u2028parts",
    }


def test_a_caption_beside_the_clip_wins_over_metadata(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": b"", "a.txt": "mine", "metadata.jsonl": '{"file_name": "a.mp4", "text": "theirs"}'})
    assert captions(find_clips(tmp_path), tmp_path) == {"a.mp4": "mine"}


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": b"", "a.txt": b"\xef\xbb\xbfan ant", "b.mp4": b""})
    put(tmp_path, {"metadata.csv": b"\xef\xbb\xbffile_name,text\nb.mp4,a bee\n"})
    assert captions(find_clips(tmp_path), tmp_path) == {"a.mp4": "an ant", "b.mp4": "a bee"}


@pytest.mark.parametrize("lines", [False, True])
def test_several_captions_are_a_list_in_metadata_or_with_the_setting_the_lines_of_a_text(
    tmp_path: Path, *, lines: bool
) -> None:
    put(tmp_path, {"a.mp4": b"", "a.txt": "an ant\r\n \n an insect\n", "b.mp4": b"", "c.mp4": b""})
    rows = [{"file_name": "b.mp4", "text": ["a bee ", "it\nbuzzes"]}, {"file_name": "c.mp4", "text": ["a cat"]}]
    put(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    found = {clip.path.name: clip.captions for clip in find_clips(tmp_path, caption_lines=lines).clips}
    assert found == {
        "a.mp4": ("an ant", "an insect") if lines else ("an ant\r\n \n an insect",),
        "b.mp4": ("a bee", "it", "buzzes") if lines else ("a bee", "it\nbuzzes"),
        "c.mp4": ("a cat",),
    }


@pytest.mark.parametrize("text", [[], [""], ["a bee", " "], ["a bee", 7], {"0": "a bee"}])
def test_a_list_without_usable_captions_is_reported(tmp_path: Path, text: object) -> None:
    put(tmp_path, {"a.mp4": b"", "metadata.jsonl": json.dumps({"file_name": "a.mp4", "text": text})})
    scan = find_clips(tmp_path)
    assert not scan.clips
    assert any("an empty caption" in skip.reason or "both strings" in skip.reason for skip in scan.skipped)


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "no caption: write one in a.txt next to the clip, or add it to metadata.jsonl"),
        (b" \n", "empty caption"),
        ("ein Bär".encode("latin-1"), "a.txt is not UTF-8 text (byte 5)"),
        ("a bear".encode("utf-16"), "a.txt is not UTF-8 text (byte 0)"),
        (b"x" * 1_000_001, "a.txt is larger than 1,000,000 bytes"),
    ],
)
def test_a_clip_without_a_usable_caption_is_skipped_with_the_reason(
    tmp_path: Path, caption: bytes | None, reason: str
) -> None:
    put(tmp_path, {"a.mp4": b"", "ok.mp4": b"", "ok.txt": "fine"})
    if caption is not None:
        put(tmp_path, {"a.txt": caption})
    scan = find_clips(tmp_path)
    assert captions(scan, tmp_path) == {"ok.mp4": "fine"}
    assert list(reasons(scan)) == ["a.mp4"]
    assert reason in reasons(scan)["a.mp4"]


def test_faults_of_metadata_are_reported_by_file_and_line_and_the_rest_is_used(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.mp4", "text": "an ant"}',
        '{"file_name": "a.mp4", "text": "an aunt"}',
        '{"file_name": "a.mp4"',
        "[1, 2]",
        '{"file_name": 7, "text": "x"}',
        '{"file_name": "gone.mp4", "text": "x"}',
        "[" * 100_000,
        "9" * 5_000,
        json.dumps({"file_name": "a.mp4", "text": "x" * 1_000_001}),
        '{"file_name": "b.mp4", "text": "a bee"}',
    ]
    put(tmp_path, {"a.mp4": b"", "b.mp4": b"", "metadata.jsonl": "\n".join(lines)})
    scan = find_clips(tmp_path)
    assert captions(scan, tmp_path) == {"a.mp4": "an ant", "b.mp4": "a bee"}
    assert reasons(scan) == {
        "metadata.jsonl, line 2": "a.mp4 already has another caption, which is kept",
        "metadata.jsonl, line 3": "is not JSON",
        "metadata.jsonl, line 4": "is not a JSON object with file_name and text",
        "metadata.jsonl, line 5": "needs file_name and text, both strings; text may be a list of them, for several "
        "captions",
        "metadata.jsonl, line 6": "gone.mp4 is not among the clips of this folder",
        "metadata.jsonl, line 7": "is not JSON",
        "metadata.jsonl, line 8": "is not JSON",
        "metadata.jsonl, line 9": "the caption is longer than 1,000,000 bytes",
    }


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"name,text\na.mp4,x\n", "metadata.csv", "has no column file_name"),
        (b"", "metadata.csv", "has no column file_name and no column text"),
        (b"file_name,text\na.mp4\n", "metadata.csv, line 2", "needs file_name and text, both strings"),
        (b"file_name,text\n" + b"x" * 200_000 + b",y\n", "metadata.csv", "beyond line 1: field larger"),
        (b"file_name,text\n\xff,y\n", "metadata.csv", "metadata.csv is not UTF-8 text (byte 15)"),
    ],
)
def test_faults_of_a_csv_are_reported(tmp_path: Path, content: bytes, name: str, reason: str) -> None:
    put(tmp_path, {"a.mp4": b"", "metadata.csv": content})
    found = reasons(find_clips(tmp_path))
    assert reason in found[name]
    assert "no caption" in found["a.mp4"]


@pytest.mark.parametrize(
    "name", ["../out.mp4", "sub/../../out.mp4", "{outside}/out.mp4", "link.mp4", "", ".", "..", "a\x00.mp4", "x" * 5000]
)
def test_no_path_of_a_metadata_file_leaves_the_folder(tmp_path: Path, name: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    put(tmp_path, {"outside/out.mp4": b"", "out.mp4": b"", "inside/ok.mp4": b"", "inside/ok.txt": "fine"})
    (inside / "link.mp4").symlink_to(outside / "out.mp4")
    (inside / "folder").symlink_to(outside)
    entry = {"file_name": name.format(outside=outside), "text": "x"}
    put(inside, {"metadata.jsonl": json.dumps(entry) + '\n{"file_name": "folder/out.mp4", "text": "x"}'})
    scan = find_clips(inside)
    assert captions(scan, inside) == {"ok.mp4": "fine"}
    found = reasons(scan)
    assert found["metadata.jsonl, line 2"] == "folder/out.mp4 is not among the clips of this folder"
    if "out" in name or "link" in name:
        assert found["metadata.jsonl, line 1"].endswith("is outside the clips' folder")


def test_what_is_no_regular_file_is_skipped(tmp_path: Path) -> None:
    put(tmp_path, {"loop.txt": "x", "gone.txt": "x", "folder.mp4/ok.mp4": b"", "folder.mp4/ok.txt": "fine"})
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    put(tmp_path, {"metadata.jsonl": '{"file_name": "loop.mp4", "text": "x"}'})
    scan = find_clips(tmp_path)
    assert captions(scan, tmp_path) == {"folder.mp4/ok.mp4": "fine"}
    assert "broken symlink" in reasons(scan)["gone.mp4"]
    assert "broken symlink" in reasons(scan)["loop.mp4"]


def test_hidden_files_and_folders_are_not_looked_at(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": b"", "a.txt": "an ant", ".crepa/b.mp4": b"", "._a.mp4": b""})
    scan = find_clips(tmp_path)
    assert list(captions(scan, tmp_path)) == ["a.mp4"]
    assert scan.skipped == []


def test_files_of_other_kinds_are_named_and_captions_are_not(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"a.MTS": b"", "a.txt": "an ant", "b.txt": "no clip", ".c.mov": b"", "metadata.csv": "file_name,text\n"},
    )
    put(tmp_path, {"z.zip": b"", "sub/photo\n.HEIC": b"", "README": b"", "notes.md": b""})
    scan = find_clips(tmp_path)
    assert list(captions(scan, tmp_path)) == ["a.MTS"]
    assert scan.left_out == ["README", "notes.md", "sub/photo\\n.HEIC", "z.zip"]


def test_names_are_safe_to_print(tmp_path: Path) -> None:
    put(tmp_path, {"\x1b[2Jevil\n.mp4": b""})
    (tmp_path / "\udcff.mp4").write_bytes(b"")
    for skipped in find_clips(tmp_path).skipped:
        assert skipped.name.isprintable()
        assert skipped.reason.isprintable()


def test_a_folder_without_clips_is_a_mistake_that_says_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path, {"a.txt": "x"})
    with pytest.raises(UserError, match=r"no file that ends in mp4, .*, webp, png, jpg, jpeg\. Each clip"):
        find_clips(tmp_path)
    put(tmp_path, {"a.zip": "x", "sub/b.heic": "x"})
    with pytest.raises(UserError, match=r"jpeg, but 2 other files: a\.zip, sub/b\.heic\. Each clip"):
        find_clips(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        find_clips(tmp_path / "a.txt")
    with pytest.raises(UserError, match="does not exist"):
        find_clips(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("loop", "a\x00b", "x" * 5000):
        with pytest.raises(UserError, match=r"The clips' folder .* Give a folder of videos or images"):
            find_clips(tmp_path / name)


NAMES = st.sampled_from(["a.mp4", "../a.mp4", "/etc/passwd", "b.mp4", "./sub/../a.mp4", "\x00", "\ud800"]) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["file_name", "text", "x"]), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries({"file_name": NAMES, "text": st.text() | VALUES})
JSON_LINES = st.lists(ENTRIES | VALUES, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
CSV_TEXT = st.lists(NAMES | st.text(), max_size=6).map(
    lambda cells: ("file_name,text\n" + ",".join(cells)).encode(errors="replace")
)


@FUZZ
@given(
    jsonl=JSON_LINES | st.binary(max_size=200),
    csv=CSV_TEXT | st.binary(max_size=200),
    caption=st.binary(max_size=50),
    lines=st.booleans(),
)
def test_whatever_metadata_and_captions_hold_the_scan_ends_with_reasons(
    jsonl: bytes, csv: bytes, caption: bytes, *, lines: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        put(folder, {"a.mp4": b"", "b.mp4": b"", "b.txt": caption, "metadata.jsonl": jsonl, "metadata.csv": csv})
        scan = find_clips(folder, caption_lines=lines)
        assert {clip.path.name for clip in scan.clips} | {skip.name for skip in scan.skipped} >= {"a.mp4", "b.mp4"}
        assert all(clip.path.parent == folder.resolve() for clip in scan.clips)
        assert all(caption.strip() for clip in scan.clips for caption in clip.captions)
        assert all((skip.name + skip.reason).isprintable() for skip in scan.skipped)


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"content"})
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
    with pytest.raises(ClipError, match="cannot be read"):
        file_digest(tmp_path / "gone")
