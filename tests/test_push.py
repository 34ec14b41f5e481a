"""Publishing an export: what is uploaded is printed first, and a refusal of the hub leaves the export whole."""

import huggingface_hub
import pytest

from advdmd.commands.push import push
from tests.test_product import cli, trained  # noqa: F401


@pytest.fixture
def sent(monkeypatch):
    """What the hub's client is asked to do."""
    calls = []

    class Client:
        def create_repo(self, repo, private, exist_ok):
            calls.append(("create", repo, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    return calls


def test_an_export_is_uploaded_and_a_dry_run_sends_nothing(trained, tmp_path, sent):  # noqa: F811
    words = ["export", trained, "--out", tmp_path / "out", "--push", "me/student", "--private"]
    dry = cli(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert sent == []
    assert "transformer/diffusion_pytorch_model.safetensors" in dry.stdout
    assert "to the private repository me/student; the licence of tiny-sd35 applies" in dry.stdout
    assert cli(*words, "--overwrite").returncode == 0
    assert sent == [("create", "me/student", True, True), ("upload", "me/student", tmp_path / "out")]


def test_a_refusal_is_one_line_and_the_export_stays(trained, tmp_path, monkeypatch):  # noqa: F811
    done = cli("export", trained, "--out", tmp_path / "a", "--push", "me")
    assert (done.returncode, (tmp_path / "a").exists()) == (2, False)
    assert "write OWNER/NAME" in done.stderr

    class Client:
        def create_repo(self, *args, **kw):
            raise OSError("401 Unauthorized: no token")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Client())
    done = cli("export", trained, "--out", tmp_path / "a", "--push", "me/student")
    assert done.returncode == 2
    assert "401" in done.stderr
    assert "the export is whole" in done.stderr
    assert (tmp_path / "a/model_index.json").is_file()
    with pytest.raises(ValueError, match="is no export"):
        push(tmp_path, "me/student")
