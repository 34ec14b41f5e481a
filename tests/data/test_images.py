"""Images as they occur: colour profiles, damaged EXIF data, links."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from advdmd.data.captioned_images import load_image
from advdmd.data.sources import read_captioned_images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def image_in(tmp_path, name, image, **save):
    image.save(tmp_path / name, **save)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a lamp"}))
    return read_captioned_images(tmp_path)[0].image


def color(image):
    return ((load_image(image, 16, 16)[:, 8, 8] + 1) * 127.5).round().astype(int).tolist()


def lab_profile():
    """A profile that is not sRGB: that of CIE XYZ or Lab serves where no file of another RGB space is at hand."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def test_an_image_with_a_profile_is_converted_to_srgb(tmp_path):
    red = Image.new("RGB", (32, 32), (220, 40, 40))
    lab = ImageCms.profileToProfile(red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    entry = image_in(tmp_path, "a.tif", lab, icc_profile=lab_profile())
    assert np.abs(np.array(color(entry)) - [220, 40, 40]).max() <= 4


def test_an_srgb_profile_changes_nothing(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    plain = load_image(image_in(tmp_path, "a.png", noise), 16, 16)
    assert (load_image(image_in(tmp_path, "b.png", noise, icc_profile=SRGB), 16, 16) == plain).all()


@pytest.mark.parametrize("profile", [b"not a profile", SRGB[:100], b""], ids=["text", "cut", "empty"])
def test_a_damaged_profile_is_ignored(tmp_path, profile):
    red = Image.new("RGB", (32, 32), (220, 40, 40))
    assert color(image_in(tmp_path, "a.png", red, icc_profile=profile)) == [220, 40, 40]


def test_damaged_exif_data_do_not_lose_an_image(tmp_path):
    red = Image.new("RGB", (32, 32), (220, 40, 40))
    entry = image_in(tmp_path, "a.png", red, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert color(entry) == [220, 40, 40]


def test_symbolic_links_are_followed_and_parent_folders_are_refused(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    Image.new("RGB", (32, 32), (220, 40, 40)).save(tmp_path / "blobs/0123", "png")
    (tmp_path / "snapshot/a.png").symlink_to("../blobs/0123")
    lines = tmp_path / "snapshot/metadata.jsonl"
    lines.write_text(json.dumps({"file_name": "a.png", "text": "a lamp"}))
    assert color(read_captioned_images(tmp_path / "snapshot")[0].image) == [220, 40, 40]
    for name in ("../blobs/0123", str(tmp_path / "blobs/0123")):
        lines.write_text(json.dumps({"file_name": name, "text": "a lamp"}))
        with pytest.raises(ValueError, match="leads out of the folder"):
            read_captioned_images(tmp_path / "snapshot")


def test_a_circle_of_links_is_no_image(tmp_path):
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a lamp"}))
    with pytest.raises(ValueError, match=r"a\.png"):
        read_captioned_images(tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_as_pillow_applies_it(tmp_path, orientation):

    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    entry = image_in(tmp_path, "a.png", pixels, exif=exif)
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert (((load_image(entry, 16, 16) + 1) * 127.5).round().transpose(1, 2, 0) == wanted).all()


def red(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (220, 40, 40)).save(path)


def test_captions_beside_their_images_are_found_and_what_has_none_is_counted(tmp_path, capsys):
    for name in ("a.jpg", "10_lamps/b.PNG", "10_lamps/c.bmp", "d.png", "e.png", "__MACOSX/x.png", ".hidden/y.png", "._a.jpg"):
        red(tmp_path / name)
    (tmp_path / "a.txt").write_text("a lamp\n")
    (tmp_path / "10_lamps/b.caption").write_text("two\nlamps")
    (tmp_path / "10_lamps/c.txt").write_text("three lamps")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "__MACOSX/x.txt").write_text("no")
    found = read_captioned_images(tmp_path)
    assert sorted((e.prompt, e.image.path.name) for e in found) == [
        ("a lamp", "a.jpg"),
        ("three lamps", "c.bmp"),
        ("two lamps", "b.PNG"),
    ]
    printed = capsys.readouterr().err
    assert "passed over: empty captions: 1, files of the operating system: 4, images without a caption: 1" in printed
    assert all(color(e.image) == pytest.approx([220, 40, 40], abs=3) for e in found)


def test_a_folder_without_any_caption_is_refused(tmp_path):
    red(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images without a caption: give"):
        read_captioned_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds neither"):
        read_captioned_images(tmp_path / "empty")


def test_a_csv_of_captions_is_read_as_the_jsonl_is(tmp_path):
    red(tmp_path / "images/a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\nimages/a.png,"a lamp, lit"\n')
    (entry,) = read_captioned_images(tmp_path)
    assert (entry.prompt, color(entry.image)) == ("a lamp, lit", [220, 40, 40])
    (tmp_path / "metadata.csv").write_text("file_name,text\n../a.png,a lamp\n")
    with pytest.raises(ValueError, match=r"row 1: '../a.png' leads out of the folder"):
        read_captioned_images(tmp_path)
    (tmp_path / "metadata.csv").write_text("file,words\na.png,a lamp\n")
    with pytest.raises(ValueError, match="needs an object with the caption"):
        read_captioned_images(tmp_path)
