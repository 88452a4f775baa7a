"""The methods: named rows of parts, with their source. A row is here once it has its oracle and passes the laws."""

import difflib
import inspect
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

from equipoise.balancing import BALANCERS
from equipoise.contracts import UserError, require
from equipoise.routing import SCORERS, SELECTORS


@dataclass(frozen=True)
class Method:
    """One way to balance.

    Attributes:
        name: what users type.
        summary: one sentence.
        source: the paper.
        scorer: key of ``SCORERS``.
        selector: key of ``SELECTORS``.
        balancers: keys of ``BALANCERS``, each with the settings that make it this method.
        settings: settings of the scorer and the selector that make it this method, as ``"part.setting"``.
        inferred: what the source leaves open and we chose; empty where the source is fully known.
    """

    name: str
    summary: str
    source: str
    scorer: str = "softmax"
    selector: str = "top_k"
    balancers: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    inferred: str = ""

    @property
    def causal(self) -> bool:
        """False where a token's experts depend on other tokens."""
        return SELECTORS[self.selector].causal

    @property
    def state(self) -> tuple[str, ...]:
        """The balancers whose state moves with the optimizer's steps."""
        return tuple(name for name in self.balancers if hasattr(BALANCERS[name], "update"))


METHODS = {
    method.name: method
    for method in (
        Method(
            "unbalanced",
            "Softmax top-k routing and nothing else: the baseline that collapses.",
            "Shazeer et al. 2017, arXiv 1701.06538, without noise and losses",
        ),
        Method(
            "switch",
            "A balancing loss per layer and micro-batch.",
            "Fedus et al. 2021, arXiv 2101.03961, eq. 4-6; with 1/K so that balance reads 1",
            balancers={"balance_loss": {"scope": "micro", "weight": 1e-2}},
        ),
        Method(
            "global_batch",
            "The same loss with loads counted over the global batch, which leaves room to specialise.",
            "Qiu et al. 2025, arXiv 2501.11873",
            balancers={"balance_loss": {"scope": "global", "weight": 8e-3}},
        ),
        Method(
            "loss_free",
            "No loss: a bias per expert steps against the load of the last step.",
            "Wang et al. 2024, arXiv 2408.15664, algorithm 1",
            scorer="sigmoid",
            balancers={"bias": {"rate": 1e-3}},
        ),
        Method(
            "quantile",
            "No loss and no step size: a bias per expert jumps to the quantile that gives it its share.",
            "Su 2026; Kimi K3 technical report, histogram form",
            scorer="sigmoid",
            balancers={"quantile": {}},
            inferred="Read second-hand; with padding the target counts real tokens only.",
        ),
        Method(
            "expert_choice",
            "Experts choose tokens, so loads are equal by construction; looks at later tokens.",
            "Zhou et al. 2022, arXiv 2202.09368",
            selector="expert_choice",
        ),
    )
}


def find(name: str) -> Method:
    """The method of this name. Fails: UserError that names the nearest."""
    if name not in METHODS:
        raise UserError(f"Unknown method {name!r}{_nearest(name, METHODS)}; there are {', '.join(METHODS)}.")
    return METHODS[name]


def parts_of(method: Method) -> dict[str, type]:
    """The classes of a method's scorer, selector and balancers, by name."""
    parts: dict[str, type] = {method.scorer: SCORERS[method.scorer], method.selector: SELECTORS[method.selector]}
    return parts | {name: BALANCERS[name] for name in method.balancers}


def build(
    method: Method, num_experts: int, settings: dict[str, Any]
) -> tuple[nn.Module, nn.Module, nn.ModuleDict, dict[str, Any]]:
    """Make a method's parts.

    Args:
        settings: by ``"part.setting"``, or by ``"setting"`` where only one part has it.
    Returns:
        Scorer, selector, balancers by name, and all settings as resolved, by ``"part.setting"``.
    Fails: UserError for a setting that no part has, or that several have.
    """
    parts = parts_of(method)
    known = {f"{name}.{key}": default for name, part in parts.items() for key, default in _settings_of(part).items()}
    resolved = known | method.settings
    resolved |= {f"{name}.{key}": value for name, given in method.balancers.items() for key, value in given.items()}
    given = [(_full_name(method.name, key, known), value) for key, value in settings.items()]
    twice = sorted({name for name, _ in given if [other for other, _ in given].count(name) > 1})
    require(not twice, f"Setting {', '.join(twice)} is given twice; give it once.")
    resolved |= dict(given)
    hints = {
        f"{name}.{key}": hint for name, part in parts.items() for key, hint in get_type_hints(part.__init__).items()
    }
    for name, value in given:
        require(_fits(value, hints[name]), f"{name}={value!r} must be {_words(hints[name])}.")
    own = {name: {key: resolved[f"{name}.{key}"] for key in _settings_of(part)} for name, part in parts.items()}
    made = {name: part(num_experts, **own[name]) for name, part in parts.items()}
    return made.pop(method.scorer), made.pop(method.selector), nn.ModuleDict(made), resolved


def _settings_of(part: type) -> dict[str, Any]:
    """A part's settings and their defaults: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(part).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a setting has the type that its part declares; a whole number serves as a number."""
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    return type(value) is hint


def _words(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "left out"}
    return " or ".join(names[each] for each in get_args(hint) or (hint,))


def defaults(method: Method) -> dict[str, Any]:
    """All settings of a method's parts, by ``"part.setting"``, as they are where nobody sets them."""
    return build(method, 2, {})[3]


def _full_name(method: str, key: str, known: dict[str, Any]) -> str:
    """``"part.setting"`` of a setting that may have been given without its part."""
    fits = [name for name in known if key in (name, name.split(".")[1])]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UserError(f"Setting {key!r} of method {method!r} is ambiguous: say {' or '.join(fits)}.")
    offers = f"it has {', '.join(known)}" if known else "it has none"
    raise UserError(f"Method {method!r} has no setting {key!r}{_nearest(key, known)}; {offers}.")


def _nearest(word: str, words: dict[str, Any]) -> str:
    """A hint at the word that was probably meant."""
    known = {name.rpartition(".")[2]: name for name in words} | dict.fromkeys(words) | {name: name for name in words}
    near = difflib.get_close_matches(word, known, n=1) or [name for name in known if name.startswith(word)]
    return f" (did you mean {known[near[0]]!r}?)" if near else ""
