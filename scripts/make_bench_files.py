"""Small files of the published benches' schemas, for the tests: tests/fixtures/benches.

    python scripts/make_bench_files.py --out tests/fixtures/benches

Needs pyarrow and pillow. Columns, types and file names are those of the data sets on the hub (method.md 8),
questions and answers are made up, pictures are small copies of data/demo/room.png. Written by pyarrow, as the
hub's own files are: the readers are tested on another writer's work. tests/it/benches.rs knows every row (of training/: tests/it/train.rs).
"""

import argparse
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

ROOM = Path(__file__).parent.parent / "data" / "demo" / "room.png"
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures():
    room = Image.open(ROOM).convert("RGB").resize((96, 72))
    views = [room, ImageOps.mirror(room), room.crop((0, 0, 72, 72)), room.crop((24, 0, 96, 72)), ImageOps.flip(room)]
    out = []
    for view in views:
        buffer = io.BytesIO()
        view.save(buffer, "JPEG", quality=50)
        out.append(buffer.getvalue())
    return out


def picture(data, name="x.jpg"):
    return {"bytes": data, "path": name}


def write(path, columns, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(columns)
    table = pa.Table.from_pylist([dict(zip([c[0] for c in columns], row)) for row in rows], schema=schema)
    pq.write_table(table, path, write_statistics=False, **options)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    a, b, c, d, e = pictures()

    omni = [("image", PICTURE), ("question", pa.string()), ("answer", pa.string()), ("answer_type", pa.string())]
    write(
        out / "omni3d-bench/data/train-00000-of-00001.parquet",
        omni,
        [
            (picture(a), "How many chairs are there?", "3", "int"),
            (picture(a), "How many beds are there?", "2", "int"),
            (picture(b), "How tall is the lamp, if the bed is 1 m tall?", "1.0", "float"),
            (picture(c), "How wide is the bed, if the lamp is 1 m wide?", "2.0", "float"),
            (picture(c), "Is the lamp taller than the bed?", "yes", "str"),
            (picture(d), "Is the bed left of the lamp?", "no", "str"),
            (picture(d), "What is closest to the camera?", "lamp", "str"),
            (picture(e), "What is on the left?", "red table", "str"),
            (picture(a), "How many chairs are there?", "3", "int"),
        ],
        compression="snappy",
        row_group_size=4,
    )
    robo = [("img", PICTURE), ("question", pa.string()), ("answer", pa.string())]
    for part, answers in [("compatibility", ["yes", "no", "no"]), ("configuration", ["Yes", "no", "yes"])]:
        rows = [(picture(p), f"Is there space {i} in {part}?", w) for i, (p, w) in enumerate(zip([a, b, c], answers))]
        write(out / f"robospatial/data/{part}-00000-of-00001.parquet", robo, rows, compression="zstd")
    blink = [
        ("idx", pa.string()),
        ("question", pa.string()),
        ("image_1", PICTURE),
        ("image_2", PICTURE),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
    ]
    write(
        out / "blink/Spatial_Relation/val-00000-of-00001.parquet",
        blink,
        [
            ("val_0", "Is the bed beneath the lamp?", picture(a), None, ["yes", "no"], "(A)"),
            ("val_1", "Is the lamp left of the bed?", picture(b), None, ["Yes", "No"], "(B)"),
        ],
    )
    write(
        out / "blink/Counting/val-00000-of-00001.parquet",
        blink,
        [
            ("val_0", "How many chairs are there?", picture(c), None, ["0", "3", "2", "1"], "(C)"),
            ("val_1", "How many beds are there?", picture(d), None, ["1", "2"], "(E)"),
        ],
    )
    vsr = [
        ("The bed is left of the lamp.", 1, 0),
        ("The lamp is under the bed.", 0, 1),
        ("TV is on the table", 1, 2),
        ("The table is behind the bed.", 0, 0),
    ]
    rows = [
        {"image": f"{i:012}.jpg", "image_link": f"http://pictures.invalid/{p}.jpg", "caption": text, "label": label, "relation": "x"}
        for i, (text, label, p) in enumerate(vsr)
    ]
    lines(out / "vsr/dev.jsonl", rows)
    real = [("image", PICTURE), ("question", pa.string()), ("answer", pa.string()), ("image_path", pa.string())]
    letters = "Please answer directly with only the letter of the correct option and nothing else."
    write(
        out / "realworldqa/data/test-00001-of-00001.parquet",
        real,
        [
            (picture(a), f"Where is the bed?\n\nA. on the left\nB. on the right\n{letters}", "A", "0"),
            (picture(b), "How many lamps are there? Please answer directly with a single word or number.", "1", "1"),
            (picture(b"no picture at all"), f"Which is larger?\nA. the bed\nB. the lamp\n{letters}", "B", "2"),
            (picture(c), "Is there a bed? Please answer directly with a single word or number.", "Yes", "3"),
        ],
    )
    for bench, rows in [
        (
            "gqa",
            [
                {"image": "1.jpg", "question": "What stands beside the bed?", "answer": "sofa"},
                {"image": "2.jpg", "question": "Which color is the bed?", "answer": "green"},
                {"image": "missing.jpg", "question": "What is this?", "answer": "bed"},
                {"image": "../../secret.jpg", "question": "What is this?", "answer": "bed"},
                {"image": "1.jpg", "question": "Is it indoors or outdoors?", "answer": "indoors"},
            ],
        ),
        (
            "tallyqa",
            [
                {"image": "VG_100K/1.jpg", "question": "How many chairs are there?", "answer": 0},
                {"image": "VG_100K/1.jpg", "question": "How many beds are there?", "answer": 1},
                {"image": "VG_100K/2.jpg", "question": "How many lamps are there?", "answer": 4},
            ],
        ),
    ]:
        lines(out / bench / f"{bench}_val.jsonl", rows)
        folder = out / bench / "images" / ("VG_100K" if bench == "tallyqa" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.jpg").write_bytes(a)
        (folder / "2.jpg").write_bytes(b)
    count = [("image", PICTURE), ("question", pa.string()), ("number", pa.int64())]
    write(
        out / "countbench/data/test-00000-of-00001.parquet",
        count,
        [
            (picture(a), "How many chairs are there?", 2),
            (picture(b), "How many chairs are there?", 3),
            (picture(c), "How many beds are there?", 1),
        ],
    )
    # Omni3D-Bench in its published size, so that rows of test and training come apart; one tiny picture.
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (90, 120, 60)).save(buffer, "PNG")
    write(
        out / "of-501-rows/omni3d-bench/data/train-00000-of-00001.parquet",
        omni,
        [(picture(buffer.getvalue()), f"What is in row {i}?", str(i), "int") for i in range(501)],
        compression="zstd",
    )

    # Training splits. Of Omni3D-Bench the last 400 rows; row 450 has the picture of the first ones.
    tiny = []
    for shade in range(6):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * shade, 120, 60)).save(buffer, "PNG")
        tiny.append(buffer.getvalue())
    write(
        out / "training/omni3d-bench/data/train-00000-of-00001.parquet",
        omni,
        [
            (picture(tiny[0 if i < 101 or i == 450 else 1 + i % 5]), f"What is in row {i}?", str(i), "int")
            for i in range(501)
        ],
        compression="zstd",
    )
    write(
        out / "training/gqa/train_balanced_instructions/train-00000-of-00001.parquet",
        [("id", pa.string()), ("imageId", pa.string()), ("question", pa.string()), ("answer", pa.string())],
        [(str(i), f"n{i % 3}", f"What is beside the bed, {i}?", "lamp") for i in range(7)],
    )
    for i in range(2):
        write(
            out / f"training/gqa/train_balanced_images/train-0000{i}-of-00002.parquet",
            [("id", pa.string()), ("image", PICTURE)],
            [(f"n{i}", picture(tiny[i]))],
        )
    write(
        out / "training/tallyqa/data/train-00000-of-00001.parquet",
        [("image", PICTURE), ("question", pa.string()), ("answer", pa.int64())],
        [
            (picture(tiny[i] if i < 4 else b"none" if i == 4 else tiny[4][: len(tiny[4]) // 2]), f"How many lamps are in {i}?", i)
            for i in range(6)
        ],
    )


if __name__ == "__main__":
    main()
