"""PyTorch side of compare.py: the workloads of `bdjax bench`, as fast as PyTorch allows. Needs torch and numpy.

On a GPU: channels-last, torch.compile, TF32 products, autocast for bfloat16 workloads, fused Adam. On a CPU: oneDNN,
autocast likewise, fused Adam, and the memory format that is faster in a few trial runs. The networks have the parameter
names that `bdjax export` writes. Unnecessary work is avoided: gradients only of what is used, predictions in inference
mode with batch normalisation folded into the convolutions, and patch triggers written into the stored bytes.

    python benchmarks/torch_peer.py first-step       # timed by compare.py as `startup`
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

try:
    import torch
except ImportError:
    hint = 'pip install "bdjax[torch]", or name an interpreter that has it by --torch-python.'
    raise SystemExit(f"{sys.executable} has no PyTorch: {hint}") from None
from torch import nn
from torch.nn import functional as f
from torch.nn.utils.fusion import fuse_conv_bn_eval

CLASSES = 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
compiling = GPU
"""Whether networks are compiled; compare.py clears it when compilation takes too long."""


class Job(NamedTuple):
    """A prepared workload."""

    run: Callable[[], Any]
    """Execute the workload once and wait for the device; returns the result."""
    note: str = ""
    """The memory format chosen by trial."""


# --- networks


class SmallVGG(nn.Module):
    """I-BAU's network: three blocks of two conv-BN-ELU, pooling and dropout; one dense layer."""

    def __init__(self, shape: tuple[int, int, int], width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = shape[2]
        for block, rate in enumerate((0.3, 0.4, 0.4)):
            for _ in range(2):
                after = width * 2**block
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ELU(inplace=False)]
                before = after
            layers += [nn.MaxPool2d(2), nn.Dropout(rate)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before * (shape[0] // 8) * (shape[1] // 8), classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits of images [N, C, H, W]."""
        return self.classifier(self.features(x).flatten(1))


class SmallCNN(nn.Sequential):
    """Three blocks of convolution without bias, pooling, BN and ELU; one dense layer."""

    def __init__(self, shape: tuple[int, int, int], width: int, classes: int) -> None:
        layers: list[nn.Module] = []
        before = shape[2]
        for after in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(after),
                nn.ELU(),
            ]
            before = after
        super().__init__(*layers, nn.Flatten(), nn.Linear(before * (shape[0] // 8) * (shape[1] // 8), classes))


class Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's output from features [N, C, H, W]."""
        y = self.bn2(self.conv2(f.relu(self.bn1(self.conv1(x)))))
        return f.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem: one 3x3 convolution, no pooling."""

    def __init__(self, shape: tuple[int, int, int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(shape[2], width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        before = width
        for stage in range(4):
            after = width * 2**stage
            first = Block(before, after, 2 if stage else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, Block(after, after, 1)))
            before = after
        self.linear = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits of images [N, C, H, W]."""
        x = f.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def network(name: str, sizes: Any, classes: int = CLASSES) -> nn.Module:
    """Create a network on the device, in training mode."""
    torch.manual_seed(0)
    kinds: dict[str, tuple[Any, int]] = {"small_vgg": (SmallVGG, 32), "resnet18": (ResNet18, 64), "cnn": (SmallCNN, 16)}
    kind, width = kinds[name]
    return kind(tuple(sizes.shape), sizes.width or width, classes).to(DEVICE)


def folded(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with every batch normalisation folded into the convolution before it."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(model.modules()):
        before = ""
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and isinstance(convolution := getattr(parent, before), nn.Conv2d):
                setattr(parent, before, fuse_conv_bn_eval(convolution, child))
                setattr(parent, name, nn.Identity())
            before = name
    return model


# --- shared by the workloads


def random_images(count: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the same random images, uint8 [N, H, W, C], and labels as bdjax's side."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, CLASSES, count)


def stored(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images as uint8 [N, C, H, W] with NHWC memory, and labels, on the device."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(DEVICE), torch.from_numpy(labels).long().to(DEVICE)


def floats(images: torch.Tensor, form: torch.memory_format) -> torch.Tensor:
    """Convert stored images to floats in [0, 1]."""
    return images.to(torch.float32, memory_format=form).div_(255)


def finished(value: Any = None) -> Any:
    """Return `value` after the device has finished."""
    if GPU:
        torch.cuda.synchronize()
    return value


def prepared(model: nn.Module, form: torch.memory_format) -> nn.Module:
    """Return the network in a memory format, compiled on a GPU."""
    model = model.to(memory_format=form)
    return torch.compile(model) if GPU and compiling else model


def best_form(trial: Callable[[torch.memory_format], Callable[[], Any]]) -> tuple[torch.memory_format, str]:
    """Return the memory format in which `trial(format)()` is faster; channels-last on a GPU, without trial."""
    if GPU:
        return torch.channels_last, f"channels-last, {'compiled' if compiling else 'not compiled: it took too long'}"
    seconds = {}
    for name, form in (("channels-last", torch.channels_last), ("channels-first", torch.contiguous_format)):
        run = trial(form)
        run()
        begins = [time.perf_counter()]
        for _ in range(3):
            run()
            begins.append(time.perf_counter())
        seconds[name, form] = min(after - before for before, after in zip(begins, begins[1:], strict=False))
    (name, form), _ = min(seconds.items(), key=lambda item: item[1])
    return form, name


# --- training


def train(name: str, attack: str, dtype: str, sizes: Any) -> Job:
    """One epoch of training with Adam, with the data set on the device."""
    steps = sizes.steps if name == "small_vgg" else max(1, sizes.steps // 3)
    images, labels = random_images(steps * sizes.batch, tuple(sizes.shape))
    if attack == "badnets":
        patch(images[::5], sizes)
    data = stored(images, labels)
    transform = {"wanet": lambda: warp(sizes)}.get(attack, lambda: None)()
    trial = sizes.batch // 2 if sizes.batch > 16 else sizes.batch
    form, note = best_form(lambda form: trainer(name, dtype, sizes, data, form, transform, trial, 1))
    return Job(trainer(name, dtype, sizes, data, form, transform, sizes.batch, steps), note)


def trainer(
    name: str, dtype: str, sizes: Any, data: Any, form: torch.memory_format, transform: Any, batch: int, steps: int
) -> Callable[[], None]:
    """Return a function that trains for `steps` further steps."""
    images, labels = data
    model = prepared(network(name, sizes).train(), form)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    bfloat16 = dtype == "bfloat16"

    def run() -> None:
        order = torch.randperm(len(images), device=DEVICE)
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            x, y = floats(images[index], form), labels[index]
            if transform:
                x, y = transform(x, y)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
                logits = model(x)
            loss = f.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        finished(loss.item())

    return run


def warp(sizes: Any) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Return WaNet's batch transformation: 10 % warped with the target label, 20 % warped with noise."""
    height, width, _ = sizes.shape
    generator = torch.Generator().manual_seed(0)
    vectors = torch.rand(1, 2, 4, 4, generator=generator) * 2 - 1
    field = f.interpolate(vectors / vectors.abs().mean(), (height, width), mode="bicubic", align_corners=True)
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)[None]
    points = (identity + 0.5 * field.permute(0, 2, 3, 1) / height).clamp(-1, 1).to(DEVICE)

    def transform(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        warped, noisy = len(x) // 10, len(x) // 5
        grid = points.repeat(warped + noisy, 1, 1, 1)
        grid[warped:] += (torch.rand_like(grid[warped:]) * 2 - 1) / height
        x[: warped + noisy] = f.grid_sample(x[: warped + noisy], grid.clamp_(-1, 1), align_corners=True)
        y[:warped] = 0
        return x, y

    return transform


def many(how: str, sizes: Any) -> Job:
    """Train several victims one after the other."""
    if how != "loop":
        raise LookupError(how)
    of_one = SimpleNamespace(**{**vars(sizes), "steps": max(1, sizes.steps // 3)})
    single = train("small_vgg", "clean", "float32", of_one)
    return Job(lambda: [single.run() for _ in range(sizes.victims)][-1], single.note)


def evaluate(name: str, sizes: Any) -> Job:
    """Predict the classes of stored images in batches of 500."""
    images = stored(*random_images(sizes.test, tuple(sizes.shape)))[0]
    model = network(name, sizes)

    def trial(form: torch.memory_format) -> Callable[[], Any]:
        ready = prepared(folded(model), form)
        return lambda: predictions(ready, images, form)

    form, note = best_form(trial)
    return Job(trial(form), note)


@torch.inference_mode()
def predictions(model: nn.Module, images: torch.Tensor, form: torch.memory_format) -> torch.Tensor:
    """Predict the classes of stored images [N, C, H, W]; the result is on the host."""
    classes = [model(floats(images[i : i + 500], form)).argmax(1) for i in range(0, len(images), 500)]
    return torch.cat(classes).cpu()


# --- defenses


def ibau(schedule: str, sizes: Any) -> Job:
    """One round of I-BAU as in the release."""
    if schedule != "release":
        raise LookupError(schedule)
    data = stored(*random_images(sizes.clean, tuple(sizes.shape)))
    batch = sizes.clean_batch

    def trial(form: torch.memory_format) -> Callable[[], Any]:
        part = data[0][: 3 * batch], data[1][: 3 * batch]
        return Unlearning(network("small_vgg", sizes), part, batch, form).round

    form, note = best_form(trial)
    model = network("small_vgg", sizes)
    return Job(lambda: Unlearning(copy.deepcopy(model), data, batch, form).round(), note)


class Unlearning:
    """I-BAU as in the authors' release.

    In evaluation mode: δ by SGD on predicted labels, projected once to norm 10; then one Adam step per batch along the
    hypergradient, by five fixed-point iterations through one retained graph of the first batch's inner gradient.
    """

    def __init__(self, model: nn.Module, data: Any, batch: int, form: torch.memory_format) -> None:
        self.model = model.to(memory_format=form).eval()
        # a compiled network has first derivatives only
        self.forward = torch.compile(self.model) if GPU and compiling else self.model
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, 1e-3, fused=True)
        images, labels = data
        starts = range(0, len(images), batch)
        self.batches = [(floats(images[i : i + batch], form), labels[i : i + batch]) for i in starts]

    def round(self) -> None:
        """Run one pass of ascent and one of unlearning."""
        delta = self.ascend()
        for images, labels in self.batches:
            for parameter, gradient in zip(self.parameters, self.hypergradient(delta, images, labels), strict=True):
                parameter.grad = gradient
            self.optimizer.step()
        finished()

    def ascend(self) -> torch.Tensor:
        """Return δ [1, C, H, W] after a pass of ascent over the batches."""
        delta = torch.zeros_like(self.batches[0][0][:1])
        for images, _ in self.batches:
            with torch.no_grad():
                predicted = self.forward(images).argmax(1)
            delta.requires_grad_(True)
            loss = 0.001 * delta.square().sum() - f.cross_entropy(self.forward(images + delta), predicted)
            delta = (delta - 10 * torch.autograd.grad(loss, delta)[0]).detach()
        return delta * (10 / delta.norm().clamp_min(1e-12)).clamp(max=1)

    def hypergradient(self, delta: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """Return the hypergradient on a batch, of which 1 % (at least one image) has δ added."""
        delta = delta.clone().requires_grad_(True)
        patched = torch.randperm(len(images), device=DEVICE)[: max(1, len(images) // 100)]
        perturbed = images.index_add(0, patched, delta.expand(len(patched), -1, -1, -1))
        loss = f.cross_entropy(self.forward(perturbed), labels)
        right, *direct = torch.autograd.grad(loss, [delta, *self.parameters])
        first_images, first_labels = self.batches[0]
        inner = 0.001 * delta.square().sum() - f.cross_entropy(self.model(first_images + delta), first_labels)
        stepped = delta - 0.1 * torch.autograd.grad(inner, delta, create_graph=True)[0]
        v = right
        for _ in range(4):  # four, because the first of five iterations multiplies zero
            v = torch.autograd.grad(stepped, delta, v, retain_graph=True)[0] + right
        indirect = torch.autograd.grad(stepped, self.parameters, v, allow_unused=True)
        return [a if b is None else a + b for a, b in zip(direct, indirect, strict=True)]


def until(problem: str, rounds: int, goal: float) -> Job:
    """Run rounds of the release on an exported victim until the ASR is below `goal`; measuring is not timed."""
    arrays = np.load(problem)
    sizes = SimpleNamespace(shape=tuple(int(n) for n in arrays["shape"]), width=None)
    model = network(str(arrays["model"]), sizes, int(arrays["classes"]))
    mismatch = model.load_state_dict(weights(problem.replace(".npz", ".safetensors")), strict=False)
    names = [name for name in (*mismatch.missing_keys, *mismatch.unexpected_keys) if "num_batches_tracked" not in name]
    if names:
        raise SystemExit(f"the victim's weights have other names than this network's: {', '.join(names)}")
    data = stored(arrays["clean_images"], arrays["clean_labels"])
    clean, triggered = (stored(arrays[name], arrays["labels"])[0] for name in ("images", "triggered"))

    def rates(form: torch.memory_format, model: nn.Module) -> tuple[float, float]:
        network = folded(model)
        hits = predictions(network, clean, form).numpy() == arrays["labels"]
        fooled = predictions(network, triggered, form).numpy() == arrays["goals"]
        return float(hits.mean()), float(fooled[arrays["eligible"]].mean())

    def trial(form: torch.memory_format) -> Callable[[], Any]:
        return Unlearning(copy.deepcopy(model), (data[0][:300], data[1][:300]), 100, form).round

    form, note = best_form(trial)

    def run() -> dict[str, Any]:
        unlearning = Unlearning(copy.deepcopy(model), data, 100, form)
        before, seconds, done = rates(form, unlearning.model), 0.0, 0
        after = before
        while done < rounds and (done == 0 or after[1] >= goal):
            begin = time.perf_counter()
            unlearning.round()
            seconds += time.perf_counter() - begin
            after, done = rates(form, unlearning.model), done + 1
        answer = {"seconds": seconds, "rounds": done, "reached": after[1] < goal}
        return answer | {"before": before, "after": after}

    return Job(run, note)


def weights(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def age(sizes: Any) -> Job:
    """Activation-guided editing of the second half of ResNet-18 without the trigger: one pass in training mode."""
    images = stored(*random_images(sizes.edited, tuple(sizes.shape)))[0]
    number = -(-sizes.edited // min(128, sizes.edited))
    model = network("resnet18", sizes)

    def edit(form: torch.memory_format) -> Callable[[], Any]:
        network = model.to(memory_format=form).train()
        layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        layers = layers[len(layers) // 2 :]

        @torch.inference_mode()
        def run() -> None:
            means = [torch.zeros((), device=DEVICE) for _ in layers]

            def add(index: int) -> Callable:
                return lambda module, inputs, out: means.__setitem__(index, means[index] + out.mean(0) / number)

            hooks = [layer.register_forward_hook(add(index)) for index, layer in enumerate(layers)]
            for part in images[torch.randperm(len(images), device=DEVICE)].chunk(number):
                network(floats(part, form))
            for hook in hooks:
                hook.remove()
            for layer, mean in zip(layers, means, strict=True):
                factor = -mean
                if isinstance(layer, nn.Conv2d):
                    factor = f.adaptive_avg_pool2d(factor[None], layer.kernel_size)[0]
                factor = 0.5 * (factor - factor.mean()) / (factor.var(correction=0) + 1e-5).sqrt() + 1
                layer.weight.detach() * factor[:, None]
            finished()

        return run

    form, note = best_form(edit)
    return Job(edit(form), note)


def inversion(sizes: Any) -> Job:
    """One epoch of Neural Cleanse's search for all classes in one batch, with folded weights."""
    images = stored(*random_images(sizes.searched, tuple(sizes.shape)))[0]
    size = max(1, min(256, sizes.searched // 8))
    model = network("small_vgg", sizes)
    height, width, channels = sizes.shape

    def search(form: torch.memory_format) -> Callable[[], Any]:
        network = prepared(folded(model), form)

        def run() -> None:
            mask = torch.ones(CLASSES, 1, height, width, device=DEVICE, requires_grad=True)
            pattern = torch.ones(CLASSES, channels, height, width, device=DEVICE, requires_grad=True)
            optimizer = torch.optim.Adam([mask, pattern], 0.1, betas=(0.5, 0.9), fused=True)
            goals = torch.arange(CLASSES, device=DEVICE).repeat_interleave(size)
            order = torch.randperm(len(images), device=DEVICE)
            for start in range(0, len(images) // size * size, size):
                x = floats(images[order[start : start + size]], form)
                m, p = (u.tanh() / (2 + 1e-7) + 0.5 for u in (mask, pattern))
                stamped = torch.lerp(x[None], p[:, None], m[:, None]).flatten(0, 1).contiguous(memory_format=form)
                loss = CLASSES * f.cross_entropy(network(stamped), goals) + 1e-3 * m.sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            finished(loss.item())

        return run

    form, note = best_form(search)
    return Job(search(form), note)


# --- triggers


def patch(images: Any, sizes: Any) -> None:
    """Write BadNets' white square into stored images [N, H, W, C], in place."""
    scale = min(images.shape[1:3]) / 32
    side, margin = max(1, round(4 * scale)), round(scale)
    rows, columns = (slice(n - margin - side, n - margin) for n in images.shape[1:3])
    images[:, rows, columns] = 255


def trigger(attack: str, sizes: Any) -> Job:
    """Apply a trigger to stored images; pictures are added in float32, clipped and rounded, in parts."""
    images = torch.from_numpy(random_images(sizes.stamped, tuple(sizes.shape))[0]).to(DEVICE)
    height, width, channels = sizes.shape
    if attack == "badnets":

        def stamp() -> torch.Tensor:
            out = images.clone()
            patch(out, sizes)
            return out
    else:
        if attack == "sig":
            stripe = 40 * torch.sin(2 * torch.pi * 6 / width * torch.arange(width))
            added = stripe[None, :, None].expand(height, width, channels)
        else:
            added = 51 * torch.from_numpy(np.load(sizes.picture)) if sizes.picture else torch.zeros(1)
        added = added.to(DEVICE)

        def stamp() -> torch.Tensor:
            out = torch.empty_like(images)
            for start in range(0, len(images), 1000):
                part = images[start : start + 1000].float().add_(added).clamp_(0, 255).round_()
                out[start : start + 1000] = part.to(torch.uint8)
            return out

    return Job(lambda: finished(stamp()))


KINDS: dict[str, Callable[..., Job]] = {
    "train": train, "evaluate": evaluate, "ibau": ibau, "age": age, "inversion": inversion, "many": many,
    "trigger": trigger,
}  # fmt: skip


def job(name: str, sizes: Any) -> Job:
    """Prepare a workload. Raises LookupError when this side does not have it."""
    kind, *arguments = name.split("/")
    if kind not in KINDS or "iad" in arguments:
        raise LookupError(name)
    return KINDS[kind](*arguments, sizes)


def begin(threads: int) -> str:
    """Set the number of threads; return version and device in words."""
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as XLA uses; no effect on a CPU
    torch.backends.cudnn.benchmark = True
    device = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"
    return f"torch {torch.__version__}, {device}"


def first_step() -> None:
    """Train a small network on images of 32x32x1 until the first step is finished."""
    sizes = SimpleNamespace(shape=(32, 32, 1), width=None, batch=128, steps=1)
    images, labels = random_images(sizes.batch, sizes.shape)
    data = stored(images, labels)
    trainer("cnn", "float32", sizes, data, torch.contiguous_format, None, sizes.batch, 1)()
    sys.stdout.write("first step\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:] != ["first-step"]:
        raise SystemExit(f"usage: {os.path.basename(__file__)} first-step; the rest is compare.py's.")
    begin(0)
    first_step()
    os._exit(0)  # skip the teardown, which is not part of a start
