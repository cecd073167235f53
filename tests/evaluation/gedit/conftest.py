"""A benchmark, a model and a judge to ask."""

from pathlib import Path

import pytest
from judge_server import SMALL, Server

from danceopd.evaluation.gedit import judge
from danceopd.evaluation.gedit.endpoint import KEY_VARIABLE


@pytest.fixture
def serve(monkeypatch):
    """serve(behave): a server whose behave(handler, body, count) answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(judge, "SHOWN_AREA", SMALL)  # PNGs of 512 x 512 take most of a test's time
    servers = []

    def start(behave) -> Server:
        servers.append(Server(behave))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """benchmark: GEdit-Bench's shape in small; model: a tiny Kontext; lora: an adapter that changes its pictures."""
    import tiny_flux  # diffusers takes seconds to import, which the judges' tests need not
    import torch
    from diffusers import FluxKontextPipeline
    from gedit_runs import save
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("gedit")
    save(folder / "benchmark")
    tiny_flux.save_tiny(folder / "model")
    pipeline = FluxKontextPipeline.from_pretrained(folder / "model")
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    state = {k.replace(".default", ""): v for k, v in pipeline.transformer.state_dict().items() if "lora_" in k}
    state = {key: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for key, value in state.items()}
    pipeline.save_lora_weights(folder / "run" / "student", transformer_lora_layers=state)
    return folder
