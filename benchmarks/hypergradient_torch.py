"""PyTorch side of hypergradient.py, as in I-BAU's release. Needs torch and numpy, but not bdjax.

The graph of one inner step is retained, and each fixed-point iteration is a reverse pass through it.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, Any]  # arrays by name, LAYER/LEAF for weights
Run = Callable[[], Arrays]
ITERATIONS, STEP, PENALTY = 5, 0.1, 0.001


def torch_side(data: Arrays) -> tuple[Run, Run, str]:
    """Return two functions, the hypergradient and its direct term as arrays by name, and the version."""
    try:
        import torch
    except ImportError:
        hint = 'pip install "bdjax[torch]", or name an interpreter that has it by --torch-python.'
        raise SystemExit(f"{sys.executable} has no PyTorch: {hint}") from None
    from torch.nn import functional as f

    torch.set_num_threads(cores())
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    images, others, delta = (tensors[name].permute(0, 3, 1, 2).contiguous() for name in ("inner", "outer", "delta"))
    p = {name: torch.from_numpy(to_torch_layout(name, data[name])).requires_grad_() for name in data if "/" in name}

    def entropy(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for i in range(6):
            x = f.conv2d(x, p[f"Conv_{i}/kernel"], p[f"Conv_{i}/bias"], padding=1)
            scale, bias = p[f"BatchNorm_{i}/scale"], p[f"BatchNorm_{i}/bias"]
            x = f.elu(f.batch_norm(x, tensors[f"mean_{i}"], tensors[f"var_{i}"], scale, bias, eps=1e-5))
            x = f.max_pool2d(x, 2) if i % 2 else x
        return f.cross_entropy(f.linear(x.flatten(1), p["head/kernel"], p["head/bias"]), labels)

    def outer(d: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = entropy(torch.cat([others[:1] + d, others[1:]]), tensors["outer_labels"])
        return torch.autograd.grad(loss, [d, *p.values()])

    def run() -> Arrays:
        d = delta.clone().requires_grad_(True)
        right, *direct = outer(d)
        g = PENALTY * (d**2).sum() - entropy(images + d, tensors["inner_labels"])
        stepped = d - STEP * torch.autograd.grad(g, d, create_graph=True)[0]
        v = torch.zeros_like(d)
        for _ in range(ITERATIONS):
            v = torch.autograd.grad(stepped, d, v, retain_graph=True)[0] + right
        indirect = torch.autograd.grad(stepped, list(p.values()), v, allow_unused=True)
        return {n: a if b is None else a + b for n, a, b in zip(p, direct, indirect, strict=True)}

    def direct() -> Arrays:
        return dict(zip(p, outer(delta.clone().requires_grad_(True))[1:], strict=True))

    return run, direct, f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def to_torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """Convert a parameter to PyTorch's layout: kernels OIHW, inputs of the dense layer in the order [C, H, W]."""
    if name == "head/kernel":
        array = array.reshape(4, 4, 128, -1).transpose(3, 2, 0, 1).reshape(-1, 2048)
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
