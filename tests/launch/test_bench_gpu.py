"""``flashtrain bench mfu`` on one GPU: MFU is known, kernels are told apart, no step allocates."""

import json
from pathlib import Path

import pytest
import torch

from flashtrain.launch import main
from flashtrain.metrics import peak_flops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("masked", ["false", "true"])
def test_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masked: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["llama-1b", "--steps=6", "--warmup=4", f"--out={tmp_path}", "--parallel.tensor", "1"]
    words += ["--model.layers", "2", "--train.sequence", "2048", "--train.batch", "2"]
    assert main.main(["bench", "mfu", *words, "--train.document_mask", masked]) == 0
    one = json.loads((tmp_path / "mfu.json").read_text())["systems"]["flashtrain"]
    known = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) is not None
    assert (one["mfu"] is not None) == known
    assert one["allocations"] == one["retries"] == 0
    for kind in ("matrix products", "attention", "norms and pointwise", "optimizer"):
        assert one["kinds_s"][kind] > 0, kind
    assert one["attention"].split(",")[0] in ("flash", "fa", "triton", "efficient")
