"""Street scenes drawn with a seeded generator: the demo's own data set, nothing to download.

Thin things stand in front of big regions: poles, fences, bicycles, people. A pixel alone says
little: lighting, shadows, texture, blur and noise spread every class over the colours of the
others, so that a network has to use the shapes.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("sky", "building", "tree", "road", "fence", "pole", "bicycle", "person")
HEIGHT, WIDTH = 96, 128

# Much alike on purpose. Each object draws a colour of its own around the colour of its class.
COLOURS = {
    "sky": (170, 185, 200),
    "building": (145, 130, 120),
    "tree": (85, 110, 75),
    "road": (115, 113, 115),
    "fence": (125, 95, 60),
    "pole": (85, 87, 92),
    "bicycle": (70, 66, 70),
    "person": (115, 90, 90),
}
COLOUR_SPREAD = {"sky": 14, "road": 12, "person": 38}
DEFAULT_COLOUR_SPREAD = 24


def make_scenes(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """``count`` pairs of an image (96, 128, 3) and its labels (96, 128), both uint8."""
    rng = np.random.default_rng(seed)
    return [Scene(rng).render() for _ in range(count)]


class Scene:
    """One scene: a map of object numbers, with the class and the colour of every object."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.objects = Image.new("L", (WIDTH, HEIGHT))
        self.pen = ImageDraw.Draw(self.objects)
        self.classes: list[int] = []
        self.colours: list[np.ndarray] = []
        self.horizon = self.between(45, 62)

        self.new_object("sky")
        for _ in range(self.between(2, 4)):
            self.building()
        for _ in range(self.between(1, 3)):
            self.tree()
        self.pen.rectangle((0, self.horizon, WIDTH, HEIGHT), self.new_object("road"))
        things = [self.fence] * self.between(1, 2) + [self.pole] * self.between(3, 6)
        things += [self.bicycle] * self.between(1, 3) + [self.person] * self.between(1, 4)
        # A thing whose foot is lower in the image is nearer: larger, and in front.
        feet = np.sort(rng.integers(self.horizon + 2, HEIGHT - 2, len(things)))
        for i, foot in zip(rng.permutation(len(things)), feet, strict=True):
            things[i](self.between(0, WIDTH), int(foot))

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        objects = np.asarray(self.objects)
        labels = np.array(self.classes, np.uint8)[objects]
        colour = np.stack(self.colours).clip(0, 255).astype(np.uint8)[objects]
        image = np.asarray(Image.fromarray(colour).filter(ImageFilter.GaussianBlur(0.5)), float)
        for cell in (4, 16):  # texture: the same on every class
            image *= 1 + 0.08 * self.smooth_noise(cell)
        for _ in range(self.between(0, 3)):  # shadows across the scene
            shadow = Image.new("L", (WIDTH, HEIGHT))
            x, slant, width = self.between(-20, WIDTH), self.between(-40, 40), self.between(8, 30)
            corners = [(x, 0), (x + width, 0), (x + width + slant, HEIGHT), (x + slant, HEIGHT)]
            ImageDraw.Draw(shadow).polygon(corners, 1)
            shaded = (np.asarray(shadow) == 1) & (labels != CLASSES.index("sky"))
            image *= np.where(shaded, 0.65, 1.0)[..., None]
        left, right = self.rng.uniform(0.7, 1.2, 2)
        cast = self.rng.uniform(0.92, 1.08, 3)
        image *= np.linspace(left, right, WIDTH)[:, None] * cast
        image += self.rng.normal(0, 10, image.shape)
        return image.clip(0, 255).astype(np.uint8), labels

    def building(self) -> None:
        x, width, top = self.between(-20, WIDTH), self.between(25, 60), self.between(5, 35)
        self.pen.rectangle((x, top, x + width, self.horizon), self.new_object("building"))
        window = self.new_object("building")  # another colour, the same class
        size, step = self.between(3, 5), self.between(8, 12)
        for left in range(x + 3, x + width - size, step):
            for upper in range(top + 4, self.horizon - size, step):
                self.pen.rectangle((left, upper, left + size, upper + size), window)

    def tree(self) -> None:
        x, top, crown = self.between(0, WIDTH), self.between(10, 30), self.new_object("tree")
        # Its trunk looks like a pole: only the crown tells them apart.
        self.line((x, top, x, self.horizon + 4), self.new_object("tree"), self.between(2, 4))
        for _ in range(6):
            a, b, r = x + self.between(-8, 8), top + self.between(-8, 12), self.between(4, 9)
            self.pen.ellipse((a - r, b - r, a + r, b + r), crown)

    def fence(self, x: int, foot: int) -> None:
        fence, width = self.new_object("fence"), self.between(40, 90)
        height, step = self.between(9, 14) + self.nearness(foot, 8), self.between(4, 6)
        x -= width // 2
        for post in range(x, x + width + 1, step):
            self.line((post, foot - height, post, foot), fence, 1)
        for rail in (foot - height + 2, foot - 3):
            self.line((x, rail, x + width, rail), fence, 1)

    def pole(self, x: int, foot: int) -> None:
        pole, top = self.new_object("pole"), self.between(4, 30)
        self.line((x, top, x, foot), pole, 1 + self.nearness(foot, 2))
        if self.rng.random() < 0.5:  # a lamp's arm
            self.line((x, top, x + self.between(6, 12) * self.rng.choice((-1, 1)), top), pole, 1)

    def bicycle(self, x: int, foot: int) -> None:
        bicycle, r = self.new_object("bicycle"), self.between(5, 7) + self.nearness(foot, 5)
        front, back, y = x + int(1.3 * r), x - int(1.3 * r), foot - r
        for hub in (front, back):
            self.pen.ellipse((hub - r, y - r, hub + r, y + r), outline=bicycle)
            for angle in self.rng.uniform(0, np.pi) + np.arange(4) * np.pi / 4:
                dx, dy = r * np.cos(angle), r * np.sin(angle)
                self.line((hub - dx, y - dy, hub + dx, y + dy), bicycle, 1)
        saddle, bars = (x - r // 3, y - r), (front - r // 3, y - int(1.4 * r))
        for a, b in (((back, y), saddle), (saddle, bars), (bars, (front, y)), (saddle, (x, y))):
            self.line((*a, *b), bicycle, 1)

    def person(self, x: int, foot: int) -> None:
        height = self.between(15, 20) + self.nearness(foot, 16)
        head, waist, w = height // 6, foot - int(0.45 * height), max(2, height // 7)
        clothes, skin = self.new_object("person"), self.new_object("person")
        top = foot - height
        self.pen.ellipse((x - w, top + head, x + w, waist + 2), clothes)
        self.pen.ellipse((x - head / 2, top, x + head / 2, top + head + 1), skin)
        for side in (-1, 1):
            self.line((x + side, waist, x + side * w, foot), clothes, 2)  # leg
            elbow = x + side * (w + self.between(1, 4))
            self.line((x, top + head + 2, elbow, waist), clothes, 1)  # arm

    def new_object(self, name: str) -> int:
        spread = COLOUR_SPREAD.get(name, DEFAULT_COLOUR_SPREAD)
        self.classes.append(CLASSES.index(name))
        self.colours.append(np.array(COLOURS[name]) + self.rng.normal(0, spread, 3))
        return len(self.classes) - 1

    def line(self, ends: tuple[float, float, float, float], number: int, width: int) -> None:
        self.pen.line(ends, number, width)

    def nearness(self, foot: int, largest: int) -> int:
        """0 on the horizon to ``largest`` at the lower border."""
        return round(largest * (foot - self.horizon) / (HEIGHT - self.horizon))

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high, endpoint=True))

    def smooth_noise(self, cell: int) -> np.ndarray:
        """(96, 128, 1): a normal value every ``cell`` pixels, interpolated between them."""
        grid = self.rng.normal(size=(HEIGHT // cell, WIDTH // cell)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((WIDTH, HEIGHT), Image.BICUBIC))[..., None]
