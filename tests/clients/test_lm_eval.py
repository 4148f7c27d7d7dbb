"""lm-eval, unchanged: its log-likelihoods are those of Hugging Face transformers, and it grades the demo model."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from lapidary_process import Lapidary
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden" / "bf16"
TASKS = Path(__file__).parent / "lm_eval_tasks"
# What the golden fixtures allow a bf16 checkpoint per token; measured are 4e-5.
BOUND = 1e-3


def golden_tensors() -> dict[str, np.ndarray]:
    data = (GOLDEN / "golden.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    types = {"F32": np.float32, "I32": np.int32}
    return {
        name: np.frombuffer(body[slice(*info["data_offsets"])], types[info["dtype"]]).reshape(info["shape"])
        for name, info in header.items()
        if name != "__metadata__"
    }


def spelling(token: int) -> str:
    return ["<pad>", "<eos>", "<bos>", "<unk>"][token] if token < 4 else f"[{token}]"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer in which any list of ids has a text: each token is an added one, found as it stands."""
    added = [
        dict(
            id=token, content=spelling(token), special=token < 4,
            single_word=False, lstrip=False, rstrip=False, normalized=False,
        )
        for token in range(vocab_size)
    ]  # fmt: skip
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=added,
        normalizer=None, pre_tokenizer=None, post_processor=None,
        decoder=dict(type="Sequence", decoders=[dict(type="Fuse")]),
        model=dict(
            type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None,
            fuse_unk=True, byte_fallback=False, vocab={spelling(t): t for t in range(vocab_size)}, merges=[],
        ),
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", add_bos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def golden_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "bf16"
    shutil.copytree(GOLDEN, folder)
    write_tokenizer(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    with Lapidary(os.environ["LAPIDARY"], str(folder), "--max-model-len", "256") as server:
        yield server


@pytest.mark.parametrize("batch_size", [1, 8])
def test_loglikelihoods_are_those_of_transformers(golden_server, batch_size):
    tensors = golden_tensors()
    prompts = [tensors[f"prompt_{i}"] for i in range(6)]
    cases = [(i, start) for i, prompt in enumerate(prompts) for start in range(1, len(prompt), 2)]
    assert len(cases) > 30
    url = golden_server.url + "/v1/completions"
    model = LocalCompletionsAPI(url, model=golden_server.model, batch_size=batch_size, max_length=256)
    assert model.tokenizer_backend == "remote", "it needs no tokenizer of its own"
    texts = [["".join(map(spelling, part)) for part in np.split(prompts[i], [start])] for i, start in cases]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=index)
        for index, pair in enumerate(texts)
    ]
    for (i, start), (loglikelihood, is_greedy) in zip(cases, model.loglikelihood(requests)):
        tokens, logprobs = prompts[i], tensors[f"logprobs_{i}"]
        rows = logprobs[start - 1 : len(tokens) - 1]
        expected = rows[np.arange(len(rows)), tokens[start:]].sum()
        assert abs(loglikelihood - expected) <= BOUND, (i, start)
        assert is_greedy == bool((rows.argmax(axis=1) == tokens[start:]).all()), (i, start)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_greedy_continuations_are_those_of_transformers(golden_server, start):
    tensors = golden_tensors()
    model = LocalCompletionsAPI(golden_server.url + "/v1/completions", model=golden_server.model, max_length=256)
    gaps = tensors["greedy_gap_2"]
    steady = int(np.argmax(gaps <= 2 * BOUND)) if (gaps <= 2 * BOUND).any() else len(gaps)
    greedy = tensors["greedy_2"][:steady]
    context = "".join(map(spelling, [*tensors["prompt_2"], *greedy[:start]]))
    options = dict(until=[], max_gen_toks=steady - start, temperature=0, ignore_eos=True, skip_special_tokens=False)
    [text] = model.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=(context, options), idx=0)]
    )
    assert text == "".join(map(spelling, greedy[start:]))


def evaluate(kind: str, server: Lapidary, path: str, task: str, **options) -> dict:
    results = simple_evaluate(
        model=kind,
        model_args=dict(base_url=server.url + path, model=server.model, max_length=2048),
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return results["results"][task]


def test_local_completions_grades_the_demo_model(server):
    results = evaluate("local-completions", server, "/v1/completions", "lapidary_choice", batch_size=4)
    assert results["acc,none"] >= 0.9, results


def test_local_chat_completions_grades_the_demo_model(server):
    options = dict(apply_chat_template=True, batch_size=1)
    results = evaluate("local-chat-completions", server, "/v1/chat/completions", "lapidary_sums", **options)
    assert results["exact_match,none"] >= 0.9, results
