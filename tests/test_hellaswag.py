"""HellaSwag: the same answers as the harness and as a plain loop, each example exactly once."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hellaswag
from model import GPT, GPTConfig

CPU = torch.device("cpu")
WORDS = "the man a dog runs over water red house she opens door".split()
# Whatever the harness's cleaning touches: markup, double spaces, spaces at either end.
AWKWARD = [
    {"ctx_a": "[header] How to cook [title] Wash it. [step] Use water.", "ctx_b": ""},
    {"ctx_a": "A man sits  down. ", "ctx_b": "he"},
    {"ctx_a": "Stir [substeps] ", "ctx_b": "[substeps]"},
    {"ctx_a": "Caf\u00e9 M\u00dcLLER \U0001f600 opens.", "ctx_b": "THE Owner"},
]


def raw_examples(n: int, longest: int = 20) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    examples = []
    for ind in range(n):
        ctx_a, ctx_b = text(3, longest).capitalize() + ".", draw.choice(["", text(1, 3)])
        raw = {"ind": ind, "activity_label": text(1, 2), "ctx_a": ctx_a, "ctx_b": ctx_b}
        raw |= AWKWARD[ind] if ind < len(AWKWARD) else {}
        raw["ctx"] = f"{raw['ctx_a']} {raw['ctx_b']}".rstrip()
        raw["endings"] = [text(1, 12) + draw.choice([".", "", " [step]."]) for _ in range(4)]
        raw["label"] = draw.randrange(4)
        examples.append(raw)
    return examples


def write_jsonl(path: Path, raws: list[Any]) -> Path:
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    return path


def random_model(context_length: int) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(32, 4, 2, context_length, 50304)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5)  # so that no two endings are nearly as likely
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("hellaswag") / "val.jsonl", raw_examples(40))


@pytest.fixture(scope="module")
def examples(data: Path) -> list[hellaswag.Example]:
    return hellaswag.load_examples(data)


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model(128)


@pytest.fixture(scope="module")
def chosen(model: GPT, examples: list[hellaswag.Example]) -> torch.Tensor:
    return hellaswag.predict(model, examples, CPU)


def test_predictions_equal_lm_eval_also_where_a_row_does_not_fit(
    tmp_path: Path, data: Path
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "hellaswag_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in task.items()]
    (tmp_path / "local.yaml").write_text(
        "\n".join([*lines, "process_docs: !function local.process_docs"])
    )
    (tmp_path / "local.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")

    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    examples = hellaswag.load_examples(data)
    for context_length in (128, 24):  # of 24 tokens, most rows do not fit
        ours = random_model(context_length)
        ours.save_pretrained(tmp_path / "model")
        theirs = lm_eval.simple_evaluate(
            model=HFLM(str(tmp_path / "model"), device="cpu", dtype="float32", batch_size=16),
            tasks=["hellaswag_local"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
        chosen = hellaswag.predict(ours, examples, CPU)
        samples = sorted(theirs["samples"]["hellaswag_local"], key=lambda s: s["doc_id"])
        assert len(samples) == len(examples)
        for sample, (pred, pred_norm) in zip(samples, chosen[:, 1].tolist(), strict=True):
            scores = [r[0] for r in sample["filtered_resps"]]
            normed = [s / len(c) for s, c in zip(scores, sample["doc"]["choices"], strict=True)]
            assert pred == scores.index(max(scores))
            assert pred_norm == normed.index(max(normed))
        summary = hellaswag.summarize(examples, chosen)
        for name in ("acc", "acc_norm"):
            figures = theirs["results"]["hellaswag_local"]
            assert summary[f"harness_{name}"] == pytest.approx(figures[f"{name},none"])


def test_log_likelihoods_equal_one_example_at_a_time(
    model: GPT, examples: list[hellaswag.Example]
) -> None:
    for batch in hellaswag.pack(tuple(examples), 128, 512):
        sums = hellaswag.log_likelihoods(model, batch, CPU)
        for (e, q), row in zip(batch.questions, sums, strict=True):
            question = examples[e].questions[q]
            for ending, score in zip(question.endings, row, strict=True):
                idx = torch.tensor([question.context + ending])
                log_p = model(idx)[0, :-1].log_softmax(-1).gather(1, idx[0, 1:, None])
                torch.testing.assert_close(score, log_p[-len(ending) :].sum(), atol=2e-4, rtol=1e-5)


def test_completion_is_the_context_and_ending_as_they_are(examples: list[Any]) -> None:
    encode = hellaswag.get_tokenizer().encode_ordinary
    for raw, example in zip(raw_examples(40), examples, strict=True):
        question = example.questions[0]
        assert question.context == encode(raw["ctx"])
        assert question.endings == [encode(" " + ending) for ending in raw["endings"]]
        assert question.lengths == [len(ending) for ending in question.endings]


def test_each_context_is_computed_once_and_shapes_are_few(examples: list[Any]) -> None:
    hellaswag.pack.cache_clear()
    batches = hellaswag.pack(tuple(examples), 128, 512)
    needed = sum(
        len(question.context) + sum(len(ending) - 1 for ending in question.endings)
        for example in examples
        for question in example.questions
    )
    computed = sum(int((batch.inputs[2] >= 0).sum()) for batch in batches)
    assert computed == needed
    assert sum(batch.scored.size(1) for batch in batches) == sum(
        len(ending) for e in examples for question in e.questions for ending in question.endings
    )
    lengths = {batch.inputs.size(2) for batch in batches}
    assert all(T % hellaswag.ROUND_TO == 0 for T in lengths)
    assert len(lengths) <= 9
    assert all(batch.inputs[0].numel() <= 512 for batch in batches)
    assert hellaswag.pack(tuple(examples), 128, 512) is batches  # kept for the next evaluation


@pytest.mark.parametrize("world_size", [2, 3, 8, 100])
def test_ranks_share_the_examples_and_count_each_once(
    model: GPT,
    examples: list[Any],
    chosen: torch.Tensor,
    world_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = hellaswag.pack(tuple(examples), 128, 512)
    monkeypatch.setattr(hellaswag, "pack", lambda *_: whole)
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        hellaswag,
        "log_likelihoods",
        lambda model, batch, device: (
            seen.extend(batch.questions) or torch.zeros(len(batch.questions), 4)
        ),
    )
    for rank in range(world_size):
        hellaswag.predict(model, examples, CPU, rank, world_size)
    assert sorted(seen) == [(e, q) for e in range(40) for q in range(2)]
    monkeypatch.undo()
    parts = [hellaswag.predict(model, examples, CPU, r, world_size) for r in range(world_size)]
    assert torch.equal(sum(parts), chosen)  # what the all-reduce of the ranks' answers makes


def test_evaluating_leaves_training_as_it_was(examples: list[Any]) -> None:
    from torch._dynamo.utils import counters

    model = random_model(64).requires_grad_(True).train()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    idx = torch.zeros(2, 64, dtype=torch.int64)
    compiled(idx, idx).backward()
    graphs = counters["stats"]["unique_graphs"]
    before = [p.grad.clone() for p in model.parameters()]
    hellaswag.predict(model, examples[:6], CPU)
    compiled(idx, idx).backward()
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert model.training
    for parameter, grad in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_summary_is_the_share_of_right_answers_with_its_standard_error(
    examples: list[Any],
) -> None:
    labels = torch.tensor([example.label for example in examples])
    chosen = labels[:, None, None].repeat(1, 2, 2)
    chosen[:10, 0, 1] += 1  # ten wrong by acc_norm of completion
    summary = hellaswag.summarize(examples, chosen)
    assert (summary["acc"], summary["acc_norm"], summary["n"]) == (1.0, 0.75, 40)
    assert (summary["harness_acc"], summary["harness_acc_norm"]) == (1.0, 1.0)
    assert summary["acc_norm_stderr"] == pytest.approx((0.75 * 0.25 / 39) ** 0.5)


GOOD = raw_examples(6)[5]
MALFORMED = {
    "{": "not a JSON object",
    "[1, 2]": "not a JSON object",
    json.dumps({k: v for k, v in GOOD.items() if k != "ctx"}): "no text in ctx",
    json.dumps(GOOD | {"activity_label": None}): "no text in activity_label",
    json.dumps(GOOD | {"ctx": " "}): "its context is empty",
    json.dumps({k: v for k, v in GOOD.items() if k != "endings"}): "not a list of four",
    json.dumps(GOOD | {"endings": ["a", "b", "c"]}): "not a list of four",
    json.dumps(GOOD | {"endings": ["a", "b", "", "d"]}): "an ending is empty",
    json.dumps(GOOD | {"label": 4}): "label 4 is not 0, 1, 2 or 3",
    json.dumps(GOOD | {"label": ""}): "label '' is not 0, 1, 2 or 3",
    json.dumps(GOOD | {"endings": ["dog " * 200] * 4}): "does not fit the context of 64",
}


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The exit code of `python hellaswag.py FLAGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags])
    try:
        hellaswag.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_model(64).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("line", MALFORMED, ids=MALFORMED.values())
def test_a_malformed_line_is_named_by_its_number(
    line: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, output = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    flags = ("--checkpoint", checkpoint, "--data", str(path), "--output", str(output))
    assert run(monkeypatch, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"hellaswag.py: {path}, line 2: ")
    assert MALFORMED[line] in error
    assert "\n" not in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--checkpoint", "nowhere/at/all"), "nowhere/at/all"),
        (("--data", "missing.jsonl"), "missing.jsonl"),
        (("--limit", "0"), "--limit 0"),
        (("--device", "abacus"), "abacus"),
        (("--output", "no/such/folder/x.jsonl"), "no/such/folder/x.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    flags: tuple[str, str],
    named: str,
    checkpoint: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = ("--checkpoint", checkpoint, "--data", str(data))
    assert run(monkeypatch, *defaults, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hellaswag.py: ")
    assert named in error
    assert "\n" not in error


def test_the_command_prints_four_figures_and_writes_a_line_for_each_example(
    checkpoint: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "predictions.jsonl"
    flags = ("--checkpoint", checkpoint, "--data", str(data), "--limit", "12")
    assert run(monkeypatch, *flags, "--output", str(output), "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["ind"] for line in lines] == list(range(12))
    for prefix, convention in (("", "completion"), ("harness_", "harness")):
        for place, name in enumerate(("acc", "acc_norm")):
            right = sum(line[convention][place] == line["label"] for line in lines)
            assert summary[prefix + name] == right / 12
    assert run(monkeypatch, *flags) == 0
    out = capsys.readouterr().out
    assert out.count("acc_norm") == 2
    assert f"{summary['harness_acc_norm']:.4f}" in out
