"""``flashtrain doctor``: facts as a table and as JSON, and what it says of what is missing."""

import json
import sys

import pytest
import torch

from flashtrain.launch import doctor, main

# As nvidia-smi 570 prints it on a host with two GPUs, underlined header included.
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\t X \t\t\t\t

Legend:
  X    = Self
"""


def test_json_is_complete_and_this_machine_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["torch"]["version"] == torch.__version__
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["extension"]["path"] is None) != (facts["extension"]["reason"] is None)
    assert facts["packages"]["tyro"]
    assert facts["cores"]["usable"] >= 1
    if torch.cuda.device_count() < 2:
        assert facts["links"] is facts["peer_access"] is facts["peer_gigabytes_per_s"] is None


def test_the_table_says_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("torch", "C++ extension", "Triton", "CPU ranks of one machine", "packages"):
        assert name in shown
    assert shown.endswith("training can run here\n")


def test_a_missing_extension_is_named_with_its_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashtrain._core", None)
    facts = doctor.examine()
    assert facts["extension"]["path"] is None
    chosen = facts["transports"]["CPU ranks of one machine"]
    assert chosen["transport"] == "group"
    assert f"the C++ extension is missing ({facts['extension']['reason']})" in chosen["why"]


def test_transports_with_extension_and_gpus() -> None:
    chosen = doctor.transports(None, [[True, True], [True, True]], 2)
    assert [one["transport"] for one in chosen.values()] == ["host", "nvlink", "group"]
    apart = doctor.transports(None, [[True, False], [False, True]], 2)["GPUs of one machine"]
    assert apart["transport"] == "group"
    assert "reach" in apart["why"]
    assert doctor.transports("no compiler", [[True]], 1)["GPUs of one machine"]["transport"] == "group"
    assert doctor.transports(None, None, 0)["GPUs of one machine"]["transport"] == "none"
    assert "NCCL" in chosen["several hosts"]["why"]


def test_required_packages_are_those_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["numpy", "tomli-w>=1.0", "torch>=2.11", 'triton>=3.6; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: listed)
    assert doctor.required() == ["numpy", "tomli-w"]


def test_problems_end_with_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu124")
    monkeypatch.setattr(doctor, "required", lambda: ["tyro", "no-such-package"])
    assert main.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "problem: torch 2.4.1+cu124 is too old: install 2.11 or newer" in shown
    assert "problem: package no-such-package is missing: pip install no-such-package" in shown
    assert "training can run here" not in shown


def test_links_are_read_from_the_driver() -> None:
    assert doctor.parse_links(TOPOLOGY, 2) == [["X", "NV18"], ["NV18", "X"]]
    assert doctor.parse_links(TOPOLOGY, 4) is None
    assert doctor.parse_links("", 2) is None


def test_variables_that_change_behaviour_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert main.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "1 (from the environment)" in shown
    assert "Ring (from the environment)" in shown


def test_matrices_of_gpus_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = doctor.examine()
    facts["gpus"] = [{"name": "GPU [x]", "memory_bytes": 80 << 30, "capability": "9.0"}] * 2
    facts |= {"nccl": "2.28.9", "links": [["X", "NV18"], ["NV18", "X"]]}
    facts |= {
        "peer_access": [[True, False], [True, True]],
        "peer_gigabytes_per_s": [[None, 391.4], [None, None]],
    }
    monkeypatch.setattr(doctor, "examine", lambda: facts)
    assert main.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("GPU [x], 80 GiB, compute capability 9.0", "NV18", "391", "n/a", "yes", "no", "2.28.9"):
        assert part in shown


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_bandwidth_between_gpus_is_measured() -> None:
    rates = doctor.peer_bandwidth(2)
    assert rates is not None
    assert rates[0][1] is not None
    assert rates[0][1] > 1
    assert rates[0][0] is None
