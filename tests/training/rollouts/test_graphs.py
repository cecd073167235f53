"""Static steps: the plain rollout's states, safe to capture for every backbone, compiled a few times, CUDA graphs."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_runs import FAMILIES
from released import prompt_of
from world_runs import config_of

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import counted, guided
from danceopd.core.query import query
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.core.sde import sde_rollout
from danceopd.models.backbones import backbone_of, flux2
from danceopd.models.footprint import storage_number
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import FullStudent, LoraStudent
from danceopd.training.loop import Trainer
from danceopd.training.rollouts import static as graphs
from danceopd.training.rollouts.capture import GraphSafe, NotCapturable, constants
from danceopd.training.rollouts.compiled import compile_blocks
from danceopd.training.rollouts.layouts import always_guided
from danceopd.training.rollouts.program import BUCKETS, Program
from danceopd.training.rollouts.static import StaticField
from danceopd.world.build import build
from danceopd.world.dit import DiT, DiTConfig

EDITS = ("dit", "kontext", "klein", "flux2", "qwen_edit")  # families whose tiny models take source pictures
SIZE = 64  # pixels
DIT = DiTConfig(image_size=16, patch_size=8, width=32, depth=4, heads=2)


@pytest.fixture(autouse=True)
def _plain_arithmetic(monkeypatch):
    """The compiled step may contract a product and a sum; PyTorch's rounds as the plain rollout does."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("DANCEOPD_KERNELS", "torch")


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def flags(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5


# ---------------------------------------------------------------------------- the states of the plain rollout

EMPTY = torch.zeros(4, dtype=torch.int64)


def curved(z, sigma, c):
    """A field of products and sums, different for each sample's prompt, source picture and noise level."""
    shape = (-1, *(1,) * (z.dim() - 1))
    has = torch.ones(len(z), dtype=torch.bool) if c.has_source is None else c.has_source
    source = 0 if c.source is None else torch.where(has.view(shape), c.source, 0)
    return z * (0.5 - 0.2 * z) + 0.3 * c.prompt.float().mean(1).view(shape) * sigma.view(shape) + 0.1 * source


def mixed(n, seed=0):
    """n samples, some with source pictures, some guided."""
    scale = torch.where(flags(n, seed + 1), 3.0, 1.0)
    prompt = torch.arange(4 * n).view(n, 4) % 7
    return Conditioning(prompt, noise_of(n, 3, 2, 2, seed=9), flags(n, seed), scale)


def static_curved(spent=None):
    both = guided(curved, EMPTY, every=True)
    return StaticField(guided(curved, EMPTY), curved, both, spent=spent)


@given(
    st.integers(1, 20),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(1, 8),
    st.sampled_from(StaticField.SOLVERS),
    st.data(),
)
def test_states_are_those_of_the_plain_rollout(n, k, steps, solver, data):
    """Bit for bit for an elementwise field, whatever the starts, and every evaluation is counted, padding apart."""
    start = torch.tensor(data.draw(st.lists(st.integers(0, steps), min_size=n, max_size=n)))
    further = torch.tensor(data.draw(st.lists(st.integers(0, steps), min_size=n * k, max_size=n * k))).view(n, k)
    until = (start[:, None] + further).clamp(max=steps)
    z, c, sigmas, counter = noise_of(n, 3, 2, 2), mixed(n), sigma_grid(steps, 3.0), Counter()
    plain = guided(counted(curved, counter, "student"), EMPTY)
    expected, levels = rollout(plain, z, c, sigmas, until, solver, start)
    field = static_curved(Counter())
    states, found = rollout(field, z, c, sigmas, until, solver, start)
    assert torch.equal(states, expected)
    assert torch.equal(found, levels)
    taken = until.amax(1) - start
    assert field.spent["student"] == counter["student"] == ((1 + (c.guidance_scale != 1)) * taken).sum()
    if n <= BUCKETS:
        assert not field.spent["padding"]


def test_no_step_whose_result_nobody_reads():
    """A batch shrinks as its samples leave: to what is under way, filled up to one of 16 sizes."""
    sizes, n = [], 40
    until = torch.arange(n)[:, None] % 12 + 1

    def watched(z, sigma, c):
        sizes.append(len(z))
        return curved(z, sigma, c)

    c = replace(mixed(n), source=None)
    field = StaticField(watched, watched)
    rollout(field, noise_of(n, 3, 2, 2), c, sigma_grid(16), until)
    under_way = [(until > i).sum().item() for i in range(12)]
    assert all(m <= size < m + n / BUCKETS + 1 for m, size in zip(under_way, sizes, strict=True))
    assert field.spent["padding"] == sum(sizes) - sum(under_way) > 0
    assert field.spent["student"] == until.sum()


@pytest.mark.parametrize(
    ("n", "k", "most"),
    [(4, 1, 0.0), (8, 1, 0.0), (16, 1, 0.0), (32, 1, 0.02), (64, 1, 0.03), (64, 4, 0.03), (64, 16, 0.03)],
)
def test_evaluations_under_low_t(n, k, most):
    """Plain: the sum of the deepest indices, no less and no more; static: at most so much padding beside it."""
    generator, least, spent, counter = torch.Generator().manual_seed(0), 0, Counter(), Counter()
    field, plain = StaticField(curved, curved, spent=spent), counted(curved, counter, "student")
    z, c, sigmas = noise_of(n, 3, 2, 2), replace(mixed(n), source=None), sigma_grid(16, 5.0)
    for _ in range(20):
        depth = query(n, 16, generator, bias="low_t", k=k)
        least += int(depth.amax(1).sum())
        rollout(field, z, c, sigmas, depth)
        rollout(plain, z, c, sigmas, depth)
    assert counter["student"] == spent["student"] == least
    assert spent["padding"] <= most * least


@pytest.mark.parametrize("n", [1, 6, 20])
def test_a_stochastic_rollout_is_the_same(n):
    z, c, sigmas, counter = noise_of(n, 3, 2, 2), mixed(n), sigma_grid(5, 3.0), Counter()
    plain = guided(counted(curved, counter, "student"), EMPTY)
    expected = sde_rollout(plain, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
    field = static_curved(Counter())
    found = sde_rollout(field, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert field.spent["student"] == counter["student"]


def test_heun_asks_as_ever():
    z, c, until = noise_of(3, 3, 2, 2), mixed(3), torch.tensor([[4], [2], [3]])
    expected, _ = rollout(guided(curved, EMPTY), z, c, sigma_grid(4), until, "heun")
    assert torch.equal(rollout(static_curved(), z, c, sigma_grid(4), until, "heun")[0], expected)


def test_what_cannot_be_captured_is_asked_as_ever(capsys):
    """The reason is said once, and what was spent in vain is not counted twice."""

    def refused(z, sigma, c):
        raise NotCapturable("it looks at the samples")

    counter = Counter()
    field = StaticField(counted(curved, counter, "student"), refused, spent=counter)
    z, c, sigmas, until = noise_of(3, 3, 2, 2), replace(mixed(3), source=None), sigma_grid(4), torch.full((3, 1), 4)
    for _ in range(2):
        assert torch.equal(rollout(field, z, c, sigmas, until)[0], rollout(curved, z, c, sigmas, until)[0])
    assert counter == {"student": 24}
    assert capsys.readouterr().err.count("it looks at the samples") == 1
    found = sde_rollout(field, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
    expected = sde_rollout(curved, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_cache_is_bounded():
    field, sigmas = StaticField(curved, curved), sigma_grid(2)
    for side in range(1, graphs.PROGRAMS + 4):
        c = replace(mixed(2), source=None)
        rollout(field, noise_of(2, 3, side, side), c, sigmas, torch.full((2, 1), 2))
    assert len(field.programs) == graphs.PROGRAMS


# ------------------------------------------------------------------------------------------------ the models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """model(family) -> (folder, backbone, transformer) of a tiny pipeline; the embedded network has no folder."""
    made = {}

    def model(family):
        if family not in made:
            folder = FAMILIES[family](tmp_path_factory.mktemp(family) / "model")
            backbone = backbone_of(folder)
            made[family] = folder, backbone, backbone.load_transformer(folder)
        return made[family]

    return model


def drawn(network):
    """Every parameter changed at random: those that begin at zero would hide an error."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return network


def asked(models, family, lora, n, device="cpu", length=24):
    """(student, its guidance's combination, noise, conditioning of n samples), some with sources, some guided."""
    meta = device == "meta"
    if family == "dit":
        with torch.device(device):
            student = DiT(DIT)
        prompt, shape, combine = torch.arange(10 * n).view(n, 10) % 400, (3, 16, 16), None
    else:
        folder, backbone, transformer = models(family)
        shape, combine = backbone.latent_shape(folder, SIZE, SIZE), getattr(backbone, "combine", None)
        torch.manual_seed(0)
        rows = [prompt_of(family, transformer, length) for _ in range(n)]
        prompt = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if "prompt_mask" in prompt:
            prompt["prompt_mask"][0, length // 2 :] = False
        embedded = 3.5 if getattr(transformer.config, "guidance_embeds", False) else None
        layers = ("num_layers", "num_single_layers", "n_layers") if meta and family != "sd3" else ()  # its two differ
        config = {**transformer.config, **{key: 1 for key in layers if key in transformer.config}}
        with torch.device(device):
            transformer = type(transformer).from_config(config)
        if not meta:
            transformer.load_state_dict(models(family)[2].state_dict())
        if lora:
            layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
            shared = SharedBase(transformer.eval(), [], backbone.velocity, layers)
            student = LoraStudent(shared, layers, 2, 2.0, embedded_guidance=embedded)
        else:
            student = FullStudent(transformer.eval(), backbone.velocity, embedded)
    student = student.to(device) if meta else drawn(student).to(device)
    source = None
    if family in EDITS:
        source = noise_of(n, *shape, seed=5)
        source = source if family == "dit" else (source,)
    c = Conditioning(prompt, source, flags(n, 2), torch.where(flags(n, 1), 3.0, 1.0)).to(device)
    return student, combine, noise_of(n, *shape).to(device), c


def empty_of(c):
    """One sample's prompt, to be the empty one."""
    return c.prompt[-1] if isinstance(c.prompt, torch.Tensor) else {key: value[-1] for key, value in c.prompt.items()}


def static_of(student, combine, c, capture=False):
    both = always_guided(student, empty_of(c), combine)
    networks = [student, getattr(student, "transformer", student)]
    return StaticField(guided(student, empty_of(c), combine=combine), student, both, networks, capture)


CASES = [(family, lora) for family in ("dit", *FAMILIES) for lora in (False, True) if family != "dit" or not lora]
# Of the default run: classes once, of those that take source pictures the ones that do; adapters on two of them.
DEFAULT = [(family, False) for family in ("dit", "sd3", "kontext", "klein", "qwen_edit", "z")]
DEFAULT += [("sd3", True), ("qwen_edit", True)]


def rest_slow(cases):
    return [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("family", "lora"), rest_slow(CASES))
def test_a_model_steps_as_it_does_otherwise(models, family, lora):
    student, combine, z, c = asked(models, family, lora, 4, length=40)  # those with a mask: of 20 and of 40 tokens
    field, sigmas, until = static_of(student, combine, c), sigma_grid(3, 3.0), torch.tensor([[3], [1], [2], [3]])
    expected, _ = rollout(field.field, z, c, sigmas, until, "ab2")
    close(rollout(field, z, c, sigmas, until, "ab2")[0], expected)
    # Of one layout and depth the batches are equal too.
    c, until = replace(c, source=None, guidance_scale=torch.ones(4)), torch.full((4, 1), 2)
    if not isinstance(c.prompt, dict) or "prompt_mask" not in c.prompt:  # filled up to another length
        expected, _ = rollout(student, z, c, sigmas, until)
        assert torch.equal(rollout(field, z, c, sigmas, until)[0], expected)


def test_buffers_stay_where_they_are_and_weights_may_change_in_place(models):
    student, combine, z, c = asked(models, "sd3", True, 4)
    field, sigmas, until = static_of(student, combine, c), sigma_grid(3, 3.0), torch.tensor([[3], [1], [2], [3]])

    def addresses():
        tensors = [t for p in field.programs.values() for t in (p.z, p.numbers, p.active, p.previous)]
        tensors += [t for p in field.programs.values() for t in p.conditioning.prompt.values()]
        return [t.data_ptr() for t in tensors]

    rollout(field, z, c, sigmas, until, "ab2")
    before = addresses()
    assert len(before) == 12  # of guided samples and others
    drawn(student)
    expected, _ = rollout(field.field, 2 * z, c, sigmas, until, "ab2")
    close(rollout(field, 2 * z, c, sigmas, until, "ab2")[0], expected)
    assert addresses() == before


# ------------------------------------------------------------------------------------------- safe to capture


def caches_of_models():
    import danceopd_kernels.lora

    import danceopd.models.lora_layers

    return [danceopd.models.lora_layers._constant, danceopd_kernels.lora._constant, flux2._position_ids]


@pytest.fixture
def fresh_caches():
    """What is cached for the meta device is of no use elsewhere."""
    yield
    for cached in caches_of_models():
        cached.cache_clear()


@torch.no_grad()
def check_safe(models, family, lora, device):
    """Drawing without guidance, and where it can editing with it."""
    student, combine, z, c = asked(models, family, lora, 3, device)
    both, edits = always_guided(student, empty_of(c), combine), c.source is not None
    for field, source in ((student, None), (both, c.source)):
        layout = graphs.Layout(source is not None, field is both, 32)  # more than a prompt's 24 tokens
        program, made = Program(field, z, graphs._in_layout(c, layout), 3, "ab2"), {}
        with constants(made):
            program.step(2)
            count = len(made)
            with GraphSafe() as guard:
                program.step(2)
        assert len(made) == count
        kept = set(guard.before)
        assert {storage_number(t) for t in (program.z, program.numbers, program.previous)} <= kept
        if family != "dit" or edits == (source is not None):  # it has weights for sources alone
            assert {storage_number(p) for p in student.parameters()} <= kept


# FLUX's own class and Qwen-Image's are those that edit too.
SAFE = [case for case in CASES if case[0] != "flux" and case not in (("flux2", True), ("qwen", True))]


@pytest.mark.parametrize(("family", "lora"), rest_slow(SAFE))
def test_a_step_is_safe_to_capture(models, fresh_caches, family, lora):
    """On the meta device nothing can be read and host data is copied there, as on CUDA: what a graph can't repeat."""
    check_safe(models, family, lora, "meta")


@pytest.mark.parametrize("family", ["dit", "sd3", "flux", "klein", "qwen_edit", "z"])
def test_a_step_is_safe_on_the_cpu(models, family):
    """With real values; adapters take another way on a CPU, which reads routes."""
    check_safe(models, family, False, "cpu")


UNSAFE = {
    "item": lambda x: x * x.sum().item(),
    "condition": lambda x: x if x.sum() > 0 else -x,
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "put by mask": lambda x: x.index_put((x > 0,), torch.zeros(())),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave((x > 0).long().flatten()),
    "equal": lambda x: x * torch.equal(x, x),
    "host data": lambda x: x[torch.tensor([1, 0])],
    "to another device": lambda x: x.to("meta"),
    "copy from another": lambda x: torch.empty_like(x, device="meta").copy_(x),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_what_no_graph_repeats_is_refused(name):
    x = noise_of(4)
    with pytest.raises(NotCapturable), GraphSafe():
        UNSAFE[name](x)


def test_what_a_graph_repeats_is_not_refused():
    x, index = noise_of(4, 4), torch.tensor([1, 0])
    with GraphSafe() as guard:
        y = x[index] @ x.where(x > 0, 0)
        y[:, 1:] += 1
        y.masked_fill_(y > 1, 0).index_copy_(0, index, y.clone())
    assert set(guard.before) == {storage_number(x), storage_number(index)}


def test_host_data_becomes_a_tensor_once():
    made = {}
    with constants(made):
        first = torch.tensor([1, 2])
        assert torch.tensor([1, 2]) is first
        assert torch.tensor([1, 3]) is not first
        assert torch.tensor([1, 2], dtype=torch.float32) is not first
        assert torch.as_tensor(first) is first
    assert torch.tensor([1, 2]) is not first


# ------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("method", [{"query": {"k": 4}}, {"method": "flow_opd", "options": {"group_size": 4}}])
def test_a_run_of_static_steps_is_one_without(raw, method):
    raw["capabilities"]["edit"]["student_guidance_scale"] = 2.0
    found = {}
    for wanted in (False, True):
        config = config_of(raw | method, cuda_graphs=wanted)
        trainer = Trainer(config, build(config))
        found[wanted] = [trainer.update() for _ in range(3)]
    for plain, static in zip(found[False], found[True], strict=True):
        assert static["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-5)  # a policy loss on policy is 0
        assert static["network_evaluations"] - static["padding"] == plain["network_evaluations"]
        assert "padding" not in plain


# ---------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def compilations():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    limit = torch._dynamo.config.recompile_limit
    yield CompileCounter()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize("family", ["dit", pytest.param("sd3", marks=pytest.mark.slow)])
def test_blocks_are_compiled_a_few_times_whatever_the_batch(models, compilations, family):
    """Once for the first size and once for all others; sd3's blocks with adapters in parts, those once each."""
    student, _, z, c = asked(models, family, family != "dit", 9)
    c, sigma = replace(c, source=None), torch.linspace(0.2, 1, 9)

    @torch.no_grad()
    def ask(n):
        return student(z[:n], sigma[:n], c[:n])

    expected = {n: ask(n) for n in range(1, 10)}
    compile_blocks(student, compilations)
    close(ask(3), expected[3])
    first = compilations.frame_count
    close(ask(4), expected[4])
    made = compilations.frame_count
    assert first == 1 if family == "dit" else first > 1
    assert made <= (2 if family == "dit" else 3) * first
    for n in (9, 2, 5, 7, 6, 8, 3):
        close(ask(n), expected[n])
    assert compilations.frame_count == made
    with constants({}):
        ask(5)
        with GraphSafe() if family == "dit" else nullcontext():  # runs as it is where it is looked at
            found = ask(3)
    close(found, expected[3])
    ask(4)
    assert compilations.frame_count == made


@pytest.mark.slow
def test_inductor_compiles_the_blocks(models):
    student, _, z, c = asked(models, "dit", False, 6)
    field, sigmas, until = (
        StaticField(student, student),
        sigma_grid(3, 3.0),
        torch.tensor([[3], [1], [2], [3], [2], [3]]),
    )
    expected, _ = rollout(field, z, replace(c, source=None), sigmas, until)
    compile_blocks(student)
    close(rollout(field, z, replace(c, source=None), sigmas, until)[0], expected, 1e-4)


# -------------------------------------------------------------------------------------------- on a real card


def on_a_card(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


UNTIL = torch.tensor([[3], [1], [2], [3]])


def on_cuda(models, family, lora=False):
    """(captured field, the same network asked as ever, noise, conditioning) of four samples."""
    student, combine, z, c = asked(models, family, lora, 4, "cuda")
    field = static_of(student, combine, c, capture=True)
    return field, field.field, z, c


def captured(field):
    return [graph for program in field.programs.values() for graph, _ in program.graphs.values()]


@on_a_card
@pytest.mark.parametrize(("family", "lora"), CASES)
@pytest.mark.parametrize("solver", StaticField.SOLVERS)
def test_captured_steps_are_those_of_the_plain_rollout(models, family, lora, solver):
    field, plain, z, c = on_cuda(models, family, lora)
    expected, _ = rollout(plain, z, c, sigma_grid(3, 3.0), UNTIL, solver)
    for _ in range(2):  # captured, then replayed
        close(rollout(field, z, c, sigma_grid(3, 3.0), UNTIL, solver)[0], expected, 1e-4)
    assert field.reason is None
    assert captured(field)


@on_a_card
@pytest.mark.parametrize("lora", [False, True])
def test_a_replay_sees_weights_that_changed_in_place(models, lora):
    field, plain, z, c = on_cuda(models, "sd3", lora)
    before, _ = rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    made = captured(field)
    drawn(field.networks[0])
    expected, _ = rollout(plain, z, c, sigma_grid(3, 3.0), UNTIL)
    close(rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)[0], expected, 1e-4)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    assert captured(field) == made


@on_a_card
def test_weights_cast_by_autocast_are_not_kept(models):
    """In bf16 the products read casts of the float32 weights, which every replay makes anew."""
    student, _, z, c = asked(models, "sd3", False, 4, "cuda")
    student.autocast = torch.bfloat16
    student.requires_grad_(True)  # what autocast keeps casts of
    field, c = StaticField(student, student, None, [student], capture=True), replace(c, guidance_scale=None)
    before, _ = rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    drawn(student)
    expected, _ = rollout(student, z, c, sigma_grid(3, 3.0), UNTIL)
    found, _ = rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    assert (found - expected).norm() < 0.1 * (before - expected).norm()


@on_a_card
def test_weights_that_moved_are_captured_anew(models):
    field, plain, z, c = on_cuda(models, "dit")
    rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    made, kept = captured(field), []
    with torch.no_grad():
        for p in field.networks[0].parameters():
            kept.append(p.data)  # such that the old place is not given to another
            p.data = 1.1 * p.data
            kept[-1].fill_(torch.nan)
    expected, _ = rollout(plain, z, c, sigma_grid(3, 3.0), UNTIL)
    close(rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)[0], expected, 1e-4)
    assert captured(field)
    assert not any(graph in made for graph in captured(field))


@on_a_card
def test_what_caches_have_dropped_is_still_there_for_a_replay(models):
    field, _, z, c = on_cuda(models, "klein")
    expected, _ = rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    for cached in caches_of_models():
        cached.cache_clear()
    torch.cuda.synchronize()
    rubbish = [torch.full((size,), torch.nan, device="cuda") for size in (8, 64, 256, 4096) for _ in range(200)]
    assert torch.equal(rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)[0], expected)
    del rubbish


@on_a_card
def test_a_capture_that_fails_leaves_the_stream_as_it_was(capsys):
    """The guard does not see a wait for the device; CUDA refuses it in a capture."""

    def waits(z, sigma, c):
        torch.cuda.synchronize()
        return plain(z, sigma, c)

    def plain(z, sigma, c):
        return z * (0.5 - 0.2 * z)

    c, stream = replace(mixed(3), source=None, guidance_scale=None).to("cuda"), torch.cuda.current_stream()
    z, sigmas, until = noise_of(3, 3, 2, 2).cuda(), sigma_grid(4), torch.full((3, 1), 4)
    expected, _ = rollout(plain, z, c, sigmas, until)
    close(rollout(StaticField(waits, waits, capture=True), z, c, sigmas, until)[0], expected)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    assert capsys.readouterr().err.count("without CUDA graphs") == 1
    field = StaticField(plain, plain, capture=True)  # and another is captured after it
    close(rollout(field, z, c, sigmas, until)[0], expected)
    assert captured(field)


@on_a_card
def test_replays_take_no_memory(models):
    field, _, z, c = on_cuda(models, "sd3", True)
    for _ in range(2):
        rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5):
        rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@on_a_card
def test_all_graphs_share_one_pool(models):
    """The graphs of four sizes reserve little more than the largest one's."""
    student, _, z, c = asked(models, "sd3", False, 4, "cuda")
    c = replace(c, guidance_scale=None)

    def reserved(until):
        field = StaticField(student, student, None, [student], capture=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        rollout(field, z, c, sigma_grid(4, 3.0), until)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert len(captured(field)) == len(until.unique())
        return torch.cuda.memory_reserved() - before

    reserved(torch.tensor([[4], [3], [2], [1]]))  # libraries' workspaces
    one, four = reserved(torch.full((4, 1), 4)), reserved(torch.tensor([[4], [3], [2], [1]]))
    assert four <= one + 4 * 2**21


@on_a_card
def test_a_stochastic_rollout_is_captured_too(models):
    field, plain, z, c = on_cuda(models, "sd3")
    sigmas = sigma_grid(3, 3.0).cuda()
    expected = sde_rollout(plain, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
    for _ in range(2):
        found = sde_rollout(field, z, c, sigmas, 0.7, torch.Generator().manual_seed(3))
        close(found[0], expected[0], 1e-3)
        close(found[1], expected[1], 1e-3)
    assert captured(field)


@on_a_card
@pytest.mark.slow
def test_compiled_blocks_are_captured(models):
    field, plain, z, c = on_cuda(models, "dit")
    expected, _ = rollout(plain, z, c, sigma_grid(3, 3.0), UNTIL)
    torch._dynamo.reset()
    compile_blocks(field.networks[0])
    for _ in range(2):
        close(rollout(field, z, c, sigma_grid(3, 3.0), UNTIL)[0], expected, 1e-3)
    assert field.reason is None
    assert captured(field)
    torch._dynamo.reset()
