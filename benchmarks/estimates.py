"""How far estimates are from measurements on hosted devices: ``python -m benchmarks.estimates [--write]``.

Every figure is held out: the model (or its family, or the chip) that is predicted was not in the fit. Every (model,
precision) counts the same, however many chips measured it. --write puts the fit into targets/."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks.decoders import DECODERS
from benchmarks.measurements import DATA, LAYERS_APART, Hub, chip_name, load, rebuilt, records, usable
from edgeforge.estimate.calibrate import factors_of, write_latency
from edgeforge.estimate.decoder import START, amounts
from edgeforge.estimate.fit import NAMES, Fit, Measured, fit_all, fit_new_chip, fit_sums, predict_chip
from edgeforge.estimate.memory import START as RESIDENT
from edgeforge.estimate.memory import amounts as resident
from edgeforge.estimate.work import PRECISIONS, TERMS
from edgeforge.resources import folder

Array = np.ndarray


@dataclass(frozen=True)
class Goal:
    """A figure beside the least or the most that it should be."""

    name: str
    value: float
    unit: str
    n: int
    least: float = -np.inf
    most: float = np.inf

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most

    def row(self) -> list[str]:
        bounds = [
            f"{word} {bound:g}" for word, bound in (("least", self.least), ("most", self.most)) if np.isfinite(bound)
        ]
        return [
            self.name,
            f"{self.value:.3g}{self.unit}",
            ", ".join(bounds),
            str(self.n),
            "yes" if self.met else "**no**",
        ]


@dataclass(frozen=True)
class Spread:
    """Errors of one precision (or all): median and shares within 20 and 30 %, in percent; n models x precisions."""

    median: float
    within20: float
    within30: float
    n: int


def on_chips(hub: Hub, fit: Fit, rows: Measured) -> Array:
    """Predicted log microseconds of each row."""
    out = np.zeros(len(rows.sample))
    for name in set(rows.chip):
        mine = rows.chip == name
        picked = hub.samples.pick(rows.sample[mine])
        out[mine] = predict_chip(picked, fit.base, fit.chips[name])[0]
    return out


def held_out(hub: Hub, groups: Array) -> Array:
    """log error of every row, from a fit without the rows' group."""
    error = np.zeros(len(hub.rows.sample))
    for group in sorted(set(groups)):
        out = (groups == group)[hub.rows.sample]
        without = fit_all(hub.samples, hub.rows.pick(~out))
        error[out] = on_chips(hub, without, hub.rows.pick(out)) - hub.rows.log_us[out]
    return error


def weights(hub: Hub, rows: Measured) -> Array:
    return 1 / np.bincount(rows.sample, minlength=len(hub.keys))[rows.sample]


def quantile(values: Array, weight: Array, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weight[order]) / weight.sum()
    return float(values[order][np.searchsorted(reached, share)])


def table(title: str, hub: Hub, error: Array, rows: Measured) -> dict[str, Spread]:
    print(f"\n{title}\n  {'precision':10s} {'n':>4s} {'rows':>5s}  median error   within 10 / 20 / 30 %")
    precision, weight = hub.samples.precision[rows.sample], weights(hub, rows)
    absolute, found = np.abs(np.expm1(error)), {}
    for name in (*NAMES, "all"):
        mask = np.ones(len(error), bool) if name == "all" else precision == NAMES.index(name)
        a, w = absolute[mask], weight[mask]
        within = [100 * w[a <= limit].sum() / w.sum() for limit in (0.1, 0.2, 0.3)]
        found[name] = Spread(100 * quantile(a, w, 0.5), within[1], within[2], len(set(rows.sample[mask])))
        shares = " / ".join(f"{share:.0f}" for share in within)
        print(f"  {name:10s} {found[name].n:4d} {mask.sum():5d}  {found[name].median:9.1f} %   {shares}")
    return found


