"""The sections of a report about scores, artifact, settings and machine. A part that is missing is one sentence."""

import dataclasses

from . import charts
from .page import Html, code, element, figure, note, section, table
from .record import EXPECTED, SCORE_NAMES, TRAINED, RunRecord, ScoreName

STAGE_TERMS = {
    "trained": "The weights as training left them, averaged if the run averages, over windows that do not overlap.",
    "plain": "The same windows with the weights of the artifact: the difference is what quantisation costs.",
    "sliding": "Windows overlap, so that nearly every token is predicted from a long context.",
    "slot": "Also fits a small correction to the past before it scores what follows.",
    "ttt": "Trains the model on each stretch of text once it has been scored, for the stretches after it.",
    "slot+ttt": "Both: a correction before a window is scored, training once a stretch has been.",
    "ctw": "Mixes in the counts of what followed the last few tokens earlier in the text.",
}

KIND_TERMS = {
    "header": "settings and the table of tensors",
    "levels": "spread of each row and column, which orders the codes",
    "int5": "matrices, 31 levels",
    "int6": "matrices of 63 levels: attention and MLP, unless the config says otherwise",
    "int7": "matrices, 127 levels",
    "int8": "matrices of 255 levels: large embeddings, unless the config says otherwise",
    "scales": "one float16 per row of codes",
    "float16": "tensors of at most 65,536 values",
}

TEXT_SENTENCES = {
    "raw": "Bits per byte are of the raw UTF-8 text.",
    "normalised": "Bits per byte are of normalised text: the bytes are counted after the tokenizer has normalised the "
    "text, so they do not compare with scores of raw text.",
    "unknown": "The scores do not say whether their bytes are of raw or of normalised text.",
}


def scores(record: RunRecord) -> Html:
    stages = record.stages
    rows = [_score_row(name, score) for name, score in record.scores.items()]
    if record.end:
        rows.insert(0, [TRAINED, f"{record.end['val_bpb']:.6f}", f"{record.end['val_loss']:.6f}", "", "", "", ""])
    scored = {name.method for name in record.scores if name.valid and not name.part and not name.variant}
    missing = [SCORE_NAMES[m] for m in EXPECTED if m not in scored]
    notes = []
    if not record.scores:
        notes.append(note("The artifact has not been scored; ", code("pgolf eval"), " does that."))
    elif missing:
        notes.append(note(f"Not scored yet: {'; '.join(missing)}."))
    if not rows:
        return section("Scores", *notes)
    notes += [note(sentence) for sentence in comparability(record)]
    chart = None
    if len(stages) > 1:
        chart = figure("Bits per byte, stage by stage", charts.stage_chart(stages), "Lower is better.")
        chart = element("div", chart, _stage_terms(record), class_="grid two")
    head = ("Score", "bits per byte", "nats per token", "tokens", "bytes", "seconds", "how")
    return section(
        "Scores", *notes, chart, element("div", table(head, rows, numeric=range(1, 6)), class_="card columns")
    )


def _stage_terms(record: RunRecord) -> Html:
    """What each stage of the chart is, for readers who have not met it."""
    terms = [(TRAINED, STAGE_TERMS["trained"])] if record.end else []
    scored = {name.method for name in record.scores}
    terms += [(title, STAGE_TERMS[m]) for m, title in SCORE_NAMES.items() if m in scored]
    pairs = [part for name, text in terms for part in (element("dt", name), element("dd", text))]
    return element("div", element("h3", "What the stages are"), element("dl", *pairs, class_="terms"), class_="card")


def _score_row(name: ScoreName, score: dict) -> list[Html | str]:
    return [
        str(name) if name.valid else element("span", str(name), class_="invalid"),
        f"{score['val_bpb']:.6f}",
        f"{score['val_loss']:.6f}",
        f"{score['tokens']:,}",
        f"{score['bytes']:,}",
        f"{score['seconds']:,.1f}",
        "; ".join(filter(None, (_how(name.method, score.get("settings", {})), _why_invalid(score)))),
    ]


def _why_invalid(score: dict) -> str:
    return "" if score.get("causal", True) else score.get("standing", "not causal")


def _how(method: str, settings: dict) -> str:
    """The settings of a score in words; an unknown one is left out."""
    parts, methods = [], method.split("+")
    if "eval_seq_len" in settings:
        parts.append(f"windows of {settings['eval_seq_len']:,} tokens")
        if method != "plain":
            parts.append(f"stride {settings['eval_stride']:,}")
    if "slot" in methods and settings.get("slot_parameters") == "cache":
        parts.append(
            f"a cache of each window's context, sharpness {settings['slot_cache_sharpness']:g}, prior "
            f"{settings['slot_cache_prior']:g}"
        )
        if settings["slot_share"] == "carried":
            parts.append(f"and of {settings['slot_cache_tokens']:,} tokens scored before it")
    elif "slot" in methods and "slot_steps" in settings:
        parts.append(f"{settings['slot_steps']} steps on {settings['slot_parameters']}, lr {settings['slot_lr']:g}")
        if settings["slot_half_life"]:
            parts.append(f"half-life {settings['slot_half_life']:g} tokens")
        if settings.get("slot_buckets"):
            parts.append(f"a table of {settings['slot_buckets']} hashed shifts")
    if "ttt" in methods and "ttt_lr" in settings:
        parts.append(
            f"{settings['ttt_epochs']} epochs of SGD, lr {settings['ttt_lr']:g}, on every "
            f"{settings['ttt_chunk_tokens']:,} tokens"
        )
        if settings["ttt_focal_gamma"]:
            parts.append(f"focal loss, gamma {settings['ttt_focal_gamma']:g}")
    if "ctw" in methods and "ctw_weight" in settings:
        parts.append(f"contexts of {settings['ctw_depth']} tokens, weight {settings['ctw_weight']:g} at most")
    return ", ".join(parts)


