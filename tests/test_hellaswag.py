"""HellaSwag: the same answers as the harness and as a plain loop, each example exactly once."""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hellaswag
from dataset import get_tokenizer, save_tokenizer
from model import GPT, GPTConfig

Examples = list[hellaswag.Example]
Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
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
        ctx_a = text(3, 20).capitalize() + "."
        ctx_b = draw.choice(["", text(1, 3)])
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a context of 64, and 40 examples in val.jsonl."""
    folder = tmp_path_factory.mktemp("hellaswag")
    random_model(64).save_pretrained(folder)
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
    save_tokenizer(tmp_path, context_length)
    # The harness's own task; only where its data comes from is replaced.
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks/hellaswag/hellaswag.yaml"),
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "val.jsonl")}},
        "training_split": None,
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    chosen = hellaswag.predict(ours, examples, CPU)
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
    summary = hellaswag.summarize(examples, chosen)
    for name in ("acc", "acc_norm"):
        expected = theirs["results"]["local"][f"{name},none"]
        assert summary[f"harness_{name}"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("context_length", "batch_tokens"),
    [(128, hellaswag.BATCH_TOKENS), (24, hellaswag.BATCH_TOKENS), (128, 100_000)],
)
def test_scores_equal_one_choice_at_a_time(
    examples: Examples, context_length: int, batch_tokens: int
) -> None:
    model = random_model(context_length)
    requests = tuple(request for example in examples for request in example.requests)
    scores = torch.zeros(len(requests) * 4)
    for batch in hellaswag.pack(requests, context_length, batch_tokens):
        hellaswag.add_log_likelihoods(model, batch, scores)
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
    requests = tuple(request for example in examples for request in example.requests)
    batches = hellaswag.pack(requests, 128)
    choices = [choice for request in requests for choice in request.choices]
    contexts = sum(len(request.context) for request in requests)
    inputs = contexts + sum(len(choice) - 1 for choice in choices)
    assert sum(batch.inputs[2].count_nonzero() for batch in batches) == inputs
    assert sum(batch.targets.size(1) for batch in batches) == sum(map(len, choices))
    assert sum(batch.inputs[0].numel() for batch in batches) <= 1.2 * inputs
    for batch in batches:  # few shapes, and none larger than planned
        assert batch.inputs.size(2) % hellaswag.ROUND_TO == 0
        assert batch.inputs[0].numel() <= hellaswag.BATCH_TOKENS
    # Kept for the next evaluation, which makes a tuple of its own.
    assert hellaswag.pack((*requests[:40], *requests[40:]), 128) is batches


class Recorder(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_made_once_a_batch_and_changes_no_bit(
    examples: Examples, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(64)
    masks = []
    hidden_states = GPT.hidden_states

    def as_boolean(self: GPT, idx: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        hidden = hidden_states(self, idx, positions, mask)
        assert torch.equal(hidden, hidden_states(self, idx, positions, mask == 0))
        return hidden

    with Recorder() as recorder:
        chosen = hellaswag.predict(model, examples[:8], CPU, dtype=dtype)
    monkeypatch.setattr(GPT, "hidden_states", as_boolean)
    assert torch.equal(hellaswag.predict(model, examples[:8], CPU, dtype=dtype), chosen)
    assert {mask.dtype for mask in masks} == {dtype}
    # SDPA converts a boolean mask with `where`: once for each of the two layers.
    assert recorder.counts["where"] == len(masks)


def test_a_batch_goes_to_the_device_in_one_transfer(examples: Examples) -> None:
    for batch in hellaswag.pack(examples[0].requests, 64):
        with Recorder() as recorder:
            moved = batch.to(torch.device("meta"))
        assert recorder.counts["_to_copy"] == 1
        assert moved.inputs.shape == batch.inputs.shape
        assert moved.targets.shape == batch.targets.shape
        here = batch.to(CPU)
        assert torch.equal(here.inputs, batch.inputs)
        assert torch.equal(here.targets, batch.targets)


def test_attention_does_not_go_to_cudnn(examples: Examples) -> None:
    model = random_model(64)
    enabled: list[bool] = []
    cudnn_enabled = torch.backends.cuda.cudnn_sdp_enabled
    model.transformer.ln_f.register_forward_hook(lambda *_: enabled.append(cudnn_enabled()))
    assert cudnn_enabled()
    hellaswag.predict(model, examples[:4], CPU)
    assert set(enabled) == {False}
    assert cudnn_enabled()  # training may use it


def test_ranks_count_each_example_once(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", 256)  # so that there are batches to share
    examples = examples[:16]
    model = random_model(128)
    predicted: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, logits: predicted.append(len(logits)))
    chosen = hellaswag.predict(model, examples, CPU)
    targets = sum(predicted)
    for world_size in (2, 3, 100):
        predicted.clear()
        parts = [hellaswag.predict(model, examples, CPU, r, world_size) for r in range(world_size)]
        assert sum(predicted) == targets
        # A rank's answer is 0 where the example is another's, so these are the answers of all.
        assert torch.equal(torch.stack(parts).sum(dim=0), chosen)


def test_evaluating_leaves_training_as_it_was(examples: Examples) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = random_model(64).requires_grad_(True).train()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    idx = torch.zeros(2, 64, dtype=torch.int64)
    compiled(idx, idx).backward()
    before = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    compilations = len(graphs)
    hellaswag.predict(model, examples[:6], CPU)
    compiled(idx, idx).backward()
    assert len(graphs) == compilations > 0
    assert model.training
    after = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(after, before)


def test_summary_is_the_accuracies_with_their_standard_errors(examples: Examples) -> None:
    labels = torch.tensor([example.label for example in examples])
    chosen = labels[:, None, None].repeat(1, 2, 2)
    chosen[:10, 0, 1] += 1  # ten wrong by acc_norm of completion
    summary = hellaswag.summarize(examples, chosen)
    assert (summary["acc"], summary["acc_norm"], summary["n"]) == (1.0, 0.75, 40)
    assert (summary["harness_acc"], summary["harness_acc_norm"]) == (1.0, 1.0)
    assert summary["acc_norm_stderr"] == pytest.approx((0.75 * 0.25 / 39) ** 0.5)


@pytest.fixture
def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`python hellaswag.py FLAGS` in this process: its exit code, output and errors."""

    def run(*flags: str | Path) -> tuple[int, str, str]:
        defaults = ("--checkpoint", folder, "--data", folder / "val.jsonl")
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, (*defaults, *flags))])
        code = 0
        try:
            hellaswag.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


