"""Says which runs each table needs: a configuration, what differs from it in each row, and the evaluations they get."""

import json
from dataclasses import dataclass, field

SETTINGS = (
    *("A", "B", "C", "D", "E", "F", "ablations", "grid"),
    *("miniature", "miniature_grid", "miniature_ablations", "merge", "operators", "unseen"),
)

# What each method differs in from DanceOPD. Trajectories that are asked at every step are fewer to an update.
METHODS = {
    "joint": {"method": "joint"},
    "off_policy": {"method": "off_policy"},
    "off_policy_samples": {"method": "off_policy", "options.states_from": "sources"},
    "diffusion_opd": {"method": "diffusion_opd", "route": "round_robin", "training.batch_size": 32},
    "flow_opd": {"method": "flow_opd"},
    "flow_opd_attached": {"method": "flow_opd", "options.detach_advantage": False},
    "danceopd": {},
    "danceopd_fast": {"method": "danceopd_fast", "rollout.solver": "ab2", "rollout.num_inference_steps": 4},
}

QUICK = ("joint", "off_policy", "diffusion_opd", "flow_opd", "danceopd")  # weight merge, the sixth, needs no run

# What the grid on validation prompts chose (results/grid.json, `danceopd reproduce grid`).
LEARNING_RATES = dict.fromkeys(METHODS, 1e-3) | {
    "off_policy_samples": 1e-4,
    "diffusion_opd": 3e-4,
    "flow_opd": 3e-5,
    "flow_opd_attached": 3e-5,
}

GRID = (3e-4, 1e-3, 3e-3)

GRID_MORE = {  # where the best was the lowest
    "off_policy_samples": (1e-4,),
    "diffusion_opd": (1e-4,),
    "flow_opd": (1e-4, 3e-5),
    "flow_opd_attached": (1e-4, 3e-5),
}


def _data(method: str, size: int) -> dict:
    """Returns a method at its own learning rate with so many samples of each capability."""
    sizes = {f"capabilities.{name}.data.size": size for name in ("t2i", "edit")}
    return {**METHODS[method], **sizes, "training.learning_rate": LEARNING_RATES[method]}


ABLATIONS = {
    "default": {"danceopd": {}},
    "routing": {"soft": {"options.routing": "soft"}},
    "query": {bias: {"query.bias": bias} for bias in ("mid_t", "high_t", "uniform")},
    "queries": {f"k{k}": {"query.k": k} for k in (4, 16)},
    "rollout": {f"steps{n}": {"rollout.num_inference_steps": n} for n in (16, 20, 28)},
    "objective": {
        **{w: {"options.objective": w} for w in ("sigma_sqrt", "logit_normal", "mode", "cosmap", "kl")},
        **{m: {"method": m} for m in ("dmd", "sds", "consistency")},
        "clean": {"options.objective": "clean"},
        "clean_uniform": {"options.objective": "clean", "query.bias": "uniform"},
    },
    # How much the data of a capability matter to methods that start from it, and to ours, which needs prompts alone.
    "data": {
        f"{method}_{size}": _data(method, size)
        for size in (500, 2000, 20000)
        for method in ("joint", "off_policy", "danceopd")
        if (method, size) != ("danceopd", 2000)  # the default
    },
    # Students that begin as the mean of the sources instead of the base ("data" has these methods from the base).
    "start": {
        f"{method}_from_merge": {**METHODS[method], "student.init_from": "merge"}
        for method in ("danceopd", "danceopd_fast", "off_policy", "joint")
    },
    # Not at equal evaluations but at as many updates as the default makes of its own (340 of 64 samples).
    "updates": {
        f"{m}_updates": {
            **METHODS[m],
            "training.learning_rate": LEARNING_RATES[m],
            "training.max_steps": 340,
            "training.max_network_evaluations": 300_000,
        }
        for m in ("joint", "off_policy", "off_policy_samples")
    },
    "beyond": {
        "ab2_steps4": {"rollout.solver": "ab2", "rollout.num_inference_steps": 4},
        "ab2_steps8": {"rollout.solver": "ab2"},
        "steps4": {"rollout.num_inference_steps": 4},
        "pool2": {"method": "pooled", "options.visits": 2},
        "pool3": {"method": "pooled", "options.visits": 3},
        "adaptive_route": {"route": "adaptive"},
        "gap_query": {"query.bias": "gap"},
        "warm_start": {"options.warm_start": 0.1},
    },
}

