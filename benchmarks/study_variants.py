"""What the study compares: each variant is the base with a few settings changed, under the question it answers.

The paper's numbers (PSDiff, arXiv:2309.11125) stand beside: mAP on CUHK-SYSU at K = 8 where nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..models.solvers import SamplerOptions

STEPS = (1, 2, 4, 8)
SEEDS = (0, 1)
BASE = "base"

# How the base departs from the paper's text, found by what lets a small model learn at all; each is a question.
BASE_RECIPE: dict[str, Any] = {
    "matching": "simota",
    "padding": "mixed",
    "num_proposals": 40,
    "dense_iou": 0.5,
    "dense_max_timestep": 150,
    "embedding_dropout": 0.5,
    "embedding_error": 0.7,
}
# One group of proposals as in the paper, of the size of the base's two.
ONE_GROUP = {"dense_iou": None, "dense_max_timestep": None, "num_proposals": 80}


@dataclass(frozen=True)
class Variant:
    """One setting of a question; network: changes to the base's PSDiffConfig, recipe: to its Recipe."""

    name: str
    network: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    """What the paper (or the public code it descends from) says of it."""


@dataclass(frozen=True)
class Question:
    """Variants that answer one question; the base is always among them."""

    title: str
    base_is: str
    """What the base stands for in this question."""
    variants: tuple[Variant, ...]
    base_paper: str = ""
    reference: str = BASE
    """The variant that the others are compared with, where it is not the base."""


QUESTIONS: tuple[Question, ...] = (
    Question(
        "Parts of the collaborative layer: self-attention (SA), dynamic convolution (DC), cross-attention (CA)",
        "SA + DC + CA",
        (
            Variant(
                "no-parts",
                {"self_attention": "none", "dynamic_conv": False, "cross_attention": False},
                paper="91.3 (none)",
            ),
            Variant("sa-only", {"dynamic_conv": False, "cross_attention": False}, paper="92.5 (SA)"),
            Variant("sa-dc", {"cross_attention": False}, paper="93.8 (SA + DC)"),
            Variant("sa-ca", {"dynamic_conv": False}, paper="94.3 (SA + CA)"),
            Variant("ca-only", {"self_attention": "none", "dynamic_conv": False}),
        ),
        base_paper="95.1 (all)",
    ),
    Question(
        "What box and class are computed from",
        "embedding, features and pooled region",
        (
            Variant("joint", {"head": "joint"}),
            Variant("cascaded", {"head": "cascaded"}, paper="95.1 (embedding alone, cascaded)"),
            Variant("parallel", {"head": "parallel"}, paper="93.5 (features, parallel)"),
        ),
    ),
    Question(
        "Diffusion or plain distillation",
        "diffusion",
        (Variant("distillation", {}, {"pure_noise": True, **ONE_GROUP}, paper="94.0 (HHCL teacher)"),),
        base_paper="95.1 (HHCL teacher)",
    ),
    Question(
        "Who answers for whom (one group of proposals)",
        "SimOTA, a second group with little noise, overlapping inputs positive",
        (
            Variant("hungarian", {}, {"matching": "hungarian", **ONE_GROUP}, paper="the paper's choice"),
            Variant(
                "simota",
                {},
                {"matching": "simota", **ONE_GROUP},
                paper="DiffusionDet: better than one-to-one",
            ),
            Variant("origin", {}, {"matching": "origin", **ONE_GROUP}),
        ),
    ),
    Question(
        "How people are padded to proposals",
        "half repeated, half gaussian",
        (Variant("repeat", {}, {"padding": "repeat"}, paper="the paper's choice"),),
    ),
    Question(
        "Whether the network must look: what enters as e_t",
        "Wiener gain, pure noise for half, wrong for the rest",
        (
            Variant("image-only", {}, {"embedding_dropout": 1.0}, paper="boxes alone are diffused"),
            Variant(
                "plain-embedding",
                {"embedding_gain": "none"},
                {"embedding_dropout": 0.0, "embedding_error": 0.0},
                paper="the paper's choice",
            ),
        ),
    ),
    Question(
        "Self-attention among the tokens of a region or among the proposals",
        "intra (tokens)",
        (Variant("inter", {"self_attention": "inter"}, paper="Sparse R-CNN's choice"),),
    ),
    Question(
        "Positions inside the region, and how 49 become one, where nothing else keeps positions",
        "joint head: position code, squeeze to 24 channels and flatten",
        (
            Variant("joint-no-code", {"head": "joint", "position_code": False}),
            Variant("joint-mean", {"head": "joint", "reduction": "mean"}),
            Variant(
                "joint-no-code-mean",
                {"head": "joint", "position_code": False, "reduction": "mean"},
                paper="the text taken literally",
            ),
            Variant("joint-flatten", {"head": "joint", "reduction": "linear"}, paper="Sparse R-CNN's choice"),
        ),
        reference="joint",
    ),
    Question(
        "Signal scale of boxes (s1)",
        "s1 = 2",
        (
            Variant("s1-1", {"box_scale": 1.0}, paper="94.3 (s1 = 1)"),
            Variant("s1-3", {"box_scale": 3.0}, paper="94.5 (s1 = 3)"),
        ),
        base_paper="95.1 (s1 = 2)",
    ),
    Question(
        "Signal scale of embeddings (s2)",
        "s2 = 3",
        (
            Variant("s2-1", {"embedding_scale": 1.0}, paper="94.2 (s2 = 1)"),
            Variant("s2-4", {"embedding_scale": 4.0}, paper="94.4 (s2 = 4)"),
        ),
        base_paper="95.1 (s2 = 3)",
    ),
    Question(
        "The text taken literally, all at once",
        "all of the base's departures",
        (
            Variant(
                "literal",
                {
                    "head": "cascaded",
                    "embedding_gain": "none",
                    "position_code": False,
                    "reduction": "mean",
                    "grid_power": 1.0,
                },
                {
                    "matching": "hungarian",
                    "padding": "repeat",
                    "embedding_dropout": 0.0,
                    "embedding_error": 0.0,
                    **ONE_GROUP,
                },
            ),
        ),
    ),
)


