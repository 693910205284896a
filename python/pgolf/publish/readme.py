"""README.md of a submission, in the order in which reviewers look for things, from what `submit` has checked."""

from ..artifact.pack import LIMIT_BYTES
from ..audit.verdict import CONDITIONS
from ..ledger import differing_fields
from ..presets import PRESETS
from .clocks import LIMIT_S
from .compliance import verdict
from .stats import BAR_NATS, compare, notes, summary
from .submission import RECORD, Submission

PULLS = "https://github.com/openai/parameter-golf/pull/"
QUANTISED = 4  # column of the seed table: the artifact's score without overlap, which not everybody makes


def render(s: Submission, content: dict, files: list[str]) -> str:
    """The whole page. files: what else the folder holds."""
    sections = (
        _title(s, content),
        _seed_table(s, content),
        _delta(s, content),
        _changes(s),
        _architecture(s),
        _compliance(s, content),
        _data(s),
        _requirements(s, content),
        _command(s),
        _lineage(s),
        _files(s, files),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _title(s: Submission, c: dict) -> str:
    kind = "Record" if s.track == RECORD else "Non-record"
    spread = f"{len(s.runs)}-seed mean" + ("" if c["val_bpb_std"] is None else f", std {c['val_bpb_std']:.5f}, ddof 1")
    return (
        f"# {kind}: {c['name']} - val_bpb {c['val_bpb']:.5f} ({len(s.runs)}-seed mean)\n\n"
        f"**val_bpb: {c['val_bpb']:.5f}** ({spread}) | {c['val_loss']:.5f} nats per token | "
        f"{c['bytes_total'] / 1e6:.2f} MB | {c['hardware']}\n\n{c['blurb']}"
    )


def _seed_table(s: Submission, c: dict) -> str:
    rows = []
    for r in s.runs:
        v, quantised = c["seed_results"][str(r.cfg.seed)], r.scores.get("plain")
        rows.append(
            [
                str(r.cfg.seed),
                f"{v['steps']:,}",
                f"{v['step_avg_ms']:.1f}",
                f"{v['pre_quant_val_bpb']:.5f}",
                f"{quantised['val_bpb']:.5f}" if quantised else "",
                f"**{v['val_bpb']:.8f}**",
                f"{v['val_loss']:.8f}",
                f"{v['train_time_s']:.1f}",
                f"{v['eval_time_s']:.1f}",
                f"{v['artifact_bytes']:,}",
            ]
        )
    blank = [""] * 2
    rows.append(
        ["mean", *blank, f"{c['pre_quant_val_bpb']:.5f}", "", f"**{c['val_bpb']:.8f}**", f"{c['val_loss']:.8f}"]
    )
    if c["val_bpb_std"] is not None:
        rows.append(["std (ddof 1)", *blank, "", "", f"{c['val_bpb_std']:.8f}", f"{c['val_loss_std']:.8f}"])
    head = ["seed", "steps", "ms/step", "pre-quant BPB", "quantised BPB", "final BPB", "nats/token"]
    head += ["train s", "eval s", "artifact bytes"]
    if not any(row[QUANTISED] for row in rows):  # nobody scored without overlap
        head, rows = _without_quantised(head), [_without_quantised(row) for row in rows]
    started = "an unknown number" if c["runs_started"] is None else c["runs_started"]
    told = f"{c['runs_reported']} runs are reported of {started} started with this config."
    if s.seeds.reason:
        told += f" The reason given for the difference: {s.seeds.reason}"
    told += "".join(f"\n- not reported: {entry}" for entry in s.seeds.unreported)
    return f"## Results\n\n{_table(head, rows)}\n\n{told}"


def _without_quantised(row: list[str]) -> list[str]:
    return row[:QUANTISED] + row[QUANTISED + 1 :]


def _delta(s: Submission, c: dict) -> str:
    of = summary(s.seeds, s.method)
    bar = f"The bar of {BAR_NATS} nats per token is {of['bar_bpb']:.5f} bits per byte with this tokenizer"
    bar += f" ({of['bytes_per_token']:.4f} bytes per token)."
    if not s.reference:
        return f"## Difference\n\nNo reference was named. {bar}"
    a = compare(s.seeds, s.method, s.reference)
    verdict = "passes" if a["passes"] else "does not pass"
    known = "" if a["name"] == f"{a['mean_bpb']:g}" else f" ({a['mean_bpb']:.5f})"
    p = "not defined: no spread" if a["p_better"] is None else f"p = {a['p_better']:.3g}"
    p_bar = "not defined" if a["p_bar"] is None else f"p = {a['p_bar']:.3g}, which {verdict} p < 0.01"
    return (
        f"## Difference to {a['name']}{known}\n\n"
        f"{c['delta_bpb']:+.5f} bits per byte, {c['delta_nats']:+.5f} nats per token. {bar}\n\n"
        f"- {a['test']}, one-sided, better at all: {p}\n- better by more than {BAR_NATS} nats: {p_bar}"
    )


def _changes(s: Submission) -> str:
    cfg = s.runs[0].cfg
    base = PRESETS.get(cfg.preset)
    if base is None:
        return ""
    rows = [[f"`{name}`", _value(here), _value(there)] for name, here, there in differing_fields(cfg, base)]
    name = _linked(cfg.preset)
    if not rows:
        return f"## What changed\n\nNothing in the settings: they are those of {name}."
    return f"## What changed against {name}\n\n{_table(['setting', 'here', 'there'], rows)}"


def _architecture(s: Submission) -> str:
    cfg, start = s.runs[0].cfg, s.runs[0].last("start")
    parts = [
        ("Parameters", f"{start.get('parameters', 0):,}"),
        (
            "Layers",
            f"{cfg.num_layers} x {cfg.model_dim}, {cfg.num_heads} heads, {cfg.num_kv_heads} for keys and values",
        ),
        ("MLP", f"{cfg.mlp_mult:g}x, leaky ReLU({cfg.negative_slope:g}) squared"),
        ("Vocabulary", f"{cfg.vocab_size:,}, tied embeddings, logits capped at {cfg.logit_softcap:g}"),
        ("Attention", f"rotary {cfg.rope_dims} of {cfg.head_dim}, exclusive in the last {cfg.xsa_last_n} layers"),
        ("Bigram table", f"{cfg.bigram_vocab_size:,} x {cfg.bigram_dim}" if cfg.bigram_vocab_size else ""),
        ("Value embedding", f"width {cfg.ve_dim}, layers {_value(cfg.ve_layers)}" if cfg.ve_dim else ""),
        ("Value residual", "yes" if cfg.value_residual else ""),
        ("Skips", "gated" if cfg.skip_gates else "plain"),
        ("Recurrence", f"layers {_value(cfg.recur_layers)} twice" if cfg.recur_layers else ""),
        ("Parallel lanes", f"from layer {cfg.parallel_start_layer}" if cfg.parallel_start_layer else ""),
        ("Optimiser", f"Muon, lr {cfg.matrix_lr:g}, momentum {cfg.muon_momentum:g}; AdamW for the rest"),
        ("Batch", f"{cfg.train_batch_tokens:,} tokens in sequences of {cfg.train_seq_len:,}"),
        ("Codes", f"{cfg.attn_bits} bits attention, {cfg.mlp_bits} MLP, {cfg.embed_bits} embeddings, {cfg.compressor}"),
        ("GPTQ", f"{cfg.calibration_batches} batches ({cfg.calibration})" if cfg.uses_gptq else ""),
        ("Scoring", _scoring(s)),
    ]
    return f"## Architecture\n\n{_table(['part', 'setting'], [[k, v] for k, v in parts if v])}"


def _scoring(s: Submission) -> str:
    settings = s.runs[0].scores[s.method]["settings"]
    prefixes = {"slot": "slot_", "ttt": "ttt_"}
    shown = [f"windows of {settings['eval_seq_len']:,}, stride {settings['eval_stride']:,}"]
    for part in s.audits[0]["method"].split("+"):
        prefix = prefixes.get(part, "-")
        if part == "slot" and settings.get("slot_parameters") == "cache":
            # The fields of a fit are without effect.
            prefix = ("slot_parameters", "slot_cache_", "slot_share", "slot_windows", "slot_focal_tokens")
        known = {k: v for k, v in settings.items() if k.startswith(prefix)}
        shown += [f"{k}={_value(v)}" for k, v in known.items() if v not in (0, 0.0, "", False)]
    return f"{s.audits[0]['method']}: " + ", ".join(shown)


def _compliance(s: Submission, c: dict) -> str:
    rows = []
    for condition, title in CONDITIONS.items():
        tests = [t for t in s.audits[0]["tests"] if t["condition"] == condition]
        cells = [verdict(audit, condition) for audit in s.audits]
        ran = ", ".join(f"{t['name']} {t['title']}" + (" (not run)" * (t["verdict"] == "not run")) for t in tests)
        rows.append([title, *cells, ran])
    head = ["condition (#1017)", *(f"seed {r.cfg.seed}" for r in s.runs), "tests"]
    clock_rows = [
        [str(r.cfg.seed), *(f"{t[k]:.1f}" for k in ("train_lenient", "train_strict", "artifact"))]
        + [f"{t[k]:.1f}" for k in ("eval_lenient", "eval_strict")]
        for r, t in zip(s.runs, s.clocks, strict=True)
    ]
    clock_head = ["seed", "training loop", "with calibration", "until the artifact", "scoring", "with loading"]
    digests = "\n".join(
        f"- seed {r.cfg.seed}: `audit_seed{r.cfg.seed}.json`, sha256 `{audit['sha256']}`, of {audit['tokens']:,} tokens"
        for r, audit in zip(s.runs, s.audits, strict=True)
    )
    return (
        "## Compliance\n\nFrom the audits of the artifacts as they were scored; nothing here was entered by hand.\n\n"
        f"{_table(head, rows)}\n\n{digests}\n\n"
        f"Budgets: {c['bytes_total']:,} of {LIMIT_BYTES:,} bytes at most ({c['bytes_code']:,} of them code); clocks in "
        f"seconds, {LIMIT_S:g} each for training with calibration and for loading with scoring:\n\n"
        f"{_table(clock_head, clock_rows)}"
    )


def _data(s: Submission) -> str:
    data, score, cfg = s.runs[0].data, s.runs[0].scores[s.method], s.runs[0].cfg
    used = min(cfg.train_shards or data.get("train_shards", 0), data.get("train_shards", 0))
    documents = {split: data.get(f"{split}_documents") for split in ("train", "val")}
    lines = [
        f"- dataset `{data.get('name')}`, sha256 `{data.get('sha256')}`",
        f"- tokenizer sha256 `{data.get('tokenizer_sha256')}`",
        f"- train_shards: {used} of {data.get('train_shards')}, {data.get('train_tokens', 0):,} tokens in all",
        f"- val_tokens: {score['tokens']:,} scored of {data.get('val_tokens', 0):,}; {score['bytes']:,} bytes of "
        f"{score['text']} text",
    ]
    if all(documents.values()):
        lines.append(f"- documents: {documents['train']:,} for training, {documents['val']:,} for validation")
    where = (
        f"training batches, {cfg.calibration_batches} of them" if cfg.calibration == "train" else "text it wrote itself"
    )
    lines.append(f"- calibration: {where}" if cfg.uses_gptq else "- calibration: none")
    return "## Data\n\n" + "\n".join(lines)


def _requirements(s: Submission, c: dict) -> str:
    e = s.environment
    cuda = f", CUDA {c['cuda_version']}" if c["cuda_version"] else ""
    found = [f"`pip install -r requirements.txt`; made with Python {e.get('python')} on {c['hardware']}{cuda}."]
    found += [f"- {note}" for note in notes(s.seeds)]
    return "## Requirements\n\n" + "\n".join(found)


def _command(s: Submission) -> str:
    ranks, seeds = s.environment.get("world_size", 1), " ".join(str(r.cfg.seed) for r in s.runs)
    return (
        "## Run\n\n```\n"
        f"for seed in {seeds}; do\n"
        f"  DATA_PATH=... SEED=$seed torchrun --standalone --nproc_per_node={ranks} \\\n"
        "    train_gpt.py > train_seed$seed.log\n"
        "done\n```\n\n`DATA_PATH` is the folder with the shards; the settings are in the program."
    )


def _lineage(s: Submission) -> str:
    preset = s.runs[0].cfg.preset
    if not preset.startswith("pr"):
        return "## Lineage\n\nSettings of our own. Kernels and trainer: pgolf_kernels."
    return f"## Lineage\n\nThe system of {_linked(preset)}, trained and scored with pgolf_kernels."


def _files(s: Submission, files: list[str]) -> str:
    what = {
        "submission.json": "the figures of this page",
        "train_gpt.py": "the program, counted",
        "requirements.txt": "versions",
        "tokenizer.model": "the tokenizer",
    }
    what |= {f"train_seed{r.cfg.seed}.log": f"training, packing and scoring of seed {r.cfg.seed}" for r in s.runs}
    what |= {f"audit_seed{r.cfg.seed}.json": f"the audit of seed {r.cfg.seed}'s artifact" for r in s.runs}
    return "## Files\n\n" + "\n".join(f"- `{name}`: {what.get(name, 'see its first lines')}" for name in files)


def _linked(preset: str) -> str:
    number = preset.removeprefix("pr")
    return f"[#{number}]({PULLS}{number})" if number.isdigit() else f"the preset {preset}"


def _value(value: object) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        cells = [*cells, *[""] * (len(head) - len(cells))]
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