# On the miniature: what each method differs in, and the conditions in which it can be trained. With "data" the
# capabilities' own pictures are at hand, with "prompts" their prompts alone (and the pictures to edit): there joint
# training and off-policy distillation learn from pictures that the sources draw, which cost evaluations too.
MINIATURE = {
    "joint": (("data",), {"method": "joint"}),
    "off_policy": (("data",), {"method": "off_policy"}),
    "joint_samples": (("prompts",), {"method": "joint"}),
    "off_policy_samples": (("prompts",), {"method": "off_policy", "options.states_from": "sources"}),
    "diffusion_opd": (
        ("data", "prompts"),
        {"method": "diffusion_opd", "route": "round_robin", "training.batch_size": 32},
    ),
    "flow_opd": (("data", "prompts"), {"method": "flow_opd"}),
    "danceopd": (("data", "prompts"), {}),
    "danceopd_fast": (  # its warm start matches the sources on the data's pictures
        ("data",),
        {"method": "danceopd_fast", "rollout.solver": "ab2", "rollout.num_inference_steps": 4},
    ),
}

# What the grid on validation prompts chose (results/miniature_grid.json, `danceopd reproduce miniature_grid`) for the
# rows that it has; the others take DanceOPD's rate.
MINIATURE_RATES = dict.fromkeys(MINIATURE, 2e-3) | {"flow_opd": 6e-4}

MINIATURE_GRID = {row: (2e-3, 6e-3) for row in MINIATURE if row != "joint_samples"}  # which takes joint's
MINIATURE_GRID["flow_opd"] = (6e-4, 2e-3, 6e-3)

# One change at a time there, for the defaults of the configurations of real models.
MINIATURE_ABLATIONS = {
    "danceopd": {},
    **{bias: {"query.bias": bias} for bias in ("mid_t", "high_t", "uniform")},
    "steps4": {"rollout.num_inference_steps": 4},
    "steps16": {"rollout.num_inference_steps": 16},
    "ab2_steps4": {"rollout.solver": "ab2", "rollout.num_inference_steps": 4},
    "warm_start": {"options.warm_start": 0.5},
    "no_average": {"training.ema_decay": 0.0},
    "more_t2i": {"capabilities.t2i.weight": 2.0},
    "adaptive_route": {"route": "adaptive"},
    "from_base": {"student.init_from": "base"},
}

# Every training there has these: a student that starts from the sources' mean learns in a fraction of the updates.
ON_MINIATURE = {"student.init_from": "merge", "training.precision": "fp32", "evaluation.times": 2}

TO_THE_BUDGET = {"training.max_steps": 100_000}  # so that the evaluations alone end a run, and lead its schedule

DRAWN_SAMPLES, DRAWN_STEPS = 2000, 16  # of each capability: pictures that a source draws, and solver steps of each

DRAWN_EVALUATIONS = 2 * DRAWN_SAMPLES * DRAWN_STEPS

# Looks' LoRAs into one: their numbers, what is trained, and the pictures that joint training draws with the LoRAs.
MERGE_COUNTS = (2, 4, 8)

MERGE_METHODS = {
    "danceopd": {"training.batch_size": 32, "rollout.solver": "ab2", "rollout.num_inference_steps": 4},
    "joint_samples": {"training.batch_size": 32},
}

MERGE_DRAWN = 2000

