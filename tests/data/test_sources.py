"""Captions where trainers keep them, and every kind of image file: read right, counted, or refused with a reason."""

import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from advdmd.data.captioned_images import Columns, ImagePlace, load_image
from advdmd.data.sources import read_captioned_images
from advdmd.evaluation.judging import read_image

RED = (220, 40, 40)


def image_bytes(kind="PNG", color=RED, size=(32, 32), **save):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind, **save)
    return out.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes() if data is None else data)


def pairs(source, **columns):
    return sorted((e.prompt, e.image.place.rpartition("/")[2]) for e in read_captioned_images(source, Columns(**columns)))


def color(image):
    return ((load_image(image, 16, 16)[:, 8, 8] + 1) * 127.5).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("key", "columns"), [("image_path", {}), ("img", {}), ("photo", {"image": "photo"}), ("jpg_file", {"image": "jpg_file"})]
)
@pytest.mark.parametrize(("text", "more"), [("caption", {}), ("en_caption", {}), ("blip", {"caption": "blip"})])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json"])
def test_columns_have_the_names_that_people_give_them(tmp_path, kind, key, columns, text, more):
    put(tmp_path / "a.png")
    row = {key: "a.png", text: "a lamp"}
    file = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([row]), file)
    else:
        file.write_text({"jsonl": json.dumps(row), "json": json.dumps([row]), "csv": f"{key},{text}\na.png,a lamp\n"}[kind])
    assert pairs(file if kind == "json" else tmp_path, **columns, **more) == [("a lamp", "a.png")]


def test_an_option_that_names_no_column_is_refused(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "text": "a lamp"}')
    with pytest.raises(ValueError, match="under words; it has image, text"):
        read_captioned_images(tmp_path, Columns(caption="words"))
    with pytest.raises(ValueError, match="there is no photo; it has image, text"):
        read_captioned_images(tmp_path, Columns(image="photo"))


def test_kohyas_folders_and_json_are_read(tmp_path, capsys):
    put(tmp_path / "a/10_red lamp/1.png")
    put(tmp_path / "a/10_red lamp/2.webp", image_bytes("WEBP"))
    (tmp_path / "a/10_red lamp/2.caption").write_text("a lamp\nat night")
    assert pairs(tmp_path / "a") == [("a lamp at night", "2.webp"), ("red lamp", "1.png")]
    assert "repeats in folder names are not used" in capsys.readouterr().err
    (tmp_path / "a/meta.json").write_text(json.dumps({"10_red lamp/1.png": {"caption": "one", "tags": "x"}}))
    assert pairs(tmp_path / "a/meta.json") == [("one", "1.png")]


def test_img2datasets_layouts_are_read(tmp_path):
    """Files, tars and parquet files, each with the tables and statistics that it writes beside them."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"key": "000000000", "caption": "a lamp", "url": "x", "status": "success"}]
    for name in ("files", "tars", "parquet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000_stats.json").write_text("{}")
    put(tmp_path / "files/00000/000000000.jpg", image_bytes("JPEG"))
    (tmp_path / "files/00000/000000000.txt").write_text("a lamp")
    (tmp_path / "files/00000/000000000.json").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "files/00000.parquet")
    assert pairs(tmp_path / "files") == [("a lamp", "000000000.jpg")]
    with tarfile.open(tmp_path / "tars/00000.tar", "w") as tar:
        for name, data in (("000000000.jpg", image_bytes("JPEG")), ("000000000.json", json.dumps(rows[0]).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tars/00000.parquet")
    assert pairs(tmp_path / "tars") == [("a lamp", "00000.tar:000000000.jpg")]
    failed = {"key": "1", "caption": "lost", "url": "y", "status": "failed_to_download", "jpg": None}
    pq.write_table(pa.Table.from_pylist([rows[0] | {"jpg": image_bytes("JPEG")}, failed]), tmp_path / "parquet/00000.parquet")
    (entry,) = read_captioned_images(tmp_path / "parquet")
    assert (entry.prompt, entry.image.row) == ("a lamp", 0)
    assert color(entry.image) == pytest.approx(RED, abs=3)


def test_parquet_files_of_the_hub_hold_their_images(tmp_path):
    """A column of {bytes, path}; row groups are read when an image of theirs is."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"image": {"bytes": image_bytes(color=(n * 20, 0, 0)), "path": f"{n}.png"}, "text": f"lamp {n}"} for n in range(7)]
    (tmp_path / "data").mkdir()
    for k, part in enumerate((rows[:5], rows[5:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"data/train-0000{k}-of-00002.parquet", row_group_size=2)
    found = read_captioned_images(tmp_path)
    assert [e.prompt for e in found] == [f"lamp {n}" for n in range(7)]
    assert [color(e.image) for e in reversed(found)] == [[n * 20, 0, 0] for n in reversed(range(7))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"several splits \(test, train\)"):
        read_captioned_images(tmp_path)


def test_empty_captions_are_passed_over_and_faults_are_listed_in_one_go(tmp_path, capsys):
    put(tmp_path / "a.png")
    lines = ['{"text": "", "image": "a.png"}', '{"text": null, "image": "a.png"}', '{"text": "a lamp", "image": "a.png"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert pairs(tmp_path) == [("a lamp", "a.png")]
    assert "passed over: empty captions: 2" in capsys.readouterr().err
    wrong = [json.dumps({"text": "a", "image": f"{n}.png"}) for n in range(30)]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, *wrong]))
    with pytest.raises(ValueError, match=r"line 4: there is no image '0\.png'(?s:.*)line 23(?s:.*)and 10 more"):
        read_captioned_images(tmp_path)


