"""Makes the page of a merge: pictures by the same noise, the numbers, and how to use the file."""

import json
import shlex
from pathlib import Path

import diffusers
from PIL import Image

from danceopd.config.reading import read_run_config
from danceopd.models.loading import class_name_of, hub_id
from danceopd.models.lora_files import loads_loras
from danceopd.models.lora_layouts import LAYOUTS
from danceopd.support.pages import data_uri, render
from danceopd.tools.merge_loras.compare import BASE, MERGED, Drawn, Results
from danceopd.tools.merge_loras.given import Given, Options
from danceopd.tools.merge_loras.triggers import phrases_of

WIDEST = 512  # pixels of a picture in the page

SMALLEST = 128  # below this a picture is enlarged by whole pixels


def page_of(output: Path, run: Path, given: Given, options: Options, results: Results) -> bytes:
    """Makes the self-contained page that stands beside the merged file.

    Args:
        output: The merged file.
        run: The run's folder.
        given, options: What was merged, and how.
        results: What came of it.

    Returns:
        The page, HTML.
    """
    words = {name: trigger.words or "acts on every prompt" for name, trigger in given.triggers.items()}
    sections = {
        route: [
            {"prompt": one.prompt, "pictures": _pictures(one, results)} for one in results.drawn if one.route == route
        ]
        for route in results.routes
    }
    return render(
        Path(__file__).with_name("page.html.j2"),
        title=output.stem,
        headline=f"{output.name} is {results.headline}",
        loras=words,
        rank=given.rank,
        table=results.table(),
        merged=MERGED,
        samples=_samples(results),
        drawn=_drawn(run, options),
        better=results.better,
        verdict=results.verdict,
        advice=results.advice,
        sections=sections,
        diffusers=python_use(output, given),
        comfyui=comfyui_use(output, run, given, options),
    ).encode()


def python_use(output: Path, given: Given) -> str:
    """Writes how diffusers draws with the file.

    Args:
        output: The file.
        given: What was merged.

    Returns:
        The lines of Python.
    """
    name = class_name_of(given.base)
    base, folder, file = map(
        json.dumps, (hub_id(given.base) or str(given.base.resolve()), str(output.parent.resolve()), output.name)
    )
    load = f"pipeline.load_lora_weights({folder}, weight_name={file})"
    if not loads_loras(getattr(diffusers, name)):
        load = f"pipeline.transformer.load_lora_adapter({folder}, weight_name={file})"
    called = [trigger.call("a fox in the snow") for trigger in given.triggers.values() if trigger.words]
    prompt = json.dumps(called[0] if called else "a fox in the snow", ensure_ascii=False)
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {name}",
            "",
            f"pipeline = {name}.from_pretrained({base}, torch_dtype=torch.bfloat16)",
            load,
            f"picture = pipeline({prompt}).images[0]",
        ]
    )


def comfyui_use(output: Path, run: Path, given: Given, options: Options) -> str:
    """Says how ComfyUI draws with the merge.

    Args:
        output: The file.
        run: The run's folder.
        given, options: What was merged, and how.

    Returns:
        A sentence or two.
    """
    family = given.backbone.__name__.rpartition(".")[2]
    if family not in LAYOUTS["comfyui"]:
        return f"No tool is known to read the comfyui layout of {family}."
    put = "into ComfyUI/models/loras and choose it in the node Load LoRA, at strength 1"
    if options.layout in ("comfyui", "kohya"):
        return f"Put {output.name} {put}."
    called = "".join(f" --trigger {shlex.quote(phrase)}" for phrase in phrases_of(given.triggers).values())
    export = f"danceopd export {shlex.quote(str(run.resolve()))} -o comfyui_lora --layout comfyui{called}"
    return f"{export}\nThen put the file in comfyui_lora {put}."


def _pictures(one: Drawn, results: Results) -> list[dict[str, str]]:
    """Lays out the pictures of one prompt and seed: base, source, PEFT's best, this merge."""
    labels = {BASE: "base", "source": _of(one.route, results), results.best: results.best, MERGED: MERGED}
    if results.shares[BASE][one.route] > 0.999:  # the base itself is what is wanted
        del labels["source"]
        labels[BASE] = "base, as is wanted"
    found = []
    for who, label in labels.items():
        if who in one.pictures:
            image = Image.fromarray(one.pictures[who].permute(1, 2, 0).numpy())
            small = max(image.size) < SMALLEST
            image.thumbnail((WIDEST, WIDEST))
            uri = data_uri(image) if small else data_uri(image, "jpeg", quality=88)
            found.append({"label": label, "uri": uri, "class": "pixels" if small else ""})
    return found


def _drawn(run: Path, options: Options) -> str:
    """Says how the pictures are drawn."""
    config = read_run_config(run)
    steps, solver, seed = config.rollout.num_inference_steps, config.rollout.solver, config.evaluation.seed
    return f"{steps} steps of {solver}, seed {seed}, guidance {options.guidance_scale:g}"


def _samples(results: Results) -> str:
    """Says how many samples a column has."""
    most = max(results.samples.values())
    few = min(results.samples.values())
    return f"{most} samples of a column" + (f", {few} of a pair" if few < most else "")


def _of(route: str, results: Results) -> str:
    return route if route in results.shares else "both LoRAs, composed" if " + " in route else "what is wanted"
