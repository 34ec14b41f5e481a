"""An error ends a command with one line: the cause and what to change."""

import signal
import subprocess
import sys

import pytest
import torch

from advdmd.cli import main


def error_line(error, monkeypatch, capsys):
    """The one line with which the command line ends on an error that a library raises."""

    def fail():
        raise error

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["advdmd", "train"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_out_of_memory_says_what_to_change(monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 3 MiB free.")
    line = error_line(error, monkeypatch, capsys)
    assert line.startswith("error: the GPU's memory is not enough: CUDA out of memory.")
    for key in ("algorithm.micro_batch_size", "gradient_checkpointing=true", "advdmd show", "--dtype bfloat16"):
        assert key in line


def error_of_missing_operation():
    """The class of the error that torch raises for an operation that a device lacks, here the meta device."""
    with pytest.raises(RuntimeError) as error:
        torch.nonzero(torch.zeros(2, device="meta"))
    return error.type


@pytest.mark.parametrize("kind", [error_of_missing_operation(), TypeError], ids=["operation", "type"])
def test_what_apples_gpus_lack_is_named_with_what_to_do(kind, monkeypatch, capsys):
    """With torch's own errors of a missing operation, and of a missing type."""
    text = "The operator 'aten::x' is not currently implemented for the MPS device. If you want this op, comment on the issue."
    line = error_line(kind(text), monkeypatch, capsys)
    assert line.startswith("error: device=mps: The operator 'aten::x' is not currently implemented for the MPS device.")
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in line


def test_another_runtime_error_is_no_user_error(monkeypatch):
    def fail():
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["advdmd", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        main.main()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_only_the_first_prints_and_errors_name_the_others(rank, monkeypatch, capsys):
    def fail():
        print("student: here")
        print("progress", file=sys.stderr)
        raise ValueError("no such recipe")

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["advdmd", "train"])
    monkeypatch.setenv("RANK", rank)
    before = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert (sys.stdout, sys.stderr) == before
    printed = capsys.readouterr()
    if rank == "0":
        assert (printed.out, printed.err) == ("student: here\n", "progress\nerror: no such recipe\n")
    else:
        assert (printed.out, printed.err) == ("", "process 1: error: no such recipe\n")


def test_ctrl_c_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "advdmd", "train", "mini-sd35-dmd2", "threads=1", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "drawing scenes" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted: what is written is kept, the same command goes on from there"
    assert "Traceback" not in rest
