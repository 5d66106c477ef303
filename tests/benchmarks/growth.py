"""How seconds and memory grow with classes, side, pairs kept and photos in the gallery.

Each point is measured in a process of its own, on one thread, and kept as a line of a file: points
that are there are not measured again, so that a run can be stopped and continued. Times are
processor time, which other programs on the machine lengthen little; memory is what the process
takes at its peak beyond what it takes after its imports. The tables give, for each column, the
exponent e of a growth as size**e: over all points, and between the two largest.

    python tests/benchmarks/growth.py                       # measure what is missing, print tables
    python tests/benchmarks/growth.py --parts classes side  # some of them
    python tests/benchmarks/growth.py --print               # print alone
"""

import argparse
import gc
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from search_speed import encoders_of, generated_vectors, memory, write_gallery
from step_cost import make_run

from dfsbir.core.device import make_fabric
from dfsbir.core.types import Modality, PairBatch
from dfsbir.data.folders import read_folder
from dfsbir.inversion.buffer import ReplayBuffer
from dfsbir.search.gallery import Gallery
from dfsbir.search.indexing import index_photos
from dfsbir.teachers.training import train_teacher

SIZES = {
    "classes": [10, 100, 1000],
    "side": [32, 64, 96, 128, 224],
    "pairs": [1_000, 10_000, 100_000],
    "gallery": [1_000, 10_000, 100_000, 1_000_000],
    "files": [1_000, 4_000, 16_000],
    "training": [1_000, 10_000, 100_000],
}
TITLES = {
    "classes": "Shared classes, `dfsbir/small` at 32 px, batches of 64 pairs",
    "side": "Side of images and inputs, px, `dfsbir/small`, 10 classes, batches of 8 pairs",
    "pairs": "Pairs kept, at 32 px and 10 classes; 64 pairs come and 64 are sampled",
    "gallery": "Generated vectors of 64 numbers; queries one at a time, 10 photos each",
    "files": "JPEG files of 224 px, decoded and embedded by `dfsbir/tiny` at 64 px into a gallery",
    "training": "JPEG files of 224 px; a teacher `dfsbir/tiny` for 64 px sees each of them once",
}


def options():
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--parts", nargs="+", choices=list(SIZES), default=list(SIZES), help="tables")
    p.add_argument("--most", type=int, default=1_000_000, help="largest size to measure")
    p.add_argument("--device", default="cpu", help="of steps and pairs: cpu or cuda")
    p.add_argument("--file", default="runs/growth.jsonl", help="where points are kept")
    p.add_argument("--print", action="store_true", help="print the tables, measure nothing")
    p.add_argument("--point", nargs=2, metavar=("PART", "SIZE"), help="measure one point here")
    return p.parse_args()


# ---- measuring


def finish(device):
    "Waits for a graphics card."
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run, device="cpu", times=5, warmup=2) -> float:
    "Median over calls: processor time, or on a graphics card the time until it is done."
    clock = time.process_time if device == "cpu" else time.perf_counter
    taken = []
    for _ in range(warmup + times):
        finish(device)
        start = clock()
        run()
        finish(device)
        taken.append(1000 * (clock() - start))
    return median(taken[warmup:])


def peak_mb(device="cpu") -> float:
    "The largest memory so far: of the graphics card, or of this process."
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def steps(device, classes=10, size=32, batch=64) -> dict:
    "One estimator step and one student step."
    args = Namespace(
        device=device,
        classes=classes,
        preset="dfsbir",
        batch=batch,
        student_batch=batch,
        precision="32-true",
    )
    crossx = make_run(args, "dfsbir/small", size)
    return {
        "estimator step, ms": milliseconds(crossx.pairs.run_step, device),
        "student step, ms": milliseconds(crossx.distill_step, device),
        "filling by a batch, ms": milliseconds(crossx.fill_buffer, device),
    }


def pairs_kept(device, count) -> dict:
    "A full buffer: adding, sampling, and writing what came."
    batch = PairBatch(
        torch.rand(64, 3, 32, 32),
        torch.rand(64, 1, 32, 32),
        torch.arange(64) % 10,
        torch.rand(64, 10),
        torch.rand(64, 10),
    )
    batch = batch.to(make_fabric(device).device)
    buffer = ReplayBuffer(count, device=batch.label.device)
    for _ in range(count // 64 + 1):
        buffer.add(batch)
    found = {
        "adding, ms": milliseconds(lambda: buffer.add(batch), device),
        "sampling, ms": milliseconds(lambda: buffer.sample(64), device),
    }
    with tempfile.TemporaryDirectory() as folder:
        buffer.save(folder)

        def save():
            buffer.add(batch)
            buffer.save(folder)

        found["adding and saving, ms"] = milliseconds(save, device)
    return found


def gallery(device, count) -> dict:
    "A gallery written, opened, searched exactly and by both indexes at a recall of 0.95."
    queries = torch.cat(list(generated_vectors(100, 64, seed=1)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        found = {"writing, s": milliseconds(lambda: write_gallery(folder, count), "cpu", 1, 0)}
        found["writing, s"] /= 1000
        found["opening, ms"] = milliseconds(lambda: Gallery(folder), "cpu", 3, 0)
        opened = Gallery(folder)
        turn = iter(range(10**9))

        def one(approximate):
            at = next(turn) % len(queries)
            opened.search(queries[at : at + 1], 10, approximate=approximate)

        found["exact, ms"] = milliseconds(partial(one, False), "cpu", 20)
        for kind in ("ivf", "hnsw"):
            before = peak_mb()
            start = time.process_time()
            card = opened.add_index(0.95, queries, kind)
            found[f"{kind} built, s"] = time.process_time() - start
            found[f"{kind}, ms"] = milliseconds(partial(one, True), "cpu", 50)
            found[f"{kind} recall"] = card["recall@10"]
            found[f"{kind} peak, MB more"] = peak_mb() - before
    return found


def write_photos(folder, count):
    "So many JPEG files of 224 px with different contents, in a hundred class folders."
    pictures = []
    for seed in range(50):
        noise = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(seed))
        pixels = torch.nn.functional.interpolate(noise[None], (224, 224), mode="bilinear")[0]
        stream = io.BytesIO()
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    for i in range(count):
        place = folder / f"class {i % 100:02d}"
        place.mkdir(exist_ok=True)
        # what follows the end of a JPEG is ignored, and makes the file one of its own
        (place / f"{i:06d}.jpg").write_bytes(pictures[i % 50] + i.to_bytes(8, "big"))


class OwnMemory:
    "Watches the memory that a process holds beside mapped files, which the system may take back."

    def __enter__(self):
        self.before, self.peak, self.done = memory()["own"], 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.2):
            self.peak = max(self.peak, memory()["own"] - self.before)

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()


@contextmanager
def folder_of_photos(count):
    "A folder that holds `photos`, so many files, and is gone afterwards."
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "photos").mkdir()
        write_photos(Path(home) / "photos", count)
        gc.collect()
        yield Path(home)