def families(hub: Hub, error: Array) -> None:
    print("\nBy family (leave one model out): median error, n = models x precisions")
    family = hub.families[hub.rows.sample]
    for name in sorted(set(family)):
        mask = family == name
        n = len(set(hub.rows.sample[mask]))
        print(f"  {name:16s} {100 * np.median(np.abs(np.expm1(error[mask]))):6.1f} %  n {n}")


def ranks(values: Array) -> Array:
    return np.argsort(np.argsort(values)).astype(float)


def spearman(hub: Hub, error: Array) -> list[Goal]:
    found = []
    precision = hub.samples.precision[hub.rows.sample]
    for chip in sorted(set(hub.rows.chip)):
        for p in range(len(NAMES)):
            mask = (hub.rows.chip == chip) & (precision == p)
            if mask.sum() >= 10:
                truth = hub.rows.log_us[mask]
                found.append(float(np.corrcoef(ranks(truth), ranks(truth + error[mask]))[0, 1]))
    print(
        f"\nSpearman within a chip and precision: median {np.median(found):.3f}, lowest {min(found):.3f},"
        f" n {len(found)}"
    )
    return [Goal("Spearman within a chip and precision, median", float(np.median(found)), "", len(found), least=0.95)]


def faster(hub: Hub, error: Array) -> list[Goal]:
    """float or w8a8, on the same chip."""
    index = {(hub.keys[s], c): i for i, (s, c) in enumerate(zip(hub.rows.sample, hub.rows.chip, strict=True))}
    right = always = n = 0
    for (key, chip), i in index.items():
        j = index.get(((key[0], "w8a8"), chip))
        if key[1] != "float" or j is None:
            continue
        truth = hub.rows.log_us[i] > hub.rows.log_us[j]
        guess = hub.rows.log_us[i] + error[i] > hub.rows.log_us[j] + error[j]
        right, always, n = right + (truth == guess), always + bool(truth), n + 1
    print(
        f"\nWhich of float and w8a8 is faster: right in {100 * right / n:.1f} %;"
        f" always w8a8: {100 * always / n:.1f} %; n {n}"
    )
    name = f"Faster of float and w8a8 (always w8a8: {100 * always / n:.1f} %)"
    return [Goal(name, 100 * right / n, " %", n, least=96)]