GOOD = raw_examples(6)[5]
# A line that is not an example, and what the message must name.
MALFORMED = [
    ("{", ["JSON"]),
    ("[1, 2]", ["JSON"]),
    (json.dumps({"ind": 5}), ["ctx_b", "ctx_a", "ctx ", "activity_label", "endings", "label None"]),
    (json.dumps(GOOD | {"activity_label": None}), ["activity_label"]),
    (json.dumps(GOOD | {"ctx": " "}), ["ctx", "empty"]),
    (json.dumps(GOOD | {"ctx_a": ""}), ["ctx_a", "empty"]),
    (json.dumps(GOOD | {"endings": ["a", "b", "c"]}), ["endings", "four"]),
    (json.dumps(GOOD | {"endings": ["a", "b", "", "d"]}), ["ending", "empty"]),
    (json.dumps(GOOD | {"label": 4}), ["label 4"]),
    (json.dumps(GOOD | {"label": ""}), ["label ''"]),
    (json.dumps(GOOD | {"label": True}), ["label True"]),
    (json.dumps(GOOD | {"label": 1.0}), ["label 1.0"]),
    (json.dumps(GOOD | {"label": {"a": [1]}}), ["label {"]),
    (json.dumps(GOOD | {"ind": "one"}), ["ind"]),
    (json.dumps(GOOD | {"ind": True}), ["ind"]),
    (json.dumps(GOOD | {"activity_label": "[a", "ctx_a": "b]", "ctx_b": ""}), ["ctx_a", "markup"]),
    ("[" * 100_000, ["JSON"]),
    (json.dumps(GOOD | {"endings": ["dog " * 200] * 4}), ["201 tokens", "context of 64"]),
]


@pytest.mark.parametrize(("line", "named"), MALFORMED)
def test_a_malformed_line_is_named_by_its_number(
    line: str, named: list[str], command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    output = tmp_path / "out.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    code, _, error = command("--data", path, "--output", output)
    assert code == 2
    where = f"hellaswag.py: {path}, line 2: "
    assert error.startswith(where)
    for text in named:
        assert text in error.removeprefix(where)
    assert error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--checkpoint", "nowhere/at/all"),
        ("--data", "missing.jsonl"),
        ("--limit", "-7"),
        ("--device", "abacus"),
        ("--output", "no/such/folder/x.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flag: str, value: str, command: Command) -> None:
    code, _, error = command(flag, value)
    assert code == 2
    assert error.startswith("hellaswag.py: ")
    assert value in error
    assert error.count("\n") == 1


def test_an_output_that_is_an_input_or_cannot_be_written_is_refused(
    command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hard").hardlink_to(folder / "val.jsonl")
    (tmp_path / "soft").symlink_to(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    monkeypatch.setattr(hellaswag, "open_checkpoint", None)  # refused before the model is read
    names = ("hard", "soft", ".", "x" * 255)
    outputs = [folder / "val.jsonl", folder / "config.json", *(tmp_path / name for name in names)]
    for output in outputs:
        code, out, error = command("--output", output)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert str(output) in error
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_figures_are_printed_when_the_file_fails_and_the_reverse(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("read-only now")

    with monkeypatch.context() as patch:
        patch.setattr(hellaswag.common, "atomic_write", fail)
        code, out, error = command("--limit", "3", "--json", "--output", tmp_path / "a.jsonl")
    assert (code, json.loads(out)["n"]) == (1, 3)
    assert "a.jsonl" in error
    monkeypatch.setattr(hellaswag, "print_summary", fail)
    command("--limit", "3", "--output", tmp_path / "b.jsonl")
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 3


def test_brackets_that_are_never_closed_take_linear_time() -> None:
    assert hellaswag.clean("a [b] [" + "[" * 10**6) == "a [" + "[" * 10**6


def test_a_token_outside_the_vocabulary_is_named(command: Command, tmp_path: Path) -> None:
    GPT(GPTConfig(16, 2, 2, 64, 300)).save_pretrained(tmp_path)
    code, _, error = command("--checkpoint", tmp_path)
    assert code == 2
    assert "line 1: token" in error
    assert "vocabulary of 300" in error


def test_the_command_prints_figures_and_saves_predictions(command: Command, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    code, out, _ = command("--limit", "12", "--output", output, "--json")
    assert code == 0
    summary = json.loads(out)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["ind"] for line in lines] == list(range(12))
    code, out, _ = command("--limit", "12")
    assert code == 0
    for prefix, convention in (("", "completion"), ("harness_", "harness")):
        for place, name in enumerate((f"{prefix}acc", f"{prefix}acc_norm")):
            right = sum(line[convention][place] == line["label"] for line in lines)
            assert summary[name] == right / 12
            assert f"{name} {summary[name]:.4f} ± {summary[f'{name}_stderr']:.4f}" in out