@dataclass(frozen=True)
class Sampling:
    """One way to sample from the trained base."""

    name: str
    options: SamplerOptions
    grid_power: float | None = None
    """Another grid than the base's; 1 is the paper's."""
    num_proposals: int | None = None
    paper: str = ""


# DiffusionDet renews at 0.5; scores of a model trained for minutes are lower.
RENEWAL_SCORE = 0.2

PLAIN_SAMPLING = Sampling("**DDIM** (base)", SamplerOptions())
SAMPLINGS: tuple[Sampling, ...] = (
    Sampling("even grid", SamplerOptions(), grid_power=1.0, paper="the paper's grid"),
    Sampling("ensemble", SamplerOptions(ensemble=True), paper="DiffusionDet: most of its gain"),
    Sampling("renewal", SamplerOptions(renewal=RENEWAL_SCORE), paper="DiffusionDet: on"),
    Sampling("renewal + ensemble", SamplerOptions(renewal=RENEWAL_SCORE, ensemble=True)),
    Sampling("fresh noise each step", SamplerOptions(refresh=True)),
    Sampling("fresh noise + ensemble", SamplerOptions(refresh=True, ensemble=True)),
    Sampling("eta 1", SamplerOptions(eta=1.0), paper="DiffusionDet: negligible"),
    Sampling("dpm2m", SamplerOptions(solver="dpm2m"), paper="+.0 +.3 +.2 +.0 at K = 1, 2, 4, 8"),
    Sampling("dpm2s", SamplerOptions(solver="dpm2s")),
    Sampling("dpm++2m", SamplerOptions(solver="dpm++2m"), paper="+.0 +.0 +.1 -.1 at K = 1, 2, 4, 8"),
    Sampling("2x the proposals", SamplerOptions(), num_proposals=120, paper="a control for K"),
)


def variants() -> tuple[Variant, ...]:
    """Every variant once, the base first."""
    return (Variant(BASE), *(variant for question in QUESTIONS for variant in question.variants))
