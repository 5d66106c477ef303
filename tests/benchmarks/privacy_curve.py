"""Retrieval against epsilon: posteriors, cold students and the data-dependent ceiling.

    python tests/benchmarks/privacy_curve.py --out runs/privacy                  # toy, 32 px
    python tests/benchmarks/privacy_curve.py --out runs/privacy --show           # the table so far
    python tests/benchmarks/privacy_curve.py --data DATA --size 64 --net efficientnet-lite/lite0 \\
        --pretrained ImageNet-1k --head-only --out runs/privacy-pacs

For each seed and each epsilon (1, 3, 8 and none) two teachers of one net are trained, and from them
students with random weights. The ceiling teaches the same students on the real images. Beside
mAP@all stands the AUC of membership inference by the loss on the photo teacher and on the photo
student. With --head-only the last layer of public weights is trained and the rest is frozen; its
"none" has the same training with a noise multiplier of .01, which bounds nothing. DATA holds
train/photo, train/sketch, test/photo and test/sketch, each of class folders.

Every part appends its rows to OUT/curve.jsonl as it ends. The same command goes on where it was
stopped; a part that is there is not computed again.
"""

import argparse
import json
import os
import time
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from dfsbir.app.audit import model_confidence
from dfsbir.baselines import data_dependent
from dfsbir.core.checkpoint import write_atomic
from dfsbir.core.config import read_table
from dfsbir.core.device import make_fabric
from dfsbir.core.privacy import guarantee_of
from dfsbir.core.types import MODALITIES
from dfsbir.crossx.build import build_crossx
from dfsbir.crossx.config import CrossXConfig
from dfsbir.data.folders import read_folder
from dfsbir.data.toy import toy_pairs
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.evaluation.membership import judge_attack
from dfsbir.evaluation.report import evaluate_retrieval
from dfsbir.evaluation.retrieval import embed
from dfsbir.teachers.class_map import align_classes, to_shared
from dfsbir.teachers.embeddings import teacher_embeddings
from dfsbir.teachers.loading import load_teacher
from dfsbir.teachers.private_training import PrivateRecipe, train_private_teacher
from dfsbir.teachers.training import accuracy, train_teacher

PHOTO, SKETCH = MODALITIES
PARTS = ("teachers", "posteriors", "cold", "ceiling")


@lru_cache(maxsize=8)
def toy_images(images: int, size: int, classes: int, seed: int, split: str = "train"):
    "Photos and sketches of the first toy classes; those of a seed serve every epsilon."
    return toy_pairs(images, size, seed=seed, classes=list(TOY_CLASSES[:classes]), split=split)


@lru_cache(maxsize=4)
def folder_images(folder: Path, size: int):
    "Photos and sketches of a folder, by modality."
    return {m: read_folder(folder / str(m), m, size) for m in MODALITIES}


