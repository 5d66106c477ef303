"""What indexing and searching cost, as ratios measured side by side.

Photo files to vectors against the bare net, exact search against faiss' flat index, and how long a
drawing waits for its answer. Encoders are made on the spot and untrained: only the clock is asked.
Rounds alternate between what is compared, medians are printed.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from dfsbir.core.types import MODALITIES, Modality
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.retrieval import embed, rank_topk
from dfsbir.search.approximate import INDEX_KINDS
from dfsbir.search.exact import nearest
from dfsbir.search.gallery import Gallery
from dfsbir.search.gallery_file import Item, write_rows
from dfsbir.search.indexing import index_photos
from dfsbir.search.photo_files import decode_photo
from dfsbir.search.searcher import Searcher
from dfsbir.students.encoder import encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net, input_of
from dfsbir.teachers.teacher import Teacher


def options():
    "The command line."
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--photos", type=int, default=10_000, help="toy photos in the gallery")
    p.add_argument(
        "--net", default="dfsbir/small", help="source/name of the encoders of that gallery"
    )
    p.add_argument("--size", type=int, default=64, help="side of their input, px")
    p.add_argument(
        "--camera-nets",
        nargs="*",
        default=["torchvision/resnet18", "timm/efficientnet_lite0"],
        help="nets that embed photos of 640 x 480 at 224 px",
    )
    p.add_argument("--camera-photos", type=int, default=256, help="how many of these")
    p.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="processes that decode",
    )
    p.add_argument(
        "--threads",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="threads of the net, in both halves of a ratio",
    )
    p.add_argument(
        "--sizes",
        type=int,
        nargs="*",
        default=[1_000, 10_000, 100_000, 1_000_000],
        help="photos of generated galleries, to see how costs grow; none: leave this out",
    )
    p.add_argument("--dim", type=int, default=64, help="numbers a vector, in generated galleries")
    p.add_argument(
        "--growth-only", action="store_true", help="generated galleries and nothing else"
    )
    p.add_argument("--rounds", type=int, default=3, help="of each comparison")
    return p.parse_args()


def encoders_of(net, size, dim=64):
    "An untrained pair."
    source, _, name = net.partition("/")
    classes, space = list(TOY_CLASSES), MetricSpace.random(len(TOY_CLASSES), dim)
    torch.manual_seed(0)
    teachers = {
        m: Teacher(
            build_net(source, name, len(classes)),
            classes,
            input_of(source, size, name=name),
            m,
            card=dict(source=source, name=name),
        )
        for m in MODALITIES
    }
    return {
        m: encoder_from_teacher(t, align_classes(classes, classes), space)
        .requires_grad_(False)
        .eval()
        for m, t in teachers.items()
    }


def seconds(work):
    "Wall time of one call."
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def threads(n):
    "PyTorch's thread count, for a while."
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_photos(folder, images, side=None):
    "Toy photos as JPEG in class folders; with `side`, enlarged to 4:3 with a camera's grain."
    rng = np.random.default_rng(0)
    for i in range(len(images)):
        x, label = images[i]
        path = folder / images.classes[label] / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy())
        if side:
            large = np.asarray(
                image.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), np.int16
            )
            image = Image.fromarray(
                (large + rng.integers(-8, 9, large.shape, np.int16)).clip(0, 255).astype(np.uint8)
            )
        image.save(path, quality=90)
    files = list(folder.rglob("*.jpg"))
    mean_kb = sum(f.stat().st_size for f in files) / len(files) / 1000
    print(f"  {len(files)} files of {image.width} x {image.height}, {mean_kb:.1f} kB each")
    return files


def embedding(name, home, photos, files, encoder, args):
    "Files to a gallery, against the forward pass of as many images that are in memory."
    size, n, found = (
        encoder.normalizer.size,
        len(files),
        {"bare": [], "bare, all cores": [], "gallery": [], "gallery, no workers": []},
    )
    batch = torch.rand(64, 3, size, size)

    def bare(cores):
        with threads(cores):
            for _ in range(n // 64):
                embed(encoder, batch, 64)
            if n % 64:
                embed(encoder, batch[: n % 64], 64)

    def gallery(workers):
        with tempfile.TemporaryDirectory(dir=home) as folder, threads(args.threads):
            index_photos(folder, photos, encoder, workers=workers, progress=False)

    bare(args.threads)
    for k in range(args.rounds):
        found["bare"].append(seconds(lambda: bare(args.threads)))
        found["gallery"].append(seconds(lambda: gallery(args.workers)))
        if k == 0:
            (
                found["bare, all cores"].append(seconds(lambda: bare(os.cpu_count() or 1))),
                found["gallery, no workers"].append(seconds(lambda: gallery(0))),
            )
    data = [f.read_bytes() for f in files[:200]]
    decode = seconds(lambda: [decode_photo(d, size) for d in data]) / len(data)
    rate = {k: n / median(v) for k, v in found.items()}
    print(
        f"  {name} at {size} px: "
        + ", ".join(f"{k} {v:.0f}/s" for k, v in rate.items())
        + f"; decoding alone {1 / decode:.0f}/s in one process"
    )
    ratios = [b / g for b, g in zip(found["bare"], found["gallery"])]
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"  RATIO files to gallery, {args.workers} workers / bare forward pass, "
        f"{args.threads} threads: {median(ratios):.2f} (rounds {rounds}; goal at least 0.85); "
        f"against bare on all cores {rate['gallery'] / rate['bare, all cores']:.2f}"
    )


def searching(gallery, queries, rounds=7):
    "Exact search against faiss' flat index (which must agree), and the approximate one."
    try:
        import faiss
    except ImportError:
        print("  faiss is not installed (pip install 'dfsbir[search]'): no comparison")
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    random = [
        torch.nn.functional.normalize(
            torch.randn(n, queries.shape[1], generator=torch.Generator().manual_seed(n)), dim=1
        )
        for n in (len(queries), len(gallery))
    ]
    for name, q, v in (
        ("random vectors", *random),
        ("the gallery (an untrained net's, nearly equal)", queries, gallery.vectors),
    ):
        flat = faiss.IndexFlatIP(v.shape[1])
        flat.add(v.numpy())
        (scores, places), ours = flat.search(q.numpy(), 10), nearest(q, v, 10)
        np.testing.assert_allclose(ours[0].numpy(), scores, rtol=1e-4, atol=1e-5)
        same = (ours[1].numpy() == places).mean()
        print(
            f"  EQUAL to faiss flat on {name}: all scores within rounding, "
            f"{same:.4f} of the places the same"
        )
    card = gallery.add_index(queries=queries)
    for q in (1, len(queries)):
        asked, took = queries[:q], {"faiss": [], "ours": [], "sorting all": [], "approximate": []}
        for _ in range(rounds):
            for k, f in (
                ("faiss", lambda q=asked: flat.search(q.numpy(), 10)),
                ("ours", lambda q=asked: nearest(q, gallery.vectors, 10)),
                ("sorting all", lambda q=asked: rank_topk(q, gallery.vectors, 10)),
                ("approximate", lambda q=asked: gallery.search(q, 10, approximate=True)),
            ):
                took[k].append(seconds(f))
        ms = {k: 1000 * median(v) for k, v in took.items()}
        print(
            f"  {q} queries: "
            + ", ".join(f"{k} {v:.2f} ms" for k, v in ms.items())
            + f"; RATIO ours / faiss flat {ms['ours'] / ms['faiss']:.2f}"
        )
    print(f"  approximate index: {card}")


def latency(searcher, sketches, count=50):
    "From strokes to hits, and to the contact sheet of the hits."
    rng = np.random.default_rng(0)
    drawings = [[rng.uniform(0, 1, (20, 2)).cumsum(0) / 20 for _ in range(8)] for _ in range(count)]
    answer = [seconds(lambda d=d: searcher.by_strokes(d)) for d in drawings]
    sheet = [seconds(lambda d=d: searcher.by_strokes(d).contact_sheet()) for d in drawings]
    image = [seconds(lambda i=i: searcher.by_sketch(sketches[i][0])) for i in range(count)]
    for name, took in (
        ("strokes to answer", answer),
        ("strokes to contact sheet", sheet),
        ("sketch image to answer", image),
    ):
        print(
            f"  {name}: median {1000 * median(took):.1f} ms, "
            f"worst of {count} {1000 * max(took):.1f} ms"
            + (" (goal under 1000)" if took is answer else "")
        )


def generated_vectors(count, dim, seed, piece=10_000):
    "Unit vectors around a thousand centres, as embeddings of photos are, in pieces."
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=torch.Generator().manual_seed(99))
    for start in range(0, count, piece):
        n = min(piece, count - start)
        near = centres[torch.randint(1000, (n,), generator=generator)]
        noise = torch.randn(n, dim, generator=generator)
        yield torch.nn.functional.normalize(near + 0.7 * noise, dim=1)


def generated_items(count):
    "Items of photos that do not exist, in a hundred folders."
    for n in range(count):
        yield Item(f"folder{n % 100:02d}/photo{n:07d}.jpg", 1000 + n, f"{n:064x}", f"{n % 100:02d}")


def memory():
    "MB that this process holds in memory of its own, and of mapped files."
    status = Path("/proc/self/status")
    if not status.is_file():
        return {"own": float("nan"), "mapped": float("nan")}
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    kb = {k: int(lines[name].split()[0]) for k, name in (("own", "RssAnon"), ("mapped", "RssFile"))}
    return {k: v / 1000 for k, v in kb.items()}


def latency_of(search, queries, repeat=20):
    "Milliseconds for one query, and for each of a hundred that are asked together."
    one = median(seconds(lambda q=q: search(queries[q : q + 1])) for q in range(repeat))
    many = median(seconds(lambda: search(queries)) for _ in range(3))
    return f"{1000 * one:.2f} ms alone, {1000 * many / len(queries):.2f} ms of {len(queries)}"


def write_gallery(folder, count, dim=64):
    "A gallery file of generated vectors, written in pieces."
    write_rows(
        folder / "gallery.safetensors",
        generated_items(count),
        generated_vectors(count, dim, seed=0),
        (b"thumbnail" for _ in range(count)),
        encoder="generated",
        broken=[],
        roots=[],
    )


def growth(home, count, dim):
    "A generated gallery of this size: written, opened, searched exactly and by both indexes."
    folder = home / f"generated{count}"
    folder.mkdir()
    queries = torch.cat(list(generated_vectors(100, dim, seed=1)))
    before = memory()["own"]
    writing = seconds(lambda: write_gallery(folder, count, dim))
    size = (folder / "gallery.safetensors").stat().st_size / 1e6
    print(
        f"\n{count} generated photos, {dim} numbers each: written in {writing:.1f} s, {size:.0f} MB"
    )
    start = time.perf_counter()
    gallery = Gallery(folder)
    opening, held = time.perf_counter() - start, memory()
    print(
        f"  opened in {opening:.2f} s; {held['own'] - before:.0f} MB more of its own, "
        f"{held['mapped']:.0f} MB mapped"
    )
    print(f"  exact: {latency_of(partial(gallery.search, k=10), queries)}")
    for kind in INDEX_KINDS:
        try:
            start = time.perf_counter()
            summary = gallery.add_index(0.95, queries, kind)
            building = time.perf_counter() - start
        except ImportError as error:
            print(f"  {kind}: {error}")
            continue
        found = ", ".join(f"{k} {v}" for k, v in summary.items() if k != "kind")
        search = partial(gallery.search, k=10, approximate=True)
        print(f"  {kind}: built in {building:.1f} s, {latency_of(search, queries)}; {found}")


def main():
    args = options()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}; "
        f"net on {args.threads} threads, {args.workers} workers"
    )
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        for count in args.sizes:
            growth(home, count, args.dim)
        if args.growth_only:
            return
        print(f"\n{args.photos} toy photos, {args.net}")
        photos, sketches = toy_pairs(args.photos, args.size, split="test")
        files, encoders = write_photos(home / "toy", photos), encoders_of(args.net, args.size)
        embedding(args.net, home, home / "toy", files, encoders[Modality.PHOTO], args)
        gallery = index_photos(
            home / "gallery",
            home / "toy",
            encoders[Modality.PHOTO],
            workers=args.workers,
            progress=False,
        )
        again = seconds(
            lambda: index_photos(
                home / "gallery",
                home / "toy",
                encoders[Modality.PHOTO],
                workers=args.workers,
                progress=False,
            )
        )
        opening = seconds(lambda: type(gallery)(home / "gallery"))
        size_mb = (home / "gallery" / "gallery.safetensors").stat().st_size / 1e6
        print(
            f"  again with nothing new: {again:.2f} s; opening the gallery {opening:.2f} s, "
            f"its file {size_mb:.1f} MB"
        )
        searching(gallery, embed(encoders[Modality.SKETCH], sketches.take(slice(100))))
        latency(Searcher(gallery, encoders), sketches)
        if args.camera_nets:
            print("\nphotos as from a camera")
        for k, net in enumerate(args.camera_nets):
            if k == 0:
                camera = write_photos(home / "camera", photos.take(slice(args.camera_photos)), 640)
            embedding(
                net, home, home / "camera", camera, encoders_of(net, 224)[Modality.PHOTO], args
            )


if __name__ == "__main__":
    main()
