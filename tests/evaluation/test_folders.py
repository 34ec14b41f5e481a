"""Folders of images that other programs have made."""

import pytest
from PIL import Image

from advdmd.commands import evaluate
from advdmd.evaluation import judging
from advdmd.evaluation.generate import image_jobs, image_path, read_images
from advdmd.evaluation.geneval import GenEval
from advdmd.mini.suites import CheckerJudge, MiniSuite


@pytest.mark.parametrize(
    "name",
    [
        "{id}/samples/{k:05d}.png",
        "{id}/samples/{k:04d}.jpg",
        "{id}/samples/img-{k}.webp",
        "{id}/{k}.jpeg",
        "{id}_{k}.jpg",
        "{id}-{k:05d}.png",
    ],
)
def test_geneval_folders_of_any_program_are_read_in_order(tmp_path, name):
    suite = GenEval(3)
    for item, k in image_jobs(suite)[:6]:
        path = tmp_path / name.format(id=item.id, k=k)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (90 * k, 0, 0)).save(path)
    (tmp_path / suite.items()[0].id).mkdir(exist_ok=True)
    (tmp_path / suite.items()[0].id / "metadata.jsonl").write_text("{}")
    for item, k in image_jobs(suite)[:6]:
        assert abs(int(judging.read_image(image_path(tmp_path, item, k))[4, 4, 0]) - 90 * k) < 12, (item.id, k)


def test_one_image_of_a_prompt_is_read_where_one_is_asked_for(tmp_path):
    suite = GenEval(1)
    for item, _ in image_jobs(suite)[:3]:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{item.id}.jpg")
    assert all(image_path(tmp_path, item, 0).is_file() for item, _ in image_jobs(suite)[:3])


def test_messages_name_the_path_and_the_layouts(tmp_path):
    suite = MiniSuite("mini-geneval", images_per_task=6, prompts_per_task=6)
    wanted = image_path(tmp_path, *image_jobs(suite)[0])
    with pytest.raises(ValueError, match=rf"first missing: {wanted}.*ITEM/samples.*--images N"):
        read_images(suite, tmp_path)
    with pytest.raises(ValueError, match=rf"the first {wanted}.*ITEM/samples"):
        evaluate.score(suite, tmp_path, CheckerJudge())