# Operators over the miniature's text-to-image source, which a student absorbs (docs/operators.md).
OPERATORS = {
    **{f"guided{scale}": {"sources.operator": {"guided": {"source": "t2i", "scale": scale}}} for scale in (2, 3)},
    **{
        name: {"sources.operator": {"guided": {"source": "t2i", "scale": 3, **more}}}
        for name, more in {
            "interval": {"interval": [0.2, 0.9]},
            "rescale": {"rescale": 0.7},
            "zero_star": {"zero_star": True},
            "apg": {"apg": {"eta": 0.0}},  # of any length: 2.5 is of other latents, and draws next to nothing here
        }.items()
    },
    "autoguided": {
        "sources.base": {},
        "sources.operator": {"autoguided": {"source": "t2i", "weak": "base", "scale": 2}},
    },
    "difference": {
        "sources.base": {},
        "sources.operator": {"difference": {"base": "base", "source": "t2i", "weight": 1.5}},
    },
    "skip_layers": {
        "sources.operator": {
            "guided": {
                "source": "t2i",
                "scale": 1,
                "skip_layers": {"layers": [1], "scale": 1.0, "interval": [0.5, 1.0]},
            }
        }
    },
    "by_sigma": {
        "sources.strong": {"guided": {"source": "t2i", "scale": 3}},
        "sources.operator": {"by_sigma": {"above": "strong", "below": "t2i", "sigma": 0.7}},
    },
    "mean": {
        "sources.base": {},
        "sources.strong": {"guided": {"source": "base", "scale": 3}},
        "sources.operator": {"mean": ["t2i", "strong"]},
    },
}

ABSORBED_SCALES = (1, 2, 3)  # of guidance at inference, beside those that are absorbed

UNTRAINED = "untrained"  # the run that measures what needs no training

# Where the edit source never saw half of the objects: how many text-to-image samples a student gets to an edit, and
# whether the pictures that it edits show all objects, of which the source knows half.
UNSEEN = {
    "one_to_one": {},
    "two_to_one": {"capabilities.t2i.weight": 2.0},
    "one_to_two": {"capabilities.t2i.weight": 0.5},
    "all_objects": {
        "capabilities.edit-half.weight": 0.0,
        "capabilities.edit": {
            **{"source": "edit", "task": "edit"},
            "data": {"prepared": "runs/unseen/cache/manifest.jsonl"},
        },
    },
}

TRAINING_SCALES = (1, 2, 3, 5, 7)  # alpha of setting D

INFERENCE_SCALES = (1, 2, 3, 5, 7)  # beta


@dataclass(frozen=True)
class Budget:
    """Network evaluations of a run, of one of D and F, of the ablations and grids, of the miniature and of a merge
    there; seeds."""

    name: str
    main: int
    short: int
    ablation: int
    miniature: int
    merge: int
    seeds: int


BUDGETS = {
    "quick": Budget("quick", main=400_000, short=200_000, ablation=100_000, miniature=100_000, merge=50_000, seeds=1),
    "paper": Budget("paper", main=600_000, short=200_000, ablation=100_000, miniature=200_000, merge=200_000, seeds=3),
}


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        setting: The table.
        row: Its line.
        seed: Of the training.
        config: The file of the setting.
        overrides: Of the configuration.
        after: The run whose student it begins as, if any.
    """

    setting: str
    row: str
    seed: int
    config: str
    overrides: dict = field(default_factory=dict)
    after: str | None = None  # the run whose student this one starts from

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.row}/seed{self.seed}"

    @property
    def evaluations(self) -> int:
        """The network evaluations of its training."""
        return self.overrides.get("training.max_network_evaluations", 0)

    @property
    def on_miniature(self) -> bool:
        """Whether its model is the miniature and not an embedded network."""
        return self.config.startswith("miniature")


def override_lines(overrides: dict) -> list[str]:
    """Returns overrides as `parse_config` takes them: "key=value" with the value in JSON."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


