#!/usr/bin/env python3
"""Truths and detections with pycocotools' own figures of them, for tests/fixtures/average-precision.

    python scripts/make_ap_fixture.py --seed 3 --out tests/fixtures/average-precision
"""
import argparse
import json
import os

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seed", type=int, default=3)
    p.add_argument("--out", required=True)
    a = p.parse_args()
    rng = np.random.default_rng(a.seed)
    classes, images, annotations, found = 4, 12, [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 9)):
            side = np.exp(rng.uniform(np.log(8), np.log(200), 2))
            x, y = rng.uniform(0, 400, 2)
            crowd = int(rng.random() < 0.1)
            # Masks are smaller than their boxes.
            area = float(side[0] * side[1] * rng.uniform(0.5, 1))
            box = [float(x), float(y), float(side[0]), float(side[1])]
            category = int(rng.integers(1, classes + 1))
            annotations.append(dict(id=len(annotations) + 1, image_id=image, category_id=category, bbox=box, area=area, iscrowd=crowd))
            for _ in range(rng.integers(0, 4)):
                moved = [float(v + rng.normal() * s * 0.12) for v, s in zip(box, [box[2], box[3], box[2], box[3]])]
                moved[2:] = [max(v, 1.0) for v in moved[2:]]
                wrong = int(rng.integers(1, classes + 1)) if rng.random() < 0.2 else category
                found.append(dict(image_id=image, category_id=wrong, bbox=moved, score=float(rng.random())))
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = rng.uniform(5, 200, 4)
            found.append(dict(image_id=image, category_id=int(rng.integers(1, classes + 1)), bbox=[float(x), float(y), float(w), float(h)], score=float(rng.random() * 0.8)))
    truth = dict(
        info={}, licenses=[],
        images=[dict(id=i, file_name=f"{i}.png", width=640, height=640) for i in range(1, images + 1)],
        annotations=annotations, categories=[dict(id=i, name=f"c{i}") for i in range(1, classes + 1)],
    )
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    e = COCOeval(coco, coco.loadRes([dict(f) for f in found]), "bbox")
    e.evaluate()
    e.accumulate()
    e.summarize()
    names = ["ap", "ap50", "ap75", "small", "medium", "large"]
    os.makedirs(a.out, exist_ok=True)
    with open(os.path.join(a.out, "case.json"), "w") as f:
        json.dump(dict(truth=truth, found=found, expected=dict(zip(names, map(float, e.stats[:6])))), f)


if __name__ == "__main__":
    main()
