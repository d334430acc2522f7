"""The command line. Heavy libraries are imported inside the commands, so that `--help` answers at once."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_mi import __version__
from distributed_mi.core.errors import ConfigError, DistributedMIError

if TYPE_CHECKING:
    from distributed_mi.core.config import FieldDoc
    from distributed_mi.pipeline import Outcome, Pipeline

STAGE_HELP = {
    "prepare": "Turn raw logs into a catalogue and time-ordered sequences (Ray Data).",
    "embed": "Encode titles and histories with a BERT encoder (Ray Data actor pool).",
    "exemplars": "Choose exemplar users by affinity propagation.",
    "interests": "Write the exemplars' interests with key phrases or a vLLM engine pool, and encode them.",
    "train": "Train the model of the `train` table (Ray Train, DeepSpeed, row-sharded item table).",
    "evaluate": "Rank the whole catalogue for the held-out users and write the report.",
}

_ALL_TABLES = (
    "workspace",
    "data",
    "embed",
    "exemplars",
    "interests",
    "train",
    "baselines",
    "evaluate",
    "scaling",
    "ray",
)
_RUN_NAME = ("train.run", "train.model.name")

STAGE_TABLES = {
    "prepare": ("workspace", "data", "ray"),
    "embed": ("workspace", "embed", "ray"),
    "exemplars": ("workspace", "exemplars", "ray"),
    "interests": ("workspace", "interests", "embed", "ray"),
    "train": ("workspace", "train", "scaling", "ray"),
    "evaluate": ("workspace", *_RUN_NAME, "evaluate", "scaling", "ray"),
    "run": _ALL_TABLES,
    "quickstart": _ALL_TABLES,
    "recommend": ("workspace", *_RUN_NAME),
    "explain": ("workspace", *_RUN_NAME),
}
"""Command -> tables or fields of the experiment file that it reads and that its `--help` documents."""


class FieldHelpCommand(typer.core.TyperCommand):
    """A command whose `--help` also documents the configuration fields that it reads."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Append the fields, generated from their docstrings."""
        formatter.write("\n" + field_help(STAGE_TABLES[ctx.command.name]))


app = typer.Typer(
    name="distributed-mi",
    help="Multi-interest sequential recommenders at cluster scale, with a language model in the loop. "
    "`distributed-mi COMMAND --help` documents the configuration fields that a command reads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="Experiment file, or a shipped name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Fields to override.", show_default=False)
]


def field_help(tables: Sequence[str]) -> str:
    """Text that documents fields of an experiment file, those of the registered choices included.

    Args:
        tables: dotted names of tables or of single fields; a table stands for all below it. Of a choice whose `name`
            alone is given, the fields are left out.
    """
    from distributed_mi.core.config import describe
    from distributed_mi.experiment import Experiment

    def wanted(name: str) -> bool:
        return any(f"{name}.".startswith(f"{table}.") for table in tables)

    docs = [d for d in describe(Experiment) if wanted(d.name)]
    parts = ["Configuration fields (override any as table.field=value):\n\n", *map(_field_entry, docs)]
    shown: dict[str, str] = {}
    for doc in docs:
        table = doc.name.removesuffix(".name")
        if not doc.kind or not wanted(table):
            continue
        if doc.kind in shown:
            parts.append(
                f"\nThe other fields of {table} are those of {shown[doc.kind]} with the same name.\n"
            )
        else:
            shown[doc.kind] = table
            parts += _choice_help(doc)
    return "".join(parts)


def _choice_help(doc: "FieldDoc", outer: tuple[str, ...] = ()) -> Iterator[str]:
    """The fields of every choice that a field may name, then of the choices among those fields.

    Args:
        doc: the field.
        outer: choices that this field belongs to. They are left out: no model is a part of itself.
    """
    from distributed_mi.core.config import describe_component
    from distributed_mi.core.registry import choices

    table = doc.name.removesuffix(".name")
    for name in (c for c in choices(doc.kind) if c not in outer):
        fields = list(describe_component(doc.kind, name, f"{table}."))
        text = "".join(map(_field_entry, fields)) or "  (no fields)\n"
        yield f'\nWith {table}.name = "{name}":\n\n{text}'
        for inner in (f for f in fields if f.kind):
            yield from _choice_help(inner, (*outer, name))