def files(device, count) -> dict:
    "A folder of photos to a gallery, in this process."
    encoder = encoders_of("dfsbir/tiny", 64)[Modality.PHOTO]
    with folder_of_photos(count) as home, OwnMemory() as own:
        start = time.process_time()
        index_photos(home / "gallery", home / "photos", encoder, progress=False)
        spent = time.process_time() - start
    return {"indexing, s": spent, "own memory, MB": own.peak}


def training(device, count) -> dict:
    "A teacher trained on a folder of photos, one pass; files are decoded by two more processes."
    with folder_of_photos(count) as home, OwnMemory() as own:
        start = process_seconds()
        data = read_folder(home / "photos", Modality.PHOTO, 224, cached=False, workers=2)
        train_teacher(
            data,
            net="dfsbir/tiny",
            epochs=1,
            batch_size=64,
            size=64,
            fabric=make_fabric(device),
            progress=False,
            workers=2,
        )
        spent = process_seconds() - start
    return {"training, s": spent, "own memory, MB": own.peak}


def process_seconds() -> float:
    "Processor time of this process and of those that it has waited for."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure(part: str, size: int, device: str) -> dict:
    "One point."
    torch.set_num_threads(1)
    before = peak_mb()
    found = {
        "classes": lambda: steps(device, classes=size),
        "side": lambda: steps(device, size=size, batch=8),
        "pairs": lambda: pairs_kept(device, size),
        "gallery": lambda: gallery(device, size),
        "files": lambda: files(device, size),
        "training": lambda: training(device, size),
    }[part]()
    of_gpu = device == "cuda" and part in ("classes", "side", "pairs")
    peak = peak_mb("cuda") if of_gpu else peak_mb() - before
    return {"part": part, "size": size, "device": device, **found, "memory, MB": peak}


# ---- points and tables


def read_points(file: Path) -> list[dict]:
    "What has been measured."
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def measure_apart(args, part: str, size: int) -> dict:
    "One point, in a process of its own."
    command = [sys.executable, __file__, "--point", part, str(size), "--device", args.device]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **threads}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def overall_exponent(points: list[tuple[float, float]]) -> float:
    "e of a growth as size**e, by least squares over (size, value)."
    x, y = (torch.tensor(column).log() for column in zip(*points))
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def as_number(value: float) -> str:
    "Three figures."
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def print_table(part: str, points: list[dict]):
    "One Markdown table: a row for each size, then the exponents."
    points = sorted(points, key=lambda p: p["size"])
    names = [k for k in points[0] if k not in ("part", "size", "device")]
    print(f"\n### {part.capitalize()}\n\n{TITLES[part]}.\n")
    print(f"| {part} | {' | '.join(names)} |\n|--:|{'--:|' * len(names)}")
    for p in points:
        print(f"| {p['size']:,} | {' | '.join(as_number(p[k]) for k in names)} |")
    for title, some in (("exponent, all", points), ("exponent, last two", points[-2:])):
        cells = []
        for k in names:
            found = [(float(p["size"]), p[k]) for p in some if p[k] > 0]
            grows = len(found) > 1 and "recall" not in k
            cells.append(f"{overall_exponent(found):.2f}" if grows else "")
        print(f"| {title} | {' | '.join(cells)} |")


def main():
    args = options()
    if args.point:
        part, size = args.point
        print(json.dumps(measure(part, int(size), args.device)))
        return
    file = Path(args.file)
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {(p["part"], p["size"]) for p in read_points(file) if p["device"] == args.device}
    for part in args.parts if not args.print else ():
        for size in SIZES[part]:
            if (part, size) in known or size > args.most:
                continue
            start = time.perf_counter()
            point = measure_apart(args, part, size)
            with open(file, "a") as f:
                f.write(json.dumps(point) + "\n")
            spent = time.perf_counter() - start
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
            print(f"{part} {size}: {spent:.0f} s, load {load:.1f}", file=sys.stderr, flush=True)
    machine = platform.machine() if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.device} ({machine}), one thread, torch {torch.__version__}")
    points = [p for p in read_points(file) if p["device"] == args.device]
    for part in args.parts:
        if found := [p for p in points if p["part"] == part]:
            print_table(part, found)


if __name__ == "__main__":
    main()
