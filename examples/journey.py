"""The whole way from pictures to a LoRA that a plain diffusers pipeline draws with, on the miniature, scored exactly.

Every step is a command as a user types it; journey.json gets the scores, and the exit status says whether the student
keeps 0.95 of both sources.

    python examples/journey.py                    # about half an hour on two cores
    python examples/journey.py --steps 20 --pictures 5
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

KEPT = 0.95  # of a source's score; a student that reaches it on both has both capabilities

KINDS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)

LIKE_PIPELINE = ("--max-sequence-length", "16", "--num-inference-steps", "16", "--guidance-scale", "1")

WEIGHTS = ("--device", "cpu", "--dtype", "float32")


def danceopd(*arguments: object) -> None:
    """Prints a command as it is typed, and runs it; ends this process where it fails."""
    words = [str(argument) for argument in arguments]
    print("\n$ danceopd " + " ".join(words), flush=True)
    if code := subprocess.run([sys.executable, "-m", "danceopd", *words], check=False).returncode:
        sys.exit(code)


def score(folder: Path, name: str, lora: str | None) -> dict[str, float]:
    """Draws both benchmarks with the plain pipeline and a LoRA; returns GenEval's overall and the edits' average."""
    model = ("--model", "miniature", *(("--lora", lora) if lora else ()), *LIKE_PIPELINE, *WEIGHTS)
    pictures, edits = folder / "geneval" / name, folder / "gedit"
    metadata = folder / "benchmark" / "evaluation_metadata.jsonl"
    drawing = ("--samples", 1, "--resolution", 64, "--detector", "miniature")
    danceopd("evaluate", "geneval", pictures, "--metadata", metadata, *model, *drawing)
    editing = ("--resolution", 64, "--method", name, "--kinds", *KINDS, "--judge", "miniature")
    danceopd("evaluate", "gedit", folder / "benchmark" / "gedit", "-o", edits, *model, *editing)
    marks = json.loads((edits / "scores" / name / "miniature" / "results.json").read_text())
    right: dict[str, list[bool]] = {}
    for line in (pictures / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        right.setdefault(record["tag"], []).append(record["correct"])
    overall = sum(sum(part) / len(part) for part in right.values()) / len(right)
    return {"geneval_overall": overall, "gedit_average": marks["scores"]["en"]["fullset"]["average"]["o"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="From pictures to a LoRA in a plain pipeline, on the miniature.")
    parser.add_argument("--folder", type=Path, default=Path("runs/journey"))
    parser.add_argument("--steps", type=int, default=400, help="updates of the student (%(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="samples of each capability (%(default)s)")
    parser.add_argument("--pictures", type=int, default=30, help="of each task and kind (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of configs/miniature.yaml")
    args = parser.parse_args()
    folder = args.folder
    config = Path(__file__).parents[1] / "configs" / "miniature.yaml"
    prepared = folder / "cache" / "manifest.jsonl"
    run = ["--config", config, f"training.output_dir={folder / 'run'}", f"training.max_steps={args.steps}"]
    run += [f"capabilities.{name}.data.prepared={prepared}" for name in ("t2i", "edit")] + args.overrides
    manifest = folder / "data" / "manifest.jsonl"
    if not manifest.exists():
        danceopd("miniature", "data", "--folder", manifest.parent, "--size", args.rows, "--seed", 3)
    encoders = ("--model", "miniature", "--max-sequence-length", 16)
    danceopd("data", "prepare", manifest, "--cache", prepared.parent, "--resolution", 64, *encoders, *WEIGHTS)
    danceopd("train", *run, "--dry-run")
    danceopd("train", *run)
    for layout in ("diffusers", "comfyui"):
        for made in (folder / layout, folder / "geneval" / layout, folder / "gedit" / layout):
            shutil.rmtree(made, ignore_errors=True)  # of an earlier student
        danceopd("export", folder / "run", "-o", folder / layout, "--layout", layout)
    if not (folder / "benchmark").exists():
        danceopd("miniature", "benchmark", "--folder", folder / "benchmark", "--size", args.pictures, "--seed", 1234)
    loras = {"base": None, "t2i": "miniature/t2i", "edit": "miniature/edit"}
    loras |= {layout: str(next((folder / layout).glob("*.safetensors"))) for layout in ("diffusers", "comfyui")}
    scores = {name: score(folder, name, lora) for name, lora in loras.items()}
    folders = [folder / "geneval" / name for name in ("edit", "diffusers")]
    danceopd("compare", *folders, "-o", folder / "compare.html")
    (folder / "journey.json").write_text(json.dumps(scores, indent=1) + "\n")
    print("\n" + json.dumps(scores, indent=1))
    kept = {
        "geneval_overall": scores["diffusers"]["geneval_overall"] / max(scores["t2i"]["geneval_overall"], 1e-9),
        "gedit_average": scores["diffusers"]["gedit_average"] / max(scores["edit"]["gedit_average"], 1e-9),
    }
    print(f"of its sources the student keeps {kept['geneval_overall']:.3f} and {kept['gedit_average']:.3f}")
    sys.exit(0 if min(kept.values()) >= KEPT else 1)


if __name__ == "__main__":
    main()
