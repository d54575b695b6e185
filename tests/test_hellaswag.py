"""HellaSwag: the same answers as the harness and as a plain loop, each example exactly once."""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

import hellaswag
from gptxs.distributed import DistInfo
from gptxs.tokenizer import get_tokenizer
from model import GPT, GPTConfig

Examples = tuple[hellaswag.Example, ...]
Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
ALONE = DistInfo(rank=0, world_size=1, device=CPU)
WORDS = "the man a dog runs over water red house she opens door".split()
# Whatever the harness's cleaning touches: markup, double spaces, spaces at either end.
AWKWARD = [
    {"ctx_a": "[header] How to cook [title] Wash it. [step] Use water.", "ctx_b": ""},
    {"ctx_a": "A man sits  down. ", "ctx_b": "he"},
    {"ctx_a": "Stir [substeps] ", "ctx_b": "[substeps]"},
    {"ctx_a": "Caf\u00e9 M\u00dcLLER \U0001f600 opens.", "ctx_b": "THE Owner"},
]


def raw_examples(n: int) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    examples = []
    for ind in range(n):
        raw = {"ind": ind, "label": draw.randrange(4), "activity_label": text(1, 2)}
        raw |= {"ctx_a": text(3, 20).capitalize() + ".", "ctx_b": text(0, 3)}
        raw |= AWKWARD[ind] if ind < len(AWKWARD) else {}
        raw["ctx"] = f"{raw['ctx_a']} {raw['ctx_b']}".rstrip()
        raw["endings"] = [text(1, 12) + draw.choice([".", "", " [step]."]) for _ in range(4)]
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 64, and 40 examples in val.jsonl."""
    folder = tmp_path_factory.mktemp("hellaswag")
    random_model(64).save_pretrained(folder / "model")
    write_jsonl(folder / "val.jsonl", raw_examples(40))
    return folder


@pytest.fixture(scope="module")
def examples(folder: Path) -> Examples:
    return hellaswag.load_examples(folder / "val.jsonl")


@pytest.mark.parametrize("context_length", [128, 24])  # of 24 tokens, most rows do not fit
def test_predictions_equal_lm_eval(
    tmp_path: Path, folder: Path, examples: Examples, context_length: int
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = random_model(context_length)
    ours.save_pretrained(tmp_path)
    # The harness's own task; only where its data comes from is replaced.
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "val.jsonl")}},
        "training_split": None,
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    chosen = hellaswag.predict(ours, examples, ALONE)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=16),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    for sample, choices in zip(samples, chosen[:, 1].tolist(), strict=True):
        scores = [response[0] for response in sample["filtered_resps"]]
        endings = sample["doc"]["choices"]
        normed = [score / len(end) for score, end in zip(scores, endings, strict=True)]
        assert choices == [scores.index(max(scores)), normed.index(max(normed))]
    accuracy = theirs["results"]["local"]["acc,none"]
    assert hellaswag.summarize(examples, chosen)["harness_acc"] == pytest.approx(accuracy)


@pytest.mark.parametrize(("context_length", "batch_tokens"), [(128, 2048), (24, 100_000)])
def test_scores_equal_one_choice_at_a_time(
    folder: Path, context_length: int, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", batch_tokens)
    examples = hellaswag.load_examples(folder / "val.jsonl")  # new ones, not in the cache
    model = random_model(context_length)
    requests = [request for example in examples for request in example.requests]
    scores = torch.zeros(len(requests) * 4)
    for inputs, targets in hellaswag.pack_for(CPU, examples, model.config):
        hellaswag.add_log_likelihoods(model, inputs, targets, scores)
    expected = []
    for request in requests:
        for choice in request.choices:
            # The newest tokens that fit as inputs, and the last one, which is only predicted.
            text = torch.tensor([(request.context + choice)[-context_length - 1 :]])
            logits = model(text[:, :-1])[0, -len(choice) :]
            expected.append(-F.cross_entropy(logits, torch.tensor(choice), reduction="sum"))
    torch.testing.assert_close(scores, torch.stack(expected), atol=2e-4, rtol=1e-5)


def test_completion_is_the_context_and_ending_as_they_are(examples: Examples) -> None:
    encode = get_tokenizer().encode_ordinary
    for raw, example in zip(raw_examples(40), examples, strict=True):
        request = example.requests[0]
        assert request.context == encode(raw["ctx"])
        assert request.choices == [encode(" " + ending) for ending in raw["endings"]]
        assert request.lengths == [len(choice) for choice in request.choices]


def test_each_context_is_computed_once_with_little_padding(examples: Examples) -> None:
    requests = [request for example in examples for request in example.requests]
    batches = hellaswag.pack_for(CPU, examples, GPTConfig())
    needed = 0
    for request in requests:
        # The last token of a choice predicts nothing.
        needed += len(request.context) + sum(len(choice) - 1 for choice in request.choices)
    assert sum(inputs[2].count_nonzero() for inputs, _ in batches) == needed
    assert sum(inputs[0].numel() for inputs, _ in batches) <= 1.2 * needed
    # Kept for the next evaluation, which makes a tuple of its own.
    assert hellaswag.pack_for(CPU, (*examples[:40], *examples[40:]), GPTConfig()) is batches


def test_ranks_count_each_example_once(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", 256)  # so that there are batches to share
    examples = examples[:16]  # other than those of the cache
    model = random_model(128)
    predicted: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, logits: predicted.append(len(logits)))
    chosen = hellaswag.predict(model, examples, ALONE)
    alone = sum(predicted)
    for world_size in (2, 100):
        predicted.clear()
        ranks = [DistInfo(rank, world_size, CPU) for rank in range(world_size)]
        parts = [hellaswag.predict(model, examples, rank) for rank in ranks]
        assert sum(predicted) == alone
        # A rank's answer is 0 where the example is another's, so these are the answers of all.
        assert torch.equal(torch.stack(parts).sum(dim=0), chosen)


def test_evaluating_leaves_training_as_it_was(examples: Examples) -> None:
    model = random_model(64).requires_grad_(True).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=False)
    idx = torch.zeros(2, 64, dtype=torch.int64)
    before = compiled(idx, idx)
    hellaswag.predict(model, examples[:6], ALONE)
    assert torch.equal(compiled(idx, idx), before)
    assert counter.frame_count == 1  # nothing is compiled again
    assert model.training


def test_every_format_holds_the_same_examples(folder: Path, tmp_path: Path) -> None:
    raws = [raw | {"label": str(raw["label"])} for raw in raw_examples(6)]  # as on the hub
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(raws), tmp_path / "hub.parquet")
    (tmp_path / "array.json").write_text(json.dumps(raws, indent=2))
    lines = "\r\n".join(json.dumps(raw, ensure_ascii=False) for raw in raws)
    (tmp_path / "marked.jsonl").write_text(f"\ufeff{lines}\n\n", encoding="utf-8", newline="")
    expected = hellaswag.load_examples(folder / "val.jsonl", limit=6)
    for path in tmp_path.iterdir():
        for found, wanted in zip(hellaswag.load_examples(path), expected, strict=True):
            assert (found.ind, found.label) == (wanted.ind, wanted.label)
            assert [r.context for r in found.requests] == [r.context for r in wanted.requests]
            assert [r.choices for r in found.requests] == [r.choices for r in wanted.requests]


def test_without_the_hub_it_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> None:
        raise ConnectionError("no DNS")

    monkeypatch.setattr("datasets.load_dataset", lambda name, split: raw_examples(3))
    monkeypatch.setattr(hellaswag, "require_hub", lambda: None)
    assert len(hellaswag.load_examples(split="train")) == 3
    monkeypatch.setattr(hellaswag, "require_hub", offline)
    with pytest.raises(ConnectionError, match=r"no DNS.*--data"):
        hellaswag.load_examples()


GOOD = raw_examples(6)[5]
BAD = {"ctx": "", "ctx_a": 5, "endings": ["a", "b", "", "d"], "label": True}
PROBLEMS = ["activity_label", "ctx is empty", "ctx_a", "ctx_b", "endings", "label True"]


@pytest.mark.parametrize(("record", "named"), [(None, ["not a JSON object"]), (BAD, PROBLEMS)])
def test_a_malformed_line_is_named(record: Any, named: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match="line 3: ") as error:
        hellaswag.load_examples(path)
    assert all(problem in str(error.value) for problem in (str(path), *named))


def test_an_ending_that_does_not_fit_is_named_by_its_line(tmp_path: Path) -> None:
    long = GOOD | {"endings": ["dog " * 200] * 4}
    examples = hellaswag.load_examples(write_jsonl(tmp_path / "long.jsonl", [GOOD, long]))
    with pytest.raises(ValueError, match=r"line 2: .* 201 tokens .* context of 64"):
        hellaswag.pack_for(CPU, examples, GPTConfig(context_length=64))


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Any:
    """`python hellaswag.py FLAGS` in this process: its exit code, output and errors."""

    def run(*switches: str, **options: Any) -> tuple[int, str, str]:
        defaults = {"data": folder / "val.jsonl", "checkpoint": folder / "model"}
        flags = [f"--{name}={value}" for name, value in {**defaults, **options}.items()]
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags, *switches])
        code = 0
        try:
            hellaswag.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def test_a_mistake_changes_nothing(command: Any, folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder / "val.jsonl")
    other = shutil.copytree(folder / "model", tmp_path / "other")
    vocabulary = (other / "vocab.json").read_text()
    (other / "vocab.json").write_text(vocabulary.replace('"the"', '"den"'))
    config = folder / "model/config.json"
    before = (config.read_bytes(), link.read_bytes())
    mistakes = [{"split": "train"}, {"limit": 0}, {"output": link}, {"output": config}]
    mistakes.append({"output": Path(os.devnull)})  # root could replace it by a file
    for mistake in (*mistakes, {"checkpoint": other}):
        code, out, error = command(**mistake)
        assert (code, out, error.count("\n")) == (2, "", 1)
        (value,) = mistake.values()
        assert str(value) in error
    assert (config.read_bytes(), link.read_bytes()) == before


def test_the_command_prints_figures_and_saves_predictions(command: Any, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    code, out, _ = command("--json", limit="12", output=output)
    assert code == 0
    summary = json.loads(out)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["ind"] for line in lines] == list(range(12))
    _, out, _ = command(limit="12")
    for prefix, convention in (("", "completion"), ("harness_", "harness")):
        for place, name in enumerate((f"{prefix}acc", f"{prefix}acc_norm")):
            right = sum(line[convention][place] == line["label"] for line in lines) / 12
            assert summary[name] == right
            assert summary[f"{name}_stderr"] == pytest.approx((right * (1 - right) / 11) ** 0.5)
            assert f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}" in out
