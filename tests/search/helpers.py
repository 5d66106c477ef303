"""What the tests of searching share: encoders, toy photos as files, wrapped encoders, children."""

import io
import multiprocessing
import struct
import zlib

import numpy as np
import torch
from PIL import Image, features
from torch import nn

from dfsbir.core.types import MODALITIES, Normalizer
from dfsbir.data.toy_shapes import TOY_CLASSES
from dfsbir.search.indexing import index_photos
from dfsbir.students.encoder import encoder_from_teacher
from dfsbir.students.heads import MetricSpace
from dfsbir.teachers.class_map import align_classes
from dfsbir.teachers.nets import build_net
from dfsbir.teachers.teacher import Teacher

SIDE, COUNT = 28, 24  # px of the encoders' input; photos in the gallery
fork = multiprocessing.get_context("fork")


def make_encoders(seed=0, **options):
    "An untrained pair of encoders."
    classes = list(TOY_CLASSES)
    torch.manual_seed(seed)
    teachers = {}
    for m in MODALITIES:
        net, card = build_net("dfsbir", "tiny", 10), {"source": "dfsbir", "name": "tiny"}
        teachers[m] = Teacher(net, classes, Normalizer(SIDE), m, card=card)
    space = MetricSpace.random(10, 12)
    shared = align_classes(classes, classes)
    pair = {
        m: encoder_from_teacher(teachers[m], shared, space, **options).eval() for m in MODALITIES
    }
    for encoder in pair.values():
        encoder.net.fc.weight.data *= 20  # an untrained net embeds everything alike
    return pair


def save(toy, i, path):
    "Toy photo i as a file."
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((toy[0][i][0].permute(1, 2, 0) * 255).byte().numpy())
    image.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def index(folder, photos, encoder, **options):
    "A gallery, without a bar and in small batches."
    return index_photos(folder, photos, encoder, **{"batch_size": 5, "progress": False, **options})


class Wrapped(nn.Module):
    "The photo encoder with something done before each batch; it has the encoder's own id."

    def __init__(self, encoder, before=lambda embedded: None):
        super().__init__()
        self.encoder, self.before, self.embedded = encoder, before, 0
        self.card, self.normalizer = encoder.card, encoder.normalizer

    def forward(self, x):
        self.before(self.embedded)
        self.embedded += len(x)
        return self.encoder(x)

    def state_dict(self, *args, **options):
        return self.encoder.state_dict(*args, **options)


def content(folder):
    "Every file below a folder, with its bytes; the lock is left out."
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock"
    }


def in_child(work):
    "Exit code of a forked process."
    child = fork.Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def picture(size=(60, 40), mode="RGB"):
    "A picture without symmetry: red above, dark to the left."
    x = np.zeros((size[1], size[0], 3), np.uint8)
    x[: size[1] // 3, :, 0] = 250
    x[:, size[0] // 4 :, 1] = 120
    return Image.fromarray(x).convert(mode)


def jpeg(image, **options):
    "The content of a JPEG file."
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def png_of_size(width, height):
    "A PNG whose header says that it is large, and that holds one line."

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    line = zlib.compress(bytes(3 * min(width, 4000) + 1))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", line) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _turned(size):
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(picture(size).rotate(90, expand=True), exif=exif, quality=95)


def _transparent(path):
    alpha = Image.linear_gradient("L").resize((60, 40))
    Image.merge("RGBA", (*picture().split(), alpha)).save(path)


def _deep(path):
    grey = np.asarray(picture(mode="L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(path)


def _animated(path):
    blue = Image.new("RGB", (60, 40), "blue")
    picture().save(path, save_all=True, append_images=[blue], duration=50)


def _without_content(path):
    "A picture of which the header is whole and the rest is zeros."
    picture((400, 300)).save(path)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(len(data) - start))


def _of_no_known_kind(path):
    picture(mode="P").save(path)
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\x80" + data[9:])  # its compression


def _huge(path):
    large = picture().resize((8000, 6250), Image.Resampling.NEAREST)
    path.write_bytes(jpeg(large, quality=50))


GOOD_FILES = {  # name: (suffix, what writes it)
    "50 megapixels": ("jpg", _huge),
    "cmyk": ("jpg", lambda p: picture(mode="CMYK").save(p, quality=95)),
    "grey": ("jpg", lambda p: picture(mode="L").save(p, quality=95)),
    "16 bit": ("png", _deep),
    "animated": ("gif", _animated),
    "turned": ("jpg", lambda p: p.write_bytes(_turned((60, 40)))),
    "turned and large": ("jpg", lambda p: p.write_bytes(_turned((1200, 800)))),
    "transparent": ("png", _transparent),
    "palette": ("png", lambda p: picture(mode="P").save(p)),
    "one pixel": ("png", lambda p: Image.new("RGB", (1, 1), "red").save(p)),
    "long": ("jpg", lambda p: picture((900, 3)).save(p)),
}
BAD_FILES = {
    "bomb": ("png", lambda p: p.write_bytes(png_of_size(30000, 30000))),
    "large bomb": ("png", lambda p: p.write_bytes(png_of_size(2**30, 2**30))),
    "cut": ("jpg", lambda p: p.write_bytes(jpeg(picture((400, 300)))[:900])),
    "empty": ("jpg", lambda p: p.write_bytes(b"")),
    "text": ("jpg", lambda p: p.write_text("hello")),
    "no kind": ("blp", _of_no_known_kind),
}
if features.check("avif"):  # of this Pillow
    BAD_FILES["no content"] = ("avif", _without_content)


def write_file(kind, folder):
    "A file of a kind, as a user may have it; -> its path."
    suffix, write = {**GOOD_FILES, **BAD_FILES}[kind]
    path = folder / f"{kind}.{suffix}"
    write(path)
    return path
