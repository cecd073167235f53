"""Scores the miniature's base and sources, and writes what is known of them beside their weights."""

import io
import json
import shutil
from pathlib import Path

import torch

from danceopd.miniature import base, sources, vae
from danceopd.miniature.data import CAPABILITIES, sample
from danceopd.miniature.detector import detect
from danceopd.miniature.evaluate import Canvas, edit_set, field_of, look_marks, score_gedit, score_geneval, t2i_set
from danceopd.miniature.looks import CLASSES, EMPTY, IMAGE_SIZE, LOOKS
from danceopd.miniature.scene import Scene, render
from danceopd.miniature.scores import geneval_correct
from danceopd.models.backbones import flux2
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.paths import MINIATURE
from danceopd.support.pictures import labelled_grid
from danceopd.world.scoring import summary

SEED, PICTURES, LOOK_PICTURES = 1234, 40, 200  # of the scores: of each task and kind, and of a look

GUIDANCE_SCALE = 2.0  # of the columns that are guided: the best of 1.5, 2, 3 and 4 for what the base draws

READ = 400  # pictures of each capability that the detector is tried on

SHOWN, CELL = 12, 112  # pictures of each row of the page, and pixels of each


def score_all(pipeline: Path, loras: dict[str, Path], pictures: int = PICTURES) -> dict[str, dict[str, dict]]:
    """Scores the base and each LoRA by every task, own or not, and the LoRAs of looks by theirs.

    Returns:
        {name: {column: its scores}} with "overall" or "average", and "standard_error".
    """
    canvas, rows = Canvas(pipeline), {}
    for name, lora in {"base": None, **loras}.items():
        field = field_of(pipeline, lora)
        draw, strong = canvas.drawer(field), canvas.drawer(field, GUIDANCE_SCALE)
        if name in LOOKS:
            marks = {"called": look_marks(draw, (name,), SEED, LOOK_PICTURES)}
            marks["not called"] = look_marks(draw, (), SEED, LOOK_PICTURES)
            rows[name] = {
                column: {"average": float(one.mean()), "standard_error": float(one.std() / len(one) ** 0.5)}
                for column, one in marks.items()
            }
            continue
        edits = score_gedit(draw, SEED, pictures)
        rows[name] = {
            "T2I": score_geneval(draw, SEED, pictures),
            "guided T2I": score_geneval(strong, SEED, pictures),
            "held-out T2I": score_geneval(draw, SEED, pictures, "held_out"),
            "Edit": edits,
            "guided Edit": score_gedit(strong, SEED, pictures),
            "Local": edits["local"],
            "Global": edits["global"],
        }
    return rows


