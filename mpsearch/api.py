"""The functions of the public interface, each usable alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch import registry
from mpsearch.adaptive import Adaptive
from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format, parse_formats
from mpsearch.front import Measurement, ParetoFront
from mpsearch.layer import Layers, check_layers
from mpsearch.pairs import PairTable
from mpsearch.plan import BitPlan
from mpsearch.sampling import score_within
from mpsearch.scoring import check_covers, check_menu, check_parts, mark_unreached
from mpsearch.spec import StudySpec
from mpsearch.studying import Study
from mpsearch.tables import CostTable, SensitivityTable

if TYPE_CHECKING:
    from mpsearch.model.model import Model


def wrap(module: Any, *, loss: Any = None, logits: Any = None, name: str = "") -> Model:
    """Make a torch module usable everywhere a model is asked for.

    Args:
        module: a torch module. It is set to evaluation mode and float32; its weights are never left changed.
        loss: ``loss(module, batch)`` -> scalar tensor, mean per sample; what gradients are taken of.
        logits: ``logits(module, batch)`` -> (samples, classes) or (samples, positions, classes) tensor.
        name: what to call it.

    Raises:
        InputError: weights that are missing (E410), quantised (E411) or not finite (E412).

    >>> import torch
    >>> wrap(torch.nn.Linear(2, 2), name="toy").name
    'toy'
    """
    from mpsearch.model.model import Model

    return Model(module, loss=loss, logits=logits, name=name)


def layers(model: Any, batch: Any = None, ties: Any = "auto", *, caches: bool = False) -> Layers:
    """Find what can be decided in a model; ``.excluded`` says what cannot, and why.

    Args:
        model: a Hugging Face folder, a torch module or `wrap`'s result.
        batch: what to run once to count multiply-adds and find fused layers; language models need none.
        ties: ``auto``, ``none``, or lists of layer names or patterns, one list per tie.
        caches: also list the KV caches, keys and values apart.

    >>> import torch
    >>> found = layers(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8)))
    >>> [layer.name for layer in found], len(found.excluded)
    (['0'], 3)
    """
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model

    return find_layers(as_model(model), () if batch is None else [batch], ties, caches=caches)


def batches(model: Any, text: str, *, tokens: int = 8192, length: int = 256, batch_size: int = 2) -> Any:
    """Cut a text into batches of tokens for a model folder.

    Args:
        model: the folder, whose tokenizer is used.
        text: a ``.txt`` or ``.jsonl`` file, or ``stdlib:calibration``, ``stdlib:validation``.
        tokens: how many tokens to use.
        length: tokens of one sequence.
        batch_size: sequences of one batch.

    Returns:
        Batches ``{"input_ids": (sequences, length)}``.
    """
    from mpsearch.bundled import resolve_model
    from mpsearch.model.data import load_batches, load_tokenizer
    from mpsearch.model.source import Source

    tokenizer = load_tokenizer(resolve_model(str(model), Path.cwd()))
    return load_batches(Source(text), tokenizer, length=length, tokens=tokens, batch_size=batch_size)


def score(
    model: Any,
    batches: Sequence[Any],
    formats: Sequence[str],
    estimator: str = "divergence",
    *,
    layers: Layers | None = None,
    streaming: bool = False,
    spill: Path | None = None,
    budgets: Sequence[str] = (),
    doubt: float = 0.02,
    **settings: Any,
) -> SensitivityTable:
    """Predict the loss increase of every decision in every format.

    Args:
        model: a Hugging Face folder, a torch module or `wrap`'s result; left as it was.
        batches: calibration batches.
        formats: the menu.
        estimator: name of the estimator.
        layers: what to score, such as the parts that `split` makes; found when left out.
        streaming: load one block of a folder's model at a time (`mpsearch.model.streaming.Stream`): the same scores,
            for estimators that look at one layer or block, or at gradients of weights.
        spill: where hidden states go while streaming when they do not fit; the system's temporary folder when left out.
        budgets: what plans the scores are for, such as ``weights <= 4 bits``: after a few batches only the decisions
            whose format the noise could still change are scored further (`mpsearch.adaptive.Adaptive`); what was spent
            is in the table's ``source`` under ``adaptive``.
        doubt: with budgets: the expected regret of the plan, as a share of its predicted loss, that is let be.
        settings: of the estimator.

    Returns:
        (L, F) values with standard errors; lower is better.

    Raises:
        InputError: the estimator cannot score this model or these layers (E506), or there is no data (E501), or too
            little of it to sample from (E504), or its batches cannot be averaged (E515), or the model gives two answers
            to one batch (E513).
        InfeasibleError: budgets that no plan keeps (E201, E203).
    """
    from mpsearch.model.batches import check_batches
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model
    from mpsearch.model.threads import one_thread

    if streaming and budgets:
        raise InputError(
            "E113", "scores are sampled for budgets, or streamed, not both", advice="leave one of them out"
        )
    if streaming:
        return _score_streamed(model, batches, formats, estimator, layers, spill, settings)
    found = as_model(model)
    chosen = registry.make("estimators", estimator, **settings)
    refusal = chosen.refuses(found)
    if refusal:
        raise InputError("E506", f"estimator '{estimator}' cannot score '{found.name}': {refusal}")
    menu = parse_formats(formats)
    check_covers(estimator, menu)
    looks = "data" in getattr(chosen, "needs", ("data",))
    check_batches(batches, chosen.by if looks else "", tokens=found.tokens)
    if not batches and looks:
        raise InputError("E501", "there are no calibration batches")
    with one_thread():
        caches = any(fmt.family == "kv" for fmt in menu)
        what = layers if layers is not None else find_layers(found, batches or (), caches=caches)
        check_parts(estimator, what)
        check_menu(what, menu)
        _check_answers(found, batches, layers)
        found.calibrate(batches, what)
        if budgets:
            sampling = Adaptive(tolerance=doubt)
            return score_within(chosen, found, batches, what, menu, budgets, sampling).table
        table: SensitivityTable = chosen.score(found, batches, what, menu)
    return mark_unreached(table, what, menu, chosen)


def _check_answers(model: Model, batches: Sequence[Any], layers: Layers | None) -> None:
    """Refuse a model that gives two answers to one batch, where layers were given: finding them looks at it as well."""
    from mpsearch.model.repeatable import check_repeatable

    if layers is not None and batches and (model.has_logits or model.has_loss):
        model.memo("repeatable", batches[0], lambda: check_repeatable(model, batches[0]))


def _score_streamed(
    model: Any,
    batches: Sequence[Any],
    formats: Sequence[str],
    estimator: str,
    layers: Layers | None,
    spill: Path | None,
    settings: Mapping[str, Any],
) -> SensitivityTable:
    from mpsearch.model.batches import check_batches
    from mpsearch.model.streaming import Stream, refusal

    if not isinstance(model, (str, Path)):
        raise InputError("E409", f"streaming reads a model folder, got {type(model).__name__}", advice="give a folder")
    chosen = registry.make("estimators", estimator, **settings)
    menu = parse_formats(formats)
    check_covers(estimator, menu)
    if layers is not None:
        check_parts(estimator, layers)
    if reason := refusal(chosen, menu):
        raise InputError("E506", reason, advice="score it in memory: streaming=False")
    looks = "data" in getattr(chosen, "needs", ("data",))
    check_batches(batches, chosen.by if looks else "", tokens=True)
    if not batches and looks:
        raise InputError("E501", "there are no calibration batches")
    table = Stream(model, spill=spill).score(chosen, batches, menu, layers)
    return mark_unreached(table, layers or (), menu, chosen)


def interactions(
    model: Any,
    batches: Sequence[Any],
    formats: Sequence[str],
    layers: Layers | None = None,
    **settings: Any,
) -> PairTable:
    """Predict what pairs of decisions do together beyond what each does alone.

    Args:
        model: a Hugging Face folder, a torch module or `wrap`'s result; left as it was.
        batches: calibration batches.
        formats: the menu.
        layers: what to score; found when left out.
        settings: ``how`` (``gauss_newton``, to second order, or ``measured``), ``band`` (only decisions at most so many
            apart), ``sampled`` (only so many pairs, drawn with ``seed``), ``against`` (``kl`` or ``loss``), ``sketch``,
            ``product`` and ``step``.

    Returns:
        Sparse pairs with standard errors; ``.singles`` is the table of the single cells on the same samples.

    Raises:
        InputError: a model without logits or loss, or formats that are not seen (E506); settings that make no sense
            (E107, E113); no data (E501).
    """
    from mpsearch.model.batches import check_batches
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model
    from mpsearch.model.threads import one_thread

    found = as_model(model)
    chosen = registry.make("interactions", "pairwise", **settings)
    refusal = chosen.refuses(found)
    if refusal:
        raise InputError("E506", f"interactions of '{found.name}' cannot be found: {refusal}")
    menu = parse_formats(formats)
    check_batches(batches, "batch", tokens=found.tokens)
    if layers is not None:
        check_layers(layers)
    if not batches:
        raise InputError("E501", "there are no calibration batches")
    with one_thread():
        caches = any(fmt.family == "kv" for fmt in menu)
        what = layers if layers is not None else find_layers(found, batches, caches=caches)
        _check_answers(found, batches, layers)
        found.calibrate(batches, what)
        table: PairTable = chosen.score(found, batches, what, menu)
    return table


def cost(model: Any, formats: Sequence[str], target: str = "bytes", *, batch: Any = None, **settings: Any) -> CostTable:
    """Say what every decision costs in every format.

    Args:
        model: as for `layers`, or its result.
        formats: the menu.
        target: ``bytes`` (as the native export stores it; ``bytes@gptq``, ``bytes@awq``, ``bytes@compressed-tensors``,
            ``bytes@gguf`` as these do), ``kv`` (settings ``context`` and ``batch``), ``bops``, or ``latency:ENGINE``,
            which times that engine's kernels here (setting ``workload``, such as ``tpot at context 512``).
        batch: as for `layers`.
        settings: of the target.

    >>> import torch
    >>> cost(torch.nn.Linear(64, 8, bias=False), ["int4-g64"]).value.tolist()
    [[272.0]]
    """
    found = model if isinstance(model, Layers) else layers(model, batch)
    menu = parse_formats(formats)
    check_menu(found, menu)
    if target.startswith("latency:"):
        from mpsearch.hardware.requests import latency_here

        return latency_here(found, menu, target.removeprefix("latency:"), **settings)
    table: CostTable = registry.make("targets", target, **settings).cost(found, menu)
    return table


def measure(
    model: Any,
    plan: BitPlan | Mapping[str, str],
    data: Sequence[Any],
    *,
    label: str = "",
    calibration: Sequence[Any] = (),
    layers: Layers | None = None,
) -> Measurement:
    """Run a plan for real: KL divergence from the original model and loss on the data, with standard errors.

    Weights, activations and KV caches are all rounded as the plan says.

    Args:
        model: a Hugging Face folder, a torch module or `wrap`'s result; its weights are put back bit for bit.
        plan: a plan, or name of a layer or decision -> format, for all of them. Of a layer whose parts are planned,
            what is in none of them stays as it is.
        data: validation batches.
        label: what to call it.
        calibration: batches for formats that are made from data (``-gptq``, ``-fisher``, ``-static``).
        layers: what the names mean, such as the parts that `split` makes; found when left out.

    >>> import torch
    >>> model = wrap(torch.nn.Sequential(torch.nn.Linear(8, 4)), logits=lambda module, batch: module(batch))
    >>> measure(model, {"0": "int8-channel@int8-token"}, [torch.ones(2, 8)]).loss < 1e-3
    True
    """
    from mpsearch.model.batches import check_batches
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model
    from mpsearch.model.threads import one_thread

    found = as_model(model)
    check_batches(data, tokens=found.tokens)
    check_batches(calibration, tokens=found.tokens)
    if not data:
        raise InputError("E501", "there are no batches to measure on")
    if layers is not None:
        check_layers(layers)
    with one_thread():
        _check_answers(found, data, plan.layers if isinstance(plan, BitPlan) else layers)
        if not isinstance(plan, BitPlan):
            caches = any(str(fmt).startswith("kv-") for fmt in plan.values())
            what = layers if layers is not None else find_layers(found, data, caches=caches)
            plan = BitPlan(what, _formats_of(plan, what))
        found.calibrate(calibration, plan.layers)
        measurement: Measurement = registry.make("evaluators", "kl").measure(found, plan, data, label)
    return measurement


def _formats_of(plan: Mapping[str, str], layers: Layers) -> dict[str, Format]:
    """Read a plan whose names are those of layers or of decisions."""
    members = {layer.name: [layer.name] for layer in layers}
    members |= {row.name: [layer.name for layer in row.layers] for row in layers.decisions}
    unknown = [name for name in plan if name not in members]
    found = {member: Format.parse(str(fmt)) for name, fmt in plan.items() for member in members.get(name, ())}
    missing = [layer.name for layer in layers if layer.name not in found]
    if unknown:
        close = did_you_mean(unknown[0], members)
        raise InputError("E302", f"the model has no layer of the plan's name '{unknown[0]}'{close}")
    if missing:
        raise InputError(
            "E302",
            f"the plan leaves out {len(missing)} layers, first '{missing[0]}'",
            advice=f"name all; bf16 leaves one as it is: '{missing[0]}': 'bf16'",
        )
    return found


def study(name: str = "", *, base: Path | None = None, **settings: Any) -> Study:
    """Set up a study; ``run()`` computes what is missing, and a second ``run()`` nothing.

    Args:
        name: name of the study; the model's name when empty.
        base: folder that relative paths start from.
        settings: the fields of `StudySpec`; ``model``, ``calibration`` and ``budgets`` are needed. ``model`` may also
            be a torch module or `wrap`'s result: ``calibration`` and ``validation`` are then lists of batches, the
            last quarter of the calibration batches when there is no validation.

    Raises:
        InputError: settings that make no sense; each error names its setting.
        StorageError: the database cannot be opened.
    """
    model = settings.get("model", "")
    if not isinstance(model, (str, Path)):
        data = {key: settings.pop(key, None) for key in ("model", "calibration", "validation")}
        budgets = settings.pop("budgets", ())
        settings["name"] = name
        return _study_of_module(model, data["calibration"] or [], data["validation"], budgets, settings)
    spec = StudySpec.of(base, name=name, **settings)
    return Study(spec, registry.make("stores", "sql", url=spec.storage))


@dataclass(frozen=True)
class Found:
    """What `search` found.

    Attributes:
        plan: the plan for the budget.
        front: the measured front.
        study: the study behind both.
    """

    plan: BitPlan
    front: ParetoFront
    study: Study


def search(
    model: Any, calibration: Any, budget: str | Sequence[str], *, validation: Any = None, **settings: Any
) -> Found:
    """Find the plan of least predicted loss within a budget, and measure it against uniform plans.

    Args:
        model: a Hugging Face folder, a torch module or `wrap`'s result.
        calibration: for a folder, a text; for a module, a list of batches.
        budget: one budget or several.
        validation: as ``calibration``; a module's last quarter of batches when left out.
        settings: further fields of `StudySpec`. Without ``storage`` nothing is kept.

    Returns:
        Plan, front and study.
    """
    settings.setdefault("storage", "sqlite://")
    if isinstance(model, (str, Path)):
        held_out = {} if validation is None else {"validation": validation}
        found = study(model=str(model), calibration=calibration, budgets=budget, **held_out, **settings)
    else:
        found = _study_of_module(model, calibration, validation, budget, settings)
    front = found.run()
    return Found(found.plans[0].plan, front, found)


def _study_of_module(
    model: Any, calibration: Sequence[Any], validation: Sequence[Any] | None, budget: Any, settings: dict[str, Any]
) -> Study:
    from mpsearch.evaluate.workbench import Workbench
    from mpsearch.model.batches import check_batches
    from mpsearch.model.digest import digest_of
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model

    found = as_model(model)
    calibration = list(calibration)
    if validation is None:
        if len(calibration) < 4:
            raise InputError(
                "E504",
                f"{len(calibration)} batches are too few to hold a quarter out",
                advice="give validation=… as well",
            )
        cut = len(calibration) * 3 // 4
        calibration, validation = calibration[:cut], calibration[cut:]
    settings["name"] = settings.get("name") or found.name
    spec = StudySpec.of_values(model=found.name, calibration="given", budgets=budget, **settings)
    check_batches(calibration, registry.load("estimators", spec.estimator).by, tokens=found.tokens)
    check_batches(list(validation), tokens=found.tokens)
    what = find_layers(found, calibration, spec.ties_used, caches=spec.counts_caches)
    bench = Workbench(found, calibration, list(validation), what)
    identity = {
        "model": found.digest,
        "calibration": digest_of(calibration),
        "validation": digest_of(list(validation)),
    }
    return Study(spec, registry.make("stores", "sql", url=spec.storage), work=bench.run, identity=identity)
