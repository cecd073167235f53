"""What is damaged, and what of the product reads it: good files, and a run over them through a public function."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """Files, and what reads them.

    Attributes:
        make: `make(folder)` writes good files.
        names: Patterns of the files that are damaged, in the folder.
        start: `start(folder)` gives `run(folder, name)`, name the file that is damaged; it returns an exit status or
            nothing.
        share: Of the mutations, against 1 of others: fewer where an input takes long.
        expected: What it may raise beside UserError, as its docstring says.
    """

    make: Callable[[Path], object]
    names: tuple[str, ...]
    start: Callable[[Path], Callable[[Path, str], object]]
    share: float = 1.0
    expected: tuple = (OSError,)

    def files(self, folder: Path) -> list[str]:
        """Lists the files that are damaged."""
        return [str(path.relative_to(folder)) for name in self.names for path in sorted(folder.glob(name))]

    def clean(self, folder: Path, files: dict[str, bytes]) -> None:
        """Removes what a run has written, where it is known to be no input."""
        for left in ("out", "made.html"):
            path = folder / left
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)


def command(*words: object) -> int:
    """Runs `danceopd`; what it prints is kept by the caller."""
    from danceopd.cli.parser import main

    return main([str(word) for word in words])


def _commands(*words: object) -> Callable:
    return lambda folder: lambda path, name: command(*words)


# ---------------------------------------------------------------------------------------------- configurations


def _configs(folder: Path) -> None:
    for name in ("demo", "setting_e", "miniature"):
        shutil.copy(ROOT / "configs" / f"{name}.yaml", folder / f"{name}.yaml")


def _read_configs(folder: Path) -> Callable:
    from danceopd.config.reading import load_config

    def run(path: Path, name: str) -> int:
        load_config(path / name)
        return command("train", "--config", name, "--dry-run", "training.output_dir=out")

    return run


def _deepspeed(folder: Path) -> None:
    shutil.copy(ROOT / "configs" / "demo.yaml", folder / "run.txt")
    for path in (ROOT / "configs" / "deepspeed").glob("*.json"):
        shutil.copy(path, folder / path.name)


def _plan(folder: Path) -> Callable:
    from danceopd.api import examiner_of
    from danceopd.config.reading import load_config
    from danceopd.planning.cluster import plan
    from danceopd.training.zero.settings import read_deepspeed

    config = load_config(folder / "run.txt")

    def run(path: Path, name: str) -> None:
        plan(config, examiner_of(config), 2, "h100", read_deepspeed(path / name)).text()

    return run


# ---------------------------------------------------------------------------------------------- rows and pictures


def _pictures(folder: Path) -> list[str]:
    import numpy as np
    from PIL import Image, ImageCms

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(folder / "a.png", icc_profile=profile)
    image.quantize(8).save(folder / "palette.png")
    Image.fromarray(rng.integers(0, 2**16, (24, 32), dtype=np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "b.jpg", exif=exif, icc_profile=profile)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("RGBA").save(folder / "c.webp", lossless=True)
    image.save(folder / "d.bmp")
    image.save(folder / "e.gif")
    image.save(folder / "f.tiff", compression="tiff_lzw")
    image.save(folder / "g.ppm")
    return sorted(path.name for path in folder.iterdir())


def _manifests(folder: Path) -> None:
    names = _pictures(folder)
    rows = [
        {"id": f"r{i}", "task": "edit", "prompt": f"make it {i}", "source_image": name, "target_image": names[0]}
        for i, name in enumerate(names)
    ]
    rows[1]["source_image"] = names[:2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f'{row["id"]},edit,"a ""cup"", {i}",{names[0]}' for i, row in enumerate(rows)]
    (folder / "rows.csv").write_text("\n".join(["id,task,prompt,source_image", *lines]) + "\n")


def _check(folder: Path) -> Callable:
    return lambda path, name: command("data", "check", path / name)


def _decode(folder: Path) -> Callable:
    from danceopd.support.pictures import check_picture_file, decode_picture

    def run(path: Path, name: str) -> None:
        for read in (check_picture_file, decode_picture):
            try:
                read(path / name)
            except ValueError:  # as it says
                pass

    return run


def _imported(folder: Path) -> None:
    import datasets
    from PIL import Image

    features = {"id": datasets.Value("string"), "prompt": datasets.Value("string"), "image": datasets.Image()}
    columns = {
        "id": ["a", "b"],
        "prompt": ["one", "two"],
        "image": [Image.new("RGB", (8, 8), c) for c in ("red", "blue")],
    }
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder / "set")


# ---------------------------------------------------------------------------------------------- weights


def _network(folder: Path) -> None:
    from world_runs import random_network

    from danceopd.world.files import save_model

    save_model(random_network(0), folder / "network.safetensors")


def _load_network(folder: Path) -> Callable:
    from danceopd.world.files import load_model

    return lambda path, name: load_model(path / name) and None


def _loras(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from small_loras import small_sd3

    transformer, generator = small_sd3(), torch.Generator().manual_seed(0)
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k", "transformer_blocks.0.ff.net.2")
    peft, kohya, lokr = {}, {}, {}
    for name in layers:
        out, width = transformer.get_submodule(name).weight.shape
        a, b = (torch.randn(*shape, generator=generator) for shape in ((2, width), (out, 2)))
        peft |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        short = f"lora_transformer_{name.replace('.', '_')}"
        kohya |= {f"{short}.lora_down.weight": a, f"{short}.lora_up.weight": b, f"{short}.alpha": torch.tensor(1.0)}
        lokr |= {f"diffusion_model.{name}.lokr_w1": torch.randn(4, 4, generator=generator)}
        lokr |= {f"diffusion_model.{name}.lokr_w2": torch.randn(out // 4, width // 4, generator=generator)}
        lokr |= {f"diffusion_model.{name}.alpha": torch.tensor(1.0)}
    save_file(peft, folder / "peft.safetensors", {"format": '"pt"', "lora_adapter_metadata": '{"transformer.r": 2}'})
    save_file(kohya, folder / "kohya.safetensors")
    save_file(lokr, folder / "lokr.safetensors")
    (folder / "adapter").mkdir()
    own = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in peft.items()}
    save_file(own, folder / "adapter" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn.to_q", "attn.to_k", "ff.net.2"],
        "rank_pattern": {"attn.to_k": 2}, "alpha_pattern": {"attn.to_k": 1}, "use_rslora": False, "use_dora": False,
        "bias": "none", "init_lora_weights": True, "base_model_name_or_path": "stabilityai/x", "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _load_loras(folder: Path) -> Callable:
    from small_loras import SD3, small_sd3

    from danceopd.models.lora_files import load_lora, lora_parameters, trained_for

    transformer = small_sd3()

    def run(path: Path, name: str) -> None:
        at = path / name.split("/")[0]
        _refusable(lambda: load_lora(at, transformer, SD3))
        _refusable(lambda: load_lora(at, transformer, SD3, header_only=True))
        _refusable(lambda: lora_parameters(at, transformer, SD3))
        _refusable(lambda: trained_for(at))

    return run


def _refusable(read: Callable) -> None:
    """Runs one of several readers of the same file, each of which may refuse it."""
    from danceopd.support.errors import UserError

    try:
        read()
    except (UserError, OSError):
        pass


def _model(folder: Path) -> None:
    import model_runs

    place = model_runs.write_place(folder, "sd3")
    shutil.rmtree(place / "other")
    config = model_runs.config_of(place, **{"training.output_dir": "out"})
    import yaml

    raw = json.loads(json.dumps(config.to_dict(), default=str).replace(f"{folder}/", ""))
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))


# ---------------------------------------------------------------------------------------------- prepared rows


def _prepared(folder: Path) -> None:
    import torch

    from danceopd.data.cache import Cache, key_of

    cache, keys = Cache(folder), [key_of(f"prompt {i}") for i in range(3)]
    entries = {key: {"prompt_embeds": torch.ones(4, 8), "pooled_prompt_embeds": torch.ones(8)} for key in keys}
    cache.write(entries | {key_of("picture"): {"latents": torch.ones(4, 8, 8)}})
    row = {
        "capability": "edit",
        "target": key_of("picture"),
        "sources": [key_of("picture")],
        "source_sizes": [[64, 64]],
    }
    lines = [
        {"model": "m", "negative_prompts": {"": keys[0]}, "made_with": {"resolution": 64}, "prompt_limits": {"t": 77}}
    ]
    lines += [
        {"id": f"r{i}", **row, "prompt": keys[i], "size": [64, 64], "cut": ["t"], "special": []} for i in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_prepared(folder: Path) -> Callable:
    from danceopd.data.prepared import PreparedData, mix

    def run(path: Path, name: str) -> None:
        data = PreparedData(path / "rows.jsonl", "edit")
        data.check_texts([""])
        data.notes()
        for kind in mix({"edit": data}).rows:
            part = data.part(kind)
            for i in range(len(part)):
                part.condition([i], [False])
            part.targets([0])

    return run


# ---------------------------------------------------------------------------------------------- runs


def _checkpoints(folder: Path) -> None:
    import torch

    from danceopd.training.checkpoints import save_state

    tensors = {"student/a": torch.arange(4.0), "optimizer/exp_avg/a": torch.ones(4)}
    shapes = {name: torch.Size([2, 2]) for name in tensors}
    for step in (1, 2):
        save_state(folder / "checkpoints", step, tensors, shapes, {"step": step, "skipped": [0, 0]}, keep=2)


def _load_checkpoints(folder: Path) -> Callable:
    from danceopd.training.checkpoints import load_newest

    def run(path: Path, name: str) -> None:
        found, _ = load_newest(path / "checkpoints")
        for name in found.shapes if found else ():
            found.tensor(name)
        if found:
            found.optimizer_states()

    return run


def _log(folder: Path) -> None:
    from report_results import make_records, make_results, write_log

    write_log(folder, make_records(40))
    (folder / "results.json").write_text(json.dumps(make_results()))


def _read_log(folder: Path) -> Callable:
    from report_results import make_results

    from danceopd.report.page import write_report
    from danceopd.support.run_log import RunLog

    results = make_results()

    def run(path: Path, name: str) -> None:
        write_report(path, results, {})
        RunLog(path, 20).close()
        shutil.rmtree(path / "tensorboard")

    return run


# ---------------------------------------------------------------------------------------------- evaluation


def _texts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cup\none\ta dog, in the style\na cup\ntwo\t{x} and \u2028\n")
    clause = {"class": "cat", "count": 1}
    lines = [
        {"tag": "single_object", "prompt": "a cat", "include": [clause]},
        {"tag": "position", "prompt": "p", "include": [clause, {**clause, "position": ["left of", 0], "color": "red"}]},
        {"tag": "counting", "prompt": "c", "include": [{**clause, "count": 3}], "exclude": [{**clause, "count": 4}]},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_texts(folder: Path) -> Callable:
    from danceopd.evaluation.geneval import Found, judge, read_metadata
    from danceopd.tools.merge_loras.prompts import read_prompts

    both = {"cat": [Found((0, 0, 1, 1), 0.95), Found((3, 0, 4, 1), 0.95)]}

    def run(path: Path, name: str) -> None:
        _refusable(lambda: read_prompts(path / "prompts.txt", ["one", "two"]))
        for line in read_metadata(path / "metadata.jsonl"):
            judge(line, both, lambda image, boxes, *more: ["red"] * len(boxes))

    return run


def _compared(folder: Path) -> None:
    from manifests import picture

    for run in ("a", "b"):
        lines = []
        for i in range(3):
            name = f"{i:05d}/samples/0000.png"
            picture(folder / run / name, color=(80 * i, 0, 0))
            meta = {"tag": "colors", "prompt": str(i), "include": []}
            line = {"filename": name, "tag": "colors", "prompt": str(i), "correct": bool(i % 2) is (run == "a")}
            lines.append({**line, "metadata": json.dumps(meta), "reason": "", "details": "{}"})
        (folder / run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / run / "generation.json").write_text('{"seed": 0}')
        edits = [
            {"kind": "style", "language": "en", "key": f"{i:04x}", "instruction": "make it red", "sc": [5, 6 + i],
             "pq": [7, 3], "picture": "fullset/style/en/0.png", "index": i}
            for i in range(3)
        ]  # fmt: skip
        scores = {"benchmark": "GEdit-Bench", "method": run, "judge": "j", "dataset": "set", "rows": edits}
        place = folder / "gedit" / "scores" / run / "j"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(scores))
        picture(folder / "gedit" / run / "fullset/style/en/0.png")


def _compare(folder: Path) -> Callable:
    def run(path: Path, name: str) -> int:
        if name.startswith("gedit"):
            return command("compare", "gedit/scores/a/j", "gedit/scores/b/j", "-o", "made.html")
        return command("compare", "a", "b", "-o", "made.html")

    return run


def _answers(folder: Path) -> None:
    marks = json.dumps({"score": [8, 7], "reasoning": "because"})
    whole = {"choices": [{"message": {"content": marks}, "finish_reason": "stop"}], "usage": {"total_tokens": 10}}
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": marks}]}}]}
    refused = {"error": {"message": "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'", "code": 400}}
    for name, body in {"whole": whole, "parts": parts, "refused": refused}.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    pieces = [{"choices": [{"delta": {"content": marks[i : i + 9]}}]} for i in range(0, len(marks), 9)]
    (folder / "stream.txt").write_text("".join(f"data: {json.dumps(p)}\n\n" for p in pieces) + "data: [DONE]\n")
    (folder / "headers.txt").write_text("Retry-After: 0\nretry-after-ms: 1\nContent-Type: application/json\n")


def _ask(folder: Path) -> Callable:
    from judge_server import Server, edits

    from danceopd.evaluation.gedit.endpoint import EndpointJudge
    from danceopd.evaluation.gedit.judge import judge_edits

    names = ("whole", "refused", "parts", "stream")

    def behave(handler, body, count: int) -> None:
        name = names[count % len(names)]
        data = (folder / f"{name}.{'txt' if name == 'stream' else 'json'}").read_bytes()
        handler.send_response(400 if name == "refused" else 429 if count % 7 == 6 else 200)
        lines = (folder / "headers.txt").read_bytes().decode("latin-1").splitlines()
        for key, _, value in (line.partition(":") for line in lines if line.isprintable()):
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    server, asked = Server(behave), edits(2)

    def run(path: Path, name: str) -> None:
        judge = EndpointJudge(server.url, "m", parallel=1, tries=2, backoff=0.001, max_wait=0.01, timeout=5)
        _refusable(lambda: judge_edits(asked, judge, path / "out"))

    return run


TARGETS = {
    "configurations": Target(_configs, ("*.yaml",), _read_configs, 1.0),
    "DeepSpeed's settings": Target(_deepspeed, ("*.json",), _plan, 0.5),
    "manifests": Target(_manifests, ("rows.*",), _check, 1.5),
    "pictures": Target(_pictures, ("*",), _decode, 2.0),
    "data sets": Target(_imported, ("set/*",), _commands("data", "import", "set", "out", "--task", "t2i"), 0.5),
    "networks": Target(_network, ("*.safetensors",), _load_network, 1.0),
    "LoRA files": Target(_loras, ("*.safetensors", "adapter/*"), _load_loras, 1.5),
    "model folders": Target(
        _model,
        ("model/model_index.json", "model/transformer/*", "model/scheduler/*", "model/text_encoder/config.json",
         "one.safetensors", "cache/*", "run.yaml"),
        _commands("train", "--config", "run.yaml", "--dry-run"),
        0.4,
    ),
    "prepared rows": Target(_prepared, ("*",), _read_prepared, 1.5),
    "checkpoints": Target(_checkpoints, ("checkpoints/*/*",), _load_checkpoints, 1.0),
    "logs": Target(_log, ("log.jsonl",), _read_log, 0.5),
    "prompt files": Target(_texts, ("*",), _read_texts, 1.0),
    "compared runs": Target(
        _compared, ("*/results.jsonl", "*/*.json", "gedit/scores/*/*/*", "*/*/*/*.png"), _compare, 0.6
    ),
    "judge's answers": Target(_answers, ("*",), _ask, 1.0),
}  # fmt: skip
