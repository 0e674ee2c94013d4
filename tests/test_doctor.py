"""The doctor tells what this machine has, and why a backend is not available."""

import subprocess

import pytest

from fusedmoe import _C, doctor
from fusedmoe.__main__ import main


def test_it_names_everything_asked_for(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "fusedmoe",
        "cpu",
        "model",
        "cores",
        "chosen",
        "torch",
        "threads",
        "compilers",
        "g++",
        "nvcc",
        "gpu",
        "backends",
        "reference",
    ):
        assert name in shown


def test_the_instruction_sets_are_the_builds():
    rows = dict(doctor.instruction_sets())
    assert rows["chosen"] == _C.isa()
    assert {name: rows[name] == "can run here" for name in rows if name != "chosen"} == dict(_C.isas())


def test_an_unavailable_backend_comes_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "available_backends", lambda: {"reference": None, "triton": "there is no GPU"})
    main(["doctor"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["reference", "available"] in lines and ["triton", "not available: there is no GPU"] in lines


def test_a_wrong_choice_of_instruction_set_is_told(monkeypatch):
    def refuse():
        raise RuntimeError("FUSEDMOE_ISA: expected one of avx512, avx2, baseline, got 'mmx'")

    monkeypatch.setattr(_C, "isa", refuse)
    assert doctor.instruction_sets() == [
        ("chosen", "none: FUSEDMOE_ISA: expected one of avx512, avx2, baseline, got 'mmx'")
    ]


def test_compilers(monkeypatch):
    assert doctor.compiler("no-such-compiler") == "not found"
    monkeypatch.setattr(doctor.shutil, "which", lambda command: command)
    for text, seen in (
        ("g++ 14.2\nCopyright\n", "g++ 14.2"),
        ("nvcc\nCuda tools, release 13.0\n", "Cuda tools, release 13.0"),
        ("", "says nothing"),
    ):
        result = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(doctor.subprocess, "run", lambda command, result=result, **options: result)
        assert doctor.compiler("g++") == seen


def test_processor():
    assert doctor.processor("processor\t: 0\nmodel name\t: Fast CPU\n\nprocessor\t: 1\n") == "Fast CPU"
    assert doctor.processor("processor\t: 0\n") is None


def test_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--loud"])
    assert "--loud" in capsys.readouterr().err
