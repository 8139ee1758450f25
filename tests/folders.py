"""Data sets in folders, as the examples and the study read them."""


def save_folder(root, classes, pairs):
    """Writes images and labels, pairs of arrays by split, and the names of the classes."""
    from PIL import Image

    for split, of_split in pairs.items():
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for k, (image, labels) in enumerate(of_split):
            Image.fromarray(image).save(root / "images" / split / f"{k}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{k}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root
