"""Fine-tuned checkpoints of the base as LoRAs: what their linear layers changed, cut to a rank."""

import re
from pathlib import Path

import torch
from torch import nn

from danceopd.models.fingerprint import sample
from danceopd.models.loading import check_transformer_file, is_file_name, load_transformer_file, transformer_folder
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_files import FILES, load_lora, save_lora
from danceopd.models.tensor_files import read_header
from danceopd.models.weights import Weights, check_fits, of_folder, of_tensors
from danceopd.support.errors import UserError

RANK = 64  # of what is extracted

MUCH = 0.9  # of the squared norm of a change, from which on its cut is taken for it without a warning

EXACT = 1024  # up to this smaller side a layer's SVD is whole; above it is a randomised one

OF_CHANGES = re.compile(r"lora|lokr|hada|\.diff|\.alpha$")  # in the keys of files that hold changes of weights


def is_checkpoint(path: Path) -> bool:
    """Tells whether a path holds a whole transformer or pipeline, and no changes of one."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("config.json", "model_index.json"))
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return not any(OF_CHANGES.search(key) for key in read_header(path))
    except UserError:  # said where it is read
        return False


def check_checkpoint(path: Path, empty: nn.Module) -> Path:
    """Checks by headers alone that a checkpoint is of a transformer; returns the path.

    Raises:
        UserError: It is not.
    """
    if is_file_name(path):
        check_transformer_file(path, empty)
    else:
        check_fits(of_folder(path), empty, path)
    return path


def digest_of(path: Path) -> str:
    """Names the content of a checkpoint, a folder or one file."""
    return sample(path if path.is_file() else transformer_folder(path))


def extracted(path: Path, base: Path, empty: nn.Module, pipeline_class: type, work: Path) -> tuple[Path, Lora, str]:
    """Makes a LoRA of what a checkpoint changed of its base, once; it stays in the folder of the work.

    Args:
        path: The checkpoint, a folder or one file.
        base: The pipeline's folder.
        empty: The transformer without values.
        pipeline_class: Diffusers' class of the pipeline.
        work: Where to.

    Returns:
        The LoRA's folder, what it adds, and a line about what it leaves out.

    Raises:
        UserError: It changes no linear layer.
    """
    digest = digest_of(path)
    folder, said = work / "checkpoints" / digest, work / "checkpoints" / f"{digest}.txt"
    if not ((folder / FILES[1]).is_file() and said.is_file()):
        own = of_folder(path) if path.is_dir() else _of_file(path, base, empty)
        lora, line = extract(own, of_folder(base), empty)
        if not lora:
            raise UserError(f"{path}: changes no linear layer of {base}; leave it out")
        save_lora(lora, folder, pipeline_class)
        said.write_text(line)
    return folder, load_lora(folder, empty, pipeline_class), said.read_text()


def _of_file(path: Path, base: Path, empty: nn.Module) -> Weights:
    return of_tensors(load_transformer_file(path, empty, base, torch.float32).state_dict())


@torch.no_grad()
def extract(own: Weights, base: Weights, empty: nn.Module, rank: int = RANK) -> tuple[Lora, str]:
    """Cuts what each linear layer changed to a rank, by its SVD.

    Args:
        own, base: The weights after and before.
        empty: The network without values.
        rank: The largest wanted.

    Returns:
        The LoRA, without layers that are as they were; and a line about what it leaves out.
    """
    linear = {f"{name}.weight": name for name, module in empty.named_modules() if isinstance(module, nn.Linear)}
    lora, kept, whole, others = {}, 0.0, 0.0, 0
    for key in base.shapes:
        change = own.tensor(key).float() - base.tensor(key).float()
        if key not in linear:
            others += bool(change.any())
        elif change.any():
            u, s, vh = _svd(change, rank)
            root = s.sqrt()
            lora[linear[key]] = (root[:, None] * vh, u * root, 1.0)
            kept, whole = kept + float(s.square().sum()), whole + float(change.square().sum())
    share = f"{100 * kept / whole:.1f} % of the squared norm of its change" if whole else "nothing"
    line = f"a checkpoint, taken as a LoRA of rank {rank} at most that keeps {share}"
    if kept < MUCH * whole:
        line += ", and what is cut off is asked of nobody: 100 % of its column is the cut"
    return lora, line + (f"; {others} norms and biases differ too, which no LoRA holds" if others else "")


def _svd(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the largest singular values of a matrix with their vectors, without those that are rounding."""
    if min(change.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, q=rank + 8, niter=4)
        vh = v.mT
    r = min(rank, int((s > 1e-6 * s[0]).sum()))
    return u[:, :r], s[:r], vh[:r]