class Curve:
    "The parts of one seed and one epsilon."

    def __init__(self, args, seed: int, epsilon: float | None):
        self.args, self.seed, self.epsilon = args, seed, epsilon
        self.fabric = make_fabric(args.device)
        self.name = "none" if epsilon is None else f"{epsilon:g}"
        self.home = Path(args.out) / f"seed-{seed}" / f"epsilon-{self.name}"

    def _toy(self, images: int, seed: int, split: str = "train"):
        return toy_images(images, self.args.size, self.args.classes, seed, split)

    @property
    def train(self):
        "Training images; no photo and no sketch show the same thing."
        args = self.args
        if args.data != "toy":
            return folder_images(Path(args.data) / "train", args.size)
        photos, sketches = (self._toy(args.images, s + self.seed) for s in (100, 200))
        return {PHOTO: photos[0], SKETCH: sketches[1]}

    @property
    def test(self):
        args = self.args
        if args.data != "toy":
            return folder_images(Path(args.data) / "test", args.size)
        pair = self._toy(args.test_images, 0, "test")
        return dict(zip(MODALITIES, pair, strict=True))

    @property
    def non_members(self):
        "Photos that no teacher saw, of the kind of the training photos where that is possible."
        if self.args.data != "toy":
            return self.test[PHOTO]
        return self._toy(self.args.images, 900 + self.seed)[0]

    @cached_property
    def teachers(self):
        "Trained now, or found in their files."
        return {m: self._teacher(m) for m in MODALITIES}

    def _teacher(self, modality):
        file = self.home / f"{modality}.safetensors"
        if file.is_file():
            return load_teacher(file)
        args = self.args
        start = dict(net=args.net, size=args.size, seed=self.seed, pretrained=bool(args.pretrained))
        shared = dict(fabric=self.fabric, out=file, progress=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        data = self.train[modality]
        if self.epsilon is None and not args.head_only:
            lr = 1e-3 if args.pretrained else 3e-3
            return train_teacher(data, epochs=args.usual_epochs, lr=lr, **start, **shared)
        noise = dict(epsilon=self.epsilon)
        if self.epsilon is None:
            noise |= dict(noise_multiplier=0.01, accountant="rdp")
        recipe = PrivateRecipe(
            **noise,
            delta=args.delta,
            epochs=args.epochs,
            batch_size=args.batch,
            lr=args.lr,
            multiplicity=args.multiplicity,
        )
        start |= dict(public=args.pretrained, head_only=args.head_only)
        return train_private_teacher(data, recipe, **start, **shared)

    @cached_property
    def class_map(self):
        return align_classes(*(self.teachers[m].classes for m in MODALITIES))

    @property
    def config(self):
        "The preset of cold students, as large as was asked for."
        args = self.args
        return CrossXConfig.preset(
            "cold",
            {
                "seed": self.seed,
                "device": args.device,
                "pairs.photo.size": args.size,
                "pairs.sketch.size": args.size,
                "pairs.steps": args.steps,
                "pairs.batch": args.pair_batch or min(256, args.pairs),
                "schedule.new_pairs": args.pairs,
                "schedule.distill_steps": args.distill,
                "students.net": args.student,
                "students.batch": args.distill_batch or min(256, args.pairs),
                "students.input_size": args.student_size,
            },
            args.changes,
        )

    def ask(self, space) -> float:
        "mAP@all of sketches that search photos."
        test = {m: to_shared(self.test[m], self.class_map.classes) for m in MODALITIES}
        found = evaluate_retrieval(
            space[SKETCH], space[PHOTO], test[SKETCH].labels, test[PHOTO].labels
        )
        return found.metrics["mAP@all"]

    def embedded(self, encoders) -> dict:
        return {m: embed(encoders[m].to(self.fabric.device), self.test[m]) for m in MODALITIES}

    def attacked(self, model) -> dict:
        "AUC of the loss attack with its interval, on photos."
        classes = self.class_map.classes
        own = model.classes if hasattr(model, "classes") else classes
        sets = [to_shared(data, own) for data in (self.train[PHOTO], self.non_members)]
        scores = [model_confidence(model, data, self.fabric.device) for data in sets]
        found = judge_attack(*scores, resamples=300)
        return {"auc": found.auc, "auc_low": found.auc_low, "auc_high": found.auc_high}

    def run_teachers(self) -> dict:
        found = {f"{m} accuracy": accuracy(self.teachers[m], self.test[m])[0] for m in MODALITIES}
        guarantee, _ = guarantee_of(self.teachers[PHOTO].card, self.teachers[PHOTO].digest())
        spent = {"spent": guarantee.epsilon} if guarantee else {}
        return found | spent | self.attacked(self.teachers[PHOTO])

    def run_posteriors(self) -> dict:
        spaces, _ = teacher_embeddings(
            self.teachers, self.class_map, self.test[PHOTO], self.test[SKETCH], self.fabric
        )
        return {"mAP@all": self.ask(spaces["teacher-posteriors", ""])}

    def run_cold(self) -> dict:
        crossx = build_crossx(*self.teachers.values(), self.config, fabric=self.fabric)
        encoders = crossx.fit(progress=False)
        said = {"statement": str(crossx.privacy())}
        return (
            {"mAP@all": self.ask(self.embedded(encoders))} | said | self.attacked(encoders[PHOTO])
        )

    def run_ceiling(self) -> dict:
        crossx = data_dependent(
            *self.teachers.values(), self.config, *self.train.values(), fabric=self.fabric
        )
        encoders = crossx.fit(progress=False)
        return {"mAP@all": self.ask(self.embedded(encoders))} | self.attacked(encoders[PHOTO])


def read_rows(file: Path) -> list[dict]:
    "The rows so far."
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


COLUMNS = {  # heading: part and figure
    "posteriors": ("posteriors", "mAP@all"),
    "cold students": ("cold", "mAP@all"),
    "ceiling": ("ceiling", "mAP@all"),
    "AUC teacher": ("teachers", "auc"),
    "AUC cold": ("cold", "auc"),
    "AUC ceiling": ("ceiling", "auc"),
}


def epsilons(rows: list[dict]) -> list[str]:
    "Of the rows, the most private first."
    numbers = sorted({r["epsilon"] for r in rows} - {"none"}, key=float)
    return [*numbers, "none"]


def figures(rows: list[dict], epsilon: str, heading: str) -> list[float]:
    "One for each seed."
    part, key = COLUMNS[heading]
    return [r[key] for r in rows if (r["epsilon"], r["part"]) == (epsilon, part)]


def headings(rows: list[dict]) -> list[str]:
    "Of the columns that rows have figures for."
    parts = {r["part"] for r in rows}
    return [heading for heading, (part, _) in COLUMNS.items() if part in parts]


def _cell(found: list[float]) -> str:
    if len(found) < 2:
        return f"{found[0]:.3f} (1 seed)" if found else ""
    return f"{mean(found):.3f} ± {stdev(found):.3f}" + " (2 seeds)" * (len(found) == 2)


def table(rows: list[dict]) -> str:
    "Means and standard deviations over seeds, one line for each epsilon, in Markdown."
    columns = headings(rows)
    lines = [f"| epsilon | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for epsilon in epsilons(rows):
        cells = [_cell(figures(rows, epsilon, heading)) for heading in columns]
        lines.append(f"| {epsilon} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chart(rows_of: dict[str, list[dict]]) -> Figure:
    "Retrieval above, membership inference below, against epsilon; a column for each data set."
    fig, axes = plt.subplots(
        2, len(rows_of), figsize=(4 * len(rows_of), 5), sharex="col", sharey="row", squeeze=False
    )
    for column, (name, rows) in zip(axes.T, rows_of.items(), strict=True):
        names = epsilons(rows)
        for heading, color in zip(COLUMNS, ("C0", "C1", "C2") * 2, strict=True):
            found = [figures(rows, epsilon, heading) for epsilon in names]
            at = [i for i, values in enumerate(found) if values]
            spread = [stdev(found[i]) if len(found[i]) > 1 else 0.0 for i in at]
            ax = column[int(heading.startswith("AUC"))]
            ax.errorbar(
                at, [mean(found[i]) for i in at], spread, label=heading, marker="o", color=color
            )
        column[0].set(title=name, ylabel="mAP@all")
        column[1].set(ylabel="AUC of membership", xlabel="epsilon", ylim=(0.45, 0.6))
        column[1].set_xticks(range(len(names)), names)
        column[1].axhline(0.5, color="k", ls=":")
    for ax in axes[:, 0]:
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, help="folder of teachers and of curve.jsonl")
    add("--data", default="toy")
    add("--classes", type=int, default=10, help="of the toy set")
    add("--images", type=int, default=4000, help="training images of each modality, toy")
    add("--test-images", type=int, default=500, help="toy")
    add("--size", type=int, default=32)
    add("--net", default="small-gn", help="of the teachers; without batch norm")
    add("--pretrained", default="", metavar="TEXT", help="public data of the net's weights")
    add("--head-only", action="store_true", help="freeze the rest of private teachers")
    add("--student", default="dfsbir/small")
    add("--student-size", type=int, help="side of its input, px; the teachers' if it is not said")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epsilons", nargs="+", default=["1", "3", "8", "none"])
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--delta", type=float, default=1e-5)
    add("--epochs", type=int, default=20, help="of private teachers")
    add("--usual-epochs", type=int, default=10, help="of the others")
    add("--batch", type=int, default=256)
    add("--lr", type=float, default=2.0, help="of private teachers")
    add("--multiplicity", type=int, default=2)
    add("--pairs", type=int, default=1024)
    add("--pair-batch", type=int, help="pictures that are estimated together")
    add("--steps", type=int, default=100, help="of each batch of pictures")
    add("--distill", type=int, default=600, help="steps of the students")
    add("--distill-batch", type=int, help="pairs in each of them")
    add("--changes", default="", help="further settings of the preset cold, as JSON or its file")
    add("--device", default="cpu")
    add("--minutes", type=float, default=float("inf"), help="begin no part after so long")
    add("--show", action="store_true", help="print the table and compute nothing")
    add("--chart", metavar="FILE.png", help="draw the rows of OUT")
    args = parser.parse_args()
    args.changes = read_table(args.changes, "--changes")
    file = Path(args.out) / "curve.jsonl"
    began = time.monotonic()
    for seed in args.seeds if not args.show else []:
        for name in args.epsilons:
            curve = Curve(args, seed, None if name == "none" else float(name))
            for part in args.parts:
                done = {(r["seed"], r["epsilon"], r["part"]) for r in read_rows(file)}
                if (seed, curve.name, part) in done:
                    continue
                if time.monotonic() - began > 60 * args.minutes:
                    break
                start = time.perf_counter()
                torch.manual_seed(seed)
                found = getattr(curve, f"run_{part}")()
                row = {"seed": seed, "epsilon": curve.name, "part": part, **found}
                row["seconds"] = time.perf_counter() - start
                with write_atomic(file) as temporary:
                    rows = [*read_rows(file), row]
                    temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
                print(json.dumps(row), flush=True)
    print(table(read_rows(file)))
    if args.chart:
        chart({Path(args.data).name: read_rows(file)}).savefig(args.chart, dpi=70)


if __name__ == "__main__":
    main()