def _field_entry(doc: "FieldDoc") -> str:
    import textwrap

    body = textwrap.fill(doc.doc, 100, initial_indent="      ", subsequent_indent="      ")
    return f"  {doc.name} = {doc.default}    ({doc.type})\n{body}\n"


def open_pipeline(config: str, overrides: Sequence[str] | None) -> "Pipeline":
    """The pipeline of an experiment file, with logging set up."""
    from distributed_mi.core.logging import setup

    setup()
    from distributed_mi.experiment import load
    from distributed_mi.pipeline import Pipeline

    return Pipeline(load(config, overrides or ()))


def run_stages(
    config: str, overrides: Sequence[str] | None, stages: Sequence[str], purpose: str
) -> "Pipeline":
    """Run stages under the workspace lock and print what happened to each."""
    pipeline = open_pipeline(config, overrides)
    with pipeline.lock(f"distributed-mi {purpose}"):
        try:
            if len(stages) == 1:
                getattr(pipeline, stages[0])()
            else:
                pipeline.run(stages)
        finally:
            pipeline.start_ray.close()
    print_outcomes(pipeline.outcomes)
    return pipeline


def print_outcomes(outcomes: "Sequence[Outcome]") -> None:
    """A table of stages: done or skipped, seconds, rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "", "seconds", "rows", box=None, pad_edge=False)
    for o in outcomes:
        rows = ", ".join(f"{n:,} {name}" for name, n in o.manifest.rows.items())
        if o.manifest.rejected_rows:
            rows += f", {o.manifest.rejected_rows:,} rejected"
        table.add_row(o.stage, "skipped" if o.skipped else "done", f"{o.seconds:.1f}", rows)
    Console(highlight=False).print(table)


def print_reports(reports: list[dict[str, Any]]) -> None:
    """The metrics of several runs side by side, with the leakage check."""
    from distributed_mi.evaluation.report import format_table

    typer.echo(format_table(reports))


ForceOption = Annotated[
    bool,
    typer.Option(
        "--force", help="Start although the predicted memory is not there (exemplars.force, train.force)."
    ),
]


def _forced(overrides: Sequence[str] | None, force: bool, *stages: str) -> list[str]:
    return [*(overrides or ()), *(f"{stage}.force=true" for stage in stages if force)]


class DefaultCommandGroup(typer.core.TyperGroup):
    """A group whose command `run` may be left out: `interests CONFIG` is `interests run CONFIG`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put `run` in front of what names no command."""
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Append the fields that `run` reads."""
        formatter.write("\n" + field_help(STAGE_TABLES[ctx.info_name]))


def _stage_command(name: str) -> None:
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        pipeline = run_stages(config, overrides, [name], name)
        if name == "evaluate":
            print_reports(pipeline.reports()[-1:])

    def exemplars(config: ConfigPath, overrides: Overrides = None, force: ForceOption = False) -> None:
        run_stages(config, _forced(overrides, force, name), [name], name)

    def train(
        config: ConfigPath,
        overrides: Overrides = None,
        force: ForceOption = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Say how much memory every worker will need, and stop.")
        ] = False,
    ) -> None:
        if not dry_run:
            run_stages(config, _forced(overrides, force, name), [name], name)
            return
        text, refusal = open_pipeline(config, overrides).train_dry_run()
        typer.echo(text)
        if refusal and not force:
            raise ConfigError(refusal)

    chosen = {"exemplars": exemplars, "train": train}.get(name, command)
    chosen.__doc__ = STAGE_HELP[name]
    app.command(name, cls=FieldHelpCommand)(chosen)


for _name in STAGE_HELP:
    if _name != "interests":
        _stage_command(_name)

