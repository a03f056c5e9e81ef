"""The official openai client, unchanged, against a live server."""

import asyncio
import random

import openai
import pytest

MESSAGES = [{"role": "user", "content": "The quick brown"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)


def test_models_lists_the_base_and_its_adapters_with_their_parent(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny-base", *(f"adapter-{index}" for index in range(8))}
    assert models["tiny-base"].parent is None
    assert models["adapter-3"].parent == "tiny-base"


def test_chat_answers_and_counts_its_tokens(client):
    answer = client.chat.completions.create(model="adapter-1", messages=MESSAGES, max_tokens=9, temperature=0)
    assert answer.model == "adapter-1"
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_adapters_answer_differently_and_by_both_of_their_names(client):
    def ask(model):
        return (
            client.completions.create(model=model, prompt="The lazy dog", max_tokens=12, temperature=0).choices[0].text
        )

    answers = {name: ask(name) for name in ("tiny-base", "adapter-0", "adapter-1", "adapter-2")}
    assert len(set(answers.values())) == 4
    assert ask("tiny-base:adapter-1") == answers["adapter-1"]


def test_a_stream_adds_up_to_the_answer_without_a_stream(client):
    options = {"model": "adapter-2", "messages": MESSAGES, "max_tokens": 24, "temperature": 0.8, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == whole.choices[0].finish_reason


def test_n_choices_differ_and_are_reproducible_by_seed(client):
    options = {"model": "adapter-3", "prompt": "Many", "max_tokens": 10, "n": 4, "temperature": 1.5, "seed": 3}
    first = client.completions.create(**options)
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in first.choices}) > 1
    again = client.completions.create(**options)
    assert [choice.text for choice in again.choices] == [choice.text for choice in first.choices]


def test_logprobs_are_those_of_the_chosen_and_the_most_likely_tokens(client):
    answer = client.chat.completions.create(
        model="adapter-1", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert len(entry.top_logprobs) == 3


def test_echo_with_logprobs_scores_the_prompt(client):
    answer = client.completions.create(
        model="adapter-1", prompt="The quick brown fox", max_tokens=1, temperature=0, echo=True, logprobs=0
    )
    choice = answer.choices[0]
    assert choice.text.startswith("The quick brown fox")
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens + 1


def test_a_stop_string_ends_the_answer_before_itself(client):
    options = {"model": "tiny-base", "prompt": "The quick", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**options).choices[0].text
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    stopped = client.completions.create(**options, stop=[middle]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free[: free.index(middle)]


def test_errors_are_openai_s_own_classes_with_the_field_named(client):
    with pytest.raises(openai.NotFoundError, match="no-such-adapter"):
        client.chat.completions.create(model="no-such-adapter", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client.chat.completions.create(model="tiny-base", messages=MESSAGES, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model="tiny-base", prompt=[5] * 600)


async def test_sixty_four_streams_with_disconnects_leave_nothing_behind(server):
    chance = random.Random(4)
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)

    async def ask(index):
        model = "tiny-base" if index % 9 == 8 else f"adapter-{index % 9}"
        num_wanted = chance.choice([1, 3, 7, 1000])
        stream = await client.completions.create(
            model=model,
            prompt="The quick brown fox " * chance.randrange(1, 8),
            max_tokens=chance.randrange(20, 60),
            stream=True,
            extra_body={"ignore_eos": True},
        )
        num_chunks = 0
        async with stream:
            async for _ in stream:
                num_chunks += 1
                if num_chunks == num_wanted:
                    return "left"
        return "finished"

    ends = await asyncio.gather(*(ask(index) for index in range(64)))
    await client.close()
    assert set(ends) == {"left", "finished"}
    for name in (
        "pomona_running_requests",
        "pomona_waiting_requests",
        "pomona_kv_blocks_used",
        "pomona_pinned_adapters",
    ):
        server.wait_until(name, 0)
    assert server.metric("pomona_internal_errors_total") == 0
