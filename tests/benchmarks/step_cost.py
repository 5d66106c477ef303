"""What a step of CrossX-DFL costs beside its floor, at several sides and teacher sizes.

The floor of a step is a bare forward and backward pass of the same networks on the same batch:
generators and teachers for the estimator step, students for the student step. On CUDA it is
replayed from a captured graph where capturing works. Teachers are made on the spot and untrained.
A step and its floor are timed in turns, so that both see the same load; times are medians. On the
CPU they are processor time.
"""

import argparse
import gc
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


def options():
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    p.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 224], help="sides, px")
    p.add_argument(
        "--nets",
        nargs="+",
        default=["dfsbir/small", "torchvision/resnet18"],
        help="source/name of teachers and students",
    )
    p.add_argument("--classes", type=int, default=10, help="shared classes")
    p.add_argument("--preset", default="dfsbir", help="of the config")
    p.add_argument("--batch", type=int, default=40, help="pairs per estimator step")
    p.add_argument("--student-batch", type=int, default=64, help="pairs per student step")
    p.add_argument("--precision", default="32-true", help="Fabric's name")
    p.add_argument("--steps", type=int, default=7, help="timed steps")
    p.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    return p.parse_args()


# ---- a run to measure


def untrained_teacher(modality, net, size, classes):
    "A teacher with random weights."
    source, _, name = net.partition("/")
    names = [f"class {i}" for i in range(classes)]
    card = {"source": source, "name": name}
    net = build_net(source, name, classes)
    return Teacher(net, names, input_of(source, size, name=name), modality, card=card)


def make_run(args, net, size):
    "A CrossX run of this size, its buffer filled."
    torch.manual_seed(0)
    config = CrossXConfig.preset(
        args.preset,
        {
            "device": args.device,
            "precision": args.precision,
            "pairs.photo.size": size,
            "pairs.sketch.size": size,
            "pairs.batch": args.batch,
            "students.batch": args.student_batch,
            "schedule.new_pairs": args.student_batch,
            "buffer.capacity": 4 * args.student_batch,
        },
    )
    teachers = [untrained_teacher(m, net, size, args.classes) for m in MODALITIES]
    crossx = build_crossx(*teachers, config, fabric=make_fabric(args.device, args.precision))
    for _ in range(4):
        crossx.fill_buffer()
    return crossx


# ---- steps and floors


@dataclass
class Part:
    "Something to measure, with what it cannot be faster than."

    name: str
    run: Callable
    images: int
    floor: Callable | None = None


def estimator_floor(crossx, batch):
    "Generators and teachers, forward and backward to the generators' weights."
    estimator, fabric = crossx.pairs, crossx.fabric
    noise, label = estimator.sample_inputs(batch)
    condition = label if estimator.classes else None

    def run():
        for m in MODALITIES:
            with fabric.autocast():
                images = estimator.generators[m].train()(noise, condition)
                logits = crossx.teachers[m](images, bn=False).logits
            logits.float().square().mean().backward()

    return run


def student_floor(crossx, batch):
    "Both students, forward and backward."
    students, fabric = crossx.distiller.students, crossx.fabric
    pairs = crossx.buffer.sample(batch, fabric.device)

    def run():
        with fabric.autocast():
            (_, photo), (_, sketch) = students(pairs.photo, pairs.sketch)
        (photo.float().square().mean() + sketch.float().square().mean()).backward()

    return run


def captured(run, device):
    "The same work replayed from a CUDA graph; as it is, where that does not work."
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as e:
        print(f"no graph for this floor, it is measured as it is: {str(e).splitlines()[0]}")
        torch.cuda.synchronize()
        return run
    return graph.replay


def parts_of(crossx, args):
    "What a run spends its time on."
    device = crossx.fabric.device
    pairs, students = 2 * args.batch, 2 * args.student_batch
    sample = crossx.buffer.sample(args.student_batch)
    sketches = crossx.pairs.generators[MODALITIES[1]]
    noise, label = crossx.pairs.sample_inputs(args.batch)
    condition = label if crossx.pairs.classes else None

    def draw():
        sketches.train()(noise, condition).square().mean().backward()

    def clear(run):
        "Gradients that a floor leaves must not grow."

        def cleared():
            run()
            crossx.pairs.generators[MODALITIES[0]].zero_grad(set_to_none=False)
            sketches.zero_grad(set_to_none=False)
            crossx.distiller.students.zero_grad(set_to_none=False)

        return cleared

    first, second = estimator_floor(crossx, args.batch), student_floor(crossx, args.student_batch)
    return [
        Part(
            "estimator step",
            crossx.pairs.run_step,
            pairs,
            captured(clear(first), device),
        ),
        Part("  sketch generator, both ways", draw, args.batch),
        Part("student step", crossx.distill_step, students, captured(clear(second), device)),
        Part("  sampling the buffer", lambda: crossx.buffer.sample(args.student_batch), students),
        Part("filling the buffer", crossx.fill_buffer, students),
        Part("  adding to the buffer", lambda: crossx.buffer.add(sample), students),
    ]


# ---- measuring


def finish(device):
    "Waits for the device."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(run, device):
    "Processor time on the CPU, else the time until the device is done."
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    finish(device)
    start = clock()
    run()
    finish(device)
    return clock() - start


class Counter(TorchDispatchMode):
    "Counts the operations that are dispatched inside its `with` block."

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(run):
    "Operations dispatched by one run."
    with Counter() as counter:
        run()
    return counter.count


def waits(run, device):
    "How often one run waits for the device; None where PyTorch cannot tell."
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def peak_memory(device):
    "MB: of the device, or of this process so far."
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )


def measure(crossx, args):
    "Rows of the table: name, ms, floor's ms, images a second, operations, waits."
    device, rows = crossx.fabric.device, []
    for part in parts_of(crossx, args):
        times, floors = [], []
        for step in range(args.warmup + args.steps):
            spent = seconds(part.run, device)
            bare = seconds(part.floor, device) if part.floor else None
            if step >= args.warmup:
                times.append(spent)
                floors.append(bare)
        ms = 1000 * median(times)
        floor = 1000 * median(floors) if part.floor else None
        counts = operations(part.run), waits(part.run, device)
        rows.append((part.name, ms, floor, 1000 * part.images / ms, *counts))
    return rows


# ---- printing


def print_machine(args):
    device = torch.device(args.device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"{device} ({name}), torch {torch.__version__}, {torch.get_num_threads()} threads{load}\n"
        f"{args.precision}, {args.classes} classes, preset {args.preset}, batch {args.batch}, "
        f"student batch {args.student_batch}; median of {args.steps} steps after {args.warmup}"
    )


def print_rows(rows):
    print(f"{'':30}{'ms':>9}{'floor':>9}{'ratio':>7}{'images/s':>10}{'ops':>7}{'waits':>7}")
    for name, ms, floor, rate, count, waited in rows:
        beside = f"{floor:>9.1f}{ms / floor:>7.2f}" if floor else " " * 16
        waited = "-" if waited is None else waited
        print(f"{name:30}{ms:>9.1f}{beside}{rate:>10.0f}{count:>7}{waited:>7}")


def main():
    args = options()
    print_machine(args)
    for net in args.nets:
        for size in args.sizes:
            crossx = make_run(args, net, size)
            device = crossx.fabric.device
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            rows = measure(crossx, args)
            print(f"\n{net} at {size} px, peak memory {peak_memory(device):.0f} MB", flush=True)
            print_rows(rows)
            del crossx
            gc.collect()


if __name__ == "__main__":
    main()