interests_app = typer.Typer(
    cls=DefaultCommandGroup,
    help=STAGE_HELP["interests"] + " `interests CONFIG` runs the stage; other commands look at its result.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(interests_app, name="interests")


class InterestsHelpCommand(FieldHelpCommand):
    """A command of the group `interests`, documented by the fields of the stage."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Append the fields of the stage."""
        formatter.write("\n" + field_help(STAGE_TABLES["interests"]))


@interests_app.command("run", cls=InterestsHelpCommand)
def interests_run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be asked and cost, from a sample of 32 prompts.")
    ] = False,
    ask_sample: Annotated[
        bool,
        typer.Option("--ask-sample", help="With --dry-run: send the sample; its answers are cached."),
    ] = False,
) -> None:
    """Write the exemplars' interests and encode them."""
    if not dry_run:
        if ask_sample:
            raise typer.BadParameter("--ask-sample goes with --dry-run")
        run_stages(config, overrides, ["interests"], "interests")
        return
    from distributed_mi.interests import plan

    pipeline = open_pipeline(config, overrides)
    with pipeline.lock("distributed-mi interests --dry-run"):
        try:
            facts = plan.dry_run(
                pipeline.experiment.interests,
                pipeline.workspace,
                ask=ask_sample,
                start_ray=pipeline.start_ray,
            )
        finally:
            pipeline.start_ray.close()
    typer.echo(plan.render(facts))


@interests_app.command("evaluate")
def interests_evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Score the interests without a judge: do they foretell later items, and what do they cover?"""
    from distributed_mi.interests import evaluate as evaluating

    pipeline = open_pipeline(config, overrides)
    with pipeline.lock("distributed-mi interests evaluate"):
        report = evaluating.evaluate(pipeline.workspace)
    typer.echo(evaluating.render(report))


@interests_app.command("compare")
def interests_compare(
    report_a: Annotated[str, typer.Argument(metavar="REPORT", help="report.json of `interests evaluate`")],
    report_b: Annotated[str, typer.Argument(metavar="REPORT", help="that of another backend's workspace")],
) -> None:
    """Compare the interests of two workspaces user by user: paired differences with intervals and p-values."""
    from distributed_mi.interests import quality_compare

    typer.echo(quality_compare.render_comparison(quality_compare.compare(report_a, report_b)))


@interests_app.command("report")
def interests_report(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", help="File to write; by default in the workspace.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Exemplars on the page.")] = None,
) -> None:
    """Write one static HTML page with every exemplar, its prompt, its answer and its interests."""
    from distributed_mi.interests.page import write_page

    pipeline = open_pipeline(config, overrides)
    typer.echo(write_page(pipeline.workspace, out, limit=limit))


@interests_app.command("ledger")
def interests_ledger(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print what the interests of a workspace have cost, run by run and in all."""
    from distributed_mi.interests import ledger

    typer.echo(ledger.render(ledger.read_runs(open_pipeline(config, overrides).workspace.stage("interests"))))


@app.command("run", cls=FieldHelpCommand)
def run_command(config: ConfigPath, overrides: Overrides = None, force: ForceOption = False) -> None:
    """Run every stage in order, skipping what is done, and print the metrics of all runs."""
    from distributed_mi.pipeline import STAGES

    print_reports(
        run_stages(config, _forced(overrides, force, "exemplars", "train"), STAGES, "run").reports()
    )


@app.command(cls=FieldHelpCommand)
def quickstart(overrides: Overrides = None) -> None:
    """Run everything on generated data, then recommend for one user and explain it. CPU, a few minutes."""
    from distributed_mi.pipeline import STAGES

    pipeline = run_stages("quickstart", overrides, STAGES, "quickstart")
    print_reports(pipeline.reports())
    sequences = pipeline.workspace.stage("prepare").read("sequences/test", "sequences", columns=["user_id"])
    user = sequences["user_id"][0].as_py()
    typer.echo(f"\nWhy user {user} (held out, never seen in training) gets these recommendations:\n")
    _explain(pipeline, user, None, top=10, as_json=False)
    typer.echo(
        "\nNext: distributed-mi recommend quickstart --user USER; the report with plots lies at "
        f"{pipeline.experiment.workspace}/evaluate/{pipeline.experiment.run_configs()[-1].run}/report.md"
    )