def test_several_captions_of_one_image_are_several_prompts(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "captions": ["a lamp", "a light", ""]}')
    assert pairs(tmp_path, caption="captions") == [("a lamp", "a.png"), ("a light", "a.png")]


@pytest.mark.parametrize(("disk", "text"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_found_in_either_normal_form(tmp_path, disk, text):
    on_disk, written = (unicodedata.normalize(form, "Lämpchen") for form in (disk, text))
    put(tmp_path / "m" / f"{on_disk}.png")
    (tmp_path / "m/metadata.jsonl").write_text(json.dumps({"image": f"{written}.png", "text": "a lamp"}))
    put(tmp_path / "s" / f"{on_disk}.png")
    (tmp_path / "s" / f"{written}.txt").write_text("a lamp")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in ((f"{on_disk}.png", image_bytes()), (f"{written}.txt", b"a lamp")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in ("m", "s", "t.tar"):
        (entry,) = read_captioned_images(tmp_path / source)
        assert color(entry.image) == list(RED), source


def test_files_of_the_operating_system_in_a_tar_are_passed_over(tmp_path, capsys):
    names = ("1.png", "1.txt", "._1.png", "__MACOSX/1.png", "d/.DS_Store", "Thumbs.db", "2.png")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names:
            data = b"a lamp" if name.endswith("1.txt") else image_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pairs(tmp_path / "t.tar") == [("a lamp", "t.tar:1.png")]
    assert "files of the operating system: 4, images without a caption: 1" in capsys.readouterr().err


def test_images_that_no_decoder_here_reads_are_counted(tmp_path, capsys):
    put(tmp_path / "a.png")
    put(tmp_path / "b.heic", b"heic")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"lamp {name}")
    assert pairs(tmp_path) == [("lamp a", "a.png")]
    assert "images that Pillow cannot read (.heic): 1" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif", "jp2", "tga", "ppm", "avif", "ico"])
def test_formats_that_pillow_writes_are_read_beside_their_captions(tmp_path, suffix):
    put(tmp_path / "x", b"")
    Image.new("RGB", (32, 32), RED).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.txt").write_text("a lamp")
    (entry,) = read_captioned_images(tmp_path)
    assert color(entry.image) == pytest.approx(RED, abs=6)


GREY = np.linspace(0.2, 0.2, 256, dtype=np.float32).reshape(16, 16)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ((GREY * 65535).astype(np.uint16), 51),
        (GREY, 51),
        (GREY * 300, "outside"),
        (GREY * np.nan, "outside"),
        ((GREY * 2e9).astype(np.int32), "32 bits"),
    ],
    ids=["16 bits", "float", "float of another range", "no numbers", "32 bits"],
)
def test_deep_tiffs_are_right_or_refused(tmp_path, array, expected):
    Image.fromarray(array).save(tmp_path / "a.tif")
    entry = ImagePlace(tmp_path / "a.tif")
    if isinstance(expected, int):
        assert color(entry) == pytest.approx([expected] * 3, abs=1)
    else:
        with pytest.raises(ValueError, match=rf"a\.tif cannot be read: .*{expected}"):
            load_image(entry, 16, 16)


def test_a_png_with_broken_text_is_read_and_one_with_broken_pixels_is_not(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "x" * 200, zip=True)
    data = image_bytes(pnginfo=about)
    at = data.index(b"zTXt")
    broken = data[: at + 18] + b"\xff" * 4 + data[at + 22 :]
    put(tmp_path / "a.png", broken)
    assert color(ImagePlace(tmp_path / "a.png")) == list(RED)
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == list(RED), "also where images are judged"
    put(tmp_path / "b.png", broken[: broken.index(b"IDAT") + 20])
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        load_image(ImagePlace(tmp_path / "b.png"), 16, 16)
