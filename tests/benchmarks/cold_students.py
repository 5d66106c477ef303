"""Students from random weights: our pairs against the baselines' and against real images.

    python tests/benchmarks/cold_students.py --pacs ../shared/data/pacs --out runs/cold

For each data set and seed: two teachers are trained, pictures are optimised against them, and
students that share nothing with them learn from the pictures alone. The same students, with the
same steps, learn from real training images (the ceiling), from Gaussian noise, from pictures with
the teachers' batch-norm statistics and no class, from real images of other classes, and from
pictures of two uni-modal estimators. Further arms leave out one thing at a time.

Every arm appends its rows to OUT/DATA-SEED-PART.csv as it ends, and all that was measured (views,
pictures, accuracies) to a .jsonl file of the same name. --merge puts them together. The parts run
side by side as processes (--jobs), each on one thread, and meet in files under OUT.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torchvision.utils import save_image

from dfsbir.baselines import AveragingWeights, GaussianPairs
from dfsbir.core.device import make_fabric, seed_everything
from dfsbir.core.types import MODALITIES, PairBatch
from dfsbir.crossx.build import build_cold_distiller, build_crossx, build_pairs
from dfsbir.crossx.config import CrossXConfig
from dfsbir.crossx.pairs import ProceduralPairs
from dfsbir.data.folders import read_folder
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES, TOY_HELD_OUT
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.results import append_results
from dfsbir.evaluation.retrieval import chance_ap, embed
from dfsbir.inversion.pyramid import as_floats
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.embeddings import teacher_embeddings
from dfsbir.teachers.loading import load_teacher
from dfsbir.teachers.training import accuracy, train_teacher

PHOTO, SKETCH = MODALITIES
METRICS = ("mAP@all", "Prec@100", "Prec@200")


def to_bytes(pairs: PairBatch) -> PairBatch:
    "Pairs with images as bytes, so that thousands stay on the device."
    images = ((pairs.of(m) * 255).round().byte() for m in MODALITIES)
    return PairBatch(*images, pairs.label)


@dataclass
class World:
    "One data set, one seed: images, teachers, and where results go."

    args: argparse.Namespace
    data: str  # "toy" or "pacs"
    seed: int
    part: str  # of the arms
    began: float
    fabric: object = None
    train: dict = field(default_factory=dict)
    test: dict = field(default_factory=dict)
    teachers: dict = field(default_factory=dict)
    judges: dict = field(default_factory=dict)
    class_map: object = None

    @property
    def home(self) -> Path:
        "The folder that the processes of this data set and seed share."
        return Path(self.args.out) / f"{self.data}-{self.seed}"

    @property
    def dataset(self) -> str:
        "What the results call it: data, side, net, and the part where it has a table of its own."
        names = [f"{self.data}{self.args.size}"]
        if self.args.teacher_net != "medium":
            names.append(self.args.teacher_net)
        if self.part in ("ablation", "files", "growth", "longer", "paper", "strokes"):
            names.append(self.part)
        return "-".join([*names, *(["val"] if self.args.validation else [])])

    def left(self) -> float:
        "Seconds until nothing new is begun."
        return self.args.budget - (time.time() - self.began)

    def say(self, text):
        print(f"{time.time() - self.began:5.0f} s  {self.data} {self.seed} {self.part}: {text}")

    def row(self, method, variant, metrics, seconds):
        "Appends an arm's numbers to this process's files: all as JSON, metrics as rows of results."
        name = Path(self.args.out) / f"{self.data}-{self.seed}-{self.part}"
        line = {"dataset": self.data, "seed": self.seed, "method": method, "variant": variant}
        line |= {"seconds": round(seconds, 1), **metrics}
        with open(f"{name}.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        rows = [
            {
                "dataset": self.dataset,
                "method": method,
                "variant": variant,
                "seed": self.seed,
                "metric": metric,
                "value": value,
                "seconds": seconds,
                "device": self.args.name,
                "run_id": f"cold-{self.data}-{self.seed}-{self.args.stamp}",
            }
            for metric, value in metrics.items()
            if metric in (*METRICS, "views")
        ]
        if rows:
            append_results(f"{name}.csv", rows)


def read_images(world: World):
    "Training images of both modalities, and those that are measured on."
    size, root = world.args.size, Path(world.args.pacs)
    if world.data == "toy":
        world.train = dict(zip(MODALITIES, toy_pairs(world.args.toy_images, size, seed=world.seed)))
    else:
        world.train = {m: read_folder(root / "train" / m.value, m, size) for m in MODALITIES}
    if world.args.validation:
        hold_out(world)
    elif world.data == "toy":
        world.test = dict(zip(MODALITIES, toy_pairs(300, size, split="test")))
    else:
        world.test = {m: read_folder(root / "test" / m.value, m, size) for m in MODALITIES}


def hold_out(world: World):
    "Measures on a quarter of the training images, from which nothing then learns."
    random = torch.Generator().manual_seed(7)
    for m in MODALITIES:
        images = world.train[m]
        order = torch.randperm(len(images), generator=random)
        held = len(images) // 4
        world.test[m] = images.take(order[:held])
        world.train[m] = images.take(order[held:])


def make_teachers(world: World):
    "Trains the two teachers, or waits for the process that does."
    folder = world.home / "teachers"
    if world.part in ("main", "all", "choice"):
        epochs = {"toy": {PHOTO: 30, SKETCH: 30}, "pacs": {PHOTO: 90, SKETCH: 45}}[world.data]
        for m in MODALITIES:
            teacher = train_teacher(
                world.train[m],
                net=f"dfsbir/{world.args.teacher_net}",
                epochs=max(1, round(epochs[m] * world.args.epochs)),
                batch_size=64,
                seed=world.seed + 1000 * (m is SKETCH),
                fabric=world.fabric,
                progress=False,
                out=folder / f"{m}.safetensors.part",
            )
            (folder / f"{m}.safetensors.part").rename(folder / f"{m}.safetensors")
            right = accuracy(teacher, world.test[m])[0]
            world.row(f"{m}-teacher", "cold", {"accuracy": right}, time.time() - world.began)
            world.say(f"{m} teacher {right:.3f} right")
    for m in MODALITIES:
        wait_for(world, folder / f"{m}.safetensors")
        world.teachers[m] = load_teacher(folder / f"{m}.safetensors").to(world.fabric.device)
    world.class_map = align_classes(*(world.teachers[m].classes for m in MODALITIES))


def wait_for(world: World, path: Path):
    "Until another process has written a file."
    while not path.exists():
        if world.left() < 0:
            raise SystemExit(f"{path} did not come in time")
        time.sleep(0.5)


def config_of(world: World, **changes) -> CrossXConfig:
    "The preset at this study's size."
    args = world.args
    toy = world.data == "toy"
    return CrossXConfig.preset(
        "cold",
        {
            "seed": world.seed,
            "pairs.photo.size": args.size,
            "pairs.sketch.size": args.size,
            "pairs.steps": args.picture_steps,
            "pairs.batch": args.picture_batch,
            "pairs.snapshots": [0.6, 1.0],
            "schedule.new_pairs": args.pictures // (4 if toy else 1),
            "schedule.distill_steps": args.steps // (2 if toy else 1),
            "students.batch": args.batch,
            "students.net": f"dfsbir/{args.teacher_net}",
        },
        changes,
    )


def make_pictures(world: World, name: str, config: CrossXConfig, rival=None) -> PairBatch:
    "Optimised pairs, as bytes on the device; kept as a file. L_adv asks the rival, a distiller."
    path, begun = world.home / f"{name}.pt", time.time()
    estimator = build_pairs(world.teachers, world.class_map, rival, config, world.fabric)
    estimator.synthesize(config.pairs.steps_for(config.schedule.new_pairs), show=1)
    pairs = to_bytes(estimator.sample(estimator.waiting()))
    world.say(f"{len(pairs)} pairs {name} in {time.time() - begun:.0f} s {estimator.terms.log()}")
    part = path.with_suffix(".part")
    torch.save(vars(pairs.to("cpu")), part)
    part.rename(path)
    return pairs


def load_pictures(world: World, name: str) -> PairBatch:
    "The pairs of another process, once they are there."
    path = world.home / f"{name}.pt"
    wait_for(world, path)
    return PairBatch(**torch.load(path, weights_only=True)).to(world.fabric.device)


def real_pairs(world: World, images: dict, n: int) -> PairBatch:
    "Real photos and sketches, paired at random by class, as bytes on the device."
    random = torch.Generator().manual_seed(world.seed)
    label = torch.arange(n) % len(images[PHOTO].classes)
    chosen = []
    for m in MODALITIES:
        of = {k: (images[m].labels == k).nonzero()[:, 0] for k in label.unique().tolist()}
        at = [of[k][torch.randint(len(of[k]), (), generator=random)] for k in label.tolist()]
        chosen.append(images[m].take(torch.stack(at)).images())
    return to_bytes(PairBatch(*chosen, label)).to(world.fabric.device)


def teach(world: World, method, variant, config, draw, pictures=0, source_seconds=0.0):
    """Students of a config on pairs that `draw(n)` gives, measured, with the seconds they took.

    Returns the distiller, for an adversary and for the curve over views.
    """
    seed_everything(config.seed)
    begun = time.time()
    distiller = build_cold_distiller(world.teachers, world.class_map, config, world.fabric)
    steps = config.plan().count("distill")
    curve = {}
    for step in range(1, steps + 1):
        distiller.step(draw(config.students.batch))
        if variant == "cold" and step in {steps // 16, steps // 4, steps // 2}:
            curve[step * config.students.batch] = measure(world, distiller.encoders())["mAP@all"]
    seconds = time.time() - begun + source_seconds
    metrics = measure(world, distiller.encoders())
    metrics |= {f"mAP@all after {v} views": value for v, value in curve.items()}
    views = steps * config.students.batch
    metrics |= {"views": views, "pictures": pictures}
    world.row(method, variant, metrics, seconds)
    world.say(f"{method} [{variant}] mAP {metrics['mAP@all']:.3f}, {seconds:.0f} s")
    return distiller


def measure(world: World, encoders: dict) -> dict[str, float]:
    "Metrics of test sketches against test photos."
    device = world.fabric.device
    found = {
        m: embed(encoders[m].to(device), world.test[m], fabric=world.fabric) for m in MODALITIES
    }
    labels = [world.test[m].labels for m in (SKETCH, PHOTO)]
    metrics = evaluate_retrieval(found[SKETCH], found[PHOTO], *labels).metrics
    return {name: metrics[name] for name in METRICS}


def sampler(world: World, pairs: PairBatch):
    "A function that draws n of the pairs, on the device."
    random = torch.Generator(world.fabric.device).manual_seed(world.seed)

    def draw(n):
        at = torch.randint(len(pairs), (n,), generator=random, device=world.fabric.device)
        return as_floats(pairs[at])

    return draw


def measure_read_outs(world: World, variant: str):
    "Rows of what the teachers alone offer."
    begun = time.time()
    found, _ = teacher_embeddings(
        world.teachers, world.class_map, world.test[PHOTO], world.test[SKETCH], world.fabric
    )
    labels = [world.test[m].labels for m in (SKETCH, PHOTO)]
    for (method, read_out), both in found.items():
        metrics = evaluate_retrieval(both[SKETCH], both[PHOTO], *labels).metrics
        metrics = {name: metrics[name] for name in METRICS}
        name = f"{variant} {read_out}".strip()
        world.row(method, name, metrics, time.time() - begun)
        world.say(f"{method} [{name}] mAP {metrics['mAP@all']:.3f}")


def measure_teachers(world: World):
    "Rows of the teachers, of a random order, and of averaged weights."
    measure_read_outs(world, "cold")
    labels = [world.test[m].labels for m in (SKETCH, PHOTO)]
    counts = torch.bincount(labels[1], minlength=int(labels[0].max()) + 1)
    floor = chance_ap(counts[labels[0]], len(labels[1])).mean().item()
    world.row("random", "cold", {"mAP@all": floor}, 0.0)
    average = AveragingWeights(*world.teachers.values(), config_of(world)).fit()
    world.row("averaging-weights", "cold", measure(world, average), 0.0)


def judge_of(world: World, m):
    "A net that was trained apart on the real data; one for all pictures of this process."
    if m not in world.judges:
        world.judges[m] = train_teacher(
            world.train[m],
            net=f"dfsbir/{world.args.teacher_net}",
            epochs=max(1, round(30 * world.args.epochs)),
            batch_size=64,
            seed=world.seed + 500,
            fabric=world.fabric,
            progress=False,
        ).to(world.fabric.device)
    return world.judges[m]


def verify(world: World, pairs: PairBatch, name: str):
    "What nets that were trained apart on the real data say of the pictures; a sheet of them."
    for m in MODALITIES:
        judge = judge_of(world, m)
        images, labels = as_floats(pairs[:1024]).of(m), pairs.label[:1024]
        with torch.no_grad():
            says = torch.cat([judge(x, bn=False).logits for x in images.split(256)]).argmax(1)
        share = (says == labels).float().mean().item()
        variant = f"cold {m}" if name == "ours" else f"cold {m}, {name}"
        world.row("verifier", variant, {"recognised": share}, 0.0)
        world.say(f"verifier recognises {share:.3f} of the {m} pictures ({name})")
        shown = torch.cat([images[labels == k][:8] for k in range(len(world.class_map.classes))])
        which = "" if name == "ours" else f"-{name.replace(' ', '-')}"
        path = Path(world.args.out) / f"sheet-{world.data}-{m}{which}.png"
        save_image(shown.cpu(), path, nrow=8, padding=1, pad_value=1.0)


# The arms


def main_arms(world: World):
    "Ours, the ceiling, and both with a smaller net of another architecture."
    config = config_of(world)
    measure_teachers(world)
    begun = time.time()
    pairs = make_pictures(world, "ours", config)
    made, n = time.time() - begun, len(pairs)
    teach(world, "crossx-dfsbir", "cold", config, sampler(world, pairs), n, made)
    real = real_pairs(world, world.train, 8192)
    teach(world, "data-dependent", "cold", config, sampler(world, real), len(real))
    small = config_of(world, **{"students.net": "dfsbir/plain"})
    teach(world, "crossx-dfsbir", "cold, plain", small, sampler(world, pairs), n, made)
    teach(world, "data-dependent", "cold, plain", small, sampler(world, real), len(real))
    if world.seed == 0:
        verify(world, pairs, "ours")
    if world.left() > 60:
        shared = config_of(world, **{"students.shared": True})
        teach(world, "crossx-dfsbir", "cold, shared", shared, sampler(world, pairs), n, made)


def uni_modal_arm(world: World):
    config = config_of(world, **{"pairs.loss.align": 0.0})
    begun = time.time()
    pairs = make_pictures(world, "uni-modal", config)
    made = time.time() - begun
    teach(world, "uni-modal", "cold", config, sampler(world, pairs), len(pairs), made)


def meta_data_arm(world: World):
    config = config_of(world, **{"pairs.loss.align": 0.0, "pairs.loss.class_": 0.0})
    begun = time.time()
    pairs = make_pictures(world, "meta-data", config)
    made = time.time() - begun
    teach(world, "meta-data", "cold", config, sampler(world, pairs), len(pairs), made)


def gaussian_arm(world: World):
    source = GaussianPairs(world.teachers, world.class_map, world.fabric, world.seed)
    pairs = PairBatch.cat([to_bytes(source.sample(256)) for _ in range(8)])
    teach(world, "gaussian-prior", "cold", config_of(world), sampler(world, pairs), len(pairs))


def alternative_arm(world: World):
    "Real images of classes that the teachers do not know, of the toy set."
    known = set(world.class_map.classes)
    classes = [c for c in (*TOY_CLASSES, *TOY_HELD_OUT) if c not in known]
    images = toy_pairs(1000, world.args.size, seed=world.seed, classes=classes)
    pairs = real_pairs(world, dict(zip(MODALITIES, images)), 4096)
    teach(world, "alternative-data", "cold", config_of(world), sampler(world, pairs), len(pairs))


def objects_arm(world: World):
    "Procedural objects in the place of all estimates."
    config = config_of(world)
    source = ProceduralPairs(config.sizes, world.fabric, world.seed)
    n = config.schedule.new_pairs
    pairs = PairBatch.cat([to_bytes(source.sample(256)) for _ in range(-(-n // 256))])
    variant = "cold, procedural objects"
    teach(world, "crossx-dfsbir", variant, config, sampler(world, pairs), len(pairs))


STUDENT_ARMS = {
    "T 1": {"students.distill_temperature": 1.0},
    "T 10": {"students.distill_temperature": 10.0},
    "no blends": {"students.blend": 0.0},
    "not the same view": {"students.same_view": False},
    "no weight average": {"students.ema_decay": 0.0},
    "proxies too": {"students.proxy_anchor": 0.1},
    "no features": {"students.feature": 0.0},
    "objects in half of the views": {"students.objects": 0.5},
}
STRONGER_CLASS = {"pairs.loss.class_": 1.0, "pairs.loss.align": 0.5}
PICTURE_ARMS = {
    "generator renewed for every batch": {f"pairs.{m}.generator": 32 for m in MODALITIES},
    "class weight 1": STRONGER_CLASS,
    "no class and no L_align": {"pairs.loss.class_": 0.0, "pairs.loss.align": 0.0},
    "no L_align": {"pairs.loss.align": 0.0},
    "L_modal": {"pairs.loss.modality": 0.1, "pairs.guidance.kind": "procedural"},
    "moving average of the batch-norm statistics": {f"pairs.{m}.bn_decay": 0.9 for m in MODALITIES},
    "no batch-norm prior": {"pairs.photo.bn": [0.0, 0.0], "pairs.sketch.bn": [0.0, 0.0]},
    "one kind of pictures": {
        f"pairs.{m}.{k}": v
        for m in MODALITIES
        for k, v in (("bn", [5.0, 5.0]), ("between", [0.0, 0.0]), ("crop", [1.0, 1.0]))
    },
}


def half_arm(world: World, name, changes, pairs: PairBatch):
    "An arm of the ablation: students of half the views."
    if world.left() > 45:
        half = config_of(world).schedule.distill_steps // 2
        config = config_of(world, **changes, **{"schedule.distill_steps": half})
        draw = sampler(world, pairs)
        teach(world, "crossx-dfsbir", f"cold half, {name}", config, draw, len(pairs))


def student_arms(world: World):
    "One thing of the students at a time, all against the first line."
    pairs = load_pictures(world, "ours")
    half_arm(world, "as it is", {}, pairs)
    for share in (4, 16):
        half_arm(world, f"1/{share} of the pictures", {}, pairs[: len(pairs) // share])
    for name, changes in STUDENT_ARMS.items():
        half_arm(world, name, changes, pairs)


def picture_arms(world: World):
    """One thing of the pictures at a time, against as many pictures as they are.

    A quarter of them where that is four batches, else all: a moving average and an adversary need
    more than one.
    """
    config = config_of(world)
    wanted, batch = config.schedule.new_pairs, config.pairs.batch * len(config.pairs.snapshots)
    share = 4 if wanted >= 16 * batch else 1
    wanted //= share
    number = f", 1/{share} of the pictures" if share > 1 else ""
    for name, changes in PICTURE_ARMS.items():
        if world.left() > 100:
            config = config_of(world, **changes, **{"schedule.new_pairs": wanted})
            own = make_pictures(world, name.replace(" ", "-"), config)
            half_arm(world, name + number, {}, own)
    if world.left() > 130:
        half_arm(world, f"adversarial{number}", {}, adversarial_pictures(world, wanted))


def adversarial_pictures(world: World, wanted: int) -> PairBatch:
    "Half of the pictures as they are, half made against students of the others."
    first = load_pictures(world, "ours")[: wanted // 2]
    config = config_of(world)
    steps = config.schedule.distill_steps // 4
    seed_everything(config.seed)
    config = config.changed({"schedule.distill_steps": steps})
    rival = build_cold_distiller(world.teachers, world.class_map, config, world.fabric)
    draw = sampler(world, first)
    for _ in range(steps):
        rival.step(draw(config.students.batch))
    changes = {"pairs.loss.adversarial": 1.0, "schedule.new_pairs": wanted // 2}
    config = config_of(world, **changes).changed({"seed": world.seed + 77})
    second = make_pictures(world, "adversarial", config, rival)
    return PairBatch.cat([first, second.to(world.fabric.device)])


def choice_arms(world: World):
    "How strongly pictures are pulled to their class, and whether students see features."
    measure_teachers(world)
    features = {"": 1.0, ", no features": 0.0}
    configs = {k: config_of(world, **{"students.feature": v}) for k, v in features.items()}
    real = real_pairs(world, world.train, 4096)
    for name, config in configs.items():
        teach(world, "data-dependent", f"cold{name}", config, sampler(world, real), len(real))
    for weight in (0.1, 1.0, 0.0):
        changes = {"pairs.loss.class_": weight, "pairs.loss.align": 0.5 * weight}
        begun = time.time()
        pairs = make_pictures(world, f"class-{weight:g}", config_of(world, **changes))
        made, n = time.time() - begun, len(pairs)
        for name, config in configs.items():
            variant = f"cold, class weight {weight:g}{name}"
            teach(world, "crossx-dfsbir", variant, config, sampler(world, pairs), n, made)


STROKES = {
    "as it is": {},
    "class weight 1": STRONGER_CLASS,
    "strokes": {"pairs.sketch.strokes": 12},
    "strokes, class weight 1": {"pairs.sketch.strokes": 12, **STRONGER_CLASS},
    "strokes, drawn again": {"pairs.sketch.strokes": 12, "pairs.sketch.redraws": 3},
}


def strokes_arms(world: World):
    "Sketches of strokes, with the pull to the class ten times stronger, and drawn again."
    for name, changes in STROKES.items():
        config = config_of(world, **changes)
        if config.pairs.sketch.redraws:  # as many batches as the others; views of photos alone
            n = config.schedule.new_pairs * config.pairs.kept // len(config.pairs.snapshots)
            config = config.changed({"schedule.new_pairs": n, "students.augment": "photo"})
        begun = time.time()
        pairs = make_pictures(world, f"strokes-{name.replace(' ', '-')}", config)
        made = time.time() - begun
        draw = sampler(world, pairs)
        teach(world, "crossx-dfsbir", f"cold, {name}", config, draw, len(pairs), made)
        verify(world, pairs, name)


def as_file(teacher, path: Path):
    """The teacher, written as a program and loaded again without its code.

    A TorchScript file keeps its batch norms; ONNX has them folded into the convolutions.
    """
    net, side = teacher.net.cpu().eval(), teacher.normalizer.size
    blank = torch.rand(2, teacher.normalizer.channels, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".onnx":
            torch.onnx.export(net, (blank,), path, dynamo=True, verbose=False)
        else:
            torch.jit.save(torch.jit.trace(net, blank), path)
    card = {name: teacher.card[name] for name in ("classes", "input", "modality")}
    return load_teacher(path, card)


def files_arms(world: World):
    "Cold students of teachers that are only files."
    for sketch_format, drawn in (("ts", None), ("onnx", None), ("onnx", False)):
        files = {PHOTO: "photo.ts", SKETCH: f"sketch.{sketch_format}"}
        teachers = {m: as_file(world.teachers[m], world.home / files[m]) for m in MODALITIES}
        teachers = {m: t.to(world.fabric.device) for m, t in teachers.items()}
        own = replace(world, teachers=teachers)
        norms = ", ".join(f"{len(t.bn_targets())} batch norms" for t in teachers.values())
        own.say(f"{' and '.join(files.values())}: {norms}")
        variant = f"cold, {' and '.join(files.values())}"
        if drawn is None:
            measure_read_outs(own, variant)
        else:
            variant += ", pictures all the same"
        config = config_of(own, **{"pairs.sketch.drawn": drawn})
        begun = time.time()
        pairs = make_pictures(own, f"files-{sketch_format}-{drawn}", config)
        made = time.time() - begun
        teach(own, "crossx-dfsbir", variant, config, sampler(own, pairs), len(pairs), made)


def growth_arms(world: World):
    "Each point a run of its own, with its own schedule: against pictures kept, and against views."
    config = config_of(world)
    most = make_pictures(world, "most", config.changed({"schedule.new_pairs": 8192}))
    random = torch.Generator().manual_seed(world.seed)
    mixed = most[torch.randperm(len(most), generator=random).to(world.fabric.device)]
    for kept in (128, 512, 2048, 8192):
        draw = sampler(world, mixed[:kept])
        teach(world, "crossx-dfsbir", f"cold, {kept} pictures", config, draw, kept)
    for views in (4_000, 16_000, 64_000, 256_000, 1_000_000):
        longer = config.changed({"schedule.distill_steps": views // config.students.batch})
        name = f"cold, {views} views of {len(mixed)} pictures"
        teach(world, "crossx-dfsbir", name, longer, sampler(world, mixed), len(mixed))


PUBLISHED = {
    "no L_align": {"pairs.loss.align": 0.0},
    "no L_modal": {"pairs.loss.modality": 0.0, "pairs.guidance": None},
    "no L_adv": {"pairs.loss.adversarial": 0.0},
    "no batch-norm prior": {"pairs.photo.bn": [0.0, 0.0], "pairs.sketch.bn": [0.0, 0.0]},
    "posteriors in the place of proxies": {
        "students.loss.proxy_anchor": 0.0,
        "students.loss.consistency": 1.0,
    },
}


def paper_arms(world: World):
    """The preset `paper` with as many steps, pictures and views as our students have.

    First with its own generators, then with the pyramid under its losses, of which one at a time is
    left out.
    """
    own = config_of(world)
    batch, rounds = own.students.batch, own.schedule.distill_steps
    sizes = {f"pairs.{m}.size": world.args.size for m in MODALITIES}
    common = {"seed": world.seed, "pairs.batch": own.pairs.batch, "students.batch": batch}
    alternating = {"schedule.rounds": rounds, "schedule.new_pairs": batch, "buffer.capacity": batch}
    config = CrossXConfig.preset("paper", common, sizes, alternating)
    teach_by_trainer(world, "cold", config)
    pyramid = {
        "pairs": own.pairs.model_dump(),
        "buffer.capacity": 100_000,
        "schedule.rounds": 4,
        "schedule.new_pairs": own.schedule.new_pairs // 4,
        "schedule.distill_steps": rounds // 4,
    }
    losses = {f"pairs.loss.{name}": 1.0 for name in ("class_", "align", "modality", "adversarial")}
    losses["pairs.guidance.kind"] = "procedural"
    config = CrossXConfig.preset("paper", {"seed": world.seed}, pyramid, losses)
    config = config.changed({"students.batch": batch})
    teach_by_trainer(world, "cold, pyramid", config)
    for name, changes in PUBLISHED.items():
        teach_by_trainer(world, f"cold, pyramid, {name}", config.changed(changes))


def teach_by_trainer(world: World, variant: str, config: CrossXConfig):
    "A whole run of a config, measured at its end."
    seed_everything(config.seed)
    begun = time.time()
    crossx = build_crossx(*world.teachers.values(), config, fabric=world.fabric)
    for action in config.plan():
        crossx.run_step(action)
    metrics = measure(world, crossx.distiller.encoders())
    views = config.plan().count("distill") * config.students.batch
    world.row("crossx-paper", variant, {**metrics, "views": views}, time.time() - begun)
    terms = {k: round(v, 3) for k, v in crossx.pairs.terms.log().items()}
    world.say(f"crossx-paper [{variant}] mAP {metrics['mAP@all']:.3f}, {terms}")


def longer_arms(world: World):
    "Ours and the ceiling with three times the views, on the pictures of `main`."
    config = config_of(world)
    longer = config.changed({"schedule.distill_steps": 3 * config.schedule.distill_steps})
    pairs, real = load_pictures(world, "ours"), real_pairs(world, world.train, 8192)
    for method, images in (("crossx-dfsbir", pairs), ("data-dependent", real)):
        draw = sampler(world, images)
        teach(world, method, "cold, three times the views", longer, draw, len(images))


PARTS = {
    "main": (main_arms,),
    "uni-modal": (uni_modal_arm, gaussian_arm),
    "others": (alternative_arm, meta_data_arm),
    "ablation": (student_arms, picture_arms),
    "objects": (objects_arm,),
    "choice": (choice_arms,),
    "files": (files_arms,),
    "strokes": (strokes_arms,),
    "growth": (growth_arms,),
    "longer": (longer_arms,),
    "paper": (paper_arms,),
    "all": (main_arms, uni_modal_arm, gaussian_arm, alternative_arm, meta_data_arm, objects_arm),
}


def work(args, data, seed, part):
    "One process: one part of one data set and seed."
    world = World(args, data, seed, part, args.began or time.time())
    torch.set_float32_matmul_precision("high")
    world.fabric = make_fabric(args.device, args.precision)
    (world.home / "teachers").mkdir(parents=True, exist_ok=True)
    read_images(world)
    make_teachers(world)
    for arm in PARTS[part]:
        if world.left() < 40:
            world.say(f"no time for {arm.__name__}")
            continue
        arm(world)
    world.say("done")


def merge(out: Path):
    "OUT/results.csv from the files of all processes, a table of means, a picture of growth."
    rows = []
    for path in sorted(out.glob("*-*-*.csv")):
        with open(path, newline="") as f:
            rows += list(csv.DictReader(f))
    if not rows:
        sys.exit(f"no arm has ended in {out}: its .log files say why")
    with open(out / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print_means(out)
    growth = [
        json.loads(line)
        for path in sorted(out.glob("*-*-growth.jsonl"))
        for line in path.read_text().splitlines()
    ]
    points = [line for line in growth if line["method"] == "crossx-dfsbir"]
    if points:
        growth_chart(points).savefig(out / "growth.png", dpi=70)


def print_means(out: Path):
    "A line for each arm: the mean over seeds, and each of them."
    table = {}
    for path in sorted(out.glob("*-*-*.jsonl")):
        for r in map(json.loads, path.read_text().splitlines()):
            for name in ("mAP@all", "recognised", "accuracy"):
                if name in r:
                    table.setdefault((r["dataset"], r["method"], r["variant"]), []).append(r[name])
    for key, values in sorted(table.items()):
        print(f"{' '.join(key):60s} {mean(values):.3f}  {' '.join(f'{v:.3f}' for v in values)}")


def growth_chart(lines: list[dict]) -> Figure:
    "mAP@all against pictures kept and against views, mean and spread over seeds."
    fig, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for ax, name in zip(axes, ("pictures", "views")):
        points = {}
        for line in lines:
            if ("views" in line["variant"]) == (name == "views"):
                points.setdefault(line[name], []).append(line["mAP@all"])
        at = sorted(points)
        spread = [stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in at]
        ax.errorbar(at, [mean(points[x]) for x in at], spread, marker="o")
        ax.set(xscale="log", xlabel=name, ylim=(0, 1))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("mAP@all")
    return fig


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="runs/cold", help="folder of results")
    add("--pacs", default="../shared/data/pacs", help="folder of PACS")
    add("--device", default="auto")
    add("--precision", default="bf16-mixed")
    add(
        "--jobs",
        default="pacs:main pacs:uni-modal pacs:others toy:all",
        help="DATA:PART, with spaces between",
    )
    add("--ablation-seeds", type=int, nargs="*", default=[])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--validation", action="store_true", help="measure on training images that are held out")
    add("--size", type=int, default=64, help="side of all images, px")
    add("--teacher-net", default="medium", help="net of teachers and students")
    add("--toy-images", type=int, default=1000)
    add("--epochs", type=float, default=1.0, help="factor on the teachers' epochs")
    add("--pictures", type=int, default=4096, help="kept on PACS; a quarter on the toy set")
    add("--picture-steps", type=int, default=120)
    add("--picture-batch", type=int, default=256)
    add("--steps", type=int, default=700, help="student steps on PACS; half of it on the toy set")
    add("--batch", type=int, default=256)
    add("--budget", type=float, default=1e9, help="seconds after which no arm is begun")
    add("--merge", action="store_true", help="only put the results together")
    add("--one", default="", help=argparse.SUPPRESS)
    add("--began", type=float, default=0.0, help=argparse.SUPPRESS)
    add("--stamp", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse()
    out = Path(args.out)
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    args.name = torch.cuda.get_device_name() if on_gpu else "cpu"
    if args.merge:
        return merge(out)
    if args.one:
        data, seed, part = args.one.split(":")
        return work(args, data, int(seed), part)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(vars(args), indent=1))
    began, stamp = time.time(), time.strftime("%Y%m%d-%H%M%S")
    jobs = [tuple(job.split(":")) for job in args.jobs.split()]
    wanted = [(data, seed, part) for data, part in jobs for seed in args.seeds]
    wanted += [("pacs", seed, "ablation") for seed in args.ablation_seeds]
    running = []
    for data, seed, part in wanted:
        log = open(out / f"{data}-{seed}-{part}.log", "w")  # noqa: SIM115
        line = [sys.executable, *sys.argv, "--one", f"{data}:{seed}:{part}"]
        line += ["--began", str(began), "--stamp", stamp]
        running.append(subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT))
    failed = [job for job, child in zip(wanted, running) if child.wait()]
    merge(out)
    print(f"{time.time() - began:.0f} s in all; failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