def comparability(record: RunRecord) -> list[str]:
    """What a reader must know before comparing the scores with each other or with others."""
    sentences = []
    texts = {score.get("text", "unknown") for score in record.scores.values()}
    sentences += [TEXT_SENTENCES[text] for text in TEXT_SENTENCES if text in texts]
    if record.end and record.cfg.val_tokens:
        sentences.append(f"The trained weights were scored on {record.cfg.val_tokens:,} validation tokens at most.")
    if not record.same_text:
        sentences.append(
            "The scores are not all of the same tokens (see val_tokens for training, --tokens for scoring), so they do "
            "not compare with each other exactly."
        )
    if any(not name.valid for name in record.scores):
        sentences.append(
            "A score marked INVALID is not causal: its predictions have seen the text they are scored on. It is in the "
            "table alone and compares with nothing."
        )
    return sentences


def artifact(record: RunRecord) -> Html:
    if record.artifact_error:
        return section("Artifact", note(f"The artifact could not be read: {record.artifact_error}."))
    if record.artifact is None:
        return section("Artifact", note("The run has not been packed; ", code("pgolf pack"), " makes the artifact."))
    found = record.artifact
    size, limit = found["artifact_bytes"], found["limit_bytes"]
    lead = (
        f"{size:,} bytes, compressed by {found['compressor']}, hold {found['parameters']:,} values: "
        f"{found['bits_per_parameter']:.3f} bits per value. With the program, which takes an estimated "
        f"{found['code_bytes']:,} bytes, that is {found['total_bytes'] / limit:.1%} of the limit of {limit:,} bytes."
    )
    over = note(f"File and program together are {-found['headroom_bytes']:,} bytes over the limit.")
    kinds = sorted(found["kinds"], key=lambda kind: -kind["stored_bytes"])
    colors = [f"c{min(i, 7)}" for i in range(1, len(kinds) + 1)]
    shares = [kind["stored_bytes"] / size for kind in kinds]
    parts = [element("span", class_=c, style=f"width:{100 * s:.3f}%") for c, s in zip(colors, shares, strict=True)]
    bar = element(
        "div",
        *parts,
        class_="stack",
        role="img",
        aria_label="Bytes of the artifact by kind; the table below has the numbers",
    )
    rows = [_kind_row(kind, color, share) for kind, color, share in zip(kinds, colors, shares, strict=True)]
    head = ("kind", "bytes", "share", "bits per value", "values", "tensors", "what it is")
    return section(
        "Artifact",
        element("p", lead),
        over if found["headroom_bytes"] < 0 else None,
        element("div", element("h3", "Bytes by kind"), bar, table(head, rows, range(1, 6)), class_="card columns"),
    )


def _kind_row(kind: dict, color: str, share: float) -> list[object]:
    count, stored = kind["parameters"], kind["stored_bytes"]
    return [
        element("span", kind["kind"], class_=f"key square {color}"),
        f"{stored:,}",
        f"{share:.1%}",
        f"{8 * stored / count:.2f}" if count else "",
        f"{count:,}" if count else "",
        f"{kind['tensors']:,}" if count else "",
        KIND_TERMS.get(kind["kind"], ""),
    ]


def implementations(record: RunRecord) -> Html:
    if not record.implementations:
        return section("Implementations", note("The log does not say which implementation each op used."))
    lead = "What each op ran on during training, as chosen for this machine."
    rows = [(code(op), impl) for op, impl in sorted(record.implementations.items())]
    return section(
        "Implementations", element("p", lead), element("div", table(("op", "implementation"), rows), class_="card")
    )


def settings(record: RunRecord) -> Html:
    base_name, _ = record.base_config()
    changed = record.changed_settings()
    if changed:
        rows = [(code(name), _value(ours), _value(theirs)) for name, ours, theirs in changed]
        shown = element("div", table(("field", "this run", base_name), rows), class_="card")
    else:
        shown = element("p", f"Every field is that of the {base_name}.")
    everything = [(code(name), _value(value)) for name, value in dataclasses.asdict(record.cfg).items()]
    full = element(
        "details", element("summary", f"All {len(everything)} fields"), table(("field", "value"), everything)
    )
    return section("Settings", shown, full)


def machine(record: RunRecord) -> Html:
    if not record.environment:
        return section("Machine", note("The run directory holds no environment.json."))
    rows = []
    for key, value in record.environment.items():
        if isinstance(value, dict):
            rows += [(name, _value(inner)) for name, inner in value.items()]
        elif key.endswith("_bytes") and isinstance(value, int):
            rows.append((_label(key.removesuffix("_bytes")), f"{value / 2**30:.1f} GiB"))
        else:
            rows.append((_label(key), _value(value)))
    return section("Machine", element("div", table(("", ""), rows), class_="card"))


def _label(key: str) -> str:
    names = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "gpu_memory": "GPU memory", "world_size": "ranks"}
    return names.get(key, key.replace("_", " "))


def _value(value: object) -> Html | str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
