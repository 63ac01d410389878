import pytest
import torch

from flashtrain.metrics import peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_bfloat16_peaks_are_the_dense_ones(name: str, tera: float) -> None:
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == pytest.approx(tera * 1e12)


def test_peaks_by_dtype() -> None:
    name = "NVIDIA H100 80GB HBM3"
    assert peak_flops(name, torch.float32) == pytest.approx(66.9e12)
    assert peak_flops(name, "tf32") == pytest.approx(494.7e12)
    assert peak_flops(name, torch.float8_e4m3fn) == pytest.approx(1978.9e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float8_e4m3fn) is None
    assert peak_flops(name, torch.float64) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "Intel(R) Xeon(R) Platinum 8480C",
        "NVIDIA H100",  # SXM or PCIe?
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A10",
        "NVIDIA L400",
        "NVIDIA H2000",
    ],
)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name, torch.bfloat16) is None