@torch.inference_mode()
def fidelity(pipeline: Path, pictures: int = 256) -> dict[str, float]:
    """Returns the VAE's mean PSNR in dB on pictures of all looks and on photos, and the share that is read the same."""
    encode, decode = flux2.picture_codec(pipeline)
    generator, found = torch.Generator().manual_seed(SEED), {}
    _, photos = t2i_set(SEED, pictures // 6)
    for name, scene in (("all looks", vae.any_scene(pictures, generator)), ("photos", photos)):
        true = render(scene)
        again = torch.cat([decode(encode(part)) for part in true.split(64)])
        found[name] = float((10 * torch.log10(4 / (again - true).square().mean((1, 2, 3)))).mean())
    before, after = detect(true).scene, detect(again).scene
    same = (before.things == after.things).all(-1) & (before.paints == after.paints).all(-1)
    return {**found, "read the same": float(same.float().mean())}


def damaged(pictures: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Blurs, shifts and mixes pictures [B, 3, 64, 64], and adds noise to them: {what is done: {how much: pictures}}."""
    generator, blurred, blurs = torch.Generator().manual_seed(SEED), pictures, {}
    for times in range(1, 5):
        for axis in (2, 3):
            padded = torch.cat([blurred.narrow(axis, 0, 1), blurred, blurred.narrow(axis, IMAGE_SIZE - 1, 1)], axis)
            one, two, three = (padded.narrow(axis, start, IMAGE_SIZE) for start in range(3))
            blurred = (one + 2 * two + three) / 4
        blurs[f"{times} x"] = blurred
    noise, others = torch.randn(pictures.shape, generator=generator), pictures.roll(len(pictures) // 2, 0)
    return {
        "blurred by [1 2 1] / 4": blurs,
        "shifted, pixels": {
            "0.5": (pictures + pictures.roll(1, 3)) / 2,
            **{f"{n}": pictures.roll((n, n), (2, 3)) for n in (1, 3)},
        },
        "with noise, of a range of 2": {f"{s:g}": pictures + s * noise for s in (0.1, 0.2, 0.3)},
        "mixed with another, own share": {f"{s:g}": s * pictures + (1 - s) * others for s in (0.8, 0.7, 0.6, 0.5)},
    }


def reading(pictures: int = PICTURES) -> list[str]:
    """Measures the detector: how it reads true pictures, and what GenEval they get when they are damaged.

    Args:
        pictures: Of each of GenEval's tasks.

    Returns:
        Lines of markdown.
    """
    wrong = {}
    for name in CAPABILITIES:
        _, _, scene = sample(name, READ, torch.Generator().manual_seed(SEED))
        seen = detect(render(scene))
        seen.scene.things[~seen.found] = EMPTY
        wrong[name] = sum(sorted(a) != sorted(b) for a, b in zip(_things(scene), _things(seen.scene), strict=True))
    misread = ", ".join(f"{name} {100 * n / READ:.2g} %" for name, n in wrong.items() if n)
    prompts, scene = t2i_set(SEED, pictures)
    true = render(scene)
    lines = [f"Of {READ} true pictures each it misreads: {misread}; of the others none.", ""]
    lines += ["| true pictures | GenEval overall |", "|---|---|"]
    for done, amounts in damaged(true).items():
        found = {}
        for amount, spoilt in amounts.items():
            right = geneval_correct(prompts, detect(spoilt)).float()
            found[amount] = summary(right, [prompt.task for prompt in prompts], "overall")["overall"]
        cells = ", ".join(f"{amount}: {value:.2f}" for amount, value in found.items())
        lines.append(f"| {done} | {cells} |")
    return lines


def _things(scene: Scene) -> list[list[tuple[int, int]]]:
    """Returns the things of each picture with their paints."""
    pairs = zip(scene.things.tolist(), scene.paints.tolist(), strict=True)
    return [[(t, p) for t, p in zip(*pair, strict=True) if t != EMPTY] for pair in pairs]


@torch.inference_mode()
def pages(pipeline: Path, loras: dict[str, Path]) -> tuple[bytes, bytes]:
    """Draws two PNGs: pictures from prompts by the base and each source that draws, and edits by base and source."""
    canvas = Canvas(pipeline)
    fields = {name: field_of(pipeline, lora) for name, lora in {"base": None, **loras}.items()}
    texts, rows = [prompt.text for prompt in t2i_set(17, SHOWN // 6)[0]], []
    for name in fields:
        if name in ("base", "t2i", *LOOKS):
            called = [f"{name}, {text}" for text in texts] if name in LOOKS else texts
            rows.append((name, canvas.draw(fields[name], called, None, 17)))
    drawn = labelled_grid(rows, [text.removeprefix("a photo of ") for text in texts], least=112)
    edits, before, after = edit_set(17, 1)
    texts, source = [edit.text for edit in edits], render(before)
    rows = [("to edit", source)]
    rows += [(name, canvas.draw(fields[name], texts, source, 17)) for name in ("base", "edit") if name in fields]
    return drawn, labelled_grid([*rows, ("asked for", render(after))], texts, least=CELL)


def curves(logs: Path, names: list[str]) -> bytes:
    """Plots the losses of the stages whose logs a folder holds, as a PNG."""

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for name in names:
        path = logs / f"{name}.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            ax = axes[0] if name == "vae" else axes[1]
            ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=name)
    for ax, label in zip(axes, ("squared error and divergence", "velocity error"), strict=True):
        ax.set(xlabel="updates", ylabel=label, yscale="log")
        ax.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def publish(folder: Path, output: Path = MINIATURE) -> None:
    """Copies what a training made to where it ships: the pipeline, the sources, and the stages' logs.

    Args:
        folder: The training's.
        output: Gets pipeline, sources/NAME and logs; a stage that the training has not made stays as it is there.

    Raises:
        UserError: The folder holds nothing that a training made.
    """
    if not any((folder / name).is_dir() for name in ("pipeline", *sources.RECIPES)):
        raise UserError(f"{folder} holds neither a pipeline nor a source; --folder is where `miniature train` wrote")
    if (folder / "pipeline").is_dir():
        shutil.copytree(folder / "pipeline", output / "pipeline", dirs_exist_ok=True)
    for name in sources.RECIPES:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, output / "sources" / name, dirs_exist_ok=True)
    for log in folder.glob("*.jsonl"):
        (output / "logs").mkdir(exist_ok=True)
        shutil.copy(log, output / "logs")


def write_card(output: Path = MINIATURE) -> Path:
    """Scores the weights that ship, and writes README.md with pictures and curves beside them.

    Args:
        output: Holds pipeline, sources and logs, as `publish` writes them.

    Returns:
        The README's path.
    """
    pipeline, logs = output / "pipeline", output / "logs"
    loras = {name: output / "sources" / name for name in sources.RECIPES if (output / "sources" / name).is_dir()}
    rows, psnr = score_all(pipeline, loras), fidelity(pipeline)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| network | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [_cell(row.get(column)) for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    recipe = ["| stage | data (share) | updates | batch | seed | time |", "|---" * 6 + "|"]
    recipe.append(f"| vae | all looks | {vae.STEPS:,} | {vae.BATCH} | {vae.SEED} | {_minutes(logs, 'vae')} |")
    made = {"base": (base.SHARES, base.STEPS, base.BATCH, base.SEED)}
    stages = {f"{name}-tuned": recipe for name, recipe in sources.TUNED.items()} | sources.RECIPES
    there = {name: recipe for name, recipe in stages.items() if name.removesuffix("-tuned") in loras}
    made |= {name: (r.shares, r.steps, sources.BATCH, r.seed) for name, r in there.items()}
    for name, (shares, steps, batch, seed) in made.items():
        mix = ", ".join(f"{key} {value:g}" for key, value in shares.items())
        recipe.append(f"| {name} | {mix} | {steps:,} | {batch} | {seed} | {_minutes(logs, name)} |")
    drawn, edited = pages(pipeline, loras)
    write_atomic(output / "drawn.png", drawn)
    write_atomic(output / "edited.png", edited)
    write_atomic(output / "curves.png", curves(logs, ["vae", *made]))
    text = CARD.format(
        size=IMAGE_SIZE,
        classes=len(CLASSES),
        pictures=PICTURES,
        looks=LOOK_PICTURES,
        seed=SEED,
        guidance=GUIDANCE_SCALE,
        scores="\n".join(lines),
        recipe="\n".join(recipe),
        psnr=", ".join(f"{value:.1f} dB on {name}" for name, value in psnr.items() if name != "read the same"),
        same=psnr["read the same"],
        reading="\n".join(reading()),
        further=", ".join(name for name in sources.RECIPES if name not in loras),
    )
    write_atomic(output / "README.md", text.encode())
    return output / "README.md"


def _cell(score: dict | None) -> str:
    if score is None:
        return ""
    return f"{score.get('overall', score.get('average')):.3f} ± {score['standard_error']:.3f}"


def _minutes(logs: Path, name: str) -> str:
    path = logs / f"{name}.jsonl"
    if not path.is_file():
        return ""
    return f"{json.loads(path.read_text().splitlines()[-1])['seconds'] / 60:.0f} min"


CARD = """# The miniature

A FLUX.2 klein pipeline in small, of diffusers' own classes and really trained: it draws and edits pictures of
{size} x {size} pixels with one to four of {classes} objects. `DiffusionPipeline.from_pretrained` loads `pipeline`,
`load_lora_weights` each folder of `sources`; call it with `max_sequence_length=16, height={size}, width={size}`. It
exists to show and test distillation on the path that users run, and draws nothing but this world.

![Pictures by the base and the sources that draw.](drawn.png)

![Edits by the base and the edit source.](edited.png)

## Scores

GenEval-shaped overall (0 to 1) for text-to-image, GEdit-shaped average (0 to 10) for edits, ± the standard error over
pictures; 16 steps, seed {seed}, {pictures} pictures of each task and kind, read by the detector below. Guided columns
have guidance_scale {guidance:g}, two evaluations a step. A look is called by its name in front of the prompt, "night,
a photo of a car"; its column says how much of what is asked is there as the look has it (0 to 1, {looks} pictures), and
"not called" the same of plain prompts, whose pictures should be plain. Made by `danceopd miniature card`.

{scores}

The aims were higher: 0.4 to 0.6 of text-to-image for the base, 0.75 to 0.9 for `t2i`, 7 to 9 for `edit`, in LoRAs of
rank 16 to 32; two cores reached this, at rank 64. An edit's mark has a ceiling of 9.95, and is lenient about what else
is in the picture: one that holds nothing but the edited object has 7.0.

## The detector

Marks are exact as far as the detector reads pictures right. {reading}

The VAE gives pictures back at {psnr}; of photos a share of {same:.3f} is read as the same objects.

## Recipe

Flow matching on latents of pictures drawn from seeds (no picture is stored), Muon and AdamW, noise levels with shift 5,
10 % empty prompts, an exponential average of 0.999 as the result. Where a stage has "tuned" in its name, all weights of
the base's transformer are trained on pictures; the source, a LoRA, starts as the best cut of that change and is fitted
to the tuned network's velocities. A look's LoRA learns from pictures. `danceopd miniature train` runs it again, and
goes on where it was stopped; it knows further sources, which do not ship: {further}. Times are on two cores beside
other work, where a log has one. `t2i`, `edit` and their tuned networks were trained to fewer updates first and
then went on to these, so the curves rise where the schedule began again: the recipe in one go was not tried.

{recipe}

![Losses of all stages.](curves.png)

## Data and licence

Objects are Noto Emoji (Apache-2.0), letters Pillow's own font; the networks are under the project's licence. Held out
of all training: each class in one colour, and sixteen pairs of classes. The base and the source `edit-half` see eight
of the classes in edits, and all of them in text-to-image.
"""
