"""Files are whole or not there, and damaged ones are named with what to do."""

import json
import os
import platform
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from advdmd.files import (
    file_hash,
    object_hash,
    read_lines,
    read_object,
    read_tensors,
    write_atomically,
    write_folder,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def broken(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.txt cannot be written \(No space left on device\): make room"):
        write_atomically(tmp_path / "a.txt", broken)
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    with pytest.raises(FileNotFoundError, match=r"'/absent/b'"):  # an error about another file stays as it is
        write_atomically(tmp_path / "a.txt", lambda _: Path("/absent/b").read_text())
    with pytest.raises(OSError, match=r"nowhere/a\.txt cannot be written \(No such file or directory\)$"):
        write_text(tmp_path / "nowhere/a.txt", "new")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="running processes cannot be listed here")
def test_files_that_a_killed_process_left_are_deleted_and_those_of_a_running_one_are_not(tmp_path):
    dead, living = (tmp_path / f".a.txt.{platform.node()}.{pid}" for pid in (2**22 + 1, os.getppid()))
    elsewhere = tmp_path / ".a.txt.another-machine.4194305"
    young = tmp_path / f".a.txt.{platform.node()}.{2**22 + 2}"
    for f in (dead, living, elsewhere, young):
        f.write_text("half")
        if f != young:
            os.utime(f, (0, 0))
    write_text(tmp_path / "a.txt", "whole")
    assert {f.name for f in tmp_path.iterdir()} == {"a.txt", living.name, elsewhere.name, young.name}


def test_a_folder_is_replaced_as_a_whole_wherever_a_stop_falls(tmp_path):
    place, content = tmp_path / "student", {"n": "1"}

    def write(folder):
        (folder / "part").mkdir(parents=True)
        (folder / "part/weights").write_text(content["n"])

    write_folder(place, write)
    content["n"] = "2"
    write_folder(place, write)
    assert (place / "part/weights").read_text() == "2"
    place.rename(tmp_path / ".student.old")  # as between the two renames

    def stopped(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(place, stopped)
    assert [f.name for f in tmp_path.iterdir()] == ["student"]
    assert (place / "part/weights").read_text() == "2"
    content["n"] = "3"
    write_folder(place, write)
    assert [f.name for f in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", "not an object"),
        ('{"step": 1', "Expecting"),
        ("", "Expecting value"),
        ('{"stop": 1}', "step missing"),
        ("[" * 100_000, "nested too deep"),
        ("\udcff", "decode"),
    ],
)
def test_a_damaged_record_is_named_with_its_fault_and_what_to_do(tmp_path, text, fault):
    file = tmp_path / "record.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"record.json is damaged .*{re.escape(fault)}.*: do something"):
        read_object(file, "step", hint="do something")
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b'{"step": 0}\n' + file.read_bytes() + b'\n{"st')
    with pytest.raises(ValueError, match=f"lines.jsonl, line 2 is damaged .*{re.escape(fault)}.*: do something"):
        read_lines(lines, "step", hint="do something")


def test_a_last_line_without_an_end_is_no_damage(tmp_path):
    (tmp_path / "a").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [x["step"] for x in read_lines(tmp_path / "a", "step", hint="")] == [0, 1]


def test_tensors_are_those_that_were_recorded(tmp_path):
    file = tmp_path / "best.safetensors"
    save_file({"a": torch.arange(100.0)}, file)
    wanted = file_hash(file)
    assert torch.equal(read_tensors(file, "a", hint="", sha256=wanted)["a"], torch.arange(100.0))
    with pytest.raises(ValueError, match=r"best\.safetensors is damaged \(b missing\)"):
        read_tensors(file, "a", "b", hint="")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert read_tensors(file, hint="")["a"][-1] != 99, "a flipped bit is a number too"
    with pytest.raises(ValueError, match=r"best\.safetensors is damaged \(its sha256 differs from its record\): make it again"):
        read_tensors(file, hint="make it again", sha256=wanted)
    for damaged in (good[:50], b"", b"\xff" * 16):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best\.safetensors is damaged .*: make it again"):
            read_tensors(file, hint="make it again")


def test_an_objects_hash_depends_on_its_content_only():
    assert object_hash({"a": 1, "b": [2.5]}) == object_hash(json.loads('{"b": [2.5], "a": 1}')) != object_hash({"a": 1})