UserOption = Annotated[str | None, typer.Option("--user", help="A user id of the data.")]
ItemsOption = Annotated[
    str | None, typer.Option("--items", help="A history instead: item ids, oldest first, a,b,c.")
]
TopOption = Annotated[int, typer.Option("--top", min=1, help="How many items.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command(cls=FieldHelpCommand)
def recommend(
    config: ConfigPath,
    overrides: Overrides = None,
    user: UserOption = None,
    items: ItemsOption = None,
    top: TopOption = 10,
    as_json: JsonOption = False,
) -> None:
    """Recommend items for a known user or for a history of item ids."""
    from distributed_mi.serving import retriever

    pipeline = open_pipeline(config, overrides)
    history = _query(user, items)
    answer = _open_retriever(pipeline).recommend(user_id=user, item_ids=history, top=top)
    typer.echo(retriever.render(answer, as_json=as_json))


@app.command(cls=FieldHelpCommand)
def explain(
    config: ConfigPath,
    overrides: Overrides = None,
    user: UserOption = None,
    items: ItemsOption = None,
    top: TopOption = 10,
    as_json: JsonOption = False,
) -> None:
    """Show each behaviour interest of a user with its items, its semantic names, and where the names come from."""
    _explain(open_pipeline(config, overrides), user, items, top, as_json)


def _explain(pipeline: "Pipeline", user: str | None, items: str | None, top: int, as_json: bool) -> None:
    from distributed_mi.serving import explain as explaining

    history = _query(user, items)
    explanation = explaining.explain(_open_retriever(pipeline), user_id=user, item_ids=history, top=top)
    typer.echo(explaining.render(explanation, as_json=as_json))


def _query(user: str | None, items: str | None) -> list[str] | None:
    if (user is None) == (items is None):
        raise typer.BadParameter("give either --user or --items")
    return [i.strip() for i in items.split(",") if i.strip()] if items is not None else None


def _open_retriever(pipeline: "Pipeline") -> Any:
    from distributed_mi.serving.retriever import Retriever
    from distributed_mi.training.checkpoint import load_model

    run_name = pipeline.experiment.run_configs()[-1].run_name
    return Retriever.open(pipeline.workspace, run_name, load_model)


checkpoint_app = typer.Typer(
    help="Look into checkpoints, check them, take the model out of them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(checkpoint_app, name="checkpoint")

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint directory, a checkpoints/ folder or model/; local or a URL.",
    ),
]


@checkpoint_app.command("inspect")
def checkpoint_inspect(path: CheckpointPath, as_json: JsonOption = False) -> None:
    """Print step, model, table, workers, files and state of a checkpoint; of a folder, of the newest in it."""
    import json

    from distributed_mi.training import checkpoint_files

    facts = checkpoint_files.inspect(path)
    typer.echo(json.dumps(facts, indent=2) if as_json else checkpoint_files.render(facts))


@checkpoint_app.command("verify")
def checkpoint_verify(path: CheckpointPath) -> None:
    """Read every file again, compare the hashes, look for missing rows; fail with the name of what is wrong."""
    from distributed_mi.training import checkpoint_files

    for whole, files in checkpoint_files.verify(path):
        typer.echo(f"{whole}: {files} files, all as they were written")


@checkpoint_app.command("export")
def checkpoint_export(
    path: CheckpointPath,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A folder or URL (format of model/), or a local file NAME.safetensors."
        ),
    ],
) -> None:
    """Write the model of a checkpoint, without optimizer state, to a folder or to one safetensors file.

    The file holds `weight` (a row per item id, padding first), the dense parameters as `dense.<name>`, and the model's
    specification as JSON under `model` of its metadata.
    """
    from distributed_mi.training import checkpoint_files

    typer.echo(f"{checkpoint_files.export(path, out)} -> {out}")


@app.command()
def compare(
    report_a: Annotated[str, typer.Argument(metavar="REPORT", help="report.json of a run")],
    report_b: Annotated[
        str, typer.Argument(metavar="REPORT", help="report.json of the run compared with it")
    ],
) -> None:
    """Compare two evaluated runs user by user: paired differences with intervals and p-values."""
    from distributed_mi.evaluation import compare as comparing

    typer.echo(comparing.render(comparing.compare(report_a, report_b)))


@app.command()
def fields() -> None:
    """Document every configuration field: name, default, type, meaning and unit."""
    typer.echo(field_help(STAGE_TABLES["run"]))


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Top-level options; the work is in the commands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0 done or already done, 2 bad configuration or usage, 1 anything else."""
    try:
        app(args=list(argv) if argv is not None else None, standalone_mode=True)
    except DistributedMIError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except SystemExit as done:
        return int(done.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
