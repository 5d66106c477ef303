"""What one step of each part of CrossX-DFL costs, in fp32 and bf16, with the share that teachers and students take.

Teachers are made on the spot and untrained: only the clock is asked. Times are medians over --steps after --warmup.
"""

import argparse
import os
import platform
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dfsbir.core.device import make_fabric
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.inversion.guidance import make_guide
from dfsbir.losses.cross_modal import modality_loss
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


def options():
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--net", default="dfsbir/small", help="source/name of both teachers and students"
    )
    p.add_argument(
        "--size", type=int, default=64, help="side of teachers' input and of estimated pictures, px"
    )
    p.add_argument("--classes", type=int, default=10, help="shared classes")
    p.add_argument("--preset", default="dfsbir", choices=["dfsbir", "paper"])
    p.add_argument("--batch", type=int, default=40, help="pairs per estimator step")
    p.add_argument("--student-batch", type=int, default=64, help="pairs per student step")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument(
        "--precisions", nargs="+", default=["32-true", "bf16-mixed"], help="Fabric's names"
    )
    p.add_argument("--steps", type=int, default=7, help="timed steps of each part")
    p.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    return p.parse_args()


def toy_teacher(modality, net, size, classes):
    "An untrained teacher; nets of a source keep that source's input."
    source, _, name = net.partition("/")
    names = (
        [f"class {i}" for i in range(classes)]
        if classes > len(TOY_CLASSES)
        else TOY_CLASSES[:classes]
    )
    return Teacher(
        build_net(source, name, classes),
        names,
        input_of(source, size, name=name),
        modality,
        card=dict(source=source, name=name),
    )


def finish(device):
    "Waits for the device."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Clock:
    "Times parts of a step; a part that runs several times in one step adds up."

    def __init__(self, device):
        self.device, self.now, self.kept = device, {}, {}

    @contextmanager
    def __call__(self, name):
        finish(self.device)
        start = time.perf_counter()
        yield
        finish(self.device)
        self.now[name] = self.now.get(name, 0.0) + time.perf_counter() - start

    def end(self, keep):
        "Closes a step."
        if keep:
            for k, v in self.now.items():
                self.kept.setdefault(k, []).append(v)
        self.now = {}

    def ms(self, name):
        return 1000 * median(self.kept[name])