# Long: it has an entry for each table.
def runs(setting: str, budget: Budget, seeds: int) -> list[Run]:
    """Returns the runs of one table, in the order in which they are made. Raises KeyError for an unknown table."""
    made = {
        "A": lambda: _methods("A", "setting_a", budget),
        "B": lambda: _methods("B", "setting_b", budget),
        "C": lambda: [("danceopd", "setting_c", {}, budget.main)],
        "D": lambda: [
            (f"alpha{alpha}", "setting_d", {"sources.cfg.guidance_scale": alpha}, budget.short)
            for alpha in TRAINING_SCALES
        ],
        "E": lambda: [("danceopd", "setting_e", {}, budget.main)],
        "F": lambda: [
            ("danceopd", "setting_f", {}, budget.short),
            ("without_self", "setting_f", {"capabilities.t2i.weight": 0, "capabilities.edit.weight": 0}, budget.short),
        ],
        "ablations": lambda: [
            (row, "setting_a", overrides, budget.ablation)
            for axis in ABLATIONS.values()
            for row, overrides in axis.items()
        ],
        "grid": lambda: [
            (f"{row}@{rate:g}", "setting_a", {**overrides, "training.learning_rate": rate}, budget.ablation)
            for row, overrides in METHODS.items()
            for rate in (*GRID, *GRID_MORE.get(row, ()))
        ],
        "miniature": lambda: [
            (
                row,
                "miniature",
                {**ON_MINIATURE, **TO_THE_BUDGET, "training.learning_rate": MINIATURE_RATES[row], **overrides},
                budget.miniature - (DRAWN_EVALUATIONS if row == "joint_samples" else 0),
            )
            for row, (_, overrides) in MINIATURE.items()
        ],
        "miniature_ablations": lambda: [
            (
                row,
                "miniature",
                {
                    **ON_MINIATURE,
                    **TO_THE_BUDGET,
                    "training.learning_rate": MINIATURE_RATES["danceopd"],
                    "evaluation.times": 1,
                    **overrides,
                },
                budget.miniature // 4,
            )
            for row, overrides in MINIATURE_ABLATIONS.items()
        ],
        "merge": lambda: [
            (
                f"{method}_{count}",
                "miniature",
                {
                    "method": method,
                    "loras": count,
                    "training.learning_rate": 6e-3,
                    **MERGE_METHODS.get(method, {}),
                },
                {UNTRAINED: 0, "danceopd": budget.merge}.get(method, budget.merge - MERGE_DRAWN * DRAWN_STEPS),
            )
            for count in MERGE_COUNTS
            for method in (UNTRAINED, *MERGE_METHODS)
        ],
        "operators": lambda: [
            (
                row,
                "miniature_operators",
                {"training.learning_rate": 2e-3, "evaluation.times": 0, **overrides},
                budget.miniature // 4,
            )
            for row, overrides in OPERATORS.items()
        ],
        "unseen": lambda: [
            (
                row,
                "miniature_unseen",
                {**ON_MINIATURE, "training.learning_rate": 2e-3, "evaluation.times": 0, **overrides},
                budget.miniature // 2,
            )
            for row, overrides in UNSEEN.items()
        ],
        "miniature_grid": lambda: [
            (
                f"{row}@{rate:g}",
                "miniature",
                {**ON_MINIATURE, **MINIATURE[row][1], "training.learning_rate": rate, "evaluation.times": 1},
                budget.miniature // 8,
            )
            for row, rates in MINIATURE_GRID.items()
            for rate in rates
        ],
    }[setting]()
    result = []
    for seed in range(1 if setting.endswith("grid") else seeds):
        for row, config, overrides, evaluations in made:
            common = {
                "training.seed": seed,
                "training.learning_rate": LEARNING_RATES.get(row, LEARNING_RATES["danceopd"]),
                "training.max_network_evaluations": evaluations,
                "evaluation.times": 6 if evaluations == budget.main else 2,
            }
            after = f"A/danceopd/seed{seed}" if setting == "F" else None
            result.append(Run(setting, row, seed, f"{config}.yaml", {**common, **overrides}, after))
    return result


def _methods(setting: str, config: str, budget: Budget) -> list[tuple]:
    names = QUICK if budget.name == "quick" else METHODS
    return [(name, config, METHODS[name], budget.main) for name in names]
