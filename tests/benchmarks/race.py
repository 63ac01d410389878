"""A race of 32 shapes at W = 4 and 16 at W = 2 on H200, launch-free, and the scores published of it.

Milliseconds of the plain product, of NCCL and cuBLAS, of torch's fused ops and of Kraken; then, at M 4096
and 8192, the same at W = 2.
"""

from typing import Any

HIDDEN = {"8B": 4096, "70B": 8192}
SYSTEMS = ("nccl", "torch", "kraken")

RACE = """
8B qkv 2048        0.038 0.106 0.103 0.112
8B qkv 4096        0.072 0.180 0.139 0.154   0.139 0.231 0.171 0.163
8B qkv 8192        0.138 0.327 0.223 0.228   0.274 0.431 0.315 0.296
8B qkv 16384       0.272 0.618 0.402 0.411
8B gate_up 2048    0.160 0.227 0.200 0.200
8B gate_up 4096    0.319 0.427 0.393 0.335   0.636 0.724 0.671 0.657
8B gate_up 8192    0.633 0.822 0.670 0.663   1.270 1.420 1.313 1.311
8B gate_up 16384   1.278 1.624 1.334 1.325
8B o 2048          0.029 0.091 0.123 0.094
8B o 4096          0.054 0.160 0.168 0.139   0.096 0.193 0.160 0.159
8B o 8192          0.101 0.295 0.256 0.229   0.186 0.354 0.285 0.665
8B o 16384         0.200 0.552 0.437 0.400
8B down 2048       0.082 0.146 0.156 0.147
8B down 4096       0.161 0.270 0.226 0.220   0.313 0.407 0.361 0.377
8B down 8192       0.319 0.506 0.373 0.398   0.625 0.788 0.709 0.720
8B down 16384      0.649 0.999 0.736 0.767
70B qkv 2048       0.113 0.223 0.171 0.199
70B qkv 4096       0.223 0.415 0.279 0.302   0.454 0.606 0.491 0.473
70B qkv 8192       0.448 0.793 0.503 0.499   0.905 1.194 0.970 0.945
70B qkv 16384      0.889 1.551 0.983 0.964
70B gate_up 2048   0.630 0.740 0.768 0.662
70B gate_up 4096   1.256 1.442 1.324 1.287   2.525 2.682 2.586 2.573
70B gate_up 8192   2.515 2.859 2.619 2.588   5.047 5.344 5.182 5.126
70B gate_up 16384  5.021 5.713 5.191 5.105
70B o 2048         0.097 0.205 0.193 0.183
70B o 4096         0.187 0.380 0.302 0.275   0.366 0.527 0.449 0.453
70B o 8192         0.380 0.728 0.519 0.504   0.747 1.056 0.882 0.876
70B o 16384        0.754 1.423 0.941 0.952
70B down 2048      0.316 0.422 0.359 0.393
70B down 4096      0.626 0.821 0.703 0.715   1.242 1.405 1.340 1.339
70B down 8192      1.270 1.619 1.363 1.382   2.558 2.861 2.664 2.657
70B down 16384     2.556 3.229 2.707 2.758
"""

# Geometric mean of bound / time, by W and class of shapes.
PUBLISHED = {
    4: {
        "all": {"nccl": 0.612, "torch": 0.738, "kraken": 0.751},
        "AG+GEMM": {"nccl": 0.639, "torch": 0.796, "kraken": 0.793},
        "GEMM+RS": {"nccl": 0.586, "torch": 0.683, "kraken": 0.712},
        "M >= 8192": {"nccl": 0.642, "torch": 0.844, "kraken": 0.850},
        "M <= 4096": {"nccl": 0.584, "torch": 0.645, "kraken": 0.664},
        "MLP": {"nccl": 0.744, "torch": 0.856, "kraken": 0.867},
        "qkv and o": {"nccl": 0.503, "torch": 0.636, "kraken": 0.651},
    },
    2: {
        "all": {"nccl": 0.747, "torch": 0.864, "kraken": 0.828},
        "AG+GEMM": {"nccl": 0.790, "torch": 0.923, "kraken": 0.949},
        "GEMM+RS": {"nccl": 0.706, "torch": 0.809, "kraken": 0.723},
    },
}


def shapes(world: int) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Of each shape what a row says of it, and its milliseconds by system."""
    found = []
    for line in RACE.strip().splitlines():
        model, name, rows, *times = line.split()
        numbers = [float(time) for time in times][0 if world == 4 else 4 :][:4]
        if numbers:
            style = "column" if name in ("qkv", "gate_up") else "row"
            row = {"shape": model, "name": name, "style": style, "rows": int(rows)}
            found.append((row, dict(zip(("gemm", *SYSTEMS), numbers, strict=True))))
    return found