def measure(args, precision):
    "[(part, ms, images per step)] and the shares of one precision."
    fabric = make_fabric(args.device, precision)
    torch.manual_seed(0)
    config = CrossXConfig.preset(
        args.preset,
        {
            "device": args.device,
            "precision": precision,
            "pairs.photo.size": args.size,
            "pairs.sketch.size": args.size,
            "pairs.batch": args.batch,
            "students.batch": args.student_batch,
            "schedule.new_pairs": args.student_batch,
            "buffer.capacity": 4 * args.student_batch,
        },
    )
    crossx = build_crossx(
        *(toy_teacher(m, args.net, args.size, args.classes) for m in MODALITIES),
        config,
        fabric=fabric,
    )
    guide = make_guide("procedural").to(fabric.device)
    clock, estimator, device = Clock(fabric.device), crossx.pairs, fabric.device
    crossx.fill_buffer()
    for step in range(args.warmup + args.steps):
        # whole actions, as a run does them
        for action in ("synthesize", "fill", "distill"):
            with clock(action):
                crossx.run_step(action)
        # parts of the estimator step, each alone
        noise, label = estimator.sample_inputs(args.batch)
        pictures = {}
        for m in MODALITIES:
            with clock(f"{m} generator forward"):
                pictures[m] = estimator._nets[m](noise, label if config.pairs.conditioned else None)
        for m in MODALITIES:
            x = pictures[m].detach().requires_grad_()
            with fabric.autocast(), clock("teachers forward"):
                out = crossx.teachers[m](x, bn=config.pairs.loss.bn > 0)
            answer = out.logits.float().logsumexp(1).sum() + sum(
                (a.square().sum() + b.sum() for a, b in out.bn), torch.zeros((), device=device)
            )
            with clock("teachers backward"):
                answer.backward()
            x = pictures[m].detach().requires_grad_()
            with fabric.autocast(), clock("guidance"):
                judged = modality_loss(guide(x), m)
            with clock("guidance"):
                judged.backward()
        for m in MODALITIES:
            with clock(f"{m} generator backward"):
                fabric.backward(pictures[m].square().mean())
            estimator.optimisers[m].zero_grad()
        # parts of the student step
        pairs = crossx.buffer.sample(args.student_batch).to(device)
        with fabric.autocast(), clock("students forward"):
            (ep, lp), (es, ls) = crossx.distiller.students(pairs.photo, pairs.sketch)
        with clock("students backward"):
            fabric.backward(lp.square().mean() + ls.square().mean())
        crossx.distiller.optimizer.zero_grad()
        clock.end(step >= args.warmup)
    pairs, students = 2 * args.batch, 2 * args.student_batch
    parts = [("estimator step, whole", "synthesize", pairs)]
    parts += [
        (f"  {m} generator {way}", f"{m} generator {way}", args.batch)
        for m in MODALITIES
        for way in ("forward", "backward")
    ]
    parts += [
        ("  teachers forward", "teachers forward", pairs),
        ("  teachers backward", "teachers backward", pairs),
        ("guidance, both ways", "guidance", pairs),
    ]
    parts += [
        ("filling the buffer", "fill", students),
        ("student step, whole", "distill", students),
        ("  students forward", "students forward", students),
        ("  students backward", "students backward", students),
    ]
    rows = [(title, clock.ms(name), images) for title, name, images in parts]
    nets = {
        "estimator step": (clock.ms("teachers forward") + clock.ms("teachers backward"))
        / clock.ms("synthesize"),
        "student step": (clock.ms("students forward") + clock.ms("students backward"))
        / clock.ms("distill"),
    }
    views = (
        config.students.views * clock.ms("teachers forward") * args.student_batch / args.batch
    )  # no gradient there: an upper bound
    plan = {a: crossx.config.plan().count(a) for a in ("synthesize", "fill", "distill")}
    plan["fill"] *= (
        CrossXConfig.preset(args.preset).schedule.new_pairs / args.student_batch
    )  # as many batches as the preset makes
    whole = sum(n * clock.ms(a) for a, n in plan.items())
    inside = (
        plan["synthesize"] * nets["estimator step"] * clock.ms("synthesize")
        + plan["distill"] * nets["student step"] * clock.ms("distill")
        + plan["fill"] * min(views, clock.ms("fill"))
    )
    nets["whole run of the preset"] = inside / whole
    return rows, nets, whole / 1000, str(device)


def main():
    args = options()
    found = {precision: measure(args, precision) for precision in args.precisions}
    device = next(iter(found.values()))[3]
    name = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine()
    )
    load = (
        f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        if hasattr(os, "getloadavg")
        else ""
    )
    print(
        f"{args.net} at {args.size} px, {args.classes} classes, preset {args.preset}, batch {args.batch}, student batch {args.student_batch}"
    )
    print(
        f"{device} ({name}), torch {torch.__version__}, {torch.get_num_threads()} threads{load}; median of {args.steps} steps after {args.warmup}\n"
    )
    print(f"{'part':<28}" + "".join(f"{p + ' ms':>16}{'images/s':>12}" for p in found))
    for i, (title, *_) in enumerate(next(iter(found.values()))[0]):
        print(
            f"{title:<28}"
            + "".join(
                f"{rows[i][1]:>16.1f}{1000 * rows[i][2] / rows[i][1]:>12.0f}"
                for rows, *_ in found.values()
            )
        )
    print(f"\n{'in teachers and students':<28}" + "".join(f"{p:>16}{'':>12}" for p in found))
    for k in next(iter(found.values()))[1]:
        print(
            f"{'  ' + k:<28}"
            + "".join(f"{nets[k]:>16.0%}{'':>12}" for _, nets, *_ in found.values())
        )
    print(
        f"{'run of the preset, s':<28}"
        + "".join(f"{whole:>16.0f}{'':>12}" for _, _, whole, _ in found.values())
    )
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1 if sys.platform == "darwin" else 1024)
        / (2**20 if sys.platform == "darwin" else 1)
    )
    print(
        f"\npeak memory of this process {peak:.0f} MB"
        + (
            f", of the device {torch.cuda.max_memory_allocated() / 2**20:.0f} MB"
            if device.startswith("cuda")
            else ""
        )
    )


if __name__ == "__main__":
    main()