def coverage(hub: Hub, error: Array) -> tuple[float, list[Goal]]:
    """The 80 % factor, and how it covers models that did not choose it (two halves of the models, 50 splits)."""
    weight, models = weights(hub, hub.rows), hub.models[hub.rows.sample]
    names, draw, shares, factors = sorted(set(models)), np.random.default_rng(0), [], []
    for _ in range(50):
        half = set(draw.permutation(names)[: len(names) // 2])
        mine = np.array([model in half for model in models])
        limit = quantile(np.abs(error[mine]), weight[mine], 0.8)
        factors.append(np.exp(limit))
        shares.append((weight[~mine] * (np.abs(error[~mine]) <= limit)).sum() / weight[~mine].sum())
    low, high = np.quantile(shares, (0.1, 0.9))
    print(
        f"80 % interval: mean factor {np.mean(factors):.2f}, coverage {100 * np.mean(shares):.0f} %"
        f" (10th to 90th percentile of splits: {100 * low:.0f} to {100 * high:.0f})"
    )
    goals = [
        Goal("80 % interval: coverage", float(100 * np.mean(shares)), " %", len(hub.keys), 75, 87),
        Goal("80 % interval: mean factor", float(np.mean(factors)), "", len(hub.keys), most=1.4),
    ]
    return float(np.exp(quantile(np.abs(error), weight, 0.8))), goals


def new_chip(hub: Hub, points: int = 10, draws: int = 3) -> tuple[dict[str, float], list[Goal]]:
    """Each chip in turn: no measurements, ``points`` models (in several draws); predicted models are new, or measured
    on another chip. Returns the 80 % factors without calibration, with it, and with a measurement elsewhere."""
    draw, models = np.random.default_rng(1), hub.models
    blind, fresh, carried, kept = [], [], [], []
    for chip in sorted(set(hub.rows.chip)):
        mine = hub.rows.chip == chip
        elsewhere = fit_all(hub.samples, hub.rows.pick(~mine))
        here = hub.rows.pick(mine & np.isfinite(elsewhere.residual)[hub.rows.sample])
        names = sorted(set(models[here.sample]))
        for fold in (fold for _ in range(draws) for fold in np.array_split(draw.permutation(names), 10)):
            test = np.isin(models[here.sample], fold)
            rest = draw.permutation([name for name in names if name not in set(fold)])[:points]
            train = here.pick(np.isin(models[here.sample], rest))
            aside = np.isin(models, fold)[hub.rows.sample]
            without = fit_all(hub.samples, hub.rows.pick(~mine & ~aside))
            picked, goal = hub.samples.pick(train.sample), hub.samples.pick(here.sample[test])
            typical = np.median(without.known, axis=0)
            blind.append(predict_chip(goal, without.base, typical)[0] - here.log_us[test])
            for fit, errors in ((without, fresh), (elsewhere, carried)):
                at_base = train.log_us - fit.residual[train.sample]
                factors = fit_new_chip(picked, at_base, fit.base, fit.known)
                at = predict_chip(goal, fit.base, factors)[0]
                errors.append(at - here.log_us[test])
            carried[-1] += elsewhere.residual[here.sample[test]]
            kept.append(here.pick(test))
    rows = Measured(*(np.concatenate([getattr(part, name) for part in kept]) for name in ("sample", "chip", "log_us")))
    titles = (
        "A chip without measurements", f"A new chip with {points} calibration models",
        f"A new chip with {points} calibration models, models measured on another chip",
    )  # fmt: skip
    widths, spreads = {}, []
    for key, title, parts in zip(("uncalibrated", "few", "carried"), titles, (blind, fresh, carried), strict=True):
        error = np.concatenate(parts)
        spreads.append(table(title, hub, error, rows)["all"])
        widths[key] = float(np.exp(quantile(np.abs(error), weights(hub, rows), 0.8)))
    limits = zip(titles[1:], spreads[1:], (13, 8), strict=True)
    return widths, [Goal(f"{title}: median error", s.median, " %", s.n, most=most) for title, s, most in limits]


# ---------------------------------------------------------------------------------------------------------- decoders

DECODE, CHUNK = ([term for term in START if term.startswith(part)] for part in ("decode", "chunk"))


def decoder_rows() -> tuple[Array, Array, dict[str, Array], dict[str, Array]]:
    """Chips and architectures of the QAIRT w4a16 rows, amounts and log microseconds of decode and chunk."""
    chips, architectures, seen = [], [], {"decode": [], "chunk": []}
    times: dict[str, list[float]] = {"decode": [], "chunk": []}
    for row in records():
        wanted = row["runtime"] == "geniex_qairt" and row["precision"] == "w4a16" and row["model_id"] in DECODERS
        if not wanted or row["duplicate_of_reference_chip"] != "0" or not float(row["tokens_per_second"] or 0):
            continue
        model, architecture = DECODERS[row["model_id"]]
        found = amounts(model, int(float(row["context_length"])))
        chips.append(chip_name(row["chipset"]))
        architectures.append(architecture)
        seen["decode"].append([found[term] for term in DECODE])
        seen["chunk"].append([found[term] for term in CHUNK])
        times["decode"].append(np.log(1e6 / float(row["tokens_per_second"])))
        times["chunk"].append(np.log(1e3 * float(row["ttft_min_ms"])))
    return (
        np.array(chips),
        np.array(architectures),
        {part: np.array(values) for part, values in seen.items()},
        {part: np.array(values) for part, values in times.items()},
    )


def decoders() -> tuple[dict[str, dict[str, float]], float, list[Goal]]:
    """Leave-one-architecture-out errors; returns the rates per chip ("" is a typical one) and the 80 % factor."""
    chips, architectures, seen, times = decoder_rows()
    rates: dict[str, dict[str, float]] = {}
    factor, goals = 1.0, []
    print(
        f"\nLanguage models (QAIRT w4a16), unseen architecture, n {len(chips)} rows,"
        f" {len(set(architectures))} architectures"
    )
    for part, terms in (("decode", DECODE), ("chunk", CHUNK)):
        start = np.log([START[term] for term in terms])
        error = np.zeros(len(chips))
        for name in sorted(set(architectures)):
            out = architectures == name
            fit = fit_sums(seen[part][~out], times[part][~out], chips[~out], start)
            rate = np.array([fit.get(chip, fit[""]) for chip in chips[out]])
            error[out] = np.log((seen[part][out] * np.exp(rate)).sum(1)) - times[part][out]
        absolute = np.abs(np.expm1(error))
        label, most = {"decode": ("decode", 4.4), "chunk": ("first chunk", 6.4)}[part]
        median = float(100 * np.median(absolute))
        goals.append(Goal(f"Language models, unseen architecture, {label}", median, " %", len(chips), most=most))
        print(f"  {label:12s} median error {median:.1f} %, 80th percentile {100 * np.quantile(absolute, 0.8):.1f} %")
        factor = max(factor, float(np.exp(np.quantile(np.abs(error), 0.8))))
        for chip, log_rates in fit_sums(seen[part], times[part], chips, start).items():
            rates.setdefault(chip, {}).update(rounded(terms, np.exp(log_rates)))
    return rates, factor, goals


# ------------------------------------------------------------------------------------------------------------ memory


def memory() -> tuple[dict[str, dict[str, float]], float, list[Goal]]:
    """Leave-one-model-out errors on phones (other hosts report what their driver maps: a few MB, or none); returns the
    rates per chip and the 80 % factor."""
    found, chips, models, log_mb = [], [], [], []
    programs, _ = rebuilt()
    for row in records():
        key = (row["model_id"], row["component"])
        if key in programs and usable(row) and row["precision"] in NAMES and row["world"] == "Mobile":
            found.append(list(resident(programs[key], PRECISIONS[row["precision"]]).values()))
            chips.append(chip_name(row["chipset"]))
            models.append(row["model_id"])
            log_mb.append(np.log(max(float(row["peak_mem_max_mb"]), 1)))
    amount, chip, model, goal = np.array(found), np.array(chips), np.array(models), np.array(log_mb)
    start = np.log(list(RESIDENT.values()))
    error = np.zeros(len(goal))
    for name in sorted(set(models)):
        out = model == name
        fit = fit_sums(amount[~out], goal[~out], chip[~out], start)
        error[out] = np.log((amount[out] * np.exp([fit[c] for c in chip[out]])).sum(1)) - goal[out]
    whole = fit_sums(amount, goal, chip, start)
    inside = np.log((amount * np.exp([whole[c] for c in chip])).sum(1)) - goal
    print("\nPeak memory (phones): median error, leave one model out (all models in the fit)")
    for name in (*sorted(set(chips)), "all"):
        mine = (chip == name) | (name == "all")
        one, known = (100 * np.median(np.abs(np.expm1(e[mine]))) for e in (error, inside))
        print(f"  {name:26s} {one:5.1f} %  ({known:.1f} %)  n {mine.sum()}")
    rates = {name: rounded(RESIDENT, np.exp(rate)) for name, rate in whole.items()}
    median = float(100 * np.median(np.abs(np.expm1(error))))
    goal = Goal("Peak memory of phones, leave one model out: median error", median, " %", len(error), most=20)
    return rates, float(np.exp(np.quantile(np.abs(error), 0.8))), [goal]


def rounded(names: Iterable[str], values: Array) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in zip(names, values, strict=True)}


def write(
    hub: Hub, fit: Fit, interval: dict[str, float], llm: dict[str, dict[str, float]], peak: dict[str, dict[str, float]]
) -> None:
    """The fit into targets/bases/hexagon.yaml and the measured chips' files."""
    at = {name: rounded(TERMS, np.exp(row)) for name, row in zip(NAMES, fit.base, strict=True)}
    residual = np.abs(np.expm1(fit.residual[np.isfinite(fit.residual)]))
    source = "qai-hub-models 0.65.0 perf.yaml, runtime qnn_dlc, QAIRT 2.50"
    about = {
        "source": source, "date": date.today().isoformat(), "workloads": len(hub.keys), "rows": len(hub.rows.sample),
        "median_residual": round(float(np.median(residual)), 4),
        "p80_residual": round(float(np.quantile(residual, 0.8)), 4),
    }  # fmt: skip
    base = folder("targets") / "bases" / "hexagon.yaml"
    factors = {name: round(factor, 2) for name, factor in interval.items()}
    write_latency(base, {"rates": at, "interval": factors, "llm": llm[""], "memory": peak[""], "fit": about})
    for chip, factors in fit.chips.items():
        mine = hub.rows.pick(hub.rows.chip == chip)
        error = on_chips(hub, fit, mine) - mine.log_us
        carried = np.abs(np.expm1(error + fit.residual[mine.sample]))
        block = {
            "factors": factors_of(factors),
            "calibration": {
                "source": source, "date": date.today().isoformat(), "workloads": len(mine.sample),
                "median_error_after": round(float(np.median(np.abs(np.expm1(error)))), 4),
                "median_residual_of_chip": round(float(np.median(carried)), 4),
            },
        }  # fmt: skip
        if chip in llm:
            block["llm"] = llm[chip]
            block["calibration"]["llm_rows"] = int((decoder_rows()[0] == chip).sum())
        if chip in peak:
            block["memory"] = peak[chip]
        write_latency(folder("targets") / f"{chip}.yaml", block)
    print(f"\nwritten: {base.name} and {len(fit.chips)} chips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the fit into targets/")
    parser.add_argument("--details", action="store_true", help="print measured and estimated per workload")
    options = parser.parse_args()
    if not DATA.is_file():
        raise SystemExit(f"{DATA} is absent -> set EDGEFORGE_DATA")
    hub = load()
    print(
        f"{len(hub.keys)} workloads (model x precision) of {len(set(hub.models))} models, {len(hub.rows.sample)} rows"
    )
    print("\n".join(unbuilt(hub)))
    fit = fit_all(hub.samples, hub.rows)
    table("In the fit (no bar, for comparison)", hub, on_chips(hub, fit, hub.rows) - hub.rows.log_us, hub.rows)
    one = held_out(hub, hub.models)
    found = table("Leave one model out", hub, one, hub.rows)
    models = len(set(hub.models))
    goals = [Goal("Models rebuilt", models, "", models + len(hub.missing), least=60)]
    goals += [
        Goal(f"Leave one model out, {name}: median error", found[name].median, " %", found[name].n, most=11)
        for name in NAMES
    ]
    goals.append(Goal("Leave one model out: within 20 %", found["all"].within20, " %", found["all"].n, least=70))
    goals.append(Goal("Leave one model out: within 30 %", found["all"].within30, " %", found["all"].n, least=80))
    if options.details:
        details(hub, one)
    families(hub, one)
    family = table("Leave one family out", hub, held_out(hub, hub.families), hub.rows)["all"]
    goals.append(Goal("Leave one family out: median error", family.median, " %", family.n, most=17))
    calibrated, more = coverage(hub, one)
    goals += spearman(hub, one) + faster(hub, one) + more
    widths, more = new_chip(hub)
    llm, llm_width, llm_goals = decoders()
    peak, peak_width, peak_goals = memory()
    goals += more + llm_goals + peak_goals
    unmet = [goal.name for goal in goals if not goal.met]
    lines = [*markdown(goals), "", f"Goals not met ({len(unmet)} of {len(goals)}): {'; '.join(unmet) or 'none'}."]
    print("\n" + "\n".join(lines))
    if options.write:
        interval = {"calibrated": calibrated, **widths, "llm": llm_width, "memory": peak_width}
        write(hub, fit, interval, llm, peak)
        REPORT.write_text("\n".join([*INTRODUCTION, *lines, "", misses(hub, one), "", *unbuilt(hub)]) + "\n")


REPORT = Path(__file__).parents[1] / "docs" / "estimates.md"
INTRODUCTION = (
    "# How far estimates are from measurements",
    "",
    "Written by `python -m benchmarks.estimates --write`. Measurements: Qualcomm AI Hub (qai-hub-models 0.65.0),",
    "runtime qnn_dlc, layers on the NPU only, copies of another chip's measurement dropped. Every figure is held out,",
    "and every held-out fit starts from the priors of `edgeforge/estimate/fit.py`, not from a fit that saw what it",
    "predicts. Each (model, precision) has the same weight, however many chips measured it. n: models x precisions,",
    "chips x precisions (Spearman), pairs (faster) or rows (language models, memory).",
    "",
    "The model's form and its priors were chosen by hand on these same held-out errors, among about 240 variants (and",
    "six of the memory), which flatters the figures a little. The last 100 were tried after the last models had been",
    "rebuilt. What they tried came from the errors of single models (sequences of 49 and 197, maps of one row, gray",
    "pictures), from those of the chip that scattered most (that a chip slows down in long graphs: its factor",
    '"tenfold"), from those of all held-out models (one scale of errors for rates and chips) and from the evidence of',
    "the fit to all measurements, which ranked about 1,700 splits of a term, priors and constants. The median at w8a8,",
    "of 55 models, moves by about 0.4 % between forms that are hardly better or worse over all.",
    "",
    "A model counts as rebuilt if its workload, written from published definitions, has as many layers as ran on the",
    f"hub, to {100 * LAYERS_APART:.0f} %. Nothing else decides, never a time: all that count are in fit and bars.",
    "The hub's numbers of weights are compared by hand only: they are a checkpoint's, with parts that are not exported",
    "and tied matrices once.",
    "",
)


def markdown(goals: Iterable[Goal]) -> list[str]:
    rows = [["Figure", "Measured", "Goal", "n", "Met"], ["---"] * 5, *(goal.row() for goal in goals)]
    return [f"| {' | '.join(row)} |" for row in rows]


def unbuilt(hub: Hub) -> list[str]:
    names = ", ".join(" ".join(model) for model, (count, _) in sorted(hub.missing.items()) if not count)
    apart = [f"{' '.join(model)} ({n} layers of {ran})" for model, (n, ran) in sorted(hub.missing.items()) if n]
    return [
        f"Measured but not rebuilt ({len(hub.missing) - len(apart)}), so in no figure above: {names}.",
        "",
        f"Written down, but more than {100 * LAYERS_APART:.0f} % of the layers apart from what ran, so not rebuilt"
        f" either: {', '.join(apart) or 'none'}.",
    ]


def medians(hub: Hub, error: Array) -> list[tuple[float, int]]:
    """The median log error of each workload over the chips and its number, lowest first."""
    return sorted((float(np.median(error[hub.rows.sample == i])), i) for i in range(len(hub.keys)))


def misses(hub: Hub, error: Array) -> str:
    """The workloads whose estimate is beyond a factor of 2."""
    found = [(np.exp(value), hub.keys[i]) for value, i in medians(hub, error) if abs(value) > np.log(2)]
    names = [f"{model} {component} {precision} (x {ratio:.2f})" for ratio, ((model, component), precision) in found]
    return f"Leave one model out, estimates beyond a factor of 2 ({len(found)}): {', '.join(names)}."


def details(hub: Hub, error: Array) -> None:
    """One line per workload: chips measured, median milliseconds measured and estimated."""
    for value, i in medians(hub, error):
        mine = hub.rows.sample == i
        (model, component), precision = hub.keys[i]
        ms = np.median(np.exp(hub.rows.log_us[mine])) / 1e3
        print(f"  {model:30s} {component:28s} {precision:6s} {ms:9.3f} ms  x {np.exp(value):.2f}  n {mine.sum()}")


if __name__ == "__main__":
    main()
