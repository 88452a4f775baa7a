"""The methods: named rows of parts, with their source. A row is here once it has its oracle and passes the laws."""

from equipoise.building import Method
from equipoise.errors import UserError
from equipoise.nearest import nearest

METHODS = {
    method.name: method
    for method in (
        Method(
            "unbalanced",
            "Softmax top-k routing and nothing else: the baseline that collapses.",
            "Shazeer et al. 2017, arXiv 1701.06538, without noise and losses",
            moves="nothing",
            traffic="none",
            cost="nothing",
            use="you need the baseline",
            avoid="the model is to be kept",
        ),
        Method(
            "switch",
            "A balancing loss per layer and micro-batch.",
            "Fedus et al. 2021, arXiv 2101.03961, eq. 4-6; with 1/K so that balance reads 1",
            moves="the router, by a loss per micro-batch",
            traffic="none",
            cost="a mean over the tokens",
            use="each micro-batch should be even",
            avoid="a micro-batch is a few sequences",
            balancers={"balance_loss": {"scope": "micro", "weight": 1e-2}},
        ),
        Method(
            "global_batch",
            "The same loss with loads counted over the global batch, which leaves room to specialise.",
            "Qiu et al. 2025, arXiv 2501.11873",
            moves="the router, by a loss over the global batch",
            traffic="E integers per micro-batch",
            cost="a mean over the tokens",
            use="you pre-train, and want experts to specialise",
            avoid="ranks run unequal numbers of micro-batches",
            balancers={"balance_loss": {"scope": "global", "weight": 8e-3}},
        ),
        Method(
            "loss_free",
            "No loss: a bias per expert steps against the load of the last step.",
            "Wang et al. 2024, arXiv 2408.15664, algorithm 1",
            moves="a bias per expert, by fixed steps",
            traffic="E integers",
            cost="an addition per score",
            use="the task's gradient should be the only one",
            avoid="runs are short, or data shift fast",
            scorer="sigmoid",
            balancers={"bias": {"rate": 1e-3}},
        ),
        Method(
            "quantile",
            "No loss and no step size: a bias per expert jumps to the quantile that gives it its share.",
            "Su 2026; Kimi K3 technical report, histogram form",
            moves="a bias per expert, to a quantile",
            traffic="E * 1000 integers",
            cost="a histogram of the scores",
            use="as `loss_free`, without a step size",
            avoid="an expert gets few tokens per step",
            scorer="sigmoid",
            balancers={"quantile": {}},
            inferred="Read second-hand; with padding the target counts real tokens only.",
        ),
        Method(
            "expert_choice",
            "Experts choose tokens, so loads are equal by construction; looks at later tokens.",
            "Zhou et al. 2022, arXiv 2202.09368",
            moves="nothing: experts choose",
            traffic="none",
            cost="a top-C per expert",
            use="the model sees whole sequences: encoders, diffusion",
            avoid="the model generates left to right",
            selector="expert_choice",
        ),
    )
}


def find(name: str) -> Method:
    """The method of this name. Fails: UserError that names the nearest."""
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}.")
    return METHODS[name]
