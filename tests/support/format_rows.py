"""Rows of public preference sets as their cards and repositories describe them, and a small ImageRewardDB on disk."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dedpo_diffusion.settings import IngestSettings
from support.pictures import picture


def settings(source="source", **changes):
    return IngestSettings("auto", str(source), Path("out"), **changes)


def read(module, row, folder=None, **changes):
    """What a format's module makes of one row."""
    return list(module.entries(dict(row), "list.json row 3", folder, settings(**changes)))


def labels(entry):
    return [answer.label_0 for answer in entry.answers]


def train_row(**changes):
    return {"prompt": "a red fox", "file_path": ["00001.jpg", "00002.jpg"], "human_preference": [0, 1]} | changes


def ranked_row(ranks=(2, 1, 3, 4), people=(), **changes):
    raw = [{"rank": list(one), "user_hash": f"user{k}"} for k, one in enumerate(people)]
    names = [f"{100 + k:05d}.jpg" for k in range(len(ranks))]
    return {"prompt": "a blue boat", "image_path": names, "rank": list(ranks), "raw_annotations": raw} | changes


def pair_row(**changes):
    return {
        "prompt": "a tower",
        "choice_dist": [12, 7],
        "confidence": 0.9999907,
        "path1": "images/u1.jpg",
        "path2": "images/u2.jpg",
        "model1": "flux",
        "model2": "infinity",
    } | changes


def ranking_row(ranking=(1, 2, 5, 3), **changes):
    names = [f"part-005658/images/0040/g{k}.webp" for k in range(len(ranking))]
    return {"id": "005658-0040", "prompt": "a portal", "generations": names, "ranking": list(ranking)} | changes


def result_row(responses=("both_good", "image_1", "image_1"), **changes):
    hub = "https://huggingface.co/datasets/data-is-better-together/open-image-preferences-v1/resolve/main"
    return {
        "id": "3368-quality",
        "status": "completed",
        "_server_id": "c2306976",
        "images": {
            "image_1": f"{hub}/image_quality_dev/3368.jpg",
            "image_2": f"{hub}/image_quality_sd/3368.jpg",
            "prompt": "a manga street",
        },
        "model_1": "dev",
        "model_2": "sd",
        "evolution": "quality",
        "category": "Manga",
        "sub_category": "detailed",
        "preference.responses": list(responses),
        "preference.responses.users": [f"user{k}" for k in range(len(responses))],
        "preference.responses.status": ["submitted"] * len(responses),
        "prompt": [0.1, 0.2, 0.3],  # an embedding under the name of the text
    } | changes


def chosen_row(seed=0, **changes):
    return {
        "id": f"{seed}-simplified",
        "prompt": f"a harp {seed}",
        "chosen": {"bytes": picture(2 * seed), "path": "a.jpg"},
        "rejected": {"bytes": picture(2 * seed + 1), "path": "b.jpg"},
        "chosen_model": "black-forest-labs/FLUX.1-dev",
        "rejected_model": "stabilityai/stable-diffusion-3.5-large",
        "evolution": "simplified",
        "category": "Anime",
        "sub_category": "anime style",
    } | changes


def two_images(seed=0):
    return {f"image{k}": {"bytes": picture(2 * seed + k), "path": None} for k in (1, 2)}


def counts_row(first=17, second=9, **changes):
    votes = [{"votedFor": "dalle-3/155_0.jpg", "userDetails": {"country": "IN", "language": "en", "userScore": 0.78}}] * first
    return {
        "prompt": "a lamp",
        **two_images(),
        "votes_image1": first,
        "votes_image2": second,
        "model1": "dalle-3",
        "model2": "flux",
        "detailed_results": json.dumps({"votes": votes, "metadata": {}}),
        "image1_path": "dalle-3/155_0.jpg",
        "image2_path": "flux/155_0.jpg",
    } | changes


def shares_row(criteria=("preference", "coherence", "alignment"), **changes):
    row = {"prompt": "a lamp", **two_images(), "model1": "imagen-3", "model2": "aurora"}
    for k, name in enumerate(criteria):
        row[f"weighted_results_image1_{name}"], row[f"weighted_results_image2_{name}"] = (0.75, 0.25 + 0.5 * k)[:2]
        row[f"detailed_results_{name}"] = json.dumps([{"votedFor": "imagen-3_1.jpg", "userDetails": {"userScores": {"global": 0.4}}}] * 26)
    return row | changes


def image_row(**changes):
    return {"image_path": "images/train/train_1/a.webp", "prompt_id": "1", "prompt": "a", "rank": 1, "classification": "x"} | changes


def write_database(folder, *, splits=("train",), prompts=3, prefix="", extracted=False):
    """A download of ImageRewardDB: prompts of 3, 4, 5 images, two to an archive; the rows of the prompts are mixed."""
    for split in splits:
        rows, members = [], {}
        for prompt in range(prompts):
            for k in range(3 + prompt):
                name, part = f"p{prompt}i{k}.webp", f"{split}_{prompt // 2 + 1}"
                members.setdefault(part, {})[name] = picture(100 * prompt + k, format="WEBP")
                rows.append(
                    {
                        "image_path": f"images/{split}/{part}/{name}",
                        "prompt_id": f"00{prompt}-{split}",
                        "prompt": f"{split} prompt {prompt}",
                        "classification": "Outdoor Scenes",
                        "image_amount_in_total": 3 + prompt,
                        "rank": 1 + (k + prompt) % 3,
                        "overall_rating": 7 - k,
                        "image_text_alignment_rating": 6,
                        "fidelity_rating": 5,
                    }
                )
        rows.sort(key=lambda row: (row["rank"], row["image_path"]))
        for part, images in members.items():
            place = folder / "images" / split / part
            place.parent.mkdir(parents=True, exist_ok=True)
            if extracted:
                place.mkdir()
                for name, data in images.items():
                    (place / name).write_bytes(data)
            else:
                with zipfile.ZipFile(place.with_name(f"{part}.zip"), "w") as archive:
                    archive.writestr(f"{prefix}{part}.json", "[]")
                    for name, data in images.items():
                        archive.writestr(f"{prefix}{name}", data)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"metadata-{split}.parquet")
    return folder
