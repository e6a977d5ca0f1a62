"""One runner in several threads: an answer is right or refused, never wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import lfm2_export
from lfm2_export.backends.base import Runner
from lfm2_export.errors import GenerationError, Lfm2ExportError
from lfm2_export.generation import complete, generate
from lfm2_export.generation_config import GenerationConfig
from tests.hash_runner import HashRunner

GREEDY = GenerationConfig(max_new_tokens=24)
PROMPTS = [[3 + i, 5, 8, 13 + i] for i in range(4)]


@pytest.fixture(scope="module", params=["hash", "onnx"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    if request.param == "hash":
        return HashRunner()
    folder = tmp_path_factory.mktemp("threads") / "made"
    lfm2_export.export("tiny-dense", scheme="fp32", output=folder)
    return lfm2_export.load_runner(folder, threads=1)


def in_threads(work: Callable[[int], object]) -> list[object]:
    found: list[object] = [None] * len(PROMPTS)
    start = threading.Barrier(len(PROMPTS))

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = work(index)
        except Lfm2ExportError as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_generations_side_by_side_are_right_or_refused(runner: Runner) -> None:
    alone = [complete(runner, [prompt], GREEDY)[0].tokens for prompt in PROMPTS]
    refused = 0
    for _ in range(5):
        for index, found in enumerate(in_threads(lambda index: complete(runner, [PROMPTS[index]], GREEDY)[0].tokens)):
            if isinstance(found, GenerationError):
                assert "the runner was used for something else after" in str(found)
                refused += 1
            else:
                assert found == alone[index]
    print(f"{refused} of {5 * len(PROMPTS)} refused")
    assert complete(runner, [PROMPTS[0]], GREEDY)[0].tokens == alone[0]  # and it goes on as ever


def test_another_generation_ends_the_one_before_it(runner: Runner) -> None:
    first = generate(runner, [PROMPTS[0]], GREEDY)
    next(first)
    second = generate(runner, [PROMPTS[1]], GREEDY)
    with pytest.raises(GenerationError, match="was used for something else after 0 steps of this generation"):
        list(first)
    assert len(list(second)) == GREEDY.max_new_tokens


def test_a_refused_call_of_another_does_not_end_a_generation(runner: Runner) -> None:
    alone = complete(runner, [PROMPTS[0]], GREEDY)[0].tokens
    events = generate(runner, [PROMPTS[0]], GREEDY)
    tokens = [next(events).token]
    with pytest.raises(Lfm2ExportError):
        runner.decode([10**9])
    assert tokens + [event.token for event in events] == alone


def test_looking_at_the_state_does_not_end_a_generation(runner: Runner) -> None:
    events = generate(runner, [PROMPTS[0]], GREEDY)
    next(events)
    runner.mark()
    runner.snapshot()
    assert len(list(events)) == GREEDY.max_new_tokens - 1
